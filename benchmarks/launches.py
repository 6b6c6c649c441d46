"""The launches whose kernels are compiled without a GPU: through the package's launchers, at a 7B model's shapes, at
ragged ones, and with every size 1.

For every target are compiled those that take most of a GPU, and those of every shipped tile and block. The others are
code paths that the compiler for one target sees as well: by default they are compiled for that one alone.

Triton compiles a kernel anew for a pointer or an integer that 16 divides, and for an integer that is 1. The tensors
are CPU memory that is never touched: the launchers and Triton read only shapes, strides and addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.add_rms_norm.triton import add_rms_norm
from videor1_kernels.group_advantage import reference as group_advantage
from videor1_kernels.group_advantage.triton import tgrpo_advantages
from videor1_kernels.grpo_loss import records
from videor1_kernels.grpo_loss.triton_terms import terms, whole_terms
from videor1_kernels.linear_logprob.products import logits_buffer, narrow_rows
from videor1_kernels.linear_logprob.triton_forward import TILES, Tile, product_statistics
from videor1_kernels.linear_logprob.triton_rows import RowStatistics, row_gradient, row_statistics
from videor1_kernels.output_gates.triton import gated_rms_norm, sigmoid_mul
from videor1_kernels.prefix_attention import DecodeLayout, PrefixLayout, triton_decode
from videor1_kernels.prefix_attention import triton as prefix_attention
from videor1_kernels.prefix_attention.decode_layout import DecodeInputs
from videor1_kernels.prefix_attention.triton import BLOCKS, NARROW, WIDE_BLOCKS, Block, Blocks
from videor1_kernels.prefix_gated_delta.reference_step import ConvStep, DeltaStep
from videor1_kernels.prefix_gated_delta.triton_step import causal_conv_step, gated_delta_step
from videor1_kernels.rotary_append.reference import HeadNorms, Places
from videor1_kernels.rotary_append.triton import rotary_append
from videor1_kernels.sampling.reference import SampleTokensOptions
from videor1_kernels.sampling.triton import sample_tokens
from videor1_kernels.silu_mul.triton import silu_mul

MODEL = (16384, 152064, 3584)  # N tokens, V vocabulary, H hidden
TARGETS = tuple(TILES)
FULL_TARGETS = (80, 90, 100)  # the others have tiles of their own, but no row or token kernel of their own
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# What a launch is compiled for by default: every target that has it, or
ONCE = (80,)  # which takes the compiler least time
# The launches at a 7B model's shapes whose machine code is looked at, for sm_90: benchmarks/static.py.
MEASURED = (
    HEAD := "7B head, odd N, bf16",
    STATISTICS := "chunk of fp32 logits, entropy",
    GRADIENT := "fp32 logits to bf16 in place, moved",
    SAMPLE := "12 rows of torch.bfloat16, all",
    SAMPLE_TOP_P := "12 rows of torch.bfloat16, top-p",
    ATTENTION := "7B group, bf16",
    WIDE_ATTENTION := "Qwen3.5 9B group, bf16",
    DECODE := "7B decode, 12 rows, bf16",
    WIDE_DECODE := "Qwen3.5 9B decode, 12 rows, bf16",
    FLATTENED := "the loop over tiles flattened",  # a fault, see launch_faults
)


Launch = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Memory:
    """Untouched tensors, at addresses that 16 divides or, with ``odd``, at ones that it does not."""

    odd: bool = False

    def __call__(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        values = torch.empty(torch.Size(shape).numel() + 1, dtype=dtype)
        return (values[1:] if self.odd else values[:-1]).view(shape)


ALIGNED, ODD = Memory(), Memory(odd=True)


def launch_all(capability: int) -> Iterator[Launch]:
    """Make every launch that ``capability`` has; yields the name of each before it is made, and its default targets."""
    for tile in tiles(capability):
        yield from _head(tile, full=capability in FULL_TARGETS)
    if capability in FULL_TARGETS:
        yield from _statistics()
        yield from _gradients()
        yield from _terms()
        yield from _advantages()
        yield from _samples()
        yield from _norms()
        yield from _rotaries()
        yield from _activations()
        yield from _output_gates()
        yield from _linear_steps()
    yield from _attention(BLOCKS[capability], WIDE_BLOCKS[capability], full=capability in FULL_TARGETS)
    decoding = triton_decode.BLOCKS[capability], triton_decode.WIDE_BLOCKS[capability]
    yield from _decode(*decoding, full=capability in FULL_TARGETS)


def launch_faults(capability: int) -> Iterator[Launch]:
    """Kernels that have what the package's must not have, to see that it would be seen."""
    if capability not in FULL_TARGETS:
        return
    yield "128 values a thread in 64 registers", TARGETS
    spilling_kernel[(1,)](ALIGNED(4096), ALIGNED(4096), BLOCK=4096, num_warps=1, maxnreg=64)
    yield "a product of fp32", TARGETS
    scalar_product_kernel[(1,)](ALIGNED(32, 32), ALIGNED(32, 32), BLOCK=32)
    if capability == 90:
        yield FLATTENED, TARGETS
        hidden, weight = (ALIGNED(n, MODEL[2], dtype=BF16) for n in MODEL[:2])
        labels, tile = ALIGNED(MODEL[0], dtype=torch.int64), replace(TILES[90], flatten=True)
        product_statistics(hidden, weight, labels, None, ALIGNED(MODEL[0]), tile)


@triton.jit
def spilling_kernel(values, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(values + at)
    tl.store(out + at, x / tl.sum(x, 0))


@triton.jit
def scalar_product_kernel(values, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(values + at)
    tl.store(out + at, tl.dot(x, x, input_precision="ieee"))


def twin(capability: int) -> int:
    """The target that stands for ``capability`` by default: sm_86 for sm_89 while all is configured alike."""
    tables: tuple[dict[int, Any], ...] = (
        *(TILES, BLOCKS, WIDE_BLOCKS),
        *(triton_decode.BLOCKS, triton_decode.WIDE_BLOCKS),
    )
    return 86 if capability == 89 and all(table[89] == table[86] for table in tables) else capability


def tiles(capability: int) -> list[Tile]:
    """The tile of ``capability``, and the one for operands that its descriptors cannot address."""
    tile = TILES[capability]
    return [tile, TILES[80]] if tile.descriptors else [tile]


def _head(tile: Tile, *, full: bool) -> Iterator[Launch]:
    def launch(sizes: tuple[int, int, int], dtype: torch.dtype, memory: Memory, bias: torch.dtype | None) -> None:
        rows, vocabulary, size = sizes
        if tile.descriptors:  # they need aligned rows, which may still be cut to any width
            pitch = -(-size // 8) * 8
            hidden, weight = (ALIGNED(n, pitch, dtype=dtype)[:, :size] for n in (rows, vocabulary))
        else:
            hidden, weight = (memory(n, size, dtype=dtype) for n in (rows, vocabulary))
        labels, biases = memory(rows, dtype=torch.int64), bias and memory(vocabulary, dtype=bias)
        product_statistics(hidden, weight, labels, biases, memory(rows), tile)

    yield HEAD, TARGETS
    launch((16383, *MODEL[1:]), BF16, ALIGNED, None)
    yield "odd everything, bf16, fp32 bias", TARGETS
    launch((333, 1001, 41), BF16, ODD, FP32)
    if full:
        yield "7B head, fp16, fp16 bias", ONCE
        launch(MODEL, FP16, ALIGNED, FP16)
        yield "sizes of 1, fp16, fp16 bias", (80, 90)
        launch((1, 1, 1), FP16, ALIGNED, FP16)


def _statistics() -> Iterator[Launch]:
    def launch(
        logits: Tensor,
        entries: int,
        memory: Memory,
        *,
        entropy: bool,
        bias: torch.dtype | None = None,
        softcap: float = 0.0,
    ) -> None:
        rows, vocabulary = logits.shape
        index, biases = memory(rows, entries, dtype=torch.int64), bias and memory(vocabulary, dtype=bias)
        row_statistics(logits, index, biases, memory(rows), entropy=entropy, softcap=softcap)

    yield STATISTICS, TARGETS
    launch(_chunk(4096, 152064, FP32), 1, ALIGNED, entropy=True)
    yield "soft-capped chunk of fp32 logits, entropy, bf16 bias", TARGETS
    launch(_chunk(4096, 256000, FP32), 1, ALIGNED, entropy=True, bias=BF16, softcap=30.0)
    yield "chunk of fp32 logits, odd V, entropy, bf16 bias", ONCE
    launch(_chunk(333, 1001, FP32), 1, ODD, entropy=True, bias=BF16)
    yield "32 of bf16 logits", ONCE
    launch(ALIGNED(4096, 152064, dtype=BF16), 32, ALIGNED, entropy=False)
    yield "3 of fp16 logits, odd V", ONCE
    launch(ODD(333, 151665, dtype=FP16), 3, ODD, entropy=False)
    yield "sizes of 1, fp16", ONCE
    launch(ALIGNED(1, 1, dtype=FP16), 1, ALIGNED, entropy=False)


def _gradients() -> Iterator[Launch]:
    def launch(
        logits: Tensor,
        out: Tensor,
        entries: int,
        memory: Memory,
        *,
        bias: torch.dtype | None = None,
        softcap: float = 0.0,
        **given: bool,
    ) -> None:
        rows, vocabulary = logits.shape
        index, biases = memory(rows, entries, dtype=torch.int64), bias and memory(vocabulary, dtype=bias)
        row_gradient(
            logits,
            out,
            index,
            biases,
            memory(rows),
            RowStatistics(memory(rows), memory(rows), memory(rows)),
            memory(rows, entries),
            grad_entropy=memory(rows) if "entropy" in given else None,
            source=memory(rows, dtype=torch.int64) if "moved" in given else None,
            softcap=softcap,
        )

    yield GRADIENT, (80, 90)
    buffer = logits_buffer(4096, 152064, torch.device("cpu"))
    launch(*(narrow_rows(buffer, 4096, 152064, dtype) for dtype in (FP32, BF16)), 1, ALIGNED, moved=True)
    yield "fp32 logits to fp16 in place, odd V, entropy, fp16 bias", ONCE
    buffer = logits_buffer(333, 1001, torch.device("cpu"))
    launch(*(narrow_rows(buffer, 333, 1001, dtype) for dtype in (FP32, FP16)), 1, ODD, entropy=True, bias=FP16)
    yield "fp32 logits in place, entropy, fp32 bias", TARGETS
    chunk = _chunk(4096, 152064, FP32)
    launch(chunk, chunk, 1, ALIGNED, entropy=True, bias=FP32)
    yield "soft-capped fp32 logits in place, entropy, fp32 bias", TARGETS
    chunk = _chunk(4096, 256000, FP32)
    launch(chunk, chunk, 1, ALIGNED, entropy=True, bias=FP32, softcap=30.0)
    yield "32 of bf16 logits", ONCE
    launch(*(ALIGNED(4096, 152064, dtype=BF16) for _ in range(2)), 32, ALIGNED)
    yield "3 of fp16 logits, odd V", ONCE
    launch(*(ODD(333, 151665, dtype=FP16) for _ in range(2)), 3, ODD)
    yield "sizes of 1, fp32", ONCE
    launch(*(ALIGNED(1, 1) for _ in range(2)), 1, ALIGNED)


def _chunk(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    return narrow_rows(logits_buffer(rows, vocabulary, torch.device("cpu")), rows, vocabulary, dtype)


def _terms() -> Iterator[Launch]:
    def options(loss_type: str, level: str, clips: tuple[float | None, float | None], beta: float) -> Any:
        by_ratio = loss_type == "sapo"
        return records.GrpoLossOptions(
            loss_type, beta, *clips, 10.0, level, 768, 6144.0, use_bias_correction_kl=by_ratio
        )

    def launch(
        completions: int,
        memory: Memory,
        loss_type: str,
        level: str,
        clips: tuple[float | None, float | None] = (0.2, 0.2),
        beta: float = 0.0,
        dtype: torch.dtype = FP32,
        **given: bool,
    ) -> None:
        old, ref = (memory(6144, dtype=dtype) if wanted else None for wanted in (given.get("old", True), beta))
        factors = (memory(6144), memory(6144)) if "weighted" in given else (None, None)
        terms(
            memory(6144, dtype=dtype),
            old,
            ref,
            memory(6144, dtype=torch.bool) if "masked" in given else None,
            tuple(memory(completions, dtype=torch.int64) for _ in range(3)),
            memory(completions),
            memory(completions, dtype=torch.int64),
            memory(1, dtype=torch.int64)[0],
            options(loss_type, level, clips, beta),
            memory(6144),
            factors=factors,
            completions=memory(1, dtype=torch.int64)[0] if "weighted" in given else None,
        )

    def launch_whole(loss_type: str, level: str, beta: float, masked: bool, lengths: torch.dtype, size: int) -> None:
        logp, mask = ALIGNED(6144), ALIGNED(6144, dtype=torch.bool).fill_(True) if masked else None
        advantages, cu_seqlens = ALIGNED(size), ALIGNED(size + 1, dtype=lengths)
        completions = records.Completions(advantages, cu_seqlens, logp, logp)
        whole_terms(logp, completions, mask, options(loss_type, level, (0.2, 0.2), beta))

    yield "on policy, KL", ONCE
    launch(16, ALIGNED, "grpo", "token", (None, None), 0.04, old=False)
    yield "DAPO", ONCE
    launch(333, ALIGNED, "dapo", "token", (0.2, 0.28))
    yield "Dr. GRPO, one-sided clip, KL, mask, odd everything, bf16", ONCE
    launch(333, ODD, "dr_grpo", "token", (None, 0.2), 0.04, BF16, masked=True)
    yield "GSPO, KL, mask", TARGETS
    launch(333, ALIGNED, "grpo", "sequence", (0.2, None), 0.04, masked=True)
    yield "GSPO over all tokens, one segment, fp16", ONCE
    launch(1, ALIGNED, "bnpo", "sequence", dtype=FP16)
    yield "weights, of completions that count, KL", TARGETS
    launch(333, ALIGNED, "grpo", "token", (0.2, 0.28), 0.04, weighted=True)
    yield "CISPO", ONCE
    launch(16, ALIGNED, "cispo", "token", (None, 3.0))
    yield "VESPO, weights", ONCE
    launch(16, ALIGNED, "vespo", "token", (None, None), weighted=True)
    yield "SAPO by completion, KL by ratio", ONCE
    launch(16, ALIGNED, "sapo", "sequence", (None, None), 0.04)
    yield "whole completions, KL, int32", TARGETS
    launch_whole("grpo", "token", 0.04, False, torch.int32, 16)
    yield "whole completions, all tokens, mask, sequence, int64", ONCE
    launch_whole("bnpo", "sequence", 0.0, True, torch.int64, 1)


def _advantages() -> Iterator[Launch]:
    def launch(
        prompts: int,
        size: int,
        others: int | None,
        rule: str,
        dtype: torch.dtype = FP32,
        lengths: torch.dtype = torch.int64,
        rest: tuple = ("std", 1e-4, "reward"),
        bars: bool = False,
        in_p: bool = False,
    ) -> None:
        above = torch.full((prompts,), 0.1) if bars else 0.1
        options = group_advantage.AdvantageOptions(rule, 0.3, 0.8, above, 0.2, (320, 512), *rest)
        zeros = torch.zeros(prompts, size, dtype=dtype)  # this launcher reads its tensors back: no stray NaN
        shuffled = None if others is None else torch.zeros(prompts, others, dtype=dtype)
        std = torch.ones(prompts) if options.normalize == "batch" else None
        tgrpo_advantages(zeros, zeros, zeros.to(lengths), shuffled, options, std, zeros == 0 if in_p else None)

    yield "4096 prompts of 8 and 4", TARGETS
    launch(4096, 8, 4, "margin")
    yield "16 and 16, int32 lengths, added to the advantage", ONCE
    launch(333, 16, 16, "threshold", lengths=torch.int32, rest=("std", 1e-4, "advantage"))
    yield "no shuffled branch, bf16, only centred", ONCE
    launch(333, 5, None, "reference", BF16, BF16, ("none", 1e-4, "reward"))
    yield "gdpo, and the batch's deviation, leave-one-out", ONCE
    launch(333, 8, 4, "margin", rest=("gdpo", 1e-4, "reward"))
    launch(333, 8, 4, "margin", rest=("batch", 1e-4, "advantage", "leave_one_out"))
    yield "a bar for each prompt", ONCE
    launch(333, 8, 4, "margin", bars=True)
    launch(333, 8, 4, "margin", dtype=BF16, bars=True)
    yield "p of some completions", ONCE
    launch(333, 8, 4, "margin", in_p=True)
    yield "sizes of 1, fp16", ONCE
    launch(1, 1, 1, "margin", dtype=FP16)
    launch(1, 1, 1, "margin", rest=("gdpo", 1e-4, "reward", "leave_one_out"))


def _samples() -> Iterator[Launch]:
    def launch(
        sizes: tuple[int, int], dtype: torch.dtype, memory: Memory, options: tuple, banned: int, uniform: torch.dtype
    ) -> None:
        ids = memory(banned, dtype=torch.int64) if banned else None
        logits, numbers = memory(*sizes, dtype=dtype), memory(sizes[0], dtype=uniform)
        for splits in (1, 11):  # as of many rows, and of 12 on 132 multiprocessors
            sample_tokens(logits, numbers, ids, SampleTokensOptions(*options), splits)

    kinds = [  # what is drawn, how many are banned, the targets in bf16 and in fp32
        ("all", (1.0, 1.0, 0), 0, TARGETS, ()),
        ("all but 16", (1.0, 1.0, 0), 16, ONCE, ()),
        ("the likeliest but 16", (0.0, 1.0, 0), 16, ONCE, ()),
        ("top-k but 16", (0.7, 1.0, 50), 16, (), ()),
        ("top-p but 16", (1.0, 0.95, 0), 16, (), ()),
        ("top-p", (1.0, 0.95, 0), 0, (90,), ()),
        ("top-k and top-p but 16", (1.0, 0.95, 50), 16, (), TARGETS),
    ]
    for what, options, banned, *targets in kinds:
        for dtype, own in zip((BF16, FP32), targets, strict=True):
            yield f"12 rows of {dtype}, {what}", own
            launch((12, 152064), dtype, ALIGNED, options, banned, FP32)
    yield "odd everything, fp16, fp64 numbers, top-k", ONCE
    launch((333, 151665), FP16, ODD, (1.0, 1.0, 50), 0, torch.float64)
    yield "sizes of 1, fp16, top-p", ONCE
    launch((1, 1), FP16, ODD, (1.0, 0.5, 0), 1, FP32)


def _norms() -> Iterator[Launch]:
    def launch(
        sizes: tuple[int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        memory: Memory,
        *,
        added: bool = True,
        unit_offset: bool = False,
    ) -> None:
        dtype, wide = dtypes
        residual = memory(*sizes, dtype=wide) if added else None
        add_rms_norm(memory(*sizes, dtype=dtype), memory(sizes[1], dtype=wide), residual, 1e-6, unit_offset)

    yield "12 rows of a 7B model, bf16", TARGETS
    launch((12, 3584), (BF16, BF16), ALIGNED)
    yield "no residual, bf16", ONCE
    launch((12, 3584), (BF16, BF16), ALIGNED, added=False)
    yield "12 rows of a Qwen3.5 of 4096, unit offset, bf16", TARGETS
    launch((12, 4096), (BF16, BF16), ALIGNED, unit_offset=True)
    yield "fp32 stream and weight", ONCE
    launch((12, 8192), (BF16, FP32), ALIGNED)
    yield "odd everything, fp16", ONCE
    launch((333, 1001), (FP16, FP16), ODD)
    yield "sizes of 1, fp32", ONCE
    launch((1, 1), (FP32, FP32), ALIGNED)


def _rotaries() -> Iterator[Launch]:
    def launch(
        rows: int,
        heads: tuple[int, int],
        size: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        memory: Memory,
        *,
        index: torch.dtype = torch.int64,
        slots: bool = True,
        norms: bool = False,
        unit_offset: bool = False,
        part: int = 1,  # of a head, this part is rotated
    ) -> None:
        dtype, table = dtypes
        caches = [memory(rows, 768, heads[1], size, dtype=dtype) for _ in range(2)]
        tables = [memory(4096, size // part, dtype=table) for _ in range(2)]
        places = [memory(rows, dtype=index) for _ in range(3)]
        qkv = memory(rows, (heads[0] + 2 * heads[1]) * size, dtype=dtype)
        weights = HeadNorms(*(memory(size, dtype=table) for _ in range(2)), 1e-6, unit_offset) if norms else None
        rotary_append(qkv, *tables, *caches, Places(places[0], places[1], places[2] if slots else None), weights)

    yield "12 rows of a 7B model, fp32 tables, bf16", TARGETS
    launch(12, (28, 4), 128, (BF16, FP32), ALIGNED)
    yield "12 rows of a Qwen3-VL 8B with norms of heads, fp32 tables, bf16", TARGETS
    launch(12, (32, 8), 128, (BF16, FP32), ALIGNED, norms=True)
    yield "12 rows of a Qwen3.5 of 16 and 4 heads of 256, a quarter of them rotated, bf16", TARGETS
    launch(12, (16, 4), 256, (BF16, FP32), ALIGNED, norms=True, unit_offset=True, part=4)
    yield "own slots, int32, bf16 tables", ONCE
    launch(12, (16, 2), 128, (BF16, BF16), ALIGNED, index=torch.int32, slots=False)
    yield "head dim 80, odd everything, norms of heads, fp16", ONCE
    launch(3, (6, 1), 80, (FP16, FP16), ODD, norms=True)
    yield "head dim 80, half of it rotated, odd everything, fp16", ONCE
    launch(3, (6, 1), 80, (FP16, FP16), ODD, part=2)
    yield "one row of one head, fp32", ONCE
    launch(1, (1, 1), 2, (FP32, FP32), ALIGNED)


def _activations() -> Iterator[Launch]:
    def launch(rows: int, width: int, rank: int, dtype: torch.dtype, memory: Memory) -> None:
        inner, b = memory(rows, 2 * rank, dtype=dtype), memory(2 * width, rank, dtype=dtype)
        silu_mul(memory(rows, 2 * width, dtype=dtype), inner, b)

    yield "12 rows of a 7B model, bf16", TARGETS
    silu_mul(ALIGNED(12, 2 * 18944, dtype=BF16))
    launch(12, 18944, 64, BF16, ALIGNED)
    yield "odd everything, fp16", ONCE
    silu_mul(ODD(333, 2 * 1001, dtype=FP16))
    launch(333, 1001, 77, FP16, ODD)
    yield "sizes of 1, fp32", ONCE
    silu_mul(ALIGNED(1, 2))
    launch(1, 1, 1, BF16, ALIGNED)


def _output_gates() -> Iterator[Launch]:
    def launch(sizes: tuple[int, int, int], dtype: torch.dtype, weight: torch.dtype, memory: Memory) -> None:
        rows, heads, size = sizes
        x, gate = (memory(rows, heads, size, dtype=dtype) for _ in range(2))
        gated_rms_norm(x, gate, memory(size, dtype=weight), 1e-6)
        sigmoid_mul(x.flatten(1), gate.flatten(1))

    yield "12 rows of a Qwen3.5 of 32 heads of 128, bf16", TARGETS
    launch((12, 32, 128), BF16, BF16, ALIGNED)
    yield "gates of an attention, odd everything, fp16", ONCE
    launch((333, 7, 143), FP16, FP32, ODD)
    yield "gates of sizes of 1, fp32", ONCE
    launch((1, 1, 1), FP32, FP32, ALIGNED)


def _linear_steps() -> Iterator[Launch]:
    def launch(
        rows: int,
        heads: tuple[int, int],
        dims: tuple[int, int],
        size: int,
        dtype: torch.dtype,
        memory: Memory,
        *,
        index: torch.dtype | None = torch.int64,
        norm: bool = True,
        gate: torch.dtype = FP32,
        bias: bool = False,
    ) -> None:
        (key_heads, value_heads), (dk, dv) = heads, dims
        q, k = (memory(rows, key_heads, dk, dtype=dtype) for _ in range(2))
        v, beta = memory(rows, value_heads, dv, dtype=dtype), memory(rows, value_heads, dtype=dtype)
        slots = None if index is None else memory(rows, dtype=index)
        state = memory(rows + 5, value_heads, dk, dv)
        step = DeltaStep(q, k, v, memory(rows, value_heads, dtype=gate), beta, state, slots)
        gated_delta_step(step, 0.1, norm)
        channels = 2 * key_heads * dk + value_heads * dv
        x, weight = memory(rows, channels, dtype=dtype), memory(channels, size, dtype=dtype)
        last = memory(rows + 5, channels, size - 1, dtype=dtype)
        offset = memory(channels, dtype=dtype) if bias else None
        causal_conv_step(ConvStep(x, last, weight, offset, slots), "silu" if norm else "none")

    yield "12 rows of a Qwen3.5 of 32 heads, bf16", TARGETS
    launch(12, (16, 32), (128, 128), 4, BF16, ALIGNED)
    yield "own slots, biased, gates and rows in fp16", ONCE
    launch(12, (16, 16), (128, 128), 4, FP16, ALIGNED, index=None, gate=FP16, bias=True)
    yield "head dims 80 and 200, int32, odd everything, no norm, fp32", ONCE
    launch(3, (2, 6), (80, 200), 3, FP32, ODD, index=torch.int32, norm=False)
    yield "head dim 256, bf16", ONCE
    launch(3, (1, 1), (256, 256), 4, BF16, ALIGNED)
    yield "sizes of 1, fp32", ONCE
    launch(1, (1, 1), (1, 1), 1, FP32, ALIGNED)


def _attention(narrow: Blocks, wide: Blocks, *, full: bool) -> Iterator[Launch]:
    def launch(layout: PrefixLayout, heads: tuple[int, int], size: int, dtype: torch.dtype, memory: Memory) -> None:
        rows, blocks = layout.total_tokens, wide if size > NARROW else narrow
        q, grad = (memory(rows, heads[0], size, dtype=dtype) for _ in range(2))
        k, v = (memory(rows, heads[1], size, dtype=dtype) for _ in range(2))
        out, lse = prefix_attention.forward(q, k, v, layout, 0.1, blocks)
        prefix_attention.backward(grad, q, k, v, out, lse, layout, 0.1, blocks)

    yield ATTENTION, TARGETS
    launch(PrefixLayout([1224], [[768] * 8]), (28, 4), 128, BF16, ALIGNED)
    yield WIDE_ATTENTION, TARGETS
    launch(PrefixLayout([1224], [[768] * 8]), (16, 4), 256, BF16, ALIGNED)
    if full:
        yield "head dim 160, odd everything, fp16", (90,)
        launch(PrefixLayout([1223, 1], [[1, 700], []]), (3, 3), 160, FP16, ODD)
        yield "head dim 80, odd everything, fp16", (90,)
        launch(PrefixLayout([1223, 1], [[1, 700], []]), (6, 2), 80, FP16, ODD)
        yield "one token, head dim 64, bf16", ONCE
        launch(PrefixLayout([1], [[]]), (1, 1), 64, BF16, ALIGNED)


def _decode(narrow: Block, wide: Block, *, full: bool) -> Iterator[Launch]:
    def launch(
        groups: list[int],
        sizes: tuple[int, int],  # of a prefix and of the memory of a suffix
        heads: tuple[int, int],
        size: int,
        dtype: torch.dtype,
        memory: Memory,
        *,
        lengths: torch.dtype = torch.int32,
        slots: bool = False,
    ) -> None:
        prefix, capacity = sizes
        row_group = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
        rows, starts = len(row_group), torch.arange(len(groups) + 1) * prefix
        layout = DecodeLayout(starts, row_group, suffix_slots=torch.arange(rows).flip(0) if slots else None)
        prefixes = [memory(len(groups) * prefix, heads[1], size, dtype=dtype) for _ in range(2)]
        suffixes = [memory(rows, capacity, heads[1], size, dtype=dtype) for _ in range(2)]
        q, suffix_lengths = memory(rows, heads[0], size, dtype=dtype), memory(rows, dtype=lengths).zero_()
        inputs = DecodeInputs(q, *prefixes, *suffixes, suffix_lengths)
        triton_decode.prefix_decode_attention(inputs, layout, 0.1, wide if size > NARROW else narrow)

    yield DECODE, TARGETS
    launch([8, 4], (1224, 768), (28, 4), 128, BF16, ALIGNED)
    yield WIDE_DECODE, TARGETS
    launch([8, 4], (1224, 768), (16, 4), 256, BF16, ALIGNED)
    if full:
        yield "3B decode, 12 rows, slots, bf16", ()
        launch([8, 4], (1224, 768), (16, 2), 128, BF16, ALIGNED, slots=True)
        yield "head dim 64, 2 queries a key, int64 lengths, fp16", ONCE
        launch([8, 4], (1224, 768), (8, 4), 64, FP16, ALIGNED, lengths=torch.int64)
        yield "head dim 192, a query a key, odd everything, fp16", (90,)
        launch([3], (333, 77), (8, 8), 192, FP16, ODD)
        yield "head dim 80, 16 queries a key, odd everything, fp16", (90,)
        launch([3], (333, 77), (16, 1), 80, FP16, ODD, slots=True)
        yield "one row, sizes of 1, bf16", ONCE
        launch([1], (1, 1), (1, 1), 1, BF16, ALIGNED)
