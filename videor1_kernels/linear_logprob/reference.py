"""Reference in plain torch: rows in chunks, the logits of a chunk recomputed in the backward pass.

N rows, H hidden, V vocabulary. z = (x W^T + b) / t, p = softmax(z), E = -sum p log p. With incoming gradients g (of
logp) and e (of E):  dz_v = g (1[v = label] - p_v) - e p_v (log p_v + E),  dx = dz W / t,  dW = (dz / t)^T x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from videor1_kernels.checks import IGNORED, compute_dtype

# Bound on the logits of one chunk. A GPU needs larger products, and fewer passes over an fp32 weight gradient.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden [N, H], weight [V, H], labels [N], temperature a float or [N] -> (logp [N], entropy [N])."""
    dtype = compute_dtype(hidden, weight, bias)
    if chunk_rows is None:
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
        chunk_rows = max(1, budget // (weight.shape[0] * dtype.itemsize))
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearLogprob.apply(hidden, weight, labels, bias, temperature, dtype, chunk_rows)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        temperature: float | Tensor,
        dtype: torch.dtype,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        logp = hidden.new_zeros(len(labels), dtype=dtype)
        entropy = torch.zeros_like(logp)
        head = weight.to(dtype)
        for rows in (labels != IGNORED).nonzero()[:, 0].split(chunk_rows):
            scores = _log_softmax(hidden, head, bias, temperature, rows, dtype)  # [n, V]
            logp[rows] = scores.gather(1, labels[rows, None])[:, 0]
            entropy[rows] = _entropy(scores, scores.exp())
        # Tensors that carry gradients are saved as given, so that an in-place change of them is caught.
        ctx.save_for_backward(hidden, weight, labels, bias, temperature if isinstance(temperature, Tensor) else None)
        ctx.temperature = temperature if not isinstance(temperature, Tensor) else None
        ctx.dtype, ctx.chunk_rows = dtype, chunk_rows
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, bias, row_temperature = ctx.saved_tensors
        temperature = ctx.temperature if row_temperature is None else row_temperature
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        dtype = ctx.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(dtype)
            active = torch.zeros_like(labels, dtype=torch.bool)
            for grad in (grad_logp, grad_entropy):
                if grad is not None:
                    active |= grad != 0
            active &= labels != IGNORED
            d_hidden = torch.zeros_like(hidden) if need_hidden else None
            d_weight = torch.zeros_like(head) if need_weight else None
            d_bias = head.new_zeros(len(head)) if need_bias else None
            for rows in active.nonzero()[:, 0].split(ctx.chunk_rows):
                scores = _log_softmax(hidden, head, bias, temperature, rows, dtype)  # [n, V]
                probs = scores.exp()
                if grad_entropy is None:
                    d_scores = torch.zeros_like(probs)
                else:
                    entropy = _entropy(scores, probs)
                    d_scores = scores.clamp_(min=torch.finfo(dtype).min).add_(entropy[:, None])
                    d_scores.mul_(probs).mul_(-grad_entropy[rows, None])
                if grad_logp is not None:
                    d_scores.addcmul_(probs, grad_logp[rows, None], value=-1)
                    d_scores.scatter_add_(1, labels[rows, None], grad_logp[rows, None])
                d_scores /= _at(temperature, rows)
                if d_hidden is not None:
                    d_hidden[rows] = (d_scores @ head).to(hidden.dtype)  # one rounding: a row is in one chunk only
                if d_weight is not None:
                    d_weight.addmm_(d_scores.T, hidden[rows].to(dtype))
                if d_bias is not None:
                    d_bias += d_scores.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float | Tensor) -> Tensor:
    """logits [..., V], index [..., K], temperature a float or [rows] -> log-probabilities [..., K]."""
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(*logits.shape[:-1], 1)
    with torch.autocast(logits.device.type, enabled=False):
        return (logits.to(compute_dtype(logits)) / temperature).log_softmax(-1).gather(-1, index)


def _log_softmax(
    hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float | Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    logits = hidden[rows].to(dtype) @ head.T  # [n, V]
    if bias is not None:
        logits += bias.to(dtype)
    logits /= _at(temperature, rows)
    return logits.log_softmax(1)


def _entropy(scores: Tensor, probs: Tensor) -> Tensor:
    # A banned token has p = 0 and log p = -inf: the clamp makes their product 0.
    return -(probs * scores.clamp(min=torch.finfo(scores.dtype).min)).sum(1)


def _at(temperature: float | Tensor, rows: Tensor) -> float | Tensor:
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature
