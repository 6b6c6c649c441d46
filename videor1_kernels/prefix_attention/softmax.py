"""Attention of one sequence that also returns its log-sum-exp, so that parts over different keys can be merged.

M queries, N keys, Hq query heads, Hkv key heads, R = Hq / Hkv, D head dim. Operands are views of packed rows. A CPU
runs ATen's blocked kernel; elsewhere the scores of a block of queries are computed at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SCORE_BYTES = 2**28  # bound on the scores of a block of queries

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return out [M, Hq, D] and lse [Hq, M] of q [M, Hq, D] and k, v [N, Hkv, D], in one dtype; N = M if causal."""
    queries, keys, values = (_by_key_head(x, k) for x in (q, k, v))
    run = _flash_forward if _blocked(q) else _plain_forward
    out, lse = run(queries, keys, values, scale, causal)
    return _packed(out), lse.flatten(0, 1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. ``out`` and ``lse`` may be those of a softmax over more keys than these."""
    grad, queries, keys, values, out = (_by_key_head(x, k) for x in (grad, q, k, v, out))
    lse = lse.unflatten(0, (k.shape[1], -1))
    run = _flash_gradients if _blocked(q) else _plain_gradients
    dq, dk, dv = run(grad, queries, keys, values, out, lse, scale, causal)
    return _packed(dq), dk.sum(1).transpose(0, 1), dv.sum(1).transpose(0, 1)


def _blocked(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))  # the kernel reads by strides, so nothing is copied
    return _flash(q, k, v, 0.0, causal, scale=scale)


def _flash_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return _flash_backward(grad, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:-1])
    for rows, scores in _scores(q, k, scale, causal):
        lse[..., rows] = scores.logsumexp(-1)
        out[..., rows, :] = (scores - lse[..., rows, None]).exp_() @ v
    return out, lse


def _plain_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    for rows, scores in _scores(q, k, scale, causal):
        g = grad[..., rows, :]
        weights = scores.sub_(lse[..., rows, None]).exp_()
        dv += (weights.mT @ g).sum(1, keepdim=True)
        shared = (g * out[..., rows, :]).sum(-1, keepdim=True)
        d_scores = weights.mul_(g @ v.mT - shared).mul_(scale)
        dq[..., rows, :] = d_scores @ k
        dk += (d_scores.mT @ q[..., rows, :]).sum(1, keepdim=True)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Iterator[tuple[slice, Tensor]]:
    """Scores [Hkv, R, m, N] of the queries, m at a time, -inf where a query does not see a key."""
    heads, count, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    step = max(1, SCORE_BYTES // (heads * keys * q.element_size()))
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        scores = q[..., rows, :] @ k.mT * scale
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(start + 1)
            scores.masked_fill_(hidden, -torch.inf)
        yield rows, scores


def _by_key_head(x: Tensor, k: Tensor) -> Tensor:
    """[M, H, D] -> [Hkv, H / Hkv, M, D], a view."""
    return x.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)


def _packed(x: Tensor) -> Tensor:
    """[Hkv, R, M, D] -> [M, Hq, D]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)
