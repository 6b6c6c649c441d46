"""How groups lie in a packed row, how rows are planned, and how a row's attention is divided among programs."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_prefix_attention import mask_of

from videor1_kernels import PrefixLayout, RowPart, plan_rows
from videor1_kernels.prefix_attention import work


def test_layout_indices() -> None:
    layout = PrefixLayout(prompt_lengths=[3, 2], completion_lengths=[[2, 1], [3]])
    # Row: p p p a a b | p p c c c
    assert layout.total_tokens == 11
    assert layout.prompt_starts == (0, 6)
    assert layout.completion_starts == ((3, 5), (8,))
    assert layout.prompt_index.tolist() == [0, 1, 2, 6, 7]
    assert layout.completion_index.tolist() == [3, 4, 5, 8, 9, 10]
    assert layout.predict_index.tolist() == [2, 3, 2, 7, 8, 9]
    assert layout.cu_completions.tolist() == [0, 2, 3, 6]
    assert layout.cu_completions.dtype == torch.int32


def test_layout_without_completions() -> None:
    layout = PrefixLayout([2, 3], [[], []])
    assert layout.total_tokens == 5
    assert layout.completion_index.shape == layout.predict_index.shape == (0,)
    assert layout.completion_index.dtype == torch.int64
    assert layout.cu_completions.tolist() == [0]


def test_text_positions() -> None:
    layout = PrefixLayout([3, 2], [[2, 1], [3]])
    first = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 2]])
    second = torch.tensor([[0, 1], [0, 1], [0, 1]])
    positions = layout.text_positions([first, second], [3, 2])
    assert positions.shape == (3, 1, 11)
    assert positions.dtype == torch.int64
    assert positions[:, 0].tolist() == [
        [0, 1, 1, 3, 4, 3, 0, 1, 2, 3, 4],
        [0, 1, 1, 3, 4, 3, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4],
    ]
    with pytest.raises(ValueError, match=r"prompt_positions\[1\]: expected shape \[3, 2\], got \[3, 3\]"):
        layout.text_positions([first, first], [3, 2])
    with pytest.raises(ValueError, match="expected 2 entries each, got 1 and 2"):
        layout.text_positions([first], [3, 2])


def test_layout_is_frozen_and_moves() -> None:
    layout = PrefixLayout([3], [[2]])
    with pytest.raises(AttributeError):
        layout.total_tokens = 7  # type: ignore[misc]
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.completion_index.device.type == moved.cu_completions.device.type == "meta"
    assert moved.total_tokens == 5


LAYOUTS = [
    PrefixLayout([7], [[3, 5]]),
    PrefixLayout([1, 4, 9], [[1], [], [4, 1, 8]]),
    PrefixLayout([8, 8], [[4, 4], [12]]),
    PrefixLayout([3], [[]]),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 4, 16])
def test_query_tiles_cover_every_pair_once(layout: PrefixLayout, block: int) -> None:
    pairs = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.int64)
    costs = []
    for first, stop, prompt, prompt_stop, own in work.query_tiles(layout, block).tolist():
        for query in range(first, min(first + block, stop)):
            pairs[query, prompt:prompt_stop] += 1
            pairs[query, own : query + 1] += 1
        costs.append(prompt_stop - prompt + first - own)
    assert torch.equal(pairs, mask_of(layout.prompt_lengths, layout.completion_lengths).long())
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize(("parts", "least"), [(512, 512), (3, 2), (512, 4), (1000, 1)])
def test_key_items_cover_every_pair_once(
    layout: PrefixLayout, block: int, parts: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "PARTS", parts)
    monkeypatch.setattr(work, "LEAST_PART", least)
    layout = PrefixLayout(layout.prompt_lengths, layout.completion_lengths)  # nothing built before
    items, sums, slots = work.key_items(layout, block)
    pairs = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.int64)
    by_slot: dict[int, tuple[int, int, int]] = {}
    for first, stop, query, query_stop, slot in items.tolist():
        assert query < query_stop <= layout.total_tokens
        for key in range(first, min(first + block, stop)):
            pairs[max(query, key) : query_stop, key] += 1
        if slot >= 0:
            assert slot not in by_slot
            by_slot[slot] = (first, stop, query)
    assert torch.equal(pairs, mask_of(layout.prompt_lengths, layout.completion_lengths).long())
    assert sorted(by_slot) == list(range(slots))
    named: list[int] = []
    for first, stop, slot, count in sums.tolist():
        own = [by_slot[i] for i in range(slot, slot + count)]
        assert count > 1
        assert {entry[:2] for entry in own} == {(first, stop)}
        assert [entry[2] for entry in own] == sorted(entry[2] for entry in own)
        named += range(slot, slot + count)
    assert sorted(named) == list(range(slots))
    lengths = [stop - first for _, _, first, stop, _ in items.tolist()]
    assert lengths == sorted(lengths, reverse=True)


def test_a_prompt_is_split_and_no_item_dominates() -> None:
    """At a 7B group's sizes: without the split 10 key tiles would hold three quarters of the work."""
    items, sums, slots = work.key_items(PrefixLayout([1224], [[768] * 8]), 128)
    lengths = (items[:, 3] - items[:, 2]).double()
    assert lengths.max() <= 512
    assert len(sums) > 10
    assert lengths.max() / lengths.sum() < 1 / 132  # the multiprocessors of an H200
    assert slots * 2 * 4 * 128 * 128 * 4 < 100 * 2**20


def test_tiles_are_built_once_per_layout_and_freed_with_it() -> None:
    layout = PrefixLayout([7], [[3, 5]])
    assert work.query_tiles(layout, 4) is work.query_tiles(layout, 4)
    assert work.query_tiles(layout, 4) is not work.query_tiles(layout, 2)
    assert work.key_items(layout, 4)[0] is work.key_items(layout, 4)[0]
    assert work.query_tiles(PrefixLayout([7], [[3, 5]]), 4) is not work.query_tiles(layout, 4)
    gone = weakref.ref(layout)
    del layout
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("prompts", "completions", "bound", "rows"),
    [
        ([3, 5], [[1, 2], []], None, [[RowPart(0, (0, 1)), RowPart(1, ())]]),
        ([], [], None, []),
        ([], [], 10, []),
        (  # first-fit decreasing: 8, 5, 4 and 3 tokens under 12: 8 with 4, 5 with 3
            [2, 4, 2, 2],
            [[6], [1], [2], [1]],
            12,
            [[RowPart(0, (0,)), RowPart(2, (0,))], [RowPart(1, (0,)), RowPart(3, (0,))]],
        ),
        # A group over the bound is split, and its prompt repeated.
        ([4], [[3, 3, 3, 6]], 10, [[RowPart(0, (0, 1))], [RowPart(0, (2,))], [RowPart(0, (3,))]]),
    ],
)
def test_planned_rows(
    prompts: list[int], completions: list[list[int]], bound: int | None, rows: list[list[RowPart]]
) -> None:
    assert plan_rows(prompts, completions, bound) == rows


@pytest.mark.parametrize("seed", range(20))
def test_everything_is_planned_once_and_nothing_over_the_bound(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [draw.randint(1, 50) for _ in range(draw.randint(1, 8))]
    completions = [[draw.randint(1, 40) for _ in range(draw.randint(0, 6))] for _ in prompts]
    bound = 90 + draw.randint(0, 200)
    rows = plan_rows(prompts, completions, bound)
    for row in rows:
        chosen = [[completions[p.group][c] for c in p.completions] for p in row]
        assert PrefixLayout([prompts[p.group] for p in row], chosen).total_tokens <= bound
        assert [p.group for p in row] == sorted({p.group for p in row})
    found = sorted((p.group, c) for row in rows for p in row for c in p.completions)
    assert found == [(g, c) for g, group in enumerate(completions) for c in range(len(group))]
    assert {p.group for row in rows for p in row} == set(range(len(prompts)))
    assert rows == plan_rows(prompts, completions, bound)


@pytest.mark.parametrize(
    ("call", "lengths", "message"),
    [
        (PrefixLayout, ([], []), "prompt_lengths: expected at least one group, got none"),
        (PrefixLayout, ([3], [[2], [1]]), "completion_lengths: expected 1 lists, one per prompt, got 2"),
        (PrefixLayout, ([3, 0], [[2], [1]]), r"prompt_lengths\[1\]: expected 1 or more, got 0"),
        (PrefixLayout, ([3], [[2, 0]]), r"completion_lengths\[0\]: expected lengths of 1 or more"),
        (plan_rows, ([3], [[1], [2]]), "completion_lengths: expected 1 lists, one per prompt, got 2"),
        (plan_rows, ([3, 8], [[1], [2, 3]], 10), r"expected at least 11 \(the prompt and completion 1 of group 1\)"),
        (plan_rows, ([3, 18], [[1], []], 10), r"expected at least 18 \(the prompt of group 1\), got 10"),
    ],
)
def test_errors(call: Callable[..., object], lengths: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"{call.__name__}: .*{message}"):
        call(*lengths)
