"""Grouping items into batches for the model, within a budget of tokens or patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from videor1.side_by_side import on_cores

T = TypeVar("T")

# Of passes that a CPU makes side by side: each costs some milliseconds beside its work, with gradients twice as many.
LEAST_TOKENS, LEAST_TRAINED_TOKENS, LEAST_PATCHES = 512, 1536, 512


def greedy_batches(items: Iterable[T], size: Callable[[T], int], budget: int) -> list[list[T]]:
    """Divide items, in their order, into batches whose sizes add up to at most ``budget``.

    A new batch begins where the next item would not fit. An item that is larger than the budget is a batch by itself.
    """
    batches: list[list[T]] = []
    used = 0
    for item in items:
        item_size = size(item)
        if not batches or used + item_size > budget:
            batches.append([])
            used = 0
        batches[-1].append(item)
        used += item_size
    return batches


def even_batches(
    items: Sequence[T], size: Callable[[T], int], budget: int, device: torch.device, *, least: int
) -> list[list[T]]:
    """Divide items, in their order, for passes that a CPU makes side by side: :func:`greedy_batches` on other devices.

    The batches are about even, and twice as many as long as each is of ``least`` or more. One that exceeds the budget
    is divided once more. The number of cores plays no part: the sums of a run's numbers would depend on it.
    """
    if not on_cores(device):
        return greedy_batches(items, size, budget)
    total, count = sum(map(size, items)), 1
    while 2 * count * least <= total:
        count *= 2
    batches: list[list[T]] = [[] for _ in range(count)]
    before = 0
    for item in items:
        middle = before + size(item) / 2  # of the item: it goes to the batch that holds more of it
        batches[min(int(middle * count / max(1, total)), count - 1)].append(item)
        before += size(item)
    return [part for batch in batches for part in greedy_batches(batch, size, budget)]
