"""The product of two bf16 matrices with an fp32 result on a CPU, from csrc/bf16_product.cpp."""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from videor1_kernels import extension

Product = Callable[[Tensor, Tensor], Tensor]

_lock = threading.Lock()


def bf16_product() -> Product | None:
    """A function that returns a b^T [n, m] in fp32, of bf16 a [n, k] and b [m, k] on the CPU.

    Products are exact, sums are in fp32. None if this CPU cannot do so; the first call in a process then logs why.
    """
    with _lock:
        return _bf16_product()


@functools.cache
def _bf16_product() -> Product | None:
    try:
        return _load()
    except extension.Unavailable as reason:
        extension.log.warning("videor1_kernels: bf16 logits on the CPU are computed in fp32, more slowly: %s", reason)
        return None


def _load() -> Product:
    if platform.machine() != "x86_64" or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        raise extension.Unavailable("this CPU has no AVX-512")  # known without compiling anything
    library = extension.load("bf16_product")
    if not library.bf16_product_supported():
        raise extension.Unavailable("this CPU has no AVX-512 BF16 instructions")
    call = library.bf16_product
    call.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 6 + [ctypes.c_void_p]
    parallel_for = extension.torch_parallel_for()

    def product(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        assert a.device == b.device == torch.device("cpu")
        assert a.shape[1:] == b.shape[1:]  # both are matrices, or the strides below fail
        a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
        out = torch.empty(len(a), len(b), dtype=torch.float32, device="cpu")
        pointers = a.data_ptr(), b.data_ptr(), out.data_ptr()
        error = call(*pointers, len(a), len(b), a.shape[1], a.stride(0), b.stride(0), out.stride(0), parallel_for)
        if error:
            raise RuntimeError(f"bf16_product: torch_parallel_for failed with error {error}")
        return out

    return product
