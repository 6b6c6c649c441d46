"""rotary_append on Triton, in one launch. R rows, Hq and Hkv heads of D, P positions of Rd, S slots of C tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.rotary_append.reference import HeadNorms, Places

BLOCK_H = 4  # heads of a program: the 36 of a 7B model are 9 programs a row


@triton.jit
def _rounded(wide, x):
    """fp32 numbers as the dtype of ``x`` has them."""
    return wide.to(x.dtype).to(tl.float32)


@triton.jit
def rotary_append_kernel(
    qkv,
    cos,
    sin,
    suffix_k,
    suffix_v,
    q,
    positions,
    lengths,
    slots,
    q_norm,
    k_norm,
    eps,
    P,
    S,
    C,
    q_heads,
    kv_heads,
    qkv_row,
    cos_row,
    sin_row,
    k_slot,
    k_token,
    k_head,
    v_slot,
    v_token,
    v_head,
    D: tl.constexpr,
    RD: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program is BLOCK_H of the Hq + 2 Hkv heads of a row. q is [R, Hq, D].

    A row whose place does not exist gets NaN for q and writes to no cache.
    """
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    token = tl.load(lengths + row).to(tl.int64) - 1
    slot = tl.load(slots + row).to(tl.int64) if HAS_SLOTS else row
    exists = (position >= 0) & (position < P) & (slot >= 0) & (slot < S) & (token >= 0) & (token < C)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    inside = (head < q_heads + 2 * kv_heads)[:, None] & (d < D)[None, :]
    heads = qkv + row * qkv_row + head[:, None] * D
    x = tl.load(heads + d[None, :], mask=inside, other=0.0)  # [BLOCK_H, BLOCK_D]
    across = (d + RD // 2) % RD  # the other half of what is rotated
    other = tl.load(heads + across[None, :], mask=inside, other=0.0)
    turned, counterpart = x.to(tl.float32), other.to(tl.float32)
    if HAS_NORMS:
        scale = tl.rsqrt(tl.sum(turned * turned, 1) / D + eps)[:, None]
        of_query = (head < q_heads)[:, None]
        turned *= scale
        counterpart *= scale
        if not UNIT_OFFSET:
            turned, counterpart = _rounded(turned, x), _rounded(counterpart, x)
        # [1, BLOCK_D], in order and as the other half has them; of v's heads it does not matter which.
        q_here, k_here = tl.load(q_norm + d, mask=d < D)[None, :], tl.load(k_norm + d, mask=d < D)[None, :]
        q_across, k_across = tl.load(q_norm + across)[None, :], tl.load(k_norm + across)[None, :]
        here = tl.where(of_query, q_here, k_here).to(tl.float32)
        there = tl.where(of_query, q_across, k_across).to(tl.float32)
        if UNIT_OFFSET:
            turned, counterpart = _rounded(turned * (1.0 + here), x), _rounded(counterpart * (1.0 + there), x)
        else:
            turned *= here
            counterpart *= there
    # As sizes, since the interpreter has no conjunction of a scalar and a vector.
    known = d < tl.where(exists, RD, 0)
    written = tl.where(exists, kv_heads, 0)
    c = tl.load(cos + position * cos_row + d, mask=known, other=float("nan")).to(tl.float32)  # [BLOCK_D]
    s = tl.load(sin + position * sin_row + d, mask=known, other=float("nan")).to(tl.float32)
    s = tl.where(d < RD // 2, -s, s)
    rotated = turned * c[None, :] + counterpart * s[None, :]
    if RD < D:
        passed = d >= tl.where(exists, RD, D)
        rotated = tl.where(passed[None, :], turned, rotated)
    rotated = rotated.to(q.dtype.element_ty)

    key = (head - q_heads).to(tl.int64)
    value = key - kv_heads
    of_q, of_k, of_v = key < 0, (key >= 0) & (key < written), (value >= 0) & (value < written)
    tl.store(q + (row * q_heads + head)[:, None] * D + d[None, :], rotated, mask=inside & of_q[:, None])
    to_k = suffix_k + slot * k_slot + token * k_token + (key * k_head)[:, None] + d[None, :]
    tl.store(to_k, rotated, mask=inside & of_k[:, None])
    to_v = suffix_v + slot * v_slot + token * v_token + (value * v_head)[:, None] + d[None, :]
    tl.store(to_v, x, mask=inside & of_v[:, None])


def rotary_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    places: Places,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Return q, normalised and rotated, [R, Hq, D], and write such a k, and v, of each row into the cache."""
    qkv, cos, sin = (x if x.stride(1) == 1 else x.contiguous() for x in (qkv, cos, sin))
    rows, width = qkv.shape
    slots, capacity, kv_heads, dim = suffix_k.shape
    heads = width // dim
    q = qkv.new_empty((rows, heads - 2 * kv_heads, dim))
    if not rows:
        return q
    rotary_append_kernel[(rows, triton.cdiv(heads, BLOCK_H))](
        qkv,
        cos,
        sin,
        suffix_k,
        suffix_v,
        q,
        *(None if x is None else x.contiguous() for x in places),
        *((None, None, 0.0) if norms is None else (norms.q.contiguous(), norms.k.contiguous(), norms.eps)),
        len(cos),
        slots,
        capacity,
        heads - 2 * kv_heads,
        kv_heads,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        *suffix_k.stride()[:3],
        *suffix_v.stride()[:3],
        D=dim,
        RD=cos.shape[1],
        HAS_SLOTS=places.suffix_slots is not None,
        HAS_NORMS=norms is not None,
        UNIT_OFFSET=norms is not None and norms.unit_offset,
        BLOCK_H=BLOCK_H,
        BLOCK_D=triton.next_power_of_2(dim),
        num_warps=4,
    )
    return q
