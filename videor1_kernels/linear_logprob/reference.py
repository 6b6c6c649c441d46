"""Reference in plain torch: rows in chunks, the logits of a chunk recomputed in the backward pass.

N rows, H hidden, V vocabulary. z = (x W^T + b) / t, p = softmax(z), E = -sum p log p. With incoming gradients g (of
logp) and e (of E):  dz_v = g (1[v = label] - p_v) - e p_v (log p_v + E),  dx = dz W / t,  dW = (dz / t)^T x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from videor1_kernels.checks import IGNORED, compute_dtype

# Bound on the logits of one chunk. A GPU needs larger products, and fewer passes over an fp32 weight gradient.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], labels [N], temperature a float or [N] -> (logp, entropy, lse), each [N]."""
    dtype = compute_dtype(hidden, weight, bias)
    logp = hidden.new_zeros(len(labels), dtype=dtype)
    entropy, lse = torch.zeros_like(logp), torch.zeros_like(logp)
    with torch.autocast(hidden.device.type, enabled=False):
        head = weight.to(dtype)
        for rows in (labels != IGNORED).nonzero()[:, 0].split(chunk_rows or _chunk_rows(weight, dtype)):
            logits = _logits(hidden, head, bias, temperature, rows, dtype)  # [n, V]
            top = logits.amax(1, keepdim=True)
            logits -= top
            probs = logits.exp()
            total = probs.sum(1)
            log_total = total.log()
            logp[rows] = logits.gather(1, labels[rows, None])[:, 0] - log_total
            lse[rows] = top[:, 0] + log_total
            # A banned token has p = 0 and a logit of -inf: the clamp makes their product 0.
            probs *= logits.clamp_(min=torch.finfo(dtype).min)
            entropy[rows] = log_total - probs.sum(1) / total
    return logp, entropy, lse


def backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    entropy: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    chunk_rows: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of what :func:`forward` returned -> (d_hidden, d_weight, d_bias), None where ``needs`` says no."""
    need_hidden, need_weight, need_bias = needs
    dtype = compute_dtype(hidden, weight, bias)
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
        for rows in active.nonzero()[:, 0].split(chunk_rows or _chunk_rows(weight, dtype)):
            scores = _logits(hidden, head, bias, temperature, rows, dtype)  # [n, V]
            scores -= lse[rows, None]
            probs = scores.exp()
            if grad_entropy is None:
                d_scores = scores.zero_()
            else:
                d_scores = scores.clamp_(min=torch.finfo(dtype).min).add_(entropy[rows, None])
                d_scores.mul_(probs).mul_(-grad_entropy[rows, None].to(dtype))
            if grad_logp is not None:
                g = grad_logp[rows, None].to(dtype)
                d_scores.addcmul_(probs, g, value=-1)
                d_scores.scatter_add_(1, labels[rows, None], g)
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
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def selective_forward(logits: Tensor, index: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """logits [R, V], index [R, K], temperature a float or [R] -> (logp [R, K], lse [R])."""
    scaled = logits.to(compute_dtype(logits)) / _column(temperature)
    lse = scaled.logsumexp(1)
    return scaled.log_softmax(1).gather(1, index), lse


def selective_backward(
    grad: Tensor, logits: Tensor, index: Tensor, temperature: float | Tensor, lse: Tensor
) -> Tensor:
    """grad, index [R, K], logits [R, V], lse [R] -> d_logits [R, V] in the dtype of ``logits``."""
    dtype = compute_dtype(logits)
    grad = grad.to(dtype)
    active = (grad != 0).any(1)
    d_logits = (logits.to(dtype) / _column(temperature) - lse[:, None]).exp_()
    d_logits.mul_(-grad.sum(1, keepdim=True)).scatter_add_(1, index, grad).div_(_column(temperature))
    return d_logits.masked_fill_(~active[:, None], 0.0).to(logits.dtype)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` without lse, differentiable."""
    logp, entropy, _ = _LinearLogprob.apply(hidden, weight, labels, bias, temperature, chunk_rows)
    return logp, entropy


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float | Tensor) -> Tensor:
    """logits [..., V], index [..., K], temperature a float or [rows] -> log-probabilities [..., K], differentiable."""
    logp, _ = _Selective.apply(logits.reshape(-1, logits.shape[-1]), index.reshape(-1, index.shape[-1]), temperature)
    return logp.reshape(index.shape)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        temperature: float | Tensor,
        chunk_rows: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp, entropy, lse = forward(hidden, weight, labels, bias, temperature, chunk_rows)
        ctx.save_for_backward(
            hidden, weight, labels, bias, temperature if isinstance(temperature, Tensor) else None, entropy, lse
        )
        ctx.temperature, ctx.chunk_rows = temperature if not isinstance(temperature, Tensor) else None, chunk_rows
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, bias, row_temperature, entropy, lse = ctx.saved_tensors
        temperature = ctx.temperature if row_temperature is None else row_temperature
        need_hidden, need_weight, _labels, need_bias = ctx.needs_input_grad[:4]
        d_hidden, d_weight, d_bias = backward(
            grad_logp, grad_entropy, hidden, weight, labels, bias, temperature, entropy, lse,
            (need_hidden, need_weight, need_bias), ctx.chunk_rows,
        )
        return d_hidden, d_weight, None, d_bias, None, None


class _Selective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        logp, lse = selective_forward(logits, index, temperature)
        ctx.save_for_backward(logits, index, temperature if isinstance(temperature, Tensor) else None, lse)
        ctx.temperature = temperature if not isinstance(temperature, Tensor) else None
        ctx.mark_non_differentiable(lse)
        return logp, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, index, row_temperature, lse = ctx.saved_tensors
        temperature = ctx.temperature if row_temperature is None else row_temperature
        return selective_backward(grad, logits, index, temperature, lse), None, None


def _logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float | Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    logits = hidden[rows].to(dtype) @ head.T  # [n, V]
    if bias is not None:
        logits += bias.to(dtype)
    return logits.div_(_at(temperature, rows))


def _chunk_rows(weight: Tensor, dtype: torch.dtype) -> int:
    budget = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"])
    return max(1, budget // (weight.shape[0] * dtype.itemsize))


def _at(temperature: float | Tensor, rows: Tensor) -> float | Tensor:
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature
