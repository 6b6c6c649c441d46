"""What decode attention reads: the tensors, which row reads which prefix, and where each row's suffix lies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, pairwise
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from videor1_kernels.checks import INTEGERS, check_cu_seqlens, check_indices, check_tensor, fail
from videor1_kernels.transfer import to_device

TILE_ROWS = 8  # rows of one prefix that the kernel works on together

# Every layout in use by its number: an operator in a compiled graph takes tensors and numbers, and finds it by that.
LAYOUTS: WeakValueDictionary[int, DecodeLayout] = WeakValueDictionary()
_numbers = count()


class DecodeInputs(NamedTuple):
    """The checked tensors of a decode step. R rows, Hq query heads, Hkv key heads, D head dim."""

    q: Tensor  # [R, Hq, D]
    prefix_k: Tensor  # [Tp, Hkv, D]
    prefix_v: Tensor  # [Tp, Hkv, D]
    suffix_k: Tensor  # [S, C, Hkv, D]
    suffix_v: Tensor  # [S, C, Hkv, D]
    suffix_lengths: Tensor  # int32 or int64 [R]: valid entries of each row's suffix


@dataclass(frozen=True, eq=False)
class DecodeLayout:
    """The indices of :func:`prefix_decode_attention`, to be built once per batch and reused by every step and layer.

    There are B prefixes and R rows, and each row reads one prefix. The rows of a prefix may be scattered.

    Args:
        cu_prefix: int32 or int64 [B+1], cumulative prefix lengths in tokens, each 1 or more.
        row_group: int64 [R], the prefix that a row reads.
        prefix_starts: int32 or int64 [B], where each prefix begins in ``prefix_k``; None: end to end, at
            ``cu_prefix[:-1]``.
        suffix_slots: int64 [R], the entry of ``suffix_k`` that a row reads; None: row r reads entry r, and ``suffix_k``
            has R entries.

    Raises:
        ValueError: a wrong shape, dtype or device, a group, start or slot out of range.
    """

    cu_prefix: Tensor
    row_group: Tensor
    prefix_starts: Tensor | None = None
    suffix_slots: Tensor | None = None
    prefix_tokens: int = field(init=False)  # the least length of prefix_k
    slots: int = field(init=False)  # the least number of entries of suffix_k
    slots_in_order: bool = field(init=False, repr=False)  # whether row r owns entry r of suffix_k
    spans: tuple[tuple[int, int], ...] = field(init=False, repr=False)  # start and length of each prefix
    members: tuple[tuple[int, ...], ...] = field(init=False, repr=False)  # the rows of each prefix
    number: int = field(init=False, repr=False)  # in LAYOUTS

    def __post_init__(self) -> None:
        op = "prefix_decode_attention"
        check_tensor(op, "cu_prefix", self.cu_prefix, ("B+1",), INTEGERS)
        device = self.cu_prefix.device
        total = int(self.cu_prefix[-1]) if len(self.cu_prefix) else 0
        check_cu_seqlens(op, "cu_prefix", self.cu_prefix, total, smallest=1)
        check_tensor(op, "row_group", self.row_group, ("R",), (torch.int64,), device)
        groups = len(self.cu_prefix) - 1
        check_indices(op, "row_group", self.row_group, groups)
        bounds = self.cu_prefix.tolist()
        starts = bounds[:-1]
        if self.prefix_starts is not None:
            check_tensor(op, "prefix_starts", self.prefix_starts, (groups,), INTEGERS, device)
            starts = self.prefix_starts.tolist()
            if min(starts, default=0) < 0:
                raise fail(op, "prefix_starts", "0 or more", min(starts))
        slots = list(range(len(self.row_group)))
        if self.suffix_slots is not None:
            check_tensor(op, "suffix_slots", self.suffix_slots, (len(self.row_group),), (torch.int64,), device)
            slots = self.suffix_slots.tolist()
            if min(slots, default=0) < 0:
                raise fail(op, "suffix_slots", "0 or more", min(slots))
        members: list[list[int]] = [[] for _ in range(groups)]
        for row, group in enumerate(self.row_group.tolist()):
            members[group].append(row)
        spans = tuple((a, n - b) for a, b, n in zip(starts, bounds, bounds[1:], strict=False))
        values = {
            "prefix_tokens": max((start + length for start, length in spans), default=0),
            "slots": max(slots, default=-1) + 1,
            "slots_in_order": slots == list(range(len(slots))),
            "spans": spans,
            "members": tuple(map(tuple, members)),
            "number": next(_numbers),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        LAYOUTS[self.number] = self

    @property
    def device(self) -> torch.device:
        return self.row_group.device

    @cached_property
    def tiles(self) -> Tensor:
        """int32 [T, 2 + TILE_ROWS]: the start and length of a prefix, up to TILE_ROWS of its rows, and -1 for the rest.

        T = R, which is enough for every grouping, so it does not depend on which rows share a prefix. Spare tiles have
        length 0. A prefix without rows has no tile.
        """
        tiles: list[list[int]] = []
        for (start, length), rows in zip(self.spans, self.members, strict=True):
            for first in range(0, len(rows), TILE_ROWS):
                own = list(rows[first : first + TILE_ROWS])
                tiles.append([start, length, *own, *[-1] * (TILE_ROWS - len(own))])
        spare = [0, 0, *[-1] * TILE_ROWS]
        tiles += [spare] * (len(self.row_group) - len(tiles))
        return to_device(torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2 + TILE_ROWS), self.device)

    @cached_property
    def prefix_lengths(self) -> Tensor:
        """int32 [R]: the length of the prefix that each row reads."""
        lengths = {row: length for (_, length), rows in zip(self.spans, self.members, strict=True) for row in rows}
        return to_device(torch.tensor([lengths[row] for row in range(len(lengths))], dtype=torch.int32), self.device)

    @cached_property
    def longest_prefix(self) -> int:
        """The length of the longest prefix that has rows, or 0 if none has any."""
        return max((length for (_, length), rows in zip(self.spans, self.members, strict=True) if rows), default=0)

    @cached_property
    def table(self) -> Tensor:
        """int64 [R, 3]: the start and the length of the prefix that each row reads, and its slot."""
        spans = {row: span for span, rows in zip(self.spans, self.members, strict=True) for row in rows}
        slots = range(len(spans)) if self.suffix_slots is None else self.suffix_slots.tolist()
        return self._index([[*spans[row], slot] for row, slot in enumerate(slots)]).reshape(-1, 3)

    @cached_property
    def gather(self) -> PaddedPrefixes:
        """The prefixes that have rows, padded to one length and one number of rows."""
        used = [(span, rows) for span, rows in zip(self.spans, self.members, strict=True) if rows]
        most = max((len(rows) for _, rows in used), default=0)
        spans = self._index([span for span, _ in used]).reshape(-1, 2)
        starts, last = spans[:, :1], spans[:, 1:] - 1
        column = torch.arange(max((length for (_, length), _ in used), default=0), device=self.device)
        place = {row: i * most + j for i, (_, own) in enumerate(used) for j, row in enumerate(own)}
        ragged = len({length for (_, length), _ in used}) > 1
        together = not ragged and all(sum(a) == b[0] for (a, _), (b, _) in pairwise(used))
        return PaddedPrefixes(
            index=starts + torch.minimum(column, last),
            start=used[0][0][0] if used and together else None,
            hidden=column > last if ragged else None,
            rows=self._index([[*own, *[own[0]] * (most - len(own))] for _, own in used]).reshape(len(used), most),
            place=self._index([place[row] for row in range(len(self.row_group))]),
            in_order=[place[row] for row in range(len(place))] == list(range(len(used) * most)),
        )

    def to(self, device: torch.device) -> DecodeLayout:
        """The layout on another device; made on the host and moved, nothing of it is read from a GPU."""
        made = copy.copy(self)
        for name in ("cu_prefix", "row_group", "prefix_starts", "suffix_slots"):
            values = getattr(self, name)
            object.__setattr__(made, name, None if values is None else to_device(values, device))
        for name in ("tiles", "prefix_lengths", "table", "gather"):
            made.__dict__.pop(name, None)
        object.__setattr__(made, "number", next(_numbers))
        LAYOUTS[made.number] = made
        return made

    def clone(self) -> DecodeLayout:
        """A layout with indices of its own, to be overwritten by :meth:`copy_`."""
        layout = self.to(self.device)
        for name in ("cu_prefix", "row_group", "prefix_starts", "suffix_slots"):
            values = getattr(layout, name)
            object.__setattr__(layout, name, None if values is None else values.clone())
        object.__setattr__(layout, "slots_in_order", False)  # copy_ may change the order
        return layout

    def copy_(self, other: DecodeLayout) -> None:
        """Make the kernel, in a CUDA graph that was captured with this layout, read as many rows of ``other``.

        Only what the kernel reads is overwritten: ``tiles``, ``prefix_lengths`` and ``suffix_slots``.
        """
        self.tiles.copy_(other.tiles)
        self.prefix_lengths.copy_(other.prefix_lengths)
        if self.suffix_slots is not None and other.suffix_slots is not None:
            self.suffix_slots.copy_(other.suffix_slots)

    def _index(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class PaddedPrefixes:
    """The prefixes padded to one length: B of at most L tokens, each read by at most M rows."""

    index: Tensor  # int64 [B, L]: positions in prefix_k; the padding repeats the last
    start: int | None  # of the first, if all have one length and lie end to end, so that nothing has to be gathered
    hidden: Tensor | None  # bool [B, L]: the padding; None if all have the same length
    rows: Tensor  # int64 [B, M]: the rows of a prefix; the padding repeats the first
    place: Tensor  # int64 [R]: where a row lies in the flattened [B * M]
    in_order: bool  # place is 0, 1, ..., B * M - 1

    def select(self, tokens: Tensor) -> Tensor:
        """The tokens [Tp, ...] of the padded prefixes, [B, L, ...]."""
        if self.start is not None:
            return tokens[self.start : self.start + self.index.numel()].unflatten(0, self.index.shape)
        return tokens.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def to_rows(self, values: Tensor) -> Tensor:
        """Values [Hkv, B * M, ...] of the padded rows, in the order of the rows: [Hkv, R, ...]."""
        return values if self.in_order else values.index_select(1, self.place)
