"""The gated activation of a decode step's feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import check_no_gradient, check_tensor, fail
from videor1_kernels.silu_mul import reference
from videor1_kernels.silu_mul.ops import run, silu_mul_op

__all__ = ["silu_mul"]

dispatch.register_triton("silu_mul", "videor1_kernels.silu_mul.triton")
dispatch.register("silu_mul", "reference", reference)


def silu_mul(gate_up: Tensor, inner: Tensor | None = None, b: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """The gated activation of a feed-forward layer (SwiGLU), from one product for both halves. For inference.

    out = silu(gate) * up with silu(z) = z / (1 + exp(-z)), which is computed in fp32 and rounded to the dtype before
    the product, as in ``F.silu(gate) * up``. fp64 stays fp64.

    With ``inner`` and ``b``, the second products of two LoRA adapters are added first, in the same launch:
    gate + inner_gate b_gate^T, up + inner_up b_up^T, where inner = x A^T is one product with that for gate and up.

    Args:
        gate_up: [R, 2 I], gate then up in each row; fp64, fp32, bf16 or fp16.
        inner: [R, 2 r], what the adapters' A gave: gate's r numbers, then up's; fp64, fp32, bf16 or fp16, as gate_up.
            None: no adapters.
        b: [2 I, r], gate's B above up's, times their scale; fp64, fp32, bf16 or fp16, as gate_up; given with ``inner``.
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        [R, I] in gate_up's dtype; no gradient.

    Raises:
        ValueError: a wrong shape or dtype, one of inner and b alone, an input that requires a gradient while torch
            records them, or a backend that cannot run here.
        TypeError: an argument that is no tensor.

    Source:
        This library; SwiGLU is that of arXiv 2002.05202, LoRA that of arXiv 2106.09685.
    """
    op = "silu_mul"
    check_tensor(op, "gate_up", gate_up, ("R", "2 I"))
    if gate_up.shape[1] % 2:
        raise fail(op, "gate_up", "an even number of columns, gate then up", gate_up.shape[1])
    if (inner is None) != (b is None):
        raise fail(op, "b" if b is None else "inner", "both of inner and b, or neither", "None")
    if inner is not None:
        check_tensor(op, "b", b, (gate_up.shape[1], "r"), (gate_up.dtype,), gate_up.device)
        check_tensor(op, "inner", inner, (len(gate_up), 2 * b.shape[1]), (gate_up.dtype,), gate_up.device)  # type: ignore[union-attr]
    check_no_gradient(op, gate_up=gate_up, inner=inner, b=b)
    return (silu_mul_op if torch.compiler.is_compiling() else run)(gate_up, inner, b, backend)
