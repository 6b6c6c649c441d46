"""The parts of the reference that work on one tile of logits: its size, the matrix product, and the running softmax.

A tile has n rows of N and m vocabulary entries of V; H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from videor1_kernels.linear_logprob.native import bf16_product

# Bound on the logits of one tile, and on its part of the weight in the compute dtype. On a CPU a tile that stays in
# cache makes everything but the products cheap. A GPU needs large products.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 2**30}
WEIGHT_BYTES = {"cpu": 8 * 2**20, "cuda": 2**30}
CHUNK_ROWS = {"cpu": 1024, "cuda": 16384}
FAR_BELOW = -1e4  # its exponential is exactly 0 in every dtype, and its product with 0 is 0, unlike that of -inf


def tile_sizes(rows: int, weight: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and vocabulary entries of a tile of ``rows`` x V logits, both at least 1."""
    kind = weight.device.type if weight.device.type in CHUNK_BYTES else "cpu"
    logits = CHUNK_BYTES[kind] // dtype.itemsize
    n = max(1, min(rows, CHUNK_ROWS[kind], logits))
    m = min(logits // n, WEIGHT_BYTES[kind] // (weight.shape[1] * dtype.itemsize), weight.shape[0])
    return n, max(1, m)


def spans(total: int, step: int) -> Iterator[slice]:
    """[0, total) in slices of ``step``, the last one shorter."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def at_rows(temperature: float | Tensor, rows: slice | Tensor) -> float | Tensor:
    """The temperature of these rows: a number, or a tensor [n, 1]."""
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature


def operand_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to multiply, so that the logits are as exact as the compute dtype ``dtype``.

    Two bf16 matrices on a CPU may stay as they are: products of their elements are exact, and sums are in fp32.
    """
    on_cpu = hidden.device.type == weight.device.type == "cpu"
    if on_cpu and hidden.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32 and bf16_product():
        return torch.bfloat16
    return dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T [n, m] of a [n, k] and b [m, k], in their dtype; in fp32 if they are bf16 on a CPU that can do so."""
    if a.device.type == "cpu" and a.dtype == torch.bfloat16:
        exact = bf16_product()
        assert exact is not None  # as operand_dtype has found
        return exact(a, b)
    if a.device.type != "cpu" or a.dtype != torch.float32 or not onednn():
        with torch.autocast(a.device.type, enabled=False):
            return a @ b.T
    a, b = (x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous() for x in (a, b))
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def onednn() -> bool:
    """Whether to call oneDNN for a product of fp32 matrices instead of ``torch.mm``, which calls MKL.

    MKL does not use AVX-512 on every CPU that has it: 86 GFLOP/s on a core of an AMD Zen 5, where oneDNN reaches 210.
    Without AVX-512 it is the quicker one: of a core of an AMD Zen 3, 70 GFLOP/s in a weight's gradient, to 43.
    """
    return torch.backends.cpu.get_cpu_capability() != "AVX2" and has_onednn()


def has_onednn() -> bool:
    """Whether this torch has it, and that product of it."""
    on = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return on and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class RunningSoftmax:
    """The softmax statistics of N rows whose logits arrive tile by tile.

    Over the logits z so far: top = max z, total = sum exp(z - top), weighted = sum exp(z - top) (z - top).
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.top = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        self.total = torch.zeros_like(self.top)
        self.weighted = torch.zeros_like(self.top)

    def add(self, rows: slice, logits: Tensor, scratch: Tensor) -> None:
        """Add ``logits`` [n, m] of ``rows``; overwrites them and ``scratch`` [n, m]."""
        top, total, weighted = self.top[rows], self.total[rows], self.weighted[rows]  # views
        new = torch.maximum(top, logits.amax(1))
        shift = new.masked_fill(new == -torch.inf, 0.0)  # every token so far is banned
        fall = (top - shift).clamp_(min=FAR_BELOW)
        shrink = fall.exp()
        weighted.addcmul_(total, fall).mul_(shrink)
        total.mul_(shrink)
        top.copy_(new)
        logits.sub_(shift[:, None])
        torch.exp(logits, out=scratch)
        total.add_(scratch.sum(1))
        weighted.add_(scratch.mul_(logits.clamp_(min=FAR_BELOW)).sum(1))
