"""prefix_decode_attention on a CPU in fp32, from csrc/decode_attention.cpp."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from videor1_kernels import extension
from videor1_kernels.checks import fail
from videor1_kernels.extension import vector_bits
from videor1_kernels.prefix_attention.decode_layout import DecodeInputs, DecodeLayout

LANES = 16  # the head dim is a multiple of this
GRAIN = 2**15  # multiplications of single numbers that are worth a thread of their own

_lock = threading.Lock()


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why it cannot run there, or None if it can. Compiles the library when the answer first depends on that."""
    if device.type != "cpu":
        return "it runs on a CPU"
    if dtype not in (None, torch.float32):
        return f"it computes in fp32, and the inputs are {dtype}"
    with _lock:
        loaded = _library()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _library() -> Callable[..., int] | str:
    try:
        call = extension.load("decode_attention").decode_attention
    except extension.Unavailable as reason:
        extension.log.warning("videor1_kernels: decode attention on the CPU runs in plain torch, slower: %s", reason)
        return str(reason)
    call.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_float, ctypes.c_int64, ctypes.c_void_p]
    return call


def prefix_decode_attention(inputs: DecodeInputs, layout: DecodeLayout, scale: float) -> Tensor:
    """The attention's output, fp32 [R, Hq, D]."""
    q, prefix_k, prefix_v, suffix_k, suffix_v, suffix_lengths = inputs
    call = _library()
    assert not isinstance(call, str), call
    rows, heads, dim = q.shape
    lengths = suffix_lengths.long().contiguous()
    known = lengths.tolist()
    if rows and not 1 <= min(known) <= max(known) <= suffix_k.shape[1]:
        expected, got = f"values from 1 to C = {suffix_k.shape[1]}", f"{min(known)} to {max(known)}"
        raise fail("prefix_decode_attention", "suffix_lengths", expected, got)
    q, prefix_k, prefix_v, suffix_k, suffix_v = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, prefix_k, prefix_v, suffix_k, suffix_v)
    )
    q = q.contiguous()
    out = torch.empty_like(q)
    numbers = (ctypes.c_int64 * 15)(
        rows,
        suffix_k.shape[2],
        heads // suffix_k.shape[2],
        dim,
        *prefix_k.stride()[:2],
        *prefix_v.stride()[:2],
        *suffix_k.stride()[:3],
        *suffix_v.stride()[:3],
        vector_bits(),
    )
    grain = max(1, GRAIN // (numbers[2] * dim * 2 * (layout.longest_prefix + max(known, default=0)) + 1))
    pointers = (x.data_ptr() for x in (q, prefix_k, prefix_v, suffix_k, suffix_v, out, layout.table, lengths))
    error = call(*pointers, numbers, scale, grain, extension.torch_parallel_for())
    if error:
        raise RuntimeError(f"decode_attention: torch_parallel_for failed with error {error}")
    return out
