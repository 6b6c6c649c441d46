"""add_rms_norm on a CPU in fp32 and bf16, from csrc/decode_step.cpp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from videor1_kernels import extension
from videor1_kernels.add_rms_norm.reference import normed_dtype

GRAIN = 2**15  # numbers that are worth a thread of their own
BF16 = {torch.float32: 0, torch.bfloat16: 1}


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why it cannot run there, or None if it can. Compiles the library when the answer first depends on that."""
    return extension.unavailable_on_cpu(device, dtype, BF16, _function)


@functools.cache
def _function() -> Callable[..., int] | str:
    arguments = [*[c_void_p] * 5, *[c_int64] * 4, c_int, c_float, c_int64, c_void_p]
    return extension.function("decode_step", "add_rms_norm", arguments, "add_rms_norm")


def add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Return normed and summed, both [R, H]."""
    call = _function()
    assert not isinstance(call, str), call
    stream = x if residual is None else residual
    kind = BF16[x.dtype] + 2 * BF16[stream.dtype] + 4 * BF16[weight.dtype] + 8 * unit_offset
    summed = stream
    rows, width = x.shape
    normed = x.new_empty((rows, width), dtype=normed_dtype(weight, stream, unit_offset))
    if x.stride(1) != 1:
        x = x.contiguous()
    weight = weight.contiguous()
    at, to, step = None, None, 0
    if residual is not None:
        if residual.stride(1) != 1:
            residual = residual.contiguous()
        summed = residual.new_empty((rows, width))
        at, to, step = residual.data_ptr(), summed.data_ptr(), residual.stride(0)
    parallel_for = extension.torch_parallel_for() if rows * width > GRAIN else None
    numbers = (rows, width, x.stride(0), step, kind, eps, max(1, GRAIN // width), parallel_for)
    error = call(x.data_ptr(), at, weight.data_ptr(), to, normed.data_ptr(), *numbers)
    if error:
        raise RuntimeError(f"add_rms_norm: torch_parallel_for failed with error {error}")
    return normed, summed
