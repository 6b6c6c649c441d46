"""What goes through the model together: as much as a budget of tokens or patches lets through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def greedy_batches(items: Iterable[T], size: Callable[[T], int], budget: int) -> list[list[T]]:
    """The items in their order, cut into batches whose sizes add up to at most ``budget``: a new one begins where the
    next item would not fit. An item that is larger than the budget is a batch by itself."""
    batches: list[list[T]] = []
    used = 0
    for item in items:
        own = size(item)
        if not batches or used + own > budget:
            batches.append([])
            used = 0
        batches[-1].append(item)
        used += own
    return batches
