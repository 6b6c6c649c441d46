"""Reference of selective_log_softmax in plain torch: rows in chunks that stay in cache, nothing kept for the gradient.

R rows, V vocabulary, K chosen entries. With incoming gradients g_k: dz_v = (sum_k g_k (1[v = index_k] - p_v)) / t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype
from videor1_kernels.linear_logprob.tiles import CHUNK_BYTES, spans


@torch.no_grad()
def selective_forward(logits: Tensor, index: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """logits [R, V], index [R, K], temperature a float or [R] -> (logp [R, K] of the compute dtype, nothing)."""
    dtype = compute_dtype(logits)
    logp = torch.empty(index.shape, dtype=dtype, device=logits.device)
    for rows in spans(len(logits), _chunk_rows(logits, dtype)):
        scores = _tempered(logits[rows], temperature, rows, dtype).log_softmax(1, dtype=dtype)  # [n, V]
        torch.gather(scores, 1, index[rows], out=logp[rows])
    return logp, logits.new_empty(0, dtype=dtype)


@torch.no_grad()
def selective_backward(
    grad: Tensor, logits: Tensor, index: Tensor, temperature: float | Tensor, statistics: Tensor
) -> Tensor:
    """grad, index [R, K], logits [R, V] -> d_logits [R, V] of the logits' dtype; an entry chosen twice adds up.

    The logits of rows whose gradients are all 0 are not read.
    """
    dtype = compute_dtype(logits)
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    live = (grad != 0).any(1)
    everything = bool(live.all())
    if not everything:
        d_logits[~live] = 0
    chosen = live.nonzero()[:, 0]
    for block in spans(len(chosen), _chunk_rows(logits, dtype)):
        rows = block if everything else chosen[block]
        g = grad[rows].to(dtype) / _at(temperature, rows)
        probs = _tempered(logits[rows], temperature, rows, dtype).softmax(1, dtype=dtype)  # [n, V]
        d_logits[rows] = probs.mul_(-g.sum(1, keepdim=True)).scatter_add_(1, index[rows], g).to(logits.dtype)
    return d_logits


def _tempered(part: Tensor, temperature: float | Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk of logits over its temperatures; as it is where that is 1: softmax converts it in passing."""
    if isinstance(temperature, float) and temperature == 1:
        return part
    return part.to(dtype) / _at(temperature, rows)


def _at(temperature: float | Tensor, rows: slice | Tensor) -> float | Tensor:
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature


def _chunk_rows(logits: Tensor, dtype: torch.dtype) -> int:
    """At least a row for each thread: softmax shares out whole rows."""
    budget = CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cpu"]) // 4  # there are four such tensors at a time
    return max(torch.get_num_threads(), budget // (logits.shape[1] * dtype.itemsize))
