"""The matrix products of the linear head in bounded memory: logits of a chunk of rows, and the three gradients.

N rows, H hidden, V vocabulary. Results are fp32. cuBLAS multiplies; operands of 16 bits are not converted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from videor1_kernels.linear_logprob import tiles, waves

# An fp32 weight gradient is read and written once per chunk. With fewer rows than this, that would take noticeable
# time: for a head of 152,064 x 3,584 about 1 ms of a card's memory traffic beside 13 ms of products.
MIN_CHUNK_ROWS = 2816
# Bound on the fp32 logits of a chunk, unless MIN_CHUNK_ROWS need more: enough for as many rows of a vocabulary of
# 152,064. 16,384 rows are then six chunks of 2,731.
CHUNK_BYTES = 1_720_000_000


def most_rows(vocabulary: int) -> int:
    """The most rows of a chunk."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * _pitch(vocabulary)))


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows of a chunk if ``rows`` are cut into chunks of about the same size, none of them a small rest."""
    chunks = max(1, math.ceil(rows / most_rows(vocabulary)))
    return max(1, math.ceil(rows / chunks))


def logits_buffer(rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """Memory for fp32 logits [rows, V]; V is rounded up to a multiple of 64, so that every row starts aligned."""
    return torch.empty((rows, _pitch(vocabulary)), dtype=torch.float32, device=device)


def narrow_rows(buffer: Tensor, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """The first rows of the buffer as [rows, V] of ``dtype``; each stays in the memory of its own row."""
    return buffer.view(dtype)[:rows, :vocabulary]


def common_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, their own if they have the same and else fp32, and with unit stride in H."""
    if hidden.dtype != weight.dtype:
        hidden, weight = hidden.float(), weight.float()
    return tuple(x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (hidden, weight))  # type: ignore[return-value]


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in fp32, accumulated in fp32; a and b of one dtype, fp32 or 16 bits."""
    if a.dtype == torch.float32:
        if out is None and a.device.type == "cpu" and len(a) >= 64:  # with few rows oneDNN takes longer to start
            return tiles.product(a, b.T)
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if a.device.type != "cuda":
        return product(a.float(), b.float(), out)
    if out is None:
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def long_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, like :func:`product`, where the sum is long and the result has few tiles: in parts of the sum, if
    they fill a GPU's multiprocessors better. Each part is accumulated in fp32, and so are they all.
    """
    parts = 1
    if a.dtype != torch.float32:
        parts = waves.inner_parts(len(a), b.shape[1], len(b), _processors(a.device))
    if parts == 1:
        return product(a, b)
    return batched_product(a.unflatten(1, (parts, -1)).transpose(0, 1), b.unflatten(0, (parts, -1))).sum(0)


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """a[i] @ b[i] in fp32, for every i; a and b of 16 bits."""
    if a.device.type != "cuda":
        return torch.bmm(a.float(), b.float())
    return torch.ops.aten.bmm.dtype(a, b, torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place, total fp32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type != "cuda":
        total.addmm_(a.float(), b.float())
    elif _adds_to_fp32(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:  # a band of rows at a time, so that the temporary stays small
        band = max(1, 2**27 // (4 * b.shape[1]))
        for first in range(0, len(total), band):
            total[first : first + band] += product(a[first : first + band], b)


class HeadGradients:
    """The head's gradients, summed over chunks of rows: d_hidden [N, H], d_weight fp32 [V, H], d_bias fp32 [V].

    A gradient that is not needed stays None. A row of d_hidden is written once, so it is rounded once, to ``dtype``.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, needs: Sequence[bool], dtype: torch.dtype) -> None:
        need_hidden, need_weight, need_bias = needs
        vocabulary, device = len(weight), hidden.device
        self.weight = weight
        self.d_hidden = torch.zeros_like(hidden, dtype=dtype) if need_hidden else None
        self._need_weight = need_weight
        self._d_weight: Tensor | None = None  # made by the first chunk: zeros would be written, and read again
        self.d_bias = torch.zeros(vocabulary, dtype=torch.float32, device=device) if need_bias else None

    @property
    def d_weight(self) -> Tensor | None:
        """fp32 [V, H]; None if it is not needed."""
        if self._d_weight is None and self._need_weight:
            return torch.zeros(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        return self._d_weight

    def add(self, rows: Tensor | slice, hidden_rows: Tensor, d_logits: Tensor) -> None:
        """Add the gradients of ``rows``, from their hidden states [n, H] and d_logits [n, V], in the head's dtype."""
        if self.d_hidden is not None:
            self.d_hidden[rows] = long_product(d_logits, self.weight).to(self.d_hidden.dtype)
        if self._d_weight is not None:
            add_product(self._d_weight, d_logits.T, hidden_rows)
        elif self._need_weight:
            self._d_weight = product(d_logits.T, hidden_rows)
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0, dtype=torch.float32)


def power_of_two(values: Tensor) -> Tensor:
    """A power of two near the largest magnitude, fp32 scalar, or 1 if all are 0. To divide by it rounds nothing."""
    largest = values.detach().abs().max().float() if values.numel() else values.new_zeros((), dtype=torch.float32)
    used = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return used / torch.frexp(used)[0]  # exact, unlike a power


def times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor (a scalar) in the wider of their dtypes, rounded once to ``dtype``; no second large tensor.

    CUDA would first round a factor without dimensions to the dtype of a 16-bit gradient, in which 1e-8 is 0. A CPU
    keeps such a factor whole, but would make a second large tensor for one with dimensions.
    """
    if gradient.dtype == dtype and gradient.device.type == "cpu":
        return gradient * factor
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, factor.reshape(1), out=out)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, whose tiles are computed at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch can add a product of 16-bit operands to an fp32 matrix; one that cannot raises an error."""
    total = torch.ones((16, 16), dtype=torch.float32, device=device)
    ones = torch.ones((16, 16), dtype=dtype, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, ones, ones, torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17).all())


def _pitch(vocabulary: int) -> int:
    return -(-vocabulary // 64) * 64
