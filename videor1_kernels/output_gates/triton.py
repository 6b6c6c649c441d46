"""sigmoid_mul and gated_rms_norm on Triton, in one launch each. R rows, W wide; Hv heads of D."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program of sigmoid_mul: at 12 rows the 4,096 of a 9B model are 48 programs
BLOCK_H = 4  # heads of a program of gated_rms_norm: at 12 rows the 32 of a 9B model are 96 programs


@triton.jit
def sigmoid_mul_kernel(x, gate, out, width, x_row, gate_row, BLOCK: tl.constexpr):
    """A program is BLOCK columns of a row. out is [R, W]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * x_row + at, mask=inside, other=0.0)  # [BLOCK]
    gates = tl.load(gate + row * gate_row + at, mask=inside, other=0.0)
    factors = (1.0 / (1.0 + tl.exp(-gates.to(tl.float32)))).to(gates.dtype).to(tl.float32)
    tl.store(out + row * width + at, (values.to(tl.float32) * factors).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_rms_norm_kernel(
    x,
    gate,
    weight,
    out,
    HV,
    x_row,
    x_head,
    gate_row,
    gate_head,
    eps,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program is BLOCK_H heads of a row. out is [R, Hv, D]."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (head < HV)[:, None] & (d < D)[None, :]
    scales = tl.load(weight + d, mask=d < D, other=0.0)[None, :]  # [1, BLOCK_D]
    values = tl.load(x + row * x_row + head[:, None] * x_head + d[None, :], mask=inside, other=0.0)
    gates = tl.load(gate + row * gate_row + head[:, None] * gate_head + d[None, :], mask=inside, other=0.0)
    wide, z = values.to(tl.float32), gates.to(tl.float32)  # [BLOCK_H, BLOCK_D]
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
    weighted = (wide * scale).to(values.dtype).to(tl.float32) * scales.to(tl.float32)
    if values.dtype == scales.dtype:  # two dtypes of 16 bits promote to fp32, and are not rounded
        weighted = weighted.to(values.dtype).to(tl.float32)
    result = (weighted * (z / (1.0 + tl.exp(-z)))).to(out.dtype.element_ty)
    tl.store(out + (row * HV + head)[:, None] * D + d[None, :], result, mask=inside)


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * sigmoid(gate), [R, W]."""
    rows, width = x.shape
    out = x.new_empty((rows, width))
    if not out.numel():
        return out
    x, gate = (t if t.stride(1) == 1 else t.contiguous() for t in (x, gate))
    grid = (rows, triton.cdiv(width, BLOCK))
    sigmoid_mul_kernel[grid](x, gate, out, width, x.stride(0), gate.stride(0), BLOCK=BLOCK, num_warps=4)
    return out


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) * silu(gate), [R, Hv, D]."""
    rows, heads, size = x.shape
    out = x.new_empty((rows, heads, size))
    if not out.numel():
        return out
    x, gate = (t if t.stride(2) == 1 else t.contiguous() for t in (x, gate))
    gated_rms_norm_kernel[(rows, triton.cdiv(heads, BLOCK_H))](
        x,
        gate,
        weight.contiguous(),
        out,
        heads,
        *x.stride()[:2],
        *gate.stride()[:2],
        eps,
        D=size,
        BLOCK_H=BLOCK_H,
        BLOCK_D=triton.next_power_of_2(size),
        num_warps=4,
    )
    return out
