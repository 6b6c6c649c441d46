"""The torch operators of linear_logprob and selective_log_softmax: opaque to torch.compile, with gradients.

They check what depends on values (labels in range, temperatures above 0), so that a compiled graph checks it too. The
operators are private; the public functions are in the package. Their schemas give the types of their parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import IGNORED, check_indices, check_temperature, compute_dtype
from videor1_kernels.linear_logprob.inputs import head_inputs

_HEAD = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? temperatures, float temperature,"
    " ScalarType? operands, float softcap"
)
_LOGITS = "Tensor logits, Tensor index, Tensor? temperatures, float temperature"


@torch.library.custom_op(
    "videor1::linear_logprob", mutates_args=(), schema=f"({_HEAD}, str backend) -> (Tensor, Tensor, Tensor)"
)
def linear_logprob_op(hidden, weight, labels, bias, temperatures, temperature, operands, softcap, backend):
    """Return (logp, entropy, lse), each [N]; lse is fp64."""
    op = "linear_logprob"
    check_indices(op, "labels", labels, weight.shape[0], ignored=IGNORED)
    check_temperature(op, temperatures)
    dtype = compute_dtype(hidden, weight, bias)
    run = dispatch.resolve(op, backend, hidden.device, dtype)
    with dispatch.running_on(hidden):
        return run.forward(head_inputs(hidden, weight, labels, bias, temperatures, temperature, operands, softcap))


@linear_logprob_op.register_fake
def _(hidden, weight, labels, bias, *others):
    logp, entropy = (hidden.new_empty(len(labels), dtype=compute_dtype(hidden, weight, bias)) for _ in range(2))
    return logp, entropy, hidden.new_empty(len(labels), dtype=torch.float64)


@torch.library.custom_op(
    "videor1::linear_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_logp, Tensor? grad_entropy, {_HEAD}, Tensor entropy, Tensor lse, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def linear_logprob_backward_op(grad_logp, grad_entropy, *others):
    """Return (d_hidden, d_weight, d_bias), an empty tensor for each that ``needs`` leaves out."""
    *head, entropy, lse, needs, backend = others
    inputs = head_inputs(*head)
    dtype = compute_dtype(inputs.hidden, inputs.weight, inputs.bias)
    run = dispatch.resolve("linear_logprob", backend, inputs.hidden.device, dtype)
    with dispatch.running_on(inputs.hidden):
        gradients = run.backward(inputs, (grad_logp, grad_entropy), entropy, lse, needs)
    # The fake kernel promises contiguous results, but a gradient may have the memory layout of its input.
    return tuple(inputs.hidden.new_empty(0) if g is None else g.contiguous() for g in gradients)


@linear_logprob_backward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, hidden, weight, _, bias, *_, needs, _ = inputs
    shaped = zip(needs, (hidden, weight, bias), strict=True)
    return tuple(x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0) for need, x in shaped)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.operands, ctx.softcap, ctx.backend = inputs
    _, entropy, lse = output
    ctx.save_for_backward(*tensors, entropy, lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Any) -> tuple[Any, ...]:
    *tensors, entropy, lse = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = linear_logprob_backward_op(
        grad_logp, grad_entropy, *tensors, ctx.temperature, ctx.operands, ctx.softcap, entropy, lse, needs, ctx.backend
    )
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return d_hidden, d_weight, None, d_bias, *[None] * 5


linear_logprob_op.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(
    "videor1::selective_log_softmax", mutates_args=(), schema=f"({_LOGITS}, str backend) -> (Tensor, Tensor)"
)
def selective_op(logits, index, temperatures, temperature, backend):
    """Return logp [R, K], and the statistics that the backend's backward pass needs.

    Logits are [R, V], or [B, T, V] with R = B T.
    """
    op = "selective_log_softmax"
    check_indices(op, "index", index, logits.shape[-1])
    check_temperature(op, temperatures)
    run = dispatch.resolve(op, backend, logits.device, compute_dtype(logits))
    with dispatch.running_on(logits):
        return run.selective_forward(logits, index, temperature if temperatures is None else temperatures)


@selective_op.register_fake
def _(logits, index, temperatures, temperature, backend):
    dtype = compute_dtype(logits)
    chosen = dispatch.chosen_backend("selective_log_softmax", logits.device, backend, dtype)
    kept = (0,) if chosen == "reference" else (2, len(index))
    return logits.new_empty(index.shape, dtype=dtype), logits.new_empty(kept, dtype=dtype)


@torch.library.custom_op(
    "videor1::selective_log_softmax_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_LOGITS}, Tensor statistics, str backend) -> Tensor",
)
def selective_backward_op(grad, logits, index, temperatures, temperature, statistics, backend):
    """Return d_logits, shaped as logits, of the incoming gradient [R, K]."""
    run = dispatch.resolve("selective_log_softmax", backend, logits.device, compute_dtype(logits))
    divisor = temperature if temperatures is None else temperatures
    with dispatch.running_on(logits):
        return run.selective_backward(grad, logits, index, divisor, statistics)


@selective_backward_op.register_fake
def _(grad, logits, *others):
    return logits.new_empty(logits.shape)


def _save_selective(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, index, temperatures, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(logits, index, temperatures, output[1])


def _differentiate_selective(ctx: Any, grad: Tensor, grad_statistics: Any) -> tuple[Any, ...]:
    logits, index, temperatures, statistics = ctx.saved_tensors
    d_logits = selective_backward_op(grad, logits, index, temperatures, ctx.temperature, statistics, ctx.backend)
    return d_logits, None, None, None, None


selective_op.register_autograd(_differentiate_selective, setup_context=_save_selective)
