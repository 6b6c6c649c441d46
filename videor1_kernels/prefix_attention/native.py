"""prefix_attention on a CPU in fp32 and bf16, from csrc/prefix_attention.cpp: a packed row in one call each way.

Its working memory is the library's own, which torch does not count: the keys and values in fp32, and in the backward
pass sums of their gradients, several for a prompt.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from videor1_kernels import extension
from videor1_kernels.extension import vector_bits
from videor1_kernels.prefix_attention.layout import PrefixLayout
from videor1_kernels.prefix_attention.work import segment_numbers

NO_MEMORY = -1000  # kNoMemory of csrc/prefix_attention.cpp

_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """The two functions of csrc/prefix_attention.cpp."""

    forward: Callable[..., int]
    backward: Callable[..., int]


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why it cannot run there, or None if it can. Compiles the library when the answer first depends on that."""
    if device.type != "cpu":
        return "it runs on a CPU"
    if dtype not in (None, torch.float32, torch.bfloat16):
        return f"it takes fp32 and bf16, and the inputs are {dtype}"
    with _lock:
        loaded = _library()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _library() -> Library | str:
    try:
        library = extension.load("prefix_attention")
    except extension.Unavailable as reason:
        extension.log.warning("videor1_kernels: prefix attention on the CPU runs in plain torch, slower: %s", reason)
        return str(reason)
    made = Library(library.prefix_attention, library.prefix_attention_backward)
    for call, pointers in ((made.forward, 7), (made.backward, 11)):
        call.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_float, ctypes.c_void_p]  # type: ignore[attr-defined]
    return made


def forward(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [T, Hq, D] and lse [Hq, T], both fp32, of q [T, Hq, D] and k, v [T, Hkv, D]."""
    q, k, v = _operands(q, k, v)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
    pointers = [x.data_ptr() for x in (q, k, v, out, lse)]
    _call(_loaded().forward, pointers, (q, k, v), layout, scale)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: PrefixLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), each in its input's dtype, from the gradient of ``out`` and the forward pass's results."""
    dtypes = q.dtype, k.dtype, v.dtype
    q, k, v = _operands(q, k, v)
    [grad] = _operands(grad.float())
    out, lse = out.float().contiguous(), lse.float().contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    pointers = [x.data_ptr() for x in (grad, q, k, v, out, lse, dq, dk, dv)]
    _call(_loaded().backward, pointers, (q, k, v, grad), layout, scale)
    dq, dk, dv = (x.to(dtype) for x, dtype in zip((dq, dk, dv), dtypes, strict=True))
    return dq, dk, dv


def _loaded() -> Library:
    library = _library()
    assert isinstance(library, Library), library
    return library


def _operands(*inputs: Tensor) -> list[Tensor]:
    """The inputs in one dtype, the entries of a head neighbours in memory."""
    if len({x.dtype for x in inputs}) > 1:
        inputs = tuple(x.float() for x in inputs)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in inputs]


def _call(
    call: Callable[..., int], pointers: list[int], operands: tuple[Tensor, ...], layout: PrefixLayout, scale: float
) -> None:
    """``operands``: q, k, v and, in the backward pass, the gradient."""
    q, k = operands[:2]
    tokens, heads, dim = q.shape
    segments = segment_numbers(layout)
    threads = torch.get_num_threads()
    parallel_for = extension.torch_parallel_for() if threads > 1 else None
    numbers = (
        tokens,
        k.shape[1],
        heads // k.shape[1],
        dim,
        q.dtype == torch.bfloat16,
        len(segments) // 4,
        threads,
        vector_bits(),
        *(stride for x in operands for stride in x.stride()[:2]),
    )
    error = call(*pointers, segments, (ctypes.c_int64 * len(numbers))(*numbers), scale, parallel_for)
    if error == NO_MEMORY:
        raise MemoryError(f"prefix_attention: no memory for the keys and sums of a row of {tokens} tokens")
    if error:
        raise RuntimeError(f"prefix_attention: torch_parallel_for failed with error {error}")
