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
from triton_cases import quicken_interpreter

from videor1_kernels import (
    DecodeLayout,
    PrefixLayout,
    add_rms_norm,
    causal_conv_step,
    gated_delta_step,
    gated_rms_norm,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    prefix_attention,
    prefix_decode_attention,
    rotary_append,
    sample_tokens,
    selective_log_softmax,
    sigmoid_mul,
    silu_mul,
    tgrpo_advantages,
)
from videor1_kernels.linear_logprob import products, triton_rows
from videor1_kernels.prefix_attention import triton, triton_decode, work
from videor1_kernels.sampling import triton as sampling
from videor1_kernels.silu_mul import triton as activation

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


Call = Callable[..., list[Tensor]]


def run(name: str, call: Call, *inputs: Tensor) -> None:
    """The results are the same bits, guarded from above and from below, and none of what memory held is among them."""
    results = []
    for at_end in (True, False):
        copies = [
            guarded(tuple(x.shape), x.dtype, at_end).copy_(x.detach()).requires_grad_(x.requires_grad) for x in inputs
        ]
        guard_allocations(at_end)
        try:
            results.append(call(*copies))
        finally:
            release_allocations()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b), name
        assert a.isfinite().all(), name
    print(name, flush=True)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def head(dtype: torch.dtype, rows: int, vocab: int, size: int, level: str) -> None:
    """linear_logprob and linear_grpo_loss."""
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
    options = {"beta": 0.04 if level == "sequence" else 0.0, "clip_low": 0.2, "clip_high": 0.2}

    def loss(hidden, weight, bias, labels, temperature, advantages, cu, old, ref):  # type: ignore[no-untyped-def]
        named = {"bias": bias, "temperature": temperature, "old_logp": old, "ref_logp": ref, "importance_level": level}
        out = linear_grpo_loss(hidden, weight, labels, advantages, cu, **named, **options, backend="triton")
        return [out.loss, out.logp, out.entropy, *torch.autograd.grad(out.loss, (hidden, weight, bias))]

    run(f"linear_grpo_loss {dtype} {level}", loss, *leaves, labels, temperature, advantages, cu, old, ref)


def attention(layout: PrefixLayout, dim: int) -> None:
    def call(q, k, v, g):  # type: ignore[no-untyped-def]
        out = prefix_attention(q, k, v, layout, backend="triton")
        return [out, *torch.autograd.grad(out, (q, k, v), g)]

    rows = layout.total_tokens
    qkv = [leaf(rows, heads, dim) for heads in (2, 1, 1)]
    run(f"prefix_attention {dim}", call, *qkv, torch.randn(rows, 2, dim))


def decode(dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    def call(q, prefix_k, prefix_v, suffix_k, suffix_v, lengths, cu, group, slots):  # type: ignore[no-untyped-def]
        layout = DecodeLayout(cu, group, suffix_slots=slots)
        for name in ("tiles", "prefix_lengths"):
            indices = getattr(layout, name)
            layout.__dict__[name] = torch.empty(indices.shape, dtype=indices.dtype).copy_(indices)
        keys = q, prefix_k, prefix_v, suffix_k, suffix_v
        return [prefix_decode_attention(*keys, suffix_lengths=lengths, layout=layout, backend="triton")]

    run(
        f"prefix_decode_attention {dim}",
        call,
        torch.randn(11, heads[0], dim).to(dtype),
        *(torch.randn(24, heads[1], dim).to(dtype) for _ in range(2)),
        *(torch.randn(12, 20, heads[1], dim).to(dtype) for _ in range(2)),
        torch.tensor([20, 1, 0, 40, 16, 17, 15, 2, 20, 20, 20]),  # 0 and 40 are out of range
        torch.tensor([0, 23, 24]),
        torch.tensor([0] * 9 + [1, 0]),
        torch.tensor([11, 0, 5, 3, 2, 1, 4, 6, 7, 10, 9]),
    )


def select(logits, index, g):  # type: ignore[no-untyped-def]
    logp = selective_log_softmax(logits, index, backend="triton")
    return [logp, *torch.autograd.grad(logp, logits, g)]


def from_logp(logp, advantages, cu, old, ref, mask):  # type: ignore[no-untyped-def]
    named = {"old_logp": old, "ref_logp": ref, "mask": mask, "importance_level": "sequence"}
    out = grpo_loss(logp, advantages, cu, **named, backend="triton")
    return [out.loss, out.kl, *torch.autograd.grad(out.loss, logp)]


def advantages(accuracy, format, lengths, shuffled):  # type: ignore[no-untyped-def]
    out = tgrpo_advantages(accuracy, format, lengths, shuffled, backend="triton")
    return [out.advantages, out.rewards, out.temporal, out.p, out.p_shuffled]


def sample(options: dict[str, float], splits: int) -> None:
    def call(logits, uniform, banned):  # type: ignore[no-untyped-def]
        sampling.INTERPRETED_PROCESSORS = 3 * splits
        return list(sample_tokens(logits, uniform, banned=banned, backend="triton", **options))

    run(f"sample_tokens {options} {splits}", call, torch.randn(3, 137).half(), torch.rand(3), torch.tensor([136, 0]))


def norm(x, weight, residual):  # type: ignore[no-untyped-def]
    alone, _ = add_rms_norm(x, weight, backend="triton")
    offset, _ = add_rms_norm(x, weight, unit_offset=True, backend="triton")
    return [alone, offset, *add_rms_norm(x, weight, residual=residual, backend="triton")]


def rotate(dim: int, dtype: torch.dtype, *, norms: bool = False, turning: int | None = None) -> None:
    def call(qkv, cos, sin, suffix_k, suffix_v, positions, lengths, slots, *weights):  # type: ignore[no-untyped-def]
        index = {"positions": positions, "suffix_lengths": lengths, "suffix_slots": slots}
        index |= dict(zip(("q_norm", "k_norm"), weights, strict=False)) | {"unit_offset": norms and bool(turning)}
        q = rotary_append(qkv, cos, sin, suffix_k, suffix_v, **index, backend="triton")
        return [q[:3], suffix_k, suffix_v]

    run(
        f"rotary_append {dim} {dtype} {norms} {turning}",
        call,
        torch.randn(8, (3 + 2) * dim).to(dtype),
        *(torch.randn(9, turning or dim) for _ in range(2)),
        *(torch.randn(4, 5, 1, dim).to(dtype) for _ in range(2)),
        torch.tensor([8, 0, 3, 9, -1, 4, 4, 4]),  # from the fourth on, one of each row is out of range
        torch.tensor([5, 1, 3, 1, 1, 0, 6, 5]),
        torch.tensor([3, 0, 2, 1, 1, 1, 1, 4]),
        *(torch.randn(dim) for _ in range(2 * norms)),
    )


def linear_step(dk: int, dv: int, index: torch.dtype) -> None:
    """One row has a slot that does not exist: its NaN is left out."""

    def rule(q, k, v, g, beta, state, slots):  # type: ignore[no-untyped-def]
        out = gated_delta_step(q, k, v, g, beta, state, slots=slots, backend="triton")
        return [out[:2], state]

    def conv(x, state, weight, bias, slots):  # type: ignore[no-untyped-def]
        out = causal_conv_step(x, state, weight, bias=bias, slots=slots, activation="silu", backend="triton")
        return [out[:2], state]

    slots = torch.tensor([3, 0, 4], dtype=index)
    tokens = [torch.randn(3, *shape) for shape in ((1, dk), (1, dk), (3, dv), (3,), (3,))]
    run(f"gated_delta_step {dk} {dv}", rule, *tokens, torch.randn(4, 3, dk, dv), slots)
    run(
        f"causal_conv_step {dk}",
        conv,
        torch.randn(3, dk),
        torch.randn(4, dk, 3),
        torch.randn(dk, 4),
        torch.randn(dk),
        slots,
    )


def main() -> None:
    quicken_interpreter()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    products.MIN_CHUNK_ROWS, products.CHUNK_BYTES, triton_rows.BLOCK = 4, 1, 128
    work.LEAST_PART, triton.INTERPRETED = 20, triton.Blocks(*[triton.Block(16, 16, 4, 1)] * 3)
    triton_decode.INTERPRETED, triton_decode.INTERPRETED_PROGRAMS = triton.Block(16, 16, 4, 1), 24
    sampling.SEGMENTS, sampling.COLUMNS, activation.BLOCK = 4, 8, 32

    head(torch.float32, 6, 70, 24, "token")
    head(torch.float32, 2, 1, 3, "sequence")
    head(torch.float16, 6, 72, 24, "sequence")  # by descriptors: all of it is a multiple of 16 bytes
    head(torch.float16, 6, 70, 23, "token")  # by pointers
    head(torch.float16, 2, 1, 3, "token")
    attention(PrefixLayout([20, 1], [[18, 3], []]), 16)
    attention(PrefixLayout([17], [[16]]), 20)
    decode(16, (6, 2), torch.float32)
    decode(20, (1, 1), torch.float16)
    index = torch.tensor([[0, 136, 136]] * 3)
    run("selective_log_softmax", select, leaf(3, 137, dtype=torch.float16), index, torch.randn(3, 3))
    logps = leaf(1030), torch.randn(3), torch.tensor([0, 1027, 1027, 1030]), torch.randn(1030), torch.randn(1030)
    run("grpo_loss", from_logp, *logps, torch.rand(1030) > 0.2)
    rewards = torch.rand(70, 5), torch.rand(70, 5), torch.randint(600, (70, 5)), torch.rand(70, 3)
    run("tgrpo_advantages", advantages, *rewards)
    for options in ({}, {"temperature": 0}, {"top_k": 9}, {"top_k": 60, "top_p": 0.9}):  # 60: more than are listed
        for splits in (1, 2):
            sample(options, splits)
    run("add_rms_norm", norm, torch.randn(3, 70).half(), torch.randn(70), torch.randn(3, 70))
    rotate(16, torch.float32)
    rotate(6, torch.float16)
    rotate(6, torch.float16, norms=True)
    rotate(20, torch.float16, norms=True, turning=6)
    run("silu_mul", lambda gate_up: [silu_mul(gate_up, backend="triton")], torch.randn(3, 2 * 70).half())
    run("sigmoid_mul", lambda *xs: [sigmoid_mul(*xs, backend="triton")], *torch.randn(2, 3, 70).half())
    heads = torch.randn(3, 5, 20).half(), torch.randn(3, 5, 20), torch.randn(20)
    run("gated_rms_norm", lambda *xs: [gated_rms_norm(*xs, backend="triton")], *heads)
    adapted = torch.randn(3, 2 * 70), torch.randn(3, 2 * 67), torch.randn(2 * 70, 67)
    run("silu_mul", lambda *inputs: [silu_mul(*inputs, backend="triton")], *adapted)
    linear_step(20, 50, torch.int64)
    linear_step(16, 32, torch.int32)


if __name__ == "__main__":
    main()
