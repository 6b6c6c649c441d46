"""How prefix attention is divided among programs: lists of row ranges, built once per layout and block size.

A prompt's token is seen by all later tokens of its group, and a completion's token by the later tokens of its
completion. So one rule covers both: in the packed row, a key is seen by the later positions of a range.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from videor1_kernels.prefix_attention.layout import PrefixLayout, once_per_layout

PARTS = 512  # the queries of all key tiles together are cut into about this many equal parts
LEAST_PART = 512  # queries


@once_per_layout
def query_tiles(layout: PrefixLayout, block: int) -> Tensor:
    """int32 [n, 5], with a row for every ``block`` queries or fewer; those that see most keys come first.

    A row holds the first query, the end of its segment, the first key of its prompt, the end of these keys (there are
    none for a prompt's own tokens), and the first key of its segment. A query sees the keys of its prompt, and those of
    its segment up to itself.
    """
    tiles = []
    for start, stop, prompt, prompt_stop in _segments(layout):
        tiles += [(first, stop, prompt, prompt_stop, start) for first in range(start, stop, block)]
    tiles.sort(key=lambda tile: tile[0] - tile[4] + tile[3] - tile[2], reverse=True)
    return torch.tensor(tiles, dtype=torch.int32, device=layout.device)


@once_per_layout
def key_items(layout: PrefixLayout, block: int) -> tuple[Tensor, Tensor, int]:
    """Return (items int32 [n, 5], sums int32 [m, 4], number of partial results).

    An item has ``block`` keys or fewer, and some of the queries that see them. It holds the first key, the end of its
    segment, the first query, the end of the queries, and the place of its partial result, or -1 if it is the only item
    of its keys. A whole group sees its prompt's keys, so the queries of these are split over several items. A row of
    ``sums`` names them: the first key, the end of its segment, the first partial result and the number of results.
    """
    tiles = [(first, stop, seen) for start, stop, seen in _key_segments(layout) for first in range(start, stop, block)]
    total = sum(seen - first for first, _, seen in tiles)
    part = max(LEAST_PART, -(-total // PARTS))
    items, sums, slots = [], [], 0
    for first, stop, seen in tiles:
        count = -(-(seen - first) // part)
        if count == 1:
            items.append((first, stop, first, seen, -1))
            continue
        size = -(-(seen - first) // count)
        for i in range(count):
            items.append((first, stop, first + i * size, min(first + (i + 1) * size, seen), slots + i))
        sums.append((first, stop, slots, count))
        slots += count
    items.sort(key=lambda item: item[3] - item[2], reverse=True)
    rows, summed = (torch.tensor(x, dtype=torch.int32, device=layout.device) for x in (items, sums))
    return rows, summed.reshape(-1, 4), slots


@once_per_layout
def segment_numbers(layout: PrefixLayout) -> ctypes.Array[ctypes.c_int64]:
    """The first position and length of every prompt and completion, and those of its prompt (length 0 for a prompt)."""
    rows = [(start, stop - start, first, end - first) for start, stop, first, end in _segments(layout)]
    return (ctypes.c_int64 * (4 * len(rows)))(*(x for row in rows for x in row))


def _segments(layout: PrefixLayout) -> Iterator[tuple[int, int, int, int]]:
    """The first position and the end of every prompt and completion, and those of its prompt, empty for a prompt."""
    for prompt, length, starts, lengths in _groups(layout):
        yield prompt, prompt + length, prompt, prompt
        for start, count in zip(starts, lengths, strict=True):
            yield start, start + count, prompt, prompt + length


def _key_segments(layout: PrefixLayout) -> Iterator[tuple[int, int, int]]:
    """The first position and the end of every prompt and completion, and the end of the tokens that see it."""
    for prompt, length, starts, lengths in _groups(layout):
        yield prompt, prompt + length, prompt + length + sum(lengths)
        for start, count in zip(starts, lengths, strict=True):
            yield start, start + count, start + count


def _groups(layout: PrefixLayout) -> Iterator[tuple[int, int, Sequence[int], Sequence[int]]]:
    return zip(
        layout.prompt_starts, layout.prompt_lengths, layout.completion_starts, layout.completion_lengths, strict=True
    )
