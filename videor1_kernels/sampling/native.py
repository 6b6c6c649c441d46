"""sample_tokens on a CPU in fp32, from csrc/sample_tokens.cpp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_double, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from videor1_kernels import extension
from videor1_kernels.extension import vector_bits
from videor1_kernels.sampling.reference import SampleTokensOptions

GRAIN = 2**15  # logits that are worth a thread of their own


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why it cannot run there, or None if it can. Compiles the library when the answer first depends on that."""
    return extension.unavailable_on_cpu(device, dtype, (torch.float32,), _function)


@functools.cache
def _function() -> Callable[..., int] | str:
    logits, uniform = [c_void_p, *[c_int64] * 3], [c_void_p, c_void_p, c_int64]
    arguments = [*logits, *uniform, c_float, c_double, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p]
    return extension.function("sample_tokens", "sample_tokens", arguments, "sample_tokens")


def sample_tokens(
    logits: Tensor, uniform: Tensor, banned: Tensor | None, options: SampleTokensOptions
) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [R] and logp fp32 [R]."""
    call = _function()
    assert not isinstance(call, str), call
    logits = logits.detach().float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    uniform, banned = uniform.double().contiguous(), None if banned is None else banned.contiguous()
    rows, vocabulary = logits.shape
    tokens, logp = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    ids, count = (None, 0) if banned is None else (banned.data_ptr(), len(banned))
    parallel_for = extension.torch_parallel_for() if rows * vocabulary > GRAIN else None
    numbers = (ids, count, options.temperature, options.top_p, options.top_k)
    outputs = (tokens.data_ptr(), logp.data_ptr(), vector_bits(), max(1, GRAIN // vocabulary), parallel_for)
    error = call(logits.data_ptr(), logits.stride(0), rows, vocabulary, uniform.data_ptr(), *numbers, *outputs)
    if error == -1000:
        raise MemoryError(f"sample_tokens: no memory for a row of {vocabulary} logits")
    if error:
        raise RuntimeError(f"sample_tokens: torch_parallel_for failed with error {error}")
    return tokens, logp
