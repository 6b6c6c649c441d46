"""prefix_decode_attention: one layer of a decode step, rows from ordered and from shuffled frames together.

The floor is memory: keys and values of every prefix once and of every suffix, read at the card's copy rate. A prompt of
a 7B model (P 1224, 12 rows, 384 own tokens) is 14.6 MB, 3.4 us at 4.3 TB/s, and 16 prompts are 234 MB, 54 us; with the
prefix repeated in every row it is 2.7 times as much. A single prompt will not get there: a kernel of three microseconds
is mostly its start and the merge of its parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from benchmarks.peers import missing
from videor1_kernels import DecodeLayout, prefix_decode_attention

Attention = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """Prompts of two branches of P tokens each; C of the ``capacity`` tokens of each row's suffix are there.

    ``rows``: of a prompt, from ordered and from shuffled frames. ``heads``: Hq query heads, Hkv key heads.
    """

    model: str
    prompts: int
    prefix: int
    rows: tuple[int, int]
    suffix: int
    capacity: int
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class DecodeInputs:
    """q [R, Hq, D], prefix_k, prefix_v [B P, Hkv, D], suffix_k, suffix_v [R, capacity, Hkv, D], lengths [R]."""

    size: Size
    layout: DecodeLayout
    q: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    suffix_k: Tensor
    suffix_v: Tensor
    lengths: Tensor


def cases(device: torch.device) -> list[Case]:
    if device.type != "cuda":
        return [_case(Size("small", 2, 384, (4, 2), 96, 192, (8, 2), 64, torch.float32))]
    heads = {"Qwen2.5-VL-7B": (28, 4, 128), "Qwen2.5-VL-3B": (16, 2, 128), "Qwen3.5-9B": (16, 4, 256)}
    return [
        _case(Size(model, prompts, 1224, (8, 4), 384, 768, (query, key), size, torch.bfloat16))
        for model, (query, key, size) in heads.items()
        for prompts in (1, 16)
    ]


def _case(size: Size) -> Case:
    rows = size.prompts * sum(size.rows)
    described = {"model": size.model, "rows": rows, "prefixes": 2 * size.prompts, "P": size.prefix, "C": size.suffix}
    return Case(
        op="prefix_decode_attention",
        title="one layer of a decode step",
        size=described,
        dtype=size.dtype,
        inputs=functools.partial(decode_inputs, size),
        expected=_expected,
        work=_work,
        contenders=(
            Contender(OURS, lambda x: _step(lambda: _ours(x)), graph=True),
            Contender(
                "torch SDPA, repeated prefix",
                lambda x: _step(_repeated(x)),
                does="every prefix in each row",
                graph=True,
            ),
            Contender(
                "flash-attn with KV cache, repeated prefix",
                lambda x: _step(_flash_cache(x)),
                missing("flash-attn", "flash_attn", gpu=True),
                does="every prefix in each row",
                graph=True,
            ),
        ),
    )


def decode_inputs(size: Size, device: torch.device) -> DecodeInputs:
    generator = torch.Generator(device).manual_seed(0)
    prefixes, rows = 2 * size.prompts, size.prompts * sum(size.rows)
    row_group = torch.arange(prefixes).repeat_interleave(torch.tensor(size.rows * size.prompts)).to(device)
    layout = DecodeLayout(torch.arange(prefixes + 1, device=device) * size.prefix, row_group)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, size.head_dim, generator=generator, device=device).to(size.dtype)

    q_heads, kv_heads = size.heads
    return DecodeInputs(
        size,
        layout,
        normal(rows, q_heads),
        *(normal(prefixes * size.prefix, kv_heads) for _ in range(2)),
        *(normal(rows, size.capacity, kv_heads) for _ in range(2)),
        torch.full((rows,), size.suffix, dtype=torch.int32, device=device),
    )


def _step(attention: Attention) -> Step:
    def step() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"out": attention()}

    return step


def _ours(inputs: DecodeInputs, backend: str = "auto", dtype: torch.dtype | None = None) -> Tensor:
    tensors = (inputs.q, inputs.prefix_k, inputs.prefix_v, inputs.suffix_k, inputs.suffix_v)
    return prefix_decode_attention(
        *(x.to(dtype or x.dtype) for x in tensors), suffix_lengths=inputs.lengths, layout=inputs.layout, backend=backend
    )


def _expected(inputs: DecodeInputs) -> Sequence[Expected]:
    """The reference in fp64; the error is relative to its norm."""
    out = _ours(inputs, "reference", torch.float64)
    return [Expected("out", "out", out.flatten(0, 1), gradient=True)]


def _work(inputs: DecodeInputs) -> Work:
    """Bytes: queries, results, keys and values of every prefix once and of the suffixes as far as they are there."""
    size = inputs.size
    suffixes = size.suffix / size.capacity * (inputs.suffix_k.nbytes + inputs.suffix_v.nbytes)
    moved = 2 * inputs.q.nbytes + inputs.prefix_k.nbytes + inputs.prefix_v.nbytes + suffixes
    return Work(0.0, moved, "bytes with each prefix once")


def _rows_of(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """Keys and values [R, P + C, Hkv, D] of a cache that shares nothing, filled before the clock runs."""
    size = inputs.size
    keys, values = (
        torch.cat([prefix.unflatten(0, (-1, size.prefix))[inputs.layout.row_group], suffix[:, : size.suffix]], 1)
        for prefix, suffix in ((inputs.prefix_k, inputs.suffix_k), (inputs.prefix_v, inputs.suffix_v))
    )
    return keys, values


def _repeated(inputs: DecodeInputs) -> Attention:
    q, keys, values = inputs.q[:, :, None], *(x.transpose(1, 2) for x in _rows_of(inputs))
    return lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)[:, :, 0]


def _flash_cache(inputs: DecodeInputs) -> Attention:
    from flash_attn import flash_attn_with_kvcache

    q, (keys, values) = inputs.q[:, None], _rows_of(inputs)
    lengths = torch.full_like(inputs.lengths, keys.shape[1])
    return lambda: flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths)[:, 0]


def test_prefix_decode_attention(run_case):
    run_case()
