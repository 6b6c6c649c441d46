"""The head's matrix products in bounded memory, with fp32 results: logits of some rows, and the three gradients.

N rows, H hidden, V vocabulary. cuBLAS does the products; operands of 16 bits are multiplied as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# An fp32 weight gradient is read and written once a chunk: fewer rows than this would make that traffic show.
MIN_CHUNK_ROWS = 4096
CHUNK_BYTES = 2_500_000_000  # of fp32 logits, where MIN_CHUNK_ROWS allow; just fits 4096 rows of a 152,064 vocabulary


def most_rows(vocabulary: int) -> int:
    """The most rows of a chunk."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * _pitch(vocabulary)))


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows of a chunk of ``rows``: as equal as they can be, so that no chunk is a small rest."""
    chunks = max(1, math.ceil(rows / most_rows(vocabulary)))
    return max(1, math.ceil(rows / chunks))


def logits_buffer(rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """fp32 [rows, V rounded up to 64], so that every row starts aligned."""
    return torch.empty((rows, _pitch(vocabulary)), dtype=torch.float32, device=device)


def narrow_rows(buffer: Tensor, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """The buffer's first rows as [rows, V] of ``dtype``, each in its own row's memory."""
    return buffer.view(dtype)[:rows, :vocabulary]


def common_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, that of both where they agree, else fp32; unit stride in H."""
    if hidden.dtype != weight.dtype:
        hidden, weight = hidden.float(), weight.float()
    return tuple(x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (hidden, weight))  # type: ignore[return-value]


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in fp32, accumulated in fp32; a and b of one dtype, fp32 or 16 bits."""
    if a.dtype == torch.float32:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if a.device.type != "cuda":
        return product(a.float(), b.float(), out)
    if out is None:
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


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
    """Sums of the head's gradients over chunks of rows. d_hidden [N, H], d_weight fp32 [V, H], d_bias fp32 [V].

    Gradients arrive divided by ``norm`` (fp32 scalar, so that fp16 keeps their small values); a row's d_hidden is
    written once, rounded once. What is not needed stays None.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, needs: Sequence[bool]) -> None:
        need_hidden, need_weight, need_bias = needs
        vocabulary, device = len(weight), hidden.device
        self.weight = weight
        self.d_hidden = torch.zeros_like(hidden) if need_hidden else None
        self.d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=device) if need_weight else None
        self.d_bias = torch.zeros(vocabulary, dtype=torch.float32, device=device) if need_bias else None

    def add(self, rows: Tensor | slice, hidden_rows: Tensor, d_logits: Tensor) -> None:
        """``rows`` of the gradient, hidden_rows [n, H] and d_logits [n, V] of the head's dtype."""
        if self.d_hidden is not None:
            self.d_hidden[rows] = product(d_logits, self.weight).to(self.d_hidden.dtype)
        if self.d_weight is not None:
            add_product(self.d_weight, d_logits.T, hidden_rows)
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0, dtype=torch.float32)


def power_of_two(values: Tensor) -> Tensor:
    """The power of two next to the largest magnitude, fp32 scalar; 1 where all are 0: dividing by it rounds nothing."""
    largest = values.detach().abs().max().float() if values.numel() else values.new_zeros((), dtype=torch.float32)
    used = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return used / torch.frexp(used)[0]  # exact, unlike a power


def times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor (a scalar) in the wider of their dtypes, rounded once to ``dtype``; no second large tensor.

    On CUDA a factor without dimensions would be rounded to a 16-bit gradient's dtype first, where 1e-8 is 0; a CPU
    keeps it whole, and would make a second tensor for one with dimensions.
    """
    if gradient.dtype == dtype and gradient.device.type == "cpu":
        return gradient * factor
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, factor.reshape(1), out=out)


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of 16-bit operands to an fp32 matrix: versions differ, and say so by raising."""
    total = torch.ones((16, 16), dtype=torch.float32, device=device)
    ones = torch.ones((16, 16), dtype=dtype, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, ones, ones, torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17).all())


def _pitch(vocabulary: int) -> int:
    return -(-vocabulary // 64) * 64
