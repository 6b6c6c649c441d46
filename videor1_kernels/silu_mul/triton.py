"""silu_mul on Triton, in one launch. R rows, I intermediate, r rank of an adapter."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program: at the 12 rows of a prompt, a 7B model's 18,944 are 228 programs
# With adapters a program takes up to MOST_ROWS rows, so that each entry of B is read once for all of them, and
# ADAPTED_BLOCK columns: a 7B model's are 296 programs. A product has at least 16 rows and 16 terms; larger tiles spill.
ADAPTED_BLOCK, RANK_BLOCK, LEAST, MOST_ROWS = 64, 32, 16, 32


@triton.jit
def _gated(gate, up, out):
    """silu(gate) * up of fp32 numbers, in the dtype of what ``out`` points to."""
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
    return (silu.to(tl.float32) * up).to(out.dtype.element_ty)


@triton.jit
def silu_mul_kernel(gate_up, out, width, row_stride, BLOCK: tl.constexpr):
    """A program is BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gates = gate_up + row * row_stride + at
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(gates + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, _gated(gate, up, out), mask=inside)


@triton.jit
def adapted_silu_mul_kernel(
    gate_up,
    inner,
    b,
    out,
    rows,
    width,
    rank,
    row_stride,
    inner_stride,
    b_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program is BLOCK columns of ROWS rows, to which it adds the products of the adapters first, in fp32.

    Columns are the first dimension of its tiles: on Hopper and Blackwell a product has at least 64 of those.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here, known = (at < width)[:, None], (row < rows)[None, :]
    gates = gate_up + row[None, :] * row_stride + at[:, None]
    gate = tl.load(gates, mask=here & known, other=0.0).to(tl.float32)  # [BLOCK, ROWS]
    up = tl.load(gates + width, mask=here & known, other=0.0).to(tl.float32)
    for first in range(0, rank, BLOCK_R):
        term = first + tl.arange(0, BLOCK_R)
        factors = b + at.to(tl.int64)[:, None] * b_stride + term[None, :]
        mask = here & (term < rank)[None, :]
        gate_b = tl.load(factors, mask=mask, other=0.0)  # [BLOCK, BLOCK_R]
        up_b = tl.load(factors + tl.cast(width, tl.int64) * b_stride, mask=mask, other=0.0)
        of = inner + row[None, :] * inner_stride + term[:, None]
        mask = (term < rank)[:, None] & known
        gate_inner = tl.load(of, mask=mask, other=0.0)  # [BLOCK_R, ROWS]
        up_inner = tl.load(of + rank, mask=mask, other=0.0)
        gate += tl.dot(gate_b, gate_inner, input_precision="ieee")
        up += tl.dot(up_b, up_inner, input_precision="ieee")
    tl.store(out + row[None, :] * width + at[:, None], _gated(gate, up, out), mask=here & known)


def silu_mul(gate_up: Tensor, inner: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up, [R, I], of [R, 2 I]; what the adapters give, of [R, 2 r] and [2 I, r], is added first."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    if not out.numel():
        return out
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    if inner is None or b is None or not b.shape[1]:
        grid = (rows, triton.cdiv(width, BLOCK))
        silu_mul_kernel[grid](gate_up, out, width, gate_up.stride(0), BLOCK=BLOCK, num_warps=4)
        return out
    inner, b = (x if x.stride(1) == 1 else x.contiguous() for x in (inner, b))
    rank = b.shape[1]
    most = MOST_ROWS if gate_up.dtype.itemsize == 2 else LEAST
    block_rows = min(max(LEAST, triton.next_power_of_2(rows)), most)
    block_rank = min(max(LEAST, triton.next_power_of_2(rank)), RANK_BLOCK)
    adapted_silu_mul_kernel[(triton.cdiv(width, ADAPTED_BLOCK), triton.cdiv(rows, block_rows))](
        gate_up,
        inner,
        b,
        out,
        rows,
        width,
        rank,
        gate_up.stride(0),
        inner.stride(0),
        b.stride(0),
        ROWS=block_rows,
        BLOCK=ADAPTED_BLOCK,
        BLOCK_R=block_rank,
        num_warps=4,
    )
    return out
