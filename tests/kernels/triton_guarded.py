"""Runs every Triton kernel in the interpreter with each tensor between two pages that may not be touched.

A read or a write that leaves its tensor ends the process with a segmentation fault. Prints the names of what has run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from videor1_kernels import (
    DecodeLayout,
    PrefixLayout,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    prefix_attention,
    prefix_decode_attention,
    sample_tokens,
    selective_log_softmax,
    tgrpo_advantages,
)
from videor1_kernels.linear_logprob import products, triton_rows
from videor1_kernels.prefix_attention import triton, triton_decode, work
from videor1_kernels.sampling import triton as sampling

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
kept: list[object] = []  # the memory lives as long as the process


def guarded(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> Tensor:
    """Memory whose last (or first) byte touches a page without access; it holds NaN, or for integers a large value."""
    count = torch.Size(shape).numel()
    if not count:
        return empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if libc.mprotect(start + page * mmap.PAGESIZE, mmap.PAGESIZE, 0):  # 0: no access
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE + (pages * mmap.PAGESIZE - size if at_end else 0)
    kept.append(memory)
    values = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
    values.fill_(torch.nan if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max)
    return values.view(shape)


empty, zeros, empty_like, zeros_like = torch.empty, torch.zeros, torch.empty_like, torch.zeros_like
new_empty = Tensor.new_empty


def shape_of(size: tuple) -> tuple[int, ...]:
    return tuple(size[0]) if size and not isinstance(size[0], int) else size


def guard_allocations(at_end: bool) -> None:
    """What the launchers allocate is guarded too."""

    def make(*size, dtype=None, device=None):  # type: ignore[no-untyped-def]
        return guarded(shape_of(size), dtype or torch.float32, at_end)

    torch.empty = make  # type: ignore[assignment]
    torch.zeros = lambda *size, **options: make(*size, **options).zero_()  # type: ignore[assignment]
    torch.empty_like = lambda x: make(*x.shape, dtype=x.dtype)  # type: ignore[assignment]
    torch.zeros_like = lambda x, dtype=None: make(*x.shape, dtype=dtype or x.dtype).zero_()  # type: ignore[assignment]
    Tensor.new_empty = lambda self, *size, dtype=None, device=None: make(*size, dtype=dtype or self.dtype)  # type: ignore


def release_allocations() -> None:
    torch.empty, torch.zeros, torch.empty_like, torch.zeros_like = empty, zeros, empty_like, zeros_like
    Tensor.new_empty = new_empty  # type: ignore[method-assign]


def run(name: str, call: Callable[..., list[Tensor]], *inputs: Tensor) -> None:
    """Guarded from above and from below, the results are those of ordinary memory."""
    want = call(*inputs)
    for at_end in (True, False):
        copies = [
            guarded(tuple(x.shape), x.dtype, at_end).copy_(x.detach()).requires_grad_(x.requires_grad) for x in inputs
        ]
        guard_allocations(at_end)
        try:
            got = call(*copies)
        finally:
            release_allocations()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    print(name, flush=True)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def head(dtype: torch.dtype, rows: int, vocab: int, size: int) -> None:
    labels = torch.randint(vocab, (rows,))
    labels[0], labels[-1] = vocab - 1, 0
    temperature, g, e = torch.rand(rows) + 0.5, torch.randn(rows), torch.randn(rows)
    leaves = leaf(rows, size, dtype=dtype), leaf(vocab, size, dtype=dtype), leaf(vocab, dtype=dtype)

    def logprob(hidden, weight, bias, labels, temperature, g, e):  # type: ignore[no-untyped-def]
        out = linear_logprob(hidden, weight, labels, bias=bias, temperature=temperature, backend="triton")
        return [*out, *torch.autograd.grad(out, (hidden, weight, bias), (g, e))]

    run(f"linear_logprob {dtype} {rows} {vocab} {size}", logprob, *leaves, labels, temperature, g, e)

    cu = torch.tensor([0, rows // 2, rows // 2, rows], dtype=torch.int32)
    advantages, old, ref = torch.tensor([1.0, 1.0, -1.0]), torch.randn(rows) - 4, torch.randn(rows) - 4

    def loss(level: str, beta: float):  # type: ignore[no-untyped-def]
        def call(hidden, weight, bias, labels, temperature, advantages, cu, old, ref):  # type: ignore[no-untyped-def]
            out = linear_grpo_loss(
                hidden,
                weight,
                labels,
                advantages,
                cu,
                bias=bias,
                temperature=temperature,
                old_logp=old,
                ref_logp=ref,
                beta=beta,
                clip_low=0.2,
                clip_high=0.2,
                importance_level=level,
                backend="triton",
            )
            return [out.loss, out.logp, out.entropy, *torch.autograd.grad(out.loss, (hidden, weight, bias))]

        return call

    for level, beta in (("token", 0.0), ("sequence", 0.04)):
        run(
            f"linear_grpo_loss {dtype} {rows} {vocab} {size} {level}",
            loss(level, beta),
            *leaves,
            labels,
            temperature,
            advantages,
            cu,
            old,
            ref,
        )


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    products.MIN_CHUNK_ROWS, products.CHUNK_BYTES, triton_rows.BLOCK = 4, 1, 128
    head(torch.float32, 9, 137, 24)
    head(torch.float32, 2, 1, 3)
    head(torch.float16, 9, 136, 24)  # by descriptors: all of it is a multiple of 16 bytes
    head(torch.float16, 9, 137, 23)  # by pointers
    head(torch.float16, 2, 1, 3)

    def select(logits, index, g):  # type: ignore[no-untyped-def]
        logp = selective_log_softmax(logits, index, backend="triton")
        return [logp, *torch.autograd.grad(logp, logits, g)]

    work.LEAST_PART, triton.INTERPRETED = 20, triton.Blocks(*[triton.Block(16, 16, 4, 1)] * 3)

    def attend(layout: PrefixLayout):  # type: ignore[no-untyped-def]
        def call(q, k, v, g):  # type: ignore[no-untyped-def]
            out = prefix_attention(q, k, v, layout, backend="triton")
            return [out, *torch.autograd.grad(out, (q, k, v), g)]

        return call

    for dim, layout in ((16, PrefixLayout([20, 1], [[18, 3], []])), (20, PrefixLayout([17], [[16]]))):
        rows = layout.total_tokens
        run(
            f"prefix_attention {dim}",
            attend(layout),
            leaf(rows, 2, dim),
            leaf(rows, 1, dim),
            leaf(rows, 1, dim),
            torch.randn(rows, 2, dim),
        )

    triton_decode.INTERPRETED, triton_decode.INTERPRETED_PROGRAMS = triton.Block(16, 16, 4, 1), 24

    def decode(q, prefix_k, prefix_v, suffix_k, suffix_v, lengths, cu, group, slots):  # type: ignore[no-untyped-def]
        layout = DecodeLayout(cu, group, suffix_slots=slots)
        for name in ("tiles", "prefix_lengths"):
            indices = getattr(layout, name)
            layout.__dict__[name] = torch.empty(indices.shape, dtype=indices.dtype).copy_(indices)
        return [
            prefix_decode_attention(
                q, prefix_k, prefix_v, suffix_k, suffix_v, suffix_lengths=lengths, layout=layout, backend="triton"
            )
        ]

    for dim, heads, dtype in ((16, (6, 2), torch.float32), (20, (1, 1), torch.float16)):
        prefixes = [torch.randn(38, heads[1], dim).to(dtype) for _ in range(2)]
        suffixes = [torch.randn(12, 37, heads[1], dim).to(dtype) for _ in range(2)]
        lengths = torch.tensor([37, 1, 0, 40, 16, 33, 32, 2, 37, 37, 37])  # 0 and 40 are out of range
        run(
            f"prefix_decode_attention {dim}",
            decode,
            torch.randn(11, heads[0], dim).to(dtype),
            *prefixes,
            *suffixes,
            lengths,
            torch.tensor([0, 37, 38]),
            torch.tensor([0] * 9 + [1, 0]),
            torch.tensor([11, 0, 5, 3, 2, 1, 4, 6, 7, 10, 9]),
        )

    run(
        "selective_log_softmax",
        select,
        leaf(3, 137, dtype=torch.float16),
        torch.tensor([[0, 136, 136]] * 3),
        torch.randn(3, 3),
    )

    def from_logp(logp, advantages, cu, old, ref, mask):  # type: ignore[no-untyped-def]
        out = grpo_loss(
            logp, advantages, cu, old_logp=old, ref_logp=ref, mask=mask, backend="triton", importance_level="sequence"
        )
        return [out.loss, out.kl, *torch.autograd.grad(out.loss, logp)]

    run(
        "grpo_loss",
        from_logp,
        leaf(1030),
        torch.randn(3),
        torch.tensor([0, 1027, 1027, 1030]),
        torch.randn(1030),
        torch.randn(1030),
        torch.rand(1030) > 0.2,
    )

    def advantages(accuracy, format, lengths, shuffled):  # type: ignore[no-untyped-def]
        out = tgrpo_advantages(accuracy, format, lengths, shuffled, backend="triton")
        return [out.advantages, out.rewards, out.temporal, out.p, out.p_shuffled]

    run(
        "tgrpo_advantages",
        advantages,
        torch.rand(70, 5),
        torch.rand(70, 5),
        torch.randint(600, (70, 5)),
        torch.rand(70, 3),
    )

    sampling.SEGMENTS, sampling.COLUMNS = 4, 8

    def sample(**options):  # type: ignore[no-untyped-def]
        def call(logits, uniform, banned):  # type: ignore[no-untyped-def]
            return list(sample_tokens(logits, uniform, banned=banned, backend="triton", **options))

        return call

    for options in ({}, {"temperature": 0}, {"top_k": 9}, {"top_k": 60, "top_p": 0.9}):  # 60: more than are listed
        run(
            f"sample_tokens {options}",
            sample(**options),
            torch.randn(3, 137).half(),
            torch.rand(3),
            torch.tensor([136, 0]),
        )


if __name__ == "__main__":
    main()
