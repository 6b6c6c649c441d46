"""Grouping items into batches for the model, within a budget of tokens or patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


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
