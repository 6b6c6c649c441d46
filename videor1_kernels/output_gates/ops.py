"""sigmoid_mul and gated_rms_norm on the backend that is asked for, and each as one node of a compiled graph."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import rarest_dtype


def run_sigmoid_mul(x: Tensor, gate: Tensor, backend: str) -> Tensor:
    """Return [R, W]."""
    chosen = dispatch.resolve("sigmoid_mul", backend, x.device, x.dtype)
    with dispatch.running_on(x):
        return chosen.sigmoid_mul(x, gate)


def run_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    """Return [R, Hv, D]."""
    chosen = dispatch.resolve("gated_rms_norm", backend, x.device, rarest_dtype(x, gate, weight))
    with dispatch.running_on(x):
        return chosen.gated_rms_norm(x, gate, weight, eps)


@torch.library.custom_op("videor1::sigmoid_mul", mutates_args=())
def sigmoid_mul_op(x: Tensor, gate: Tensor, backend: str) -> Tensor:
    return run_sigmoid_mul(x, gate, backend).contiguous()


@sigmoid_mul_op.register_fake
def _(x: Tensor, gate: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("videor1::gated_rms_norm", mutates_args=())
def gated_rms_norm_op(x: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return run_gated_rms_norm(x, gate, weight, eps, backend).contiguous()


@gated_rms_norm_op.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)
