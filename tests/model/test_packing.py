"""Batches under a budget: nothing is lost or moved, none holds more than it may, none could have held the next item."""

from __future__ import annotations

import itertools
import random

import pytest

from videor1.model.packing import greedy_batches


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [
        ([], 10, []),
        ([3], 10, [[3]]),
        ([4, 6, 1], 10, [[4, 6], [1]]),  # full to the last token
        ([4, 7], 10, [[4], [7]]),
        ([6, 6, 1, 3], 10, [[6], [6, 1, 3]]),  # in order: the first has room for the 1
        ([2, 11, 2], 10, [[2], [11], [2]]),  # too large for any batch: alone
        ([11, 12], 10, [[11], [12]]),
        ([0, 0, 1], 0, [[0, 0], [1]]),
    ],
)
def test_by_hand(sizes: list[int], budget: int, expected: list[list[int]]) -> None:
    asked: list[int] = []
    assert greedy_batches(iter(sizes), lambda item: asked.append(item) or item, budget) == expected  # type: ignore[func-returns-value]
    assert asked == sizes, "each size is asked once"


def test_random_sizes() -> None:
    rng = random.Random(0)
    for _ in range(200):
        items = ["x" * rng.randrange(12) for _ in range(rng.randrange(1, 20))]
        budget = rng.randrange(1, 25)
        batches = greedy_batches(items, len, budget)
        assert [item for batch in batches for item in batch] == items
        assert all(sum(map(len, batch)) <= budget for batch in batches if len(batch) > 1)
        for batch, following in itertools.pairwise(batches):
            assert sum(map(len, batch)) + len(following[0]) > budget
