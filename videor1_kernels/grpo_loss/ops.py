"""The torch operators of grpo_loss and linear_grpo_loss: opaque to torch.compile, with gradients.

Both compute their whole gradient in the forward pass, so the backward pass only multiplies it by the incoming gradient
of the loss. They check what depends on values. They are private; the public functions are in the package. Their schemas
give the types of their parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import IGNORED, check_cu_seqlens, check_indices, check_temperature, compute_dtype
from videor1_kernels.grpo_loss.factors import counted_tokens
from videor1_kernels.grpo_loss.records import Completions, GrpoLossOptions
from videor1_kernels.grpo_loss.rows import read_rows
from videor1_kernels.linear_logprob.inputs import head_inputs
from videor1_kernels.linear_logprob.products import times


@torch.library.custom_op("videor1::scale", mutates_args=())
def scale_op(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, a scalar. An operator, so that a second derivative is an error and not a missing term."""
    return times(gradient, factor, dtype)


@scale_op.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


@torch.library.custom_op("videor1::count", mutates_args=(), schema="(Tensor count) -> SymInt")
def count_op(count):
    """Read an int64 scalar: the one value that a caller may want on the host."""
    return int(count)


@count_op.register_fake
def _(count: Tensor) -> Any:
    return torch.library.get_ctx().new_dynamic_size()


_COMPLETIONS = (
    "Tensor advantages, Tensor cu_seqlens, Tensor? old_logp, Tensor? ref_logp, Tensor? rollout_logp, "
    "Tensor? token_weight, Tensor? importance_weight, Tensor? completion_mask"
)
_GIVEN = len(Completions._fields)
_LEAVES = (0, 1, 3 + _GIVEN)  # hidden, weight and bias among the inputs of linear_grpo_loss
_OPTIONS = "str terms, float[] numbers, float? max_completion_length, float? num_tokens"


@torch.library.custom_op(
    "videor1::grpo_loss",
    mutates_args=(),
    schema=f"(Tensor logp, {_COMPLETIONS}, Tensor? mask, {_OPTIONS}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def grpo_loss_op(logp, *others):
    """Return (loss, logp, kl, clip_fraction, coefficient, skipped)."""
    op = "grpo_loss"
    completions, (mask, *options, backend) = Completions(*others[:_GIVEN]), others[_GIVEN:]
    check_cu_seqlens(op, "cu_seqlens", completions.cu_seqlens, len(logp))
    run = dispatch.resolve(op, backend, logp.device, compute_dtype(logp))
    if completions.completion_mask is not None:
        counted = counted_tokens(completions.completion_mask, completions.cu_seqlens, len(logp))
        mask = counted if mask is None else mask & counted
    with dispatch.running_on(logp):
        return tuple(run.grpo_loss(logp, completions, mask, GrpoLossOptions.unpacked(*options)))


@grpo_loss_op.register_fake
def _(logp: Tensor, *options: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(logp)
    loss, kl, clip_fraction = (logp.new_empty((), dtype=dtype) for _ in range(3))
    shown, coefficient = (logp.new_empty(logp.shape, dtype=dtype) for _ in range(2))
    return loss, shown, kl, clip_fraction, coefficient, logp.new_empty((), dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(output[4])
    ctx.dtype, ctx.others = inputs[0].dtype, len(inputs) - 1
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Any, ...]:
    (coefficient,) = ctx.saved_tensors
    return (None if grad is None else scale_op(coefficient, grad, ctx.dtype), *[None] * ctx.others)


grpo_loss_op.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(
    "videor1::linear_grpo_loss",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor labels, {_COMPLETIONS}, Tensor? bias, Tensor? temperatures,"
    f" float temperature, ScalarType? operands, float softcap, {_OPTIONS}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_grpo_loss_op(hidden, weight, labels, *others):
    """Return (loss, logp, entropy, kl, clip_fraction, skipped, d_hidden, d_weight, d_bias, norm).

    The gradients are those of loss / norm, an empty tensor for each that ``needs`` (hidden, weight, bias) leaves out.
    """
    op = "linear_grpo_loss"
    completions = Completions(*others[:_GIVEN])
    bias, temperatures, temperature, operands, softcap, *options, needs, backend = others[_GIVEN:]
    advantages, cu_seqlens = completions.advantages, completions.cu_seqlens
    if completions.completion_mask is not None:
        counted = counted_tokens(completions.completion_mask, cu_seqlens, len(labels))
        labels = labels.masked_fill(~counted, IGNORED)
    rows = read_rows(labels, advantages, cu_seqlens, temperatures, weight.shape[0])
    check_cu_seqlens(op, "cu_seqlens", cu_seqlens, len(hidden), values=rows.boundaries)
    if rows.bad_labels:
        check_indices(op, "labels", labels, weight.shape[0], ignored=IGNORED)
    if rows.bad_temperatures:
        check_temperature(op, temperatures)
    run = dispatch.resolve(op, backend, hidden.device, compute_dtype(hidden, weight, bias))
    inputs = head_inputs(hidden, weight, labels, bias, temperatures, temperature, operands, softcap)
    with dispatch.running_on(hidden):
        result = run.linear_grpo_loss(inputs, completions, GrpoLossOptions.unpacked(*options), needs, rows)
    # The fake kernel promises contiguous results, but a gradient may have the memory layout of its input.
    return tuple(hidden.new_empty(0) if value is None else value.contiguous() for value in result)


@linear_grpo_loss_op.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *others: Any) -> tuple[Any, ...]:
    bias, _, _, operands, *_, needs, backend = others[_GIVEN:]
    dtype = compute_dtype(hidden, weight, bias)
    chosen = dispatch.chosen_backend("linear_grpo_loss", hidden.device, backend, dtype)
    loss, kl, clip_fraction, norm = (hidden.new_empty((), dtype=dtype) for _ in range(4))
    logp, entropy = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
    exact = chosen == "reference"  # sums in the inputs' dtypes; the kernels keep fp32 until the backward pass
    product = operands or (hidden.dtype if hidden.dtype == weight.dtype else dtype)
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(x.shape, dtype=x.dtype if exact or (x is hidden and x.dtype == product) else dtype)
        if need and x is not None
        else hidden.new_empty(0)
        for need, x in zip(needs, (hidden, weight, bias), strict=True)
    )
    skipped = hidden.new_empty((), dtype=torch.int64)
    return loss, logp, entropy, kl, clip_fraction, skipped, d_hidden, d_weight, d_bias, norm


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, bias = (inputs[i] for i in _LEAVES)
    ctx.save_for_backward(*output[6:10])
    ctx.dtypes, ctx.size = [None if x is None else x.dtype for x in (hidden, weight, bias)], len(inputs)
    ctx.set_materialize_grads(False)


def _differentiate_linear(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Any, ...]:
    *gradients, norm = ctx.saved_tensors
    found: list[Tensor | None] = [None] * ctx.size
    for place, g, dtype in zip(_LEAVES, gradients, ctx.dtypes, strict=True):
        if grad is not None and ctx.needs_input_grad[place]:
            found[place] = scale_op(g, grad * norm, dtype)
    return tuple(found)


linear_grpo_loss_op.register_autograd(_differentiate_linear, setup_context=_save_linear)
