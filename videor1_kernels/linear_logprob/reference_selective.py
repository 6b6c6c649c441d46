"""Reference of selective_log_softmax in plain torch, in chunks of rows that stay in cache.

Nothing is kept for the gradient.

R rows, V vocabulary, K chosen entries. With incoming gradients g_k: dz_v = (sum_k g_k (1[v = index_k] - p_v)) / t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype
from videor1_kernels.linear_logprob.tiles import CHUNK_BYTES, at_rows, spans


@torch.no_grad()
def selective_forward(logits: Tensor, index: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return logp [R, K] in the compute dtype, and an empty tensor: the backward pass needs no statistics.

    logits [R, V], index [R, K], temperature a float or [R].
    """
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
    """Return d_logits [R, V], in the logits' dtype, of the incoming gradient [R, K].

    If an entry is chosen twice, its gradients add up. The logits of rows whose gradients are all 0 are not read.
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
        g = grad[rows].to(dtype) / at_rows(temperature, rows)
        probs = _tempered(logits[rows], temperature, rows, dtype).softmax(1, dtype=dtype)  # [n, V]
        d_logits[rows] = probs.mul_(-g.sum(1, keepdim=True)).scatter_add_(1, index[rows], g).to(logits.dtype)
    return d_logits


def _tempered(part: Tensor, temperature: float | Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk of logits divided by its temperatures. At temperature 1 it is not even converted: softmax does that."""
    if isinstance(temperature, float) and temperature == 1:
        return part
    return part.to(dtype) / at_rows(temperature, rows)


def _chunk_rows(logits: Tensor, dtype: torch.dtype) -> int:
    """Rows of a chunk: at least one for each thread, since softmax gives a thread whole rows."""
    budget = CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cpu"]) // 4  # four such tensors exist at a time
    return max(torch.get_num_threads(), budget // (logits.shape[1] * dtype.itemsize))
