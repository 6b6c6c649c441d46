"""Which branches are in flight, and the room they need: no model here."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import Judge
from tiny import make_model, make_prompt

from videor1.errors import ConfigError
from videor1.rollout.local.kv_cache import Capacity, KVCache, Sizes, Spans, plan_capacity
from videor1.rollout.local.scheduler import Job, Scheduler
from videor1.rollout.protocol import Branch, Request
from videor1.types import Prompt


def request(tokens: int, ordered: int, shuffled: int = 0, judge: Judge | None = None) -> Request:
    prompt = Prompt(make_prompt(None, "x").sample, torch.zeros(tokens, dtype=torch.int64), None, 0)
    second = Branch(shuffled, ("shuffled", 0)) if shuffled else None
    return Request(prompt, 0, Branch(ordered, ("ordered", 0)), second, judge)


def schedule(requests: Sequence[Request], slots: int, prefix: int = 99, *, eager: bool = False) -> Scheduler:
    return Scheduler(requests, Capacity(slots, prefix, 4, 1), eager=eager)


def names(jobs: Sequence[Job]) -> list[tuple[int, bool]]:
    """(number of the request, whether shuffled) of each."""
    return [(job.number, job.shuffled) for job in jobs]


def test_everything_enters_where_there_is_room() -> None:
    scheduler = schedule([request(5, 2, 1), request(3, 2)], 5, 13)
    entered = scheduler.admit()
    assert names(entered) == [(0, False), (0, True), (1, False)]
    assert sorted((job.start, job.length) for job in entered) == [(0, 5), (5, 5), (10, 3)]
    sequences = [sequence for job in entered for sequence in job.sequences]
    assert sorted(sequence.slot for sequence in sequences) == [0, 1, 2, 3, 4]
    assert [sequence.buffer_row for sequence in sequences] == [0, 1, 2, 3, 4]
    assert [sequence.index for sequence in sequences] == [0, 1, 0, 0, 1]
    assert scheduler.admit() == []
    # Rows that leave make room at once.
    scheduler = schedule([request(4, 2), request(6, 2), request(2, 1)], 3, 10)
    first, *none = scheduler.admit()
    assert not none  # three slots: the second branch does not fit, and the third does not overtake it
    scheduler.leave(first.sequences[0])
    (second,) = scheduler.admit()
    assert names([second]) == [(1, False)]
    assert {sequence.slot for sequence in first.sequences}.isdisjoint(sequence.slot for sequence in second.sequences)
    scheduler.leave(first.sequences[0])
    assert scheduler.running == [second]
    (third,) = scheduler.admit()
    assert third.start == 0  # the first prompt's place


def test_shuffled_branches_that_may_matter() -> None:
    judges = [Judge(None), Judge(None)]
    asked = [request(2, 2, 1, judge) for judge in judges]
    assert names(schedule(asked, 9, eager=True).admit()) == [(0, False), (1, False), (0, True), (1, True)]
    scheduler = schedule(asked, 9)
    assert names(scheduler.admit()) == [(0, False), (1, False)]
    judges[1].verdicts = (True,)
    assert names(scheduler.admit()) == [(1, True)]
    assert scheduler.admit() == []
    for job in list(scheduler.running):
        for sequence in list(job.sequences):
            scheduler.leave(sequence)
    assert names(scheduler.admit()) == [(0, True)]  # nothing else is left to do
    # What no longer matters is dropped.
    judges = [Judge(True), Judge(None)]
    scheduler = schedule([*(request(2, 1, 2, judge) for judge in judges), request(2, 2)], 4, eager=True)
    assert names(scheduler.admit()) == [(0, False), (0, True), (1, False)]
    for judge in judges:
        judge.verdicts = (False,)
    waiting, running = scheduler.drop()
    assert (names(waiting), names(running)) == ([(1, True)], [(0, True)])
    assert scheduler.drop() == ([], [])
    assert names(scheduler.running) == [(0, False), (1, False)]
    assert names(scheduler.admit()) == [(2, False)]  # in the slots of those that were stopped
    assert scheduler.waiting == []
    # Ordered ones come before those that may matter.
    scheduler = schedule([request(2, 2, 2, Judge(None)), request(2, 2)], 4, eager=True)
    assert names(scheduler.admit()) == [(0, False), (1, False)]


def test_random_runs_never_share_memory_and_always_end() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        judges = [rng.choice([None, Judge(True), Judge(None)]) for _ in range(12)]
        asked = [request(rng.randint(1, 30), rng.randint(1, 6), rng.randint(0, 3), judge) for judge in judges]
        branches = [(len(r.prompt.input_ids), b.count) for r in asked for b in (r.ordered, r.shuffled) if b]
        capacity = plan_capacity(branches, 4, Sizes(1, 0), max_rows=rng.randint(1, 20))
        scheduler, done = Scheduler(asked, capacity, eager=rng.random() < 0.5), 0
        while True:
            scheduler.drop()
            scheduler.admit()
            jobs = scheduler.running
            if not jobs:
                break
            running = [sequence for job in jobs for sequence in job.sequences]
            assert len({sequence.slot for sequence in running}) == len(running) <= capacity.slots
            spans = sorted((job.start, job.start + job.length) for job in jobs)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
            assert spans[-1][1] <= capacity.prefix_tokens
            for sequence in rng.sample(running, rng.randint(1, len(running))):
                scheduler.leave(sequence)
                done += 1
            for judge in judges:
                if judge is not None and rng.random() < 0.1:
                    judge.verdicts = (True,)
        assert not scheduler.waiting
        assert done == sum(count for _, count in branches)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_spans(steps: list[tuple[bool, int]]) -> None:
    spans, taken = Spans(40), []
    for take, length in steps:
        if take:
            start = spans.take(length)
            if start is None:
                used = {i for a, n in taken for i in range(a, a + n)}
                assert not any(used.isdisjoint(range(i, i + length)) for i in range(41 - length))
            else:
                assert all(start + length <= a or a + n <= start for a, n in taken)
                assert 0 <= start <= 40 - length
                taken.append((start, length))
        elif taken:
            spans.give(*taken.pop(length % len(taken)))
    for span in taken:
        spans.give(*span)
    assert spans.take(40) == 0


def test_the_cache_is_the_shared_amount() -> None:
    """A group of 8 ordered and 4 shuffled answers: two prompts and twelve suffixes, not twelve prompts."""
    group = [(1224, 8), (1224, 4)]
    capacity = plan_capacity(group, 768, Sizes(57344, 0), max_rows=64, budget=10**10)
    assert capacity.bytes == (2 * 1224 + 12 * 768) * 57344
    assert plan_capacity(group, 768, Sizes(57344, 0), max_rows=64) == capacity
    needs = r"kv_mib: 8 completions of up to 768 tokens to a prompt of 1224 tokens need 402\.9 MiB"
    with pytest.raises(ConfigError, match=needs):
        plan_capacity(group, 768, Sizes(57344, 0), max_rows=64, budget=400 * 2**20)
    branches = [(100, 8), (100, 4)] * 6
    for budget in (20_000, 10_000, 2_500):
        capacity = plan_capacity(branches, 50, Sizes(4, 0), max_rows=1000, budget=budget)
        assert capacity.bytes <= budget
        assert capacity.slots >= 8
        assert capacity.prefix_tokens >= 100
    # Without a budget the rows bound; one branch always fits.
    assert plan_capacity(branches, 50, Sizes(4, 0), max_rows=16) == Capacity(16, 200, 50, 4)
    assert plan_capacity(branches, 50, Sizes(4, 0), max_rows=1) == Capacity(8, 100, 50, 4)
    config = make_model().config.text_config
    assert Sizes.of(config, torch.float32).token == 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, head dim, bytes
    cache = KVCache(Capacity(3, 7, 5, 256), config, torch.float32, torch.device("cpu"))
    tensors = [*cache.prefix_k, *cache.prefix_v, *cache.suffix_k, *cache.suffix_v]
    assert sum(t.numel() * t.element_size() for t in tensors) == (7 + 3 * 5) * Sizes.of(config, torch.float32).token
