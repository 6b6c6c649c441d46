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


def silu_mul(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """The gated activation of a feed-forward layer (SwiGLU), from one product for both halves. For inference.

    out = silu(gate) * up with silu(z) = z / (1 + exp(-z)), which is computed in fp32 and rounded to the dtype before
    the product, as in ``F.silu(gate) * up``. fp64 stays fp64.

    Args:
        gate_up: [R, 2 I], gate then up in each row; fp64, fp32, bf16 or fp16.
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        [R, I] in gate_up's dtype; no gradient.

    Raises:
        ValueError: a wrong shape or dtype, an input that requires a gradient while torch records them, or a backend
            that cannot run here.
        TypeError: an argument that is no tensor.

    Source:
        This library; SwiGLU is that of arXiv 2002.05202.
    """
    op = "silu_mul"
    check_tensor(op, "gate_up", gate_up, ("R", "2 I"))
    if gate_up.shape[1] % 2:
        raise fail(op, "gate_up", "an even number of columns, gate then up", gate_up.shape[1])
    check_no_gradient(op, gate_up=gate_up)
    return (silu_mul_op if torch.compiler.is_compiling() else run)(gate_up, backend)
