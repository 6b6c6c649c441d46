"""gated_delta_step and causal_conv_step on Triton, in one launch each. R rows, S slots; heads and sizes as there."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.prefix_gated_delta.reference_step import ConvStep, DeltaStep

BLOCK_V = (
    32  # columns of a state that a program has: at Dk = Dv = 128 they are 32 numbers a thread, and 4 programs a head
)
BLOCK_C = 512  # channels of a program: the 8,192 of a 9B model are 16 programs a row


@triton.jit
def gated_delta_step_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    slots,
    out,
    S,
    HV,
    scale,
    q_row,
    k_row,
    v_row,
    g_row,
    beta_row,
    state_slot,
    DK: tl.constexpr,
    DV: tl.constexpr,
    REPEAT: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program is BLOCK_V columns of the state of one head of a row. out is [R, Hv, Dv].

    A row whose slot does not exist gets NaN and writes to no state.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64) if HAS_SLOTS else row
    exists = (slot >= 0) & (slot < S)
    d, c = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    of_key = head // REPEAT * DK + d
    q_t = tl.load(q + row * q_row + of_key, mask=d < DK, other=0.0).to(tl.float32)  # [BLOCK_K]
    k_t = tl.load(k + row * k_row + of_key, mask=d < DK, other=0.0).to(tl.float32)
    v_t = tl.load(v + row * v_row + head * DV + c, mask=c < DV, other=0.0).to(tl.float32)  # [BLOCK_V]
    decay = tl.exp(tl.load(g + row * g_row + head).to(tl.float32))
    rate = tl.load(beta + row * beta_row + head).to(tl.float32)
    if NORMALISE:
        q_t *= tl.rsqrt(tl.sum(q_t * q_t, 0) + 1e-6)
        k_t *= tl.rsqrt(tl.sum(k_t * k_t, 0) + 1e-6)
    # As a size, since the interpreter has no conjunction of a scalar and a vector.
    inside = (d < tl.where(exists, DK, 0))[:, None] & (c < DV)[None, :]
    at = state + slot * state_slot + (head * DK + d[:, None]) * DV + c[None, :]
    s = tl.load(at, mask=inside, other=0.0) * decay  # [BLOCK_K, BLOCK_V]
    change = rate * (v_t - tl.sum(s * k_t[:, None], 0))
    s += k_t[:, None] * change[None, :]
    tl.store(at, s, mask=inside)
    o = tl.sum(s * (q_t * scale)[:, None], 0)
    o = tl.where(exists, o, float("nan"))
    tl.store(out + (row * HV + head) * DV + c, o.to(out.dtype.element_ty), mask=c < DV)


def gated_delta_step(step: DeltaStep, scale: float, use_qk_l2norm: bool) -> Tensor:
    """Return out [R, Hv, Dv] in v's dtype; the states of the rows change."""
    q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (step.q, step.k, step.v))
    g, beta = (x if x.stride(1) == 1 else x.contiguous() for x in (step.g, step.beta))
    rows, heads, width = v.shape
    out = v.new_empty((rows, heads, width))
    if not rows:
        return out
    size = k.shape[2]
    block = min(BLOCK_V, triton.next_power_of_2(width))
    gated_delta_step_kernel[(rows, heads, triton.cdiv(width, block))](
        q,
        k,
        v,
        g,
        beta,
        step.state,
        None if step.slots is None else step.slots.contiguous(),
        out,
        len(step.state),
        heads,
        scale,
        *(x.stride(0) for x in (q, k, v, g, beta, step.state)),
        DK=size,
        DV=width,
        REPEAT=heads // k.shape[1],
        HAS_SLOTS=step.slots is not None,
        NORMALISE=use_qk_l2norm,
        BLOCK_K=triton.next_power_of_2(size),
        BLOCK_V=block,
        num_warps=4,
    )
    return out


@triton.jit
def causal_conv_step_kernel(
    x,
    state,
    weight,
    bias,
    slots,
    out,
    S,
    C,
    x_row,
    state_slot,
    weight_row,
    K: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program is BLOCK channels of a row. out is [R, C]. A row whose slot does not exist gets NaN and writes to no
    state."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64) if HAS_SLOTS else row
    exists = (slot >= 0) & (slot < S)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known, held = c < C, c < tl.where(exists, C, 0)
    new = tl.load(x + row * x_row + c, mask=known, other=0.0)  # [BLOCK]
    filters, last = weight + c * weight_row, state + slot * state_slot + c.to(tl.int64) * (K - 1)
    total = new.to(tl.float32) * tl.load(filters + K - 1, mask=known, other=0.0).to(tl.float32)
    for j in tl.static_range(K - 1):
        value = tl.load(last + j, mask=held, other=0.0)
        total += value.to(tl.float32) * tl.load(filters + j, mask=known, other=0.0).to(tl.float32)
        if j > 0:
            tl.debug_barrier()  # another thread may hold the numbers that are overwritten
            tl.store(last + j - 1, value, mask=held)
    if K > 1:
        tl.debug_barrier()
        tl.store(last + K - 2, new, mask=held)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    total = tl.where(exists, total, float("nan"))
    tl.store(out + row * C + c, total.to(out.dtype.element_ty), mask=known)


def causal_conv_step(step: ConvStep, activation: str) -> Tensor:
    """Return out [R, C] in x's dtype; the last inputs of the rows change."""
    x, weight = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (step.x, step.weight))
    rows, channels = x.shape
    out = x.new_empty((rows, channels))
    if not rows:
        return out
    block = min(BLOCK_C, triton.next_power_of_2(channels))
    causal_conv_step_kernel[(rows, triton.cdiv(channels, block))](
        x,
        step.state,
        weight,
        None if step.bias is None else step.bias.contiguous(),
        None if step.slots is None else step.slots.contiguous(),
        out,
        len(step.state),
        channels,
        x.stride(0),
        step.state.stride(0),
        weight.stride(0),
        K=weight.shape[1],
        HAS_SLOTS=step.slots is not None,
        HAS_BIAS=step.bias is not None,
        SILU=activation == "silu",
        BLOCK=block,
        num_warps=4,
    )
    return out
