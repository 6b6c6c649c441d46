"""What Qwen3.5 multiplies an attention's output with: sigmoid of a gate, or silu of one behind a norm."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import check_no_gradient, check_number, check_tensor, fail
from videor1_kernels.output_gates import native, reference
from videor1_kernels.output_gates.ops import gated_rms_norm_op, run_gated_rms_norm, run_sigmoid_mul, sigmoid_mul_op

__all__ = ["gated_rms_norm", "sigmoid_mul"]

dispatch.register_triton("sigmoid_mul", "videor1_kernels.output_gates.triton")
dispatch.register("sigmoid_mul", "reference", reference)
dispatch.register_triton("gated_rms_norm", "videor1_kernels.output_gates.triton")
dispatch.register("gated_rms_norm", "native", native, unavailable=native.unavailable)
dispatch.register("gated_rms_norm", "reference", reference)


def sigmoid_mul(x: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """The gate of an attention's output. For inference.

    out = x * sigmoid(gate) with sigmoid(z) = 1 / (1 + exp(-z)), which is computed in fp32 and rounded to the dtype
    before the product, as in ``x * torch.sigmoid(gate)``. fp64 stays fp64.

    Args:
        x: [R, W]; fp64, fp32, bf16 or fp16. A view of a wider product is read where it lies.
        gate: [R, W]; fp64, fp32, bf16 or fp16, as x; a view as x may be.
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        [R, W] in x's dtype; no gradient.

    Raises:
        ValueError: a wrong shape, dtype or device, an input that requires a gradient while torch records them, or a
            backend that cannot run here.
        TypeError: an argument that is no tensor.

    Source:
        This library; the gate of an attention's output is that of arXiv 2505.06708.
    """
    op = "sigmoid_mul"
    check_tensor(op, "x", x, ("R", "W"))
    check_tensor(op, "gate", gate, x.shape, (x.dtype,), x.device)
    check_no_gradient(op, x=x, gate=gate)
    return (sigmoid_mul_op if torch.compiler.is_compiling() else run_sigmoid_mul)(x, gate, backend)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """The norm of each head of a linear attention's output, times its gate. For inference.

    out = weight * x / sqrt(mean(x^2) + eps) * silu(gate), the mean over D, silu(z) = z / (1 + exp(-z)). The roundings
    are those of transformers' Qwen3_5RMSNormGated: x / sqrt(...) is computed in fp32 and rounded to x's dtype, its
    product with the weight is rounded to what the two dtypes promote to, that with silu, which is fp32, to x's dtype.

    Args:
        x: [R, Hv, D]; fp64, fp32, bf16 or fp16.
        gate: [R, Hv, D]; fp64, fp32, bf16 or fp16, whatever x is. A view of rows of a wider product is read where it
            lies.
        weight: [D], fp64, fp32, bf16 or fp16.
        eps: added to the mean of squares, 0 or more.
        backend: ``auto``, ``triton``, ``native`` (on a CPU: fp32 and bf16; C++ compiled at its first use),
            ``reference``.

    Returns:
        [R, Hv, D] in x's dtype; no gradient. The maths is fp64 where an input is.

    Raises:
        ValueError: a wrong shape, dtype, device or eps, an input that requires a gradient while torch records them, or
            a backend that cannot run here.
        TypeError: an argument that is no tensor.

    Source:
        This library; the norm is that of arXiv 1910.07467, its place that of arXiv 2412.06464.
    """
    op = "gated_rms_norm"
    check_tensor(op, "x", x, ("R", "Hv", "D"))
    if not x.shape[2]:
        raise fail(op, "x", "at least one entry in a head", list(x.shape))
    check_tensor(op, "gate", gate, x.shape, device=x.device)
    check_tensor(op, "weight", weight, (x.shape[2],), device=x.device)
    check_number(op, "eps", eps, at_least=0)
    check_no_gradient(op, x=x, gate=gate, weight=weight)
    call = gated_rms_norm_op if torch.compiler.is_compiling() else run_gated_rms_norm
    return call(x, gate, weight, float(eps), backend)
