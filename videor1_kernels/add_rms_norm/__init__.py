"""The RMS norm of a residual stream, and the addition before it, of a decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.add_rms_norm import native, reference
from videor1_kernels.add_rms_norm.ops import add_rms_norm_op, run
from videor1_kernels.checks import check_no_gradient, check_number, check_tensor, fail

__all__ = ["add_rms_norm"]

dispatch.register_triton("add_rms_norm", "videor1_kernels.add_rms_norm.triton")
dispatch.register("add_rms_norm", "native", native, unavailable=native.unavailable)
dispatch.register("add_rms_norm", "reference", reference)


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream, and normalise the sum for the next layer. For inference.

    s = x + residual; normed = weight * s / sqrt(mean(s^2) + eps), the mean over H. The roundings are those of
    transformers' Qwen2RMSNorm behind an addition: s is rounded to the stream's dtype, the norm is computed in fp32 from
    the rounded s and itself rounded to that dtype, then multiplied by the weight.

    With ``unit_offset`` the factor is 1 + weight, a norm whose weight is 0 at first. The roundings are then those of
    transformers' Qwen3_5RMSNorm: 1 + weight and the product are fp32 too, and rounded once, to the stream's dtype.

    Args:
        x: [R, H], the layer's output; fp64, fp32, bf16 or fp16.
        weight: [H], fp64, fp32, bf16 or fp16.
        residual: [R, H], the stream; fp64, fp32, bf16 or fp16, whatever x is. None: x is the stream.
        eps: added to the mean of squares, 0 or more.
        unit_offset: whether the factor is 1 + weight.
        backend: ``auto``, ``triton``, ``native`` (on a CPU: fp32 and bf16; C++ compiled at its first use),
            ``reference``.

    Returns:
        (normed, summed): [R, H] each. summed is the new stream in the dtype of the old one, x itself where there is no
        residual; normed is in the dtype of weight * summed, with ``unit_offset`` in that of summed. The norm is fp64
        where an input is. Neither has a gradient.

    Raises:
        ValueError: a wrong shape, dtype, device or eps, an input that requires a gradient while torch records them, or
            a backend that cannot run here.
        TypeError: an argument that is no tensor.

    Source:
        This library; the norm is that of arXiv 1910.07467.
    """
    op = "add_rms_norm"
    check_tensor(op, "x", x, ("R", "H"))
    if not x.shape[1]:
        raise fail(op, "x", "at least one entry in a row", list(x.shape))
    check_tensor(op, "weight", weight, (x.shape[1],), device=x.device)
    if residual is not None:
        check_tensor(op, "residual", residual, x.shape, device=x.device)
    check_number(op, "eps", eps, at_least=0)
    check_no_gradient(op, x=x, weight=weight, residual=residual)
    if torch.compiler.is_compiling():
        normed, *summed = add_rms_norm_op(x, weight, residual, float(eps), unit_offset, backend)
        return normed, summed[0] if summed else x
    return run(x, weight, residual, float(eps), backend, unit_offset)
