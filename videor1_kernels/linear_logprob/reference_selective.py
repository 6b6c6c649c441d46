"""Reference of selective_log_softmax in plain torch, in chunks of rows that stay in cache.

Nothing is kept for the gradient.

R rows, V vocabulary, K chosen entries. Logits are [R, V], or [B, T, V] with R = B T: a slice is read where it lies.
With incoming gradients g_k: dz_v = (sum_k g_k (1[v = index_k] - p_v)) / t.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype
from videor1_kernels.linear_logprob.tiles import CHUNK_BYTES, at_rows, spans


@torch.no_grad()
def selective_forward(logits: Tensor, index: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return logp [R, K] in the compute dtype, and an empty tensor: the backward pass needs no statistics.

    index [R, K], temperature a float or [R].
    """
    dtype = compute_dtype(logits)
    logp = torch.empty(index.shape, dtype=dtype, device=logits.device)
    for rows, part in _chunks(logits, dtype):
        scores = _tempered(part, temperature, rows, dtype).log_softmax(1, dtype=dtype)  # [n, V]
        torch.gather(scores, 1, index[rows], out=logp[rows])
    return logp, logits.new_empty(0, dtype=dtype)


@torch.no_grad()
def selective_backward(
    grad: Tensor, logits: Tensor, index: Tensor, temperature: float | Tensor, statistics: Tensor
) -> Tensor:
    """Return d_logits, shaped as logits and in their dtype, of the incoming gradient [R, K].

    If an entry is chosen twice, its gradients add up. The logits of rows whose gradients are all 0 are not read.
    """
    dtype = compute_dtype(logits)
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    flat, live = d_logits.view(len(index), logits.shape[-1]), (grad != 0).any(1)
    for chunk, part in _chunks(logits, dtype):
        rows: slice | Tensor = chunk
        if not bool(live[chunk].all()):
            flat[chunk] = 0
            inside = live[chunk].nonzero()[:, 0]
            rows, part = inside + chunk.start, part[inside]
        g = grad[rows].to(dtype) / at_rows(temperature, rows)
        probs = _tempered(part, temperature, rows, dtype).softmax(1, dtype=dtype)  # [n, V]
        flat[rows] = probs.mul_(-g.sum(1, keepdim=True)).scatter_add_(1, index[rows], g).to(logits.dtype)
    return d_logits


def _chunks(logits: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (which of the R rows, their logits [n, V]), views of a size that stays in cache."""
    size = _chunk_rows(logits, dtype)
    for number, part in enumerate(logits if logits.dim() == 3 else (logits,)):
        for rows in spans(len(part), size):
            first = number * len(part)
            yield slice(first + rows.start, first + rows.stop), part[rows]


def _tempered(part: Tensor, temperature: float | Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk of logits divided by its temperatures. At temperature 1 it is not even converted: softmax does that."""
    if isinstance(temperature, float) and temperature == 1:
        return part
    return part.to(dtype) / at_rows(temperature, rows)


def _chunk_rows(logits: Tensor, dtype: torch.dtype) -> int:
    """Rows of a chunk: at least one for each thread, since softmax gives a thread whole rows."""
    budget = CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cpu"]) // 4  # four such tensors exist at a time
    return max(torch.get_num_threads(), budget // (logits.shape[-1] * dtype.itemsize))
