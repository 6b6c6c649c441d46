"""The lists of tiles against the definition of who sees whom, pair by pair."""

import gc
import weakref

import pytest
import torch

from videor1_kernels import PrefixLayout
from videor1_kernels.prefix_attention import work

LAYOUTS = [
    PrefixLayout([7], [[3, 5]]),
    PrefixLayout([1, 4, 9], [[1], [], [4, 1, 8]]),
    PrefixLayout([8, 8], [[4, 4], [12]]),
    PrefixLayout([3], [[]]),
]


def seen(layout):
    """bool [T, T]: row sees column."""
    out = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.bool)
    for start, length, starts, lengths in zip(
        layout.prompt_starts, layout.prompt_lengths, layout.completion_starts, layout.completion_lengths, strict=True
    ):
        for own, count in [(start, length), *zip(starts, lengths, strict=True)]:
            out[own : own + count, start : start + length] = own != start
            out[own : own + count, own : own + count] = torch.ones(count, count).tril() > 0
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 4, 16])
def test_query_tiles_cover_every_pair_once(layout, block):
    pairs = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.int64)
    costs = []
    for first, stop, prompt, prompt_stop, own in work.query_tiles(layout, block).tolist():
        for query in range(first, min(first + block, stop)):
            pairs[query, prompt:prompt_stop] += 1
            pairs[query, own : query + 1] += 1
        costs.append(prompt_stop - prompt + first - own)
    assert torch.equal(pairs, seen(layout).long())
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize(("parts", "least"), [(512, 512), (3, 2), (1000, 1)])
def test_key_items_cover_every_pair_once(layout, block, parts, least, monkeypatch):
    monkeypatch.setattr(work, "PARTS", parts)
    monkeypatch.setattr(work, "LEAST_PART", least)
    layout = PrefixLayout(layout.prompt_lengths, layout.completion_lengths)  # nothing built before
    items, sums, slots = work.key_items(layout, block)
    pairs = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.int64)
    by_slot = {}
    for first, stop, query, query_stop, slot in items.tolist():
        assert query < query_stop
        for key in range(first, min(first + block, stop)):
            pairs[max(query, key) : query_stop, key] += 1
        if slot >= 0:
            assert slot not in by_slot
            by_slot[slot] = (first, stop, query)
    assert torch.equal(pairs, seen(layout).long())
    assert sorted(by_slot) == list(range(slots))
    named = []
    for first, stop, slot, count in sums.tolist():
        own = [by_slot[i] for i in range(slot, slot + count)]
        assert count > 1
        assert {entry[:2] for entry in own} == {(first, stop)}
        assert [entry[2] for entry in own] == sorted(entry[2] for entry in own)
        named += range(slot, slot + count)
    assert sorted(named) == list(range(slots))
    lengths = [stop - first for _, _, first, stop, _ in items.tolist()]
    assert lengths == sorted(lengths, reverse=True)


def test_a_prompt_is_split_and_no_item_dominates():
    """At a 7B group's sizes: without the split 10 key tiles would hold three quarters of the work."""
    layout = PrefixLayout([1224], [[768] * 8])
    items, sums, slots = work.key_items(layout, 128)
    lengths = (items[:, 3] - items[:, 2]).double()
    assert lengths.max() <= 512
    assert len(sums) > 10
    assert lengths.max() / lengths.sum() < 1 / 132  # the multiprocessors of an H200
    assert slots * 2 * 4 * 128 * 128 * 4 < 100 * 2**20


def test_built_once_per_layout_and_freed_with_it():
    layout = PrefixLayout([7], [[3, 5]])
    assert work.query_tiles(layout, 4) is work.query_tiles(layout, 4)
    assert work.query_tiles(layout, 4) is not work.query_tiles(layout, 2)
    assert work.key_items(layout, 4)[0] is work.key_items(layout, 4)[0]
    assert work.query_tiles(PrefixLayout([7], [[3, 5]]), 4) is not work.query_tiles(layout, 4)
    gone = weakref.ref(layout)
    del layout
    gc.collect()
    assert gone() is None
