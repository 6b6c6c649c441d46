"""gated_rms_norm on a CPU in fp32 and bf16, from csrc/decode_step.cpp."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from videor1_kernels import extension
from videor1_kernels.extension import vector_bits

GRAIN = 2**13  # numbers that are worth a thread of their own, each with an exponential
BF16 = {torch.float32: 0, torch.bfloat16: 1}
NUMBERS = struct.Struct("8q").pack


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why it cannot run there, or None if it can. Compiles the library when the answer first depends on that."""
    return extension.unavailable_on_cpu(device, dtype, BF16, _function)


@functools.cache
def _function() -> Callable[..., int] | str:
    arguments = [*[c_void_p] * 4, c_float, c_char_p, c_int, c_int64, c_void_p]
    return extension.function("decode_step", "gated_rms_norm", arguments, "gated_rms_norm")


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) * silu(gate), [R, Hv, D]."""
    call = _function()
    assert not isinstance(call, str), call
    rows, heads, size = x.shape
    out = x.new_empty((rows, heads, size))
    x, gate = (t if t.stride(2) == 1 else t.contiguous() for t in (x, gate))
    weight = weight.contiguous()
    numbers = NUMBERS(rows, heads, size, *x.stride()[:2], *gate.stride()[:2], vector_bits())
    dtypes = BF16[x.dtype] + 2 * BF16[gate.dtype] + 4 * BF16[weight.dtype]
    parallel_for = extension.torch_parallel_for() if out.numel() > GRAIN else None
    pointers = (x.data_ptr(), gate.data_ptr(), weight.data_ptr(), out.data_ptr())
    error = call(*pointers, eps, numbers, dtypes, max(1, GRAIN // size), parallel_for)
    if error:
        raise RuntimeError(f"gated_rms_norm: torch_parallel_for failed with error {error}")
    return out
