"""rotary_append on a CPU in fp32 and bf16, from csrc/decode_step.cpp."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from videor1_kernels import extension
from videor1_kernels.rotary_append.reference import HeadNorms, Places, check_places

GRAIN = 2**15  # numbers that are worth a thread of their own
BF16 = {torch.float32: 0, torch.bfloat16: 1}
NUMBERS = struct.Struct("17q").pack  # a third of the time that an array of ctypes takes


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why it cannot run there, or None if it can. Compiles the library when the answer first depends on that."""
    return extension.unavailable_on_cpu(device, dtype, BF16, _function)


@functools.cache
def _function() -> Callable[..., int] | str:
    arguments = [*[c_void_p] * 11, c_float, c_char_p, c_int, c_int64, c_void_p]
    return extension.function("decode_step", "rotary_append", arguments, "rotary_append")


def rotary_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    places: Places,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Return q, normalised and rotated, [R, Hq, D], and write such a k, and v, of each row into the cache."""
    call = _function()
    assert not isinstance(call, str), call
    if sin.dtype != cos.dtype:
        cos, sin = cos.float(), sin.float()
    kind = BF16[qkv.dtype] + 2 * BF16[cos.dtype] + (0 if norms is None else 4 * norms.unit_offset)
    qkv, cos, sin = (x if x.stride(1) == 1 else x.contiguous() for x in (qkv, cos, sin))
    positions, lengths, slots = places
    positions, lengths = _addressable(positions), _addressable(lengths)
    slots = None if slots is None else _addressable(slots)
    rows, width = qkv.shape
    count, capacity, kv_heads, dim = suffix_k.shape
    weights = () if norms is None else (norms.q.float().contiguous(), norms.k.float().contiguous())
    q = qkv.new_empty((rows, width // dim - 2 * kv_heads, dim))
    numbers = NUMBERS(
        rows,
        q.shape[1],
        kv_heads,
        dim,
        cos.shape[0],
        count,
        capacity,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        *suffix_k.stride()[:3],
        *suffix_v.stride()[:3],
        cos.shape[1],
    )
    error = call(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        suffix_k.data_ptr(),
        suffix_v.data_ptr(),
        q.data_ptr(),
        positions.data_ptr(),
        lengths.data_ptr(),
        None if slots is None else slots.data_ptr(),
        *((None, None) if norms is None else (weight.data_ptr() for weight in weights)),
        0.0 if norms is None else norms.eps,
        numbers,
        kind,
        max(1, GRAIN // width),
        extension.torch_parallel_for() if rows * width > GRAIN else None,
    )
    if error == -1:  # which is known here by the call alone: these checks are several of torch's operations
        check_places(places, len(cos), count, capacity)
    if error:
        raise RuntimeError(f"rotary_append: torch_parallel_for failed with error {error}")
    return q


def _addressable(values: Tensor) -> Tensor:
    return values if values.dtype == torch.int64 and values.is_contiguous() else values.long().contiguous()
