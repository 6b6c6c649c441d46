"""What the tests of prefix_decode_attention share: its loop over rows and heads, and rows in memory that holds NaN."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton_cases import CUDA, DEVICE

from videor1_kernels import DecodeLayout, last_backend, prefix_decode_attention
from videor1_kernels.prefix_attention import triton_decode
from videor1_kernels.prefix_attention.triton import Block

OP = "prefix_decode_attention"
DTYPES = {  # that a backend is compared with fp64 in; in fp32 the Triton kernel runs in the interpreter only
    "reference": torch.float64,
    "native": torch.float32,
    "triton": torch.float16 if CUDA else torch.float32,
}


def ragged(rows: int, capacity: int) -> list[int]:
    return [random.Random(1 + i).randint(1, capacity) for i in range(rows)]


CASES: dict[str, tuple[Any, ...]] = {
    "one row": ([(1, 1)], [1], 1),
    "one group": ([(37, 3)], [5, 1, 20], 20),
    "equal prefixes": ([(5, 2), (5, 2)], [1, 4, 2, 3], 6),
    "ragged groups": ([(20, 3), (1, 1), (16, 2)], ragged(6, 20), 20),
    "a row more than a tile": ([(33, 9), (17, 8)], ragged(17, 18), 18),
    "three tiles of a prefix": ([(20, 20)], ragged(20, 7), 7),
    "ends on the borders of blocks and parts": ([(48, 2), (16, 2)], [16, 32, 1, 48], 48),
    "a prefix nobody reads": ([(9, 1), (20, 0), (5, 2)], [3, 2, 4], 4),
    "much spare capacity": ([(20, 2)], [2, 19], 300),
    "long": ([(300, 2), (290, 1)], [300, 1, 257], 300),
}


def naive(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Sequence[int],
    cu_prefix: Sequence[int],
    row_group: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """The definition, row by row and head by head."""
    repeat = q.shape[1] // prefix_k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    for row, (group, length) in enumerate(zip(row_group, suffix_lengths, strict=True)):
        own = slice(cu_prefix[group], cu_prefix[group + 1])
        for head in range(q.shape[1]):
            keys = torch.cat([prefix_k[own, head // repeat], suffix_k[row, :length, head // repeat]])
            values = torch.cat([prefix_v[own, head // repeat], suffix_v[row, :length, head // repeat]])
            out[row, head] = (keys @ q[row, head] * scale).softmax(0) @ values
    return out


class Case:
    """Rows that share prefixes, in memory that holds NaN wherever the operation must not read.

    groups: (prefix length, rows) each; ``scattered``: the rows in a mixed order, prefixes apart from each other, and
    suffixes in slots of their own with free slots between.
    """

    def __init__(
        self,
        groups: Sequence[tuple[int, int]],
        lengths: Sequence[int],
        capacity: int,
        heads: tuple[int, int] = (4, 2),
        dim: int = 16,
        *,
        backend: str = "triton",
        dtype: torch.dtype | None = None,
        scattered: bool = False,
    ) -> None:
        order = random.Random(0)
        torch.manual_seed(0)
        self.backend, self.device = backend, DEVICE if backend == "triton" else "cpu"
        dtype = dtype or DTYPES[backend]
        tokens = [length for length, _ in groups]
        self.row_group = [group for group, (_, rows) in enumerate(groups) for _ in range(rows)]
        rows = len(self.row_group)
        if scattered:
            order.shuffle(self.row_group)
        gap = 3 if scattered else 0
        self.starts = [sum(tokens[:i]) + gap * (i + 1) for i in range(len(tokens))]
        self.prefix = [slice(start, start + length) for start, length in zip(self.starts, tokens, strict=True)]
        self.slots = order.sample(range(2 * rows + 1), rows) if scattered else list(range(rows))
        slots = 2 * rows + 1 if scattered else rows
        self.cu = torch.tensor([0, *tokens], dtype=torch.int32, device=self.device).cumsum(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(self.device, dtype)

        self.q = normal(rows, heads[0], dim)
        pool = sum(tokens) + gap * (len(tokens) + 1)
        self.pk, self.pv = (self.q.new_full((pool, heads[1], dim), torch.nan) for _ in range(2))
        for group in sorted(set(self.row_group)):
            for x in (self.pk, self.pv):
                x[self.prefix[group]] = normal(tokens[group], heads[1], dim)
        self.clean = [normal(slots, capacity, heads[1], dim) for _ in range(2)]
        self.layout = DecodeLayout(
            self.cu,
            torch.tensor(self.row_group, dtype=torch.int64, device=self.device),
            torch.tensor(self.starts, device=self.device) if scattered else None,
            torch.tensor(self.slots, device=self.device) if scattered else None,
        )
        self.set_lengths(lengths)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        self.sk, self.sv = (torch.full_like(x, torch.nan) for x in self.clean)
        for slot, length in zip(self.slots, lengths, strict=True):
            for x, clean in zip((self.sk, self.sv), self.clean, strict=True):
                x[slot, :length] = clean[slot, :length]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.pk, self.pv, self.sk, self.sv

    def __call__(self, **options: Any) -> Tensor:
        options = {"suffix_lengths": self.lengths, "layout": self.layout, "backend": self.backend} | options
        out = prefix_decode_attention(*self.tensors, **options)
        assert last_backend(OP) == options["backend"]
        return out

    def exact(self, dtype: torch.dtype = torch.float64, scale: float | None = None) -> Tensor:
        """The loop, on the prefixes and suffixes taken out of their memory."""
        tokens = [torch.cat([x[own] for own in self.prefix]).to("cpu", dtype) for x in (self.pk, self.pv)]
        suffixes = [x[self.slots].to("cpu", dtype) for x in (self.sk, self.sv)]
        q, lengths, group = self.q.to("cpu", dtype), self.lengths.tolist(), self.row_group
        return naive(q, *tokens, *suffixes, lengths, self.cu.tolist(), group, scale).to(self.device)

    def permuted(self, order: list[int]) -> Tensor:
        """The result of the same rows in another order."""
        layout = DecodeLayout(
            self.cu,
            self.layout.row_group[order],
            torch.tensor(self.starts, device=self.device),
            torch.tensor(self.slots, device=self.device)[order],
        )
        return prefix_decode_attention(
            self.q[order], *self.tensors[1:], suffix_lengths=self.lengths[order], layout=layout, backend=self.backend
        )


def use_small_blocks(monkeypatch: Any) -> None:
    """Several blocks, and several parts of a prefix and of a suffix, at lengths that the interpreter gets through."""
    monkeypatch.setattr(triton_decode, "INTERPRETED", Block(16, 16, 4, 1))
    monkeypatch.setattr(triton_decode, "INTERPRETED_PROGRAMS", 24)
