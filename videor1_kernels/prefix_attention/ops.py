"""The torch operators of prefix_attention: opaque to torch.compile, with gradients.

An operator takes only tensors and numbers, so a layout is passed as its lengths; the operator then finds the layout of
these lengths and this device again. The operators are private; the public function is in the package. Their schemas
give the types of their parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import compute_dtype
from videor1_kernels.prefix_attention.layout import PrefixLayout, known_layout

_OP = "prefix_attention"
_REST = "SymInt[] prompts, SymInt[] counts, SymInt[] completions, float scale, str backend"


@torch.library.custom_op(
    "videor1::prefix_attention", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)"
)
def prefix_attention_op(q, k, v, prompts, counts, completions, scale, backend):
    """Return out [T, Hq, D] and lse [Hq, T], from q [T, Hq, D] and k, v [T, Hkv, D]."""
    run = dispatch.resolve(_OP, backend, q.device, _dtype(q, k, v))
    with dispatch.running_on(q):
        out, lse = run.forward(q, k, v, _layout(prompts, counts, completions, q.device), scale)
    return out.contiguous(), lse


@prefix_attention_op.register_fake
def _(q, k, v, *others):
    chosen = dispatch.chosen_backend(_OP, q.device, others[-1], _dtype(q, k, v))
    dtype = compute_dtype(q, k, v)
    out = q.new_empty(q.shape, dtype=_dtype(q, k, v) if chosen == "triton" else dtype)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)


@torch.library.custom_op(
    "videor1::prefix_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_REST}) -> (Tensor, Tensor, Tensor)",
)
def prefix_attention_backward_op(grad, q, k, v, out, lse, prompts, counts, completions, scale, backend):
    """Return (dq, dk, dv)."""
    run = dispatch.resolve(_OP, backend, q.device, _dtype(q, k, v))
    with dispatch.running_on(q):
        dq, dk, dv = run.backward(grad, q, k, v, out, lse, _layout(prompts, counts, completions, q.device), scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@prefix_attention_backward_op.register_fake
def _(grad, q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Any) -> tuple[Any, ...]:
    return *prefix_attention_backward_op(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None, None, None


prefix_attention_op.register_autograd(_differentiate, setup_context=_save)


def _dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of the inputs if they have the same one, else the compute dtype."""
    return q.dtype if q.dtype == k.dtype == v.dtype else compute_dtype(q, k, v)


def _layout(
    prompts: Sequence[int], counts: Sequence[int], completions: Sequence[int], device: torch.device
) -> PrefixLayout:
    return known_layout(tuple(prompts), tuple(counts), tuple(completions), device)
