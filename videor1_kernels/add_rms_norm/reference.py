"""Reference of add_rms_norm in plain torch. R rows, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype


def normed_dtype(weight: Tensor, summed: Tensor, unit_offset: bool) -> torch.dtype:
    """That of the result: with ``unit_offset`` the stream's own, whatever the weight is."""
    return summed.dtype if unit_offset else torch.promote_types(weight.dtype, summed.dtype)


def add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Return normed and summed, both [R, H]."""
    summed = x if residual is None else (x + residual).to(residual.dtype)
    wide = summed.to(compute_dtype(x, weight, residual))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1 + weight.to(normed.dtype))).to(summed.dtype), summed
    return weight * normed.to(summed.dtype), summed
