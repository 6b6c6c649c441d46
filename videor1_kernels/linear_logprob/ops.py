"""torch operators of linear_logprob and selective_log_softmax: opaque to torch.compile, with gradients.

What depends on values (labels in range, temperatures above 0) is checked inside, so that a compiled graph checks it
too. The operators are private; the public functions are in the package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import IGNORED, check_indices, check_temperature, compute_dtype


@torch.library.custom_op("videor1::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], labels [N], temperatures [N] or None -> (logp, entropy, lse) [N], lse fp64."""
    op = "linear_logprob"
    check_indices(op, "labels", labels, weight.shape[0], ignored=IGNORED)
    check_temperature(op, temperatures)
    dtype = compute_dtype(hidden, weight, bias)
    run = dispatch.resolve(op, backend, hidden.device, dtype)
    with dispatch.running_on(hidden):
        return run.forward(hidden, weight, labels, bias, temperature if temperatures is None else temperatures)


@linear_logprob_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropy = (hidden.new_empty(len(labels), dtype=compute_dtype(hidden, weight, bias)) for _ in range(2))
    return logp, entropy, hidden.new_empty(len(labels), dtype=torch.float64)


@torch.library.custom_op("videor1::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    entropy: Tensor,
    lse: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (d_hidden, d_weight, d_bias); an empty tensor for each that ``needs`` leaves out."""
    run = dispatch.resolve("linear_logprob", backend, hidden.device, compute_dtype(hidden, weight, bias))
    with dispatch.running_on(hidden):
        gradients = run.backward(
            grad_logp,
            grad_entropy,
            hidden,
            weight,
            labels,
            bias,
            temperature if temperatures is None else temperatures,
            entropy,
            lse,
            needs,
        )
    # Contiguous, as the fake kernel says; a gradient may have come out in the layout of its input.
    return tuple(hidden.new_empty(0) if g is None else g.contiguous() for g in gradients)  # type: ignore[return-value]


@linear_logprob_backward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, hidden, weight, _, bias, *_, needs, _ = inputs
    shaped = zip(needs, (hidden, weight, bias), strict=True)
    return tuple(x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0) for need, x in shaped)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, temperatures, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, labels, bias, temperatures, output[1], output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Any) -> tuple[Any, ...]:
    hidden, weight, labels, bias, temperatures, entropy, lse = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = linear_logprob_backward_op(
        grad_logp,
        grad_entropy,
        hidden,
        weight,
        labels,
        bias,
        temperatures,
        ctx.temperature,
        entropy,
        lse,
        needs,
        ctx.backend,
    )
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return d_hidden, d_weight, None, d_bias, None, None, None


linear_logprob_op.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("videor1::selective_log_softmax", mutates_args=())
def selective_op(
    logits: Tensor, index: Tensor, temperatures: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    """logits [R, V], index [R, K], temperatures [R] or None -> (logp [R, K], what the backend's backward needs)."""
    op = "selective_log_softmax"
    check_indices(op, "index", index, logits.shape[1])
    check_temperature(op, temperatures)
    run = dispatch.resolve(op, backend, logits.device, compute_dtype(logits))
    with dispatch.running_on(logits):
        return run.selective_forward(logits, index, temperature if temperatures is None else temperatures)


@selective_op.register_fake
def _(
    logits: Tensor, index: Tensor, temperatures: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits)
    chosen = dispatch.chosen_backend("selective_log_softmax", logits.device, backend, dtype)
    kept = (0,) if chosen == "reference" else (2, len(logits))
    return logits.new_empty(index.shape, dtype=dtype), logits.new_empty(kept, dtype=dtype)


@torch.library.custom_op("videor1::selective_log_softmax_backward", mutates_args=())
def selective_backward_op(
    grad: Tensor,
    logits: Tensor,
    index: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    statistics: Tensor,
    backend: str,
) -> Tensor:
    """grad, index [R, K], logits [R, V] -> d_logits [R, V]."""
    run = dispatch.resolve("selective_log_softmax", backend, logits.device, compute_dtype(logits))
    with dispatch.running_on(logits):
        return run.selective_backward(
            grad, logits, index, temperature if temperatures is None else temperatures, statistics
        )


@selective_backward_op.register_fake
def _(
    grad: Tensor,
    logits: Tensor,
    index: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    statistics: Tensor,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_selective(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, index, temperatures, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(logits, index, temperatures, output[1])


def _differentiate_selective(ctx: Any, grad: Tensor, grad_statistics: Any) -> tuple[Any, ...]:
    logits, index, temperatures, statistics = ctx.saved_tensors
    d_logits = selective_backward_op(grad, logits, index, temperatures, ctx.temperature, statistics, ctx.backend)
    return d_logits, None, None, None, None


selective_op.register_autograd(_differentiate_selective, setup_context=_save_selective)
