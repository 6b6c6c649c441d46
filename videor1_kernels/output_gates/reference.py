"""References of sigmoid_mul and gated_rms_norm in plain torch. R rows, W wide; Hv heads of D."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from videor1_kernels.checks import compute_dtype


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * sigmoid(gate), [R, W]."""
    return x * torch.sigmoid(gate)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) * silu(gate), [R, Hv, D]."""
    dtype = compute_dtype(x, gate, weight)
    wide = x.to(dtype)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    weighted = weight * normed.to(x.dtype)
    return (weighted.to(dtype) * F.silu(gate.to(dtype))).to(x.dtype)
