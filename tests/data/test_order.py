"""The order of samples that are held in memory, and the seeds that it and everything else is drawn from."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch

from videor1.data.order import SampleStream
from videor1.seeding import derive_seed, generator


def order(count: int, samples: int, **options: int) -> list[int]:
    stream = SampleStream(samples, **{"seed": 1} | options)
    return [stream.at(draw) for draw in range(count)]


def test_stream_draws_every_sample_once_an_epoch_in_new_orders() -> None:
    draws = order(40, 10, seed=3)
    epochs = [tuple(draws[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({*epochs, tuple(order(10, 10, seed=4))}) == 5
    expected = torch.randperm(10, generator=generator(3, "data", 2)).tolist()  # as documented
    assert list(epochs[2]) == expected
    assert order(7, 3, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]


def test_stream_is_stateless() -> None:
    straight, stream = order(50, 7), SampleStream(7, seed=1)
    jumps = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert {draw: stream.at(draw) for draw in jumps} == dict(enumerate(straight))
    for start in (0, 20):
        drawn = itertools.islice(SampleStream(7, seed=1).iterate(start), 50 - start)
        assert list(drawn) == list(enumerate(straight))[start:]


def test_stream_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        SampleStream(0, seed=1)
    with pytest.raises(ValueError, match="draw: expected 0 or more, got -1"):
        SampleStream(3, seed=1).at(-1)


def test_derived_seeds_follow_their_documented_formula() -> None:
    # A change here changes the data order and the permutations of every run.
    digest = hashlib.sha256(b"i2:42s11:permutationi1:7s2:\xc3\xa9").digest()
    assert derive_seed(42, "permutation", 7, "é") == int.from_bytes(digest[:8], "big") >> 1
    assert derive_seed(42) == 5957220968500082653


def test_derived_seeds_differ_by_every_name() -> None:
    names = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", ""), ("1",), (1,), (11,), (1, 1), (-1,), ("a", 1), (1, "a")]
    seeds = {derive_seed(seed, *name) for seed in (0, 1, -1, 2**70) for name in names}
    assert len(seeds) == 4 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_independent_and_seeded_by_their_names() -> None:
    draws = [torch.rand(3, generator=generator(5, "sampling", i)).tolist() for i in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
    seeded = torch.Generator().manual_seed(derive_seed(5, "sampling", 1))
    assert draws[1] == torch.rand(3, generator=seeded).tolist()
