"""Linear layers on a CPU in fp32 by oneDNN, forward and backward, where it is quicker than torch's choice, MKL.

That is where the CPU has AVX-512 (:func:`videor1_kernels.linear_logprob.tiles.onednn`). With few rows oneDNN takes
longer to start than to multiply.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from videor1_kernels.linear_logprob.tiles import onednn, product

LEAST_ROWS, LEAST_PRODUCTS = 64, 2**21  # multiplications


def use_onednn(model: nn.Module) -> int:
    """Give every plain linear layer of a model in fp32 on a CPU the product above; return how many there are."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and _fits(m.weight)] if onednn() else []
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, by the quicker library for the size."""
    rows = x.numel() // x.shape[-1]
    small = rows < LEAST_ROWS or rows * weight.numel() < LEAST_PRODUCTS
    if small or not (_fits(x) and _fits(weight)) or torch.is_autocast_enabled("cpu") or not onednn():
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], len(weight))


def _fits(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # x [rows, in]
        ctx.save_for_backward(x, weight)
        out = product(x, weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(grad, weight.T) if need_x else None,
            product(grad.T, x.T) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )
