"""Reference of rotary_append in plain torch. R rows, Hq and Hkv heads of D, P positions of Rd, S slots of C tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from videor1_kernels.checks import capturing, check_indices, compute_dtype, fail


class Places(NamedTuple):
    """Where the new token of each row stands: int64 or int32 [R]."""

    positions: Tensor  # in the tables
    suffix_lengths: Tensor  # tokens, the new one included: it is written at the index below
    suffix_slots: Tensor | None  # None: row r has slot r


class HeadNorms(NamedTuple):
    """RMSNorms of each head of q and of k, before they are rotated."""

    q: Tensor  # the weight, [D]
    k: Tensor
    eps: float
    unit_offset: bool = False  # whether the factor is 1 + weight


def check_places(places: Places, positions: int, slots: int, capacity: int) -> None:
    """Check that every place exists. This waits for the device, so it is left out while a CUDA graph is captured."""
    op = "rotary_append"
    check_indices(op, "positions", places.positions, positions)
    lengths = places.suffix_lengths
    if not capturing(lengths) and bool(((lengths < 1) | (lengths > capacity)).any()):
        got = f"{int(lengths.min())} to {int(lengths.max())}"
        raise fail(op, "suffix_lengths", f"values from 1 to C = {capacity}", got)
    if places.suffix_slots is not None:
        check_indices(op, "suffix_slots", places.suffix_slots, slots)


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
    slots, capacity, kv_heads, dim = suffix_k.shape
    check_places(places, len(cos), slots, capacity)
    heads = qkv.unflatten(1, (-1, dim))  # [R, Hq + 2 Hkv, D]
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    dtype = compute_dtype(qkv, cos, sin, *(norms[:2] if norms else ()))
    if norms is not None:
        q, k = (_normed(x, weight, norms, dtype) for x, weight in ((q, norms.q), (k, norms.k)))
    cos, sin = (table[places.positions.long()][:, None].to(dtype) for table in (cos, sin))  # [R, 1, Rd]
    q, k = (_rotated(x, cos, sin).to(qkv.dtype) for x in (q, k))
    rows = torch.arange(len(qkv), device=qkv.device) if places.suffix_slots is None else places.suffix_slots.long()
    token = places.suffix_lengths.long() - 1
    suffix_k[rows, token], suffix_v[rows, token] = k, v
    return q


def _normed(x: Tensor, weight: Tensor, norms: HeadNorms, dtype: torch.dtype) -> Tensor:
    """Normalise heads [R, heads, D] as add_rms_norm does the stream: rounded to their own dtype before the weight, with
    a unit offset behind it.
    """
    wide = x.to(dtype)
    normed = wide * (wide.square().mean(-1, keepdim=True) + norms.eps).rsqrt()
    if norms.unit_offset:
        return (normed * (1 + weight.to(dtype))).to(x.dtype).to(dtype)
    return normed.to(x.dtype).to(dtype) * weight.to(dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + _rotate_half(turned) * sin, passed], -1)


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)
