"""Reference of add_rms_norm in plain torch. R rows, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype


def add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return normed and summed, both [R, H]."""
    summed = x if residual is None else (x + residual).to(residual.dtype)
    wide = summed.to(compute_dtype(x, weight, residual))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(summed.dtype), summed
