"""rotary_append on the backend that is asked for, and as one node of a compiled graph."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import rarest_dtype
from videor1_kernels.rotary_append.reference import HeadNorms, Places


def run(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    places: Places,
    norms: HeadNorms | None,
    backend: str,
) -> Tensor:
    """Return q [R, Hq, D]; suffix_k and suffix_v change."""
    dtype = rarest_dtype(qkv, cos, sin, *(norms[:2] if norms else ()))
    chosen = dispatch.resolve("rotary_append", backend, qkv.device, dtype)
    with dispatch.running_on(qkv):
        return chosen.rotary_append(qkv, cos, sin, suffix_k, suffix_v, places, norms)


@torch.library.custom_op("videor1::rotary_append", mutates_args=("suffix_k", "suffix_v"))
def rotary_append_op(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    positions: Tensor,
    suffix_lengths: Tensor,
    suffix_slots: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    backend: str,
) -> Tensor:
    places = Places(positions, suffix_lengths, suffix_slots)
    norms = None if q_norm is None or k_norm is None else HeadNorms(q_norm, k_norm, eps, unit_offset)
    return run(qkv, cos, sin, suffix_k, suffix_v, places, norms, backend).contiguous()


@rotary_append_op.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    positions: Tensor,
    suffix_lengths: Tensor,
    suffix_slots: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    backend: str,
) -> Tensor:
    _, _, kv_heads, dim = suffix_k.shape
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // dim - 2 * kv_heads, dim))
