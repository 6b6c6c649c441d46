"""add_rms_norm on Triton, in one launch. R rows, H hidden."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.add_rms_norm.reference import normed_dtype

PER_WARP = 512  # numbers of a row: 16 of each thread


@triton.jit
def add_rms_norm_kernel(
    x,
    residual,
    weight,
    summed,
    normed,
    H,
    x_row,
    residual_row,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program is a row. summed and normed are [R, H]; without a residual x is the sum, and summed is not written."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < H
    scales = tl.load(weight + at, mask=inside, other=0.0)  # [BLOCK]; before the stream, to wait for both at once
    total = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    stream = x.dtype.element_ty
    if HAS_RESIDUAL:
        stream = residual.dtype.element_ty
        total += tl.load(residual + row * residual_row + at, mask=inside, other=0.0).to(tl.float32)
        stored = total.to(stream)
        tl.store(summed + row * H + at, stored, mask=inside)
        total = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / H + eps)
    if UNIT_OFFSET:
        result = total * scale * (1.0 + scales.to(tl.float32))
    else:
        result = (total * scale).to(stream).to(tl.float32) * scales.to(tl.float32)
    tl.store(normed + row * H + at, result.to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Return normed and summed, both [R, H]."""
    rows, width = x.shape
    stream = x if residual is None else residual
    summed = x if residual is None else residual.new_empty((rows, width))
    normed = x.new_empty((rows, width), dtype=normed_dtype(weight, stream, unit_offset))
    if not rows:
        return normed, summed
    values, added = (t if t.stride(1) == 1 else t.contiguous() for t in (x, stream))
    block = triton.next_power_of_2(width)
    add_rms_norm_kernel[(rows,)](
        values,
        added,
        weight.contiguous(),
        summed,
        normed,
        width,
        values.stride(0),
        added.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        UNIT_OFFSET=unit_offset,
        BLOCK=block,
        num_warps=min(16, max(1, block // PER_WARP)),
    )
    return normed, summed
