"""prefix_attention as autograd sees it, whatever the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from videor1_kernels import dispatch
from videor1_kernels.checks import compute_dtype
from videor1_kernels.prefix_attention.layout import PrefixLayout


class PrefixAttention(torch.autograd.Function):
    """q, k, v, layout, scale, backend -> out. Keeps q, k, v, the output and its log-sum-exps, no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float, backend: str) -> Tensor:
        dtype = q.dtype if q.dtype == k.dtype == v.dtype else compute_dtype(q, k, v)
        ctx.run = dispatch.resolve("prefix_attention", backend, q.device, dtype)
        with dispatch.running_on(q):
            out, lse = ctx.run.forward(q, k, v, layout, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        with dispatch.running_on(q):
            gradients = ctx.run.backward(grad, q, k, v, out, lse, ctx.layout, ctx.scale)
        return *gradients, None, None, None
