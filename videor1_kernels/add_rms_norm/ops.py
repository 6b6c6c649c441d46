"""add_rms_norm on the backend that is asked for, and as one node of a compiled graph."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.add_rms_norm.reference import normed_dtype
from videor1_kernels.checks import rarest_dtype


def run(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, backend: str, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Return normed and summed; without a residual summed is x itself."""
    chosen = dispatch.resolve("add_rms_norm", backend, x.device, rarest_dtype(x, weight, residual))
    with dispatch.running_on(x):
        return chosen.add_rms_norm(x, weight, residual, eps, unit_offset)


@torch.library.custom_op("videor1::add_rms_norm", mutates_args=())
def add_rms_norm_op(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, unit_offset: bool, backend: str
) -> list[Tensor]:
    """Return [normed, summed], or [normed] without a residual: an operator may not return its input."""
    normed, summed = run(x, weight, residual, eps, backend, unit_offset)
    return [normed] if residual is None else [normed, summed]


@add_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, unit_offset: bool, backend: str) -> list[Tensor]:
    summed = x if residual is None else residual
    normed = x.new_empty(x.shape, dtype=normed_dtype(weight, summed, unit_offset))
    return [normed] if residual is None else [normed, x.new_empty(x.shape, dtype=summed.dtype)]
