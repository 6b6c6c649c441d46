"""Sampled tokens against an enumeration of the truncated distribution, written without torch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from videor1.sampling import SamplingOptions, sample_tokens

ALMOST_ONE = 1 - 2.0**-24  # the largest fp32 number below 1
NONE = torch.tensor([], dtype=torch.long)


def draw(logits: Tensor, uniform: Tensor | list[float], banned: Tensor = NONE, **options: float) -> list[int]:
    """Tokens of one row of logits [V], one per uniform number."""
    uniform = torch.as_tensor(uniform, dtype=torch.float32)
    return sample_tokens(logits.expand(len(uniform), -1), uniform, SamplingOptions(1, **options), banned).tolist()


def truncated(
    logits: list[float], temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, banned: tuple[int, ...] = ()
) -> list[tuple[int, float]]:
    """(token, probability), likeliest first, of what may be drawn."""
    allowed = [token for token in range(len(logits)) if token not in banned]
    order = sorted(allowed, key=lambda token: (-logits[token], token))
    order = order[:top_k] if top_k else order
    weights = [math.exp((logits[token] - logits[order[0]]) / temperature) for token in order]
    kept: list[tuple[int, float]] = []
    for token, weight in zip(order, weights, strict=True):
        if top_p < 1 and sum(p for _, p in kept) >= top_p:
            break
        kept.append((token, weight / sum(weights)))
    total = sum(p for _, p in kept)
    return [(token, p / total) for token, p in kept]


def grid(count: int) -> Tensor:
    """Evenly spaced numbers in (0, 1): the share of them in an interval is its length, to within one."""
    return (torch.arange(count) + 0.5) / count


SETTINGS = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 5, "top_p": 0.7},
    {"top_k": 10_000},
    {"top_p": 1e-9},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_each_token_gets_its_share_of_the_unit_interval(options: dict) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    expected = truncated(logits.tolist(), **options)
    count = 20_000
    counts = Counter(draw(logits, grid(count), **options))
    for token, probability in expected:
        assert abs(counts.pop(token, 0) - probability * count) <= 1.1, token
    assert not counts  # nothing outside the kept set


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-24, 24).map(lambda x: x / 4), min_size=2, max_size=12),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1e-6, 0.31, 0.77, 0.98, 1.0]),
    top_k=st.integers(0, 14),
    banned=st.sets(st.integers(0, 11), max_size=1),
)
def test_the_inverse_of_the_cumulative_distribution(logits, temperature, top_p, top_k, banned) -> None:
    """Quarter-integer logits have many ties, which go in the order of the ids."""
    banned = tuple(token for token in banned if token < len(logits))
    expected = truncated(logits, temperature, top_p, top_k, banned)
    edges = torch.tensor([p for _, p in expected], dtype=torch.float64).cumsum(0)
    uniform = grid(97).double()
    uniform = uniform[(uniform[:, None] - edges).abs().amin(1) > 1e-5]  # fp32 may go either way at an edge
    want = [expected[int((edges <= u).sum())][0] for u in uniform]
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    assert draw(torch.tensor(logits), uniform.float(), torch.tensor(banned, dtype=torch.long), **options) == want


def test_random_numbers_give_the_distribution() -> None:
    logits = torch.tensor([0.5, 1.5, -1.0, 0.0, 1.0])
    count = 40_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    counts = Counter(draw(logits, uniform, top_p=0.9))
    expected = truncated(logits.tolist(), top_p=0.9)
    chi2 = sum((counts[token] - count * p) ** 2 / (count * p) for token, p in expected)
    assert len(expected) == 4
    assert sum(counts[token] for token, _ in expected) == count
    assert chi2 < 16.3  # the 0.999 quantile for 3 degrees of freedom


def test_the_edges_of_the_unit_interval() -> None:
    generator = torch.Generator().manual_seed(2)
    for options in SETTINGS:
        for scale in (0.0, 0.01, 1.0, 30.0):
            logits = torch.randn(500, generator=generator) * scale
            kept = truncated(logits.tolist(), **options)
            first, last = draw(logits, [0.0, ALMOST_ONE], **options)
            assert first == kept[0][0]
            assert last in {token for token, _ in kept}


def test_top_p_keeps_the_token_that_crosses_it_and_no_more() -> None:
    logits = torch.tensor([4.0, 2.0, 1.0, 1.0]).log()  # probabilities 1/2, 1/4, 1/8, 1/8, exact in fp32
    for top_p, kept in ((0.25, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 4), (1.0, 4)):
        assert set(draw(logits, grid(1000), top_p=top_p)) == set(range(kept)), top_p


def test_top_p_is_taken_after_top_k_and_temperature() -> None:
    logits = torch.tensor([3.0, 3.0, 2.0, 2.0]).log()
    # Of the two kept by top_k each has one half: top_p 0.5 leaves one. Of all four, 0.3 would not reach 0.5.
    assert set(draw(logits, grid(100), top_k=2, top_p=0.5)) == {0}
    assert set(draw(logits, grid(100), top_p=0.5)) == {0, 1}
    # A low temperature sharpens first: 9/26, 9/26, 4/26, 4/26.
    assert set(draw(logits, grid(100), top_p=0.65, temperature=0.5)) == {0, 1}
    assert set(draw(logits, grid(100), top_p=0.65)) == {0, 1, 2}


@pytest.mark.parametrize("options", [*SETTINGS, {"temperature": 0.0}], ids=str)
def test_banned_tokens_are_never_drawn(options: dict) -> None:
    logits = torch.zeros(10)
    logits[[3, 7]] = 50.0
    drawn = draw(logits, [0.0, *grid(500).tolist(), ALMOST_ONE], torch.tensor([3, 7]), **options)
    assert not {3, 7} & set(drawn)


def test_top_k_counts_allowed_tokens_only() -> None:
    logits = torch.tensor([9.0, 8.0, 1.0, 1.0, 0.0])
    assert set(draw(logits, grid(200), torch.tensor([0, 1]), top_k=2)) == {2, 3}


def test_top_k_wider_than_what_is_allowed_leaves_banned_tokens_out() -> None:
    logits = torch.tensor([9.0, 1.0, 1.0])
    assert set(draw(logits, [*grid(200).tolist(), ALMOST_ONE], torch.tensor([0]), top_k=3)) == {1, 2}


def test_greedy_takes_the_likeliest_and_the_lowest_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, -1.0, 5.0, 5.0], [1.0, 1.0, 1.0, 7.0]])
    uniform = torch.tensor([0.9, 0.5, 0.1])
    assert sample_tokens(logits, uniform, SamplingOptions(1, temperature=0.0), NONE).tolist() == [1, 0, 3]
    banned = sample_tokens(logits, uniform, SamplingOptions(1, temperature=0.0), torch.tensor([1, 3]))
    assert banned.tolist() == [2, 0, 0]


def test_a_row_does_not_depend_on_the_others_and_repeats() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(9, 333, generator=generator) * 3
    uniform = torch.rand(9, generator=generator)
    options = SamplingOptions(1, temperature=0.9, top_p=0.9, top_k=100)
    banned = torch.tensor([5, 6])
    together = sample_tokens(logits, uniform, options, banned)
    assert torch.equal(together, sample_tokens(logits, uniform, options, banned))
    order = torch.randperm(9, generator=generator)
    assert torch.equal(together[order], sample_tokens(logits[order], uniform[order], options, banned))
    alone = [int(sample_tokens(row[None], u[None], options, banned)) for row, u in zip(logits, uniform, strict=True)]
    assert together.tolist() == alone


def test_logits_stay_as_they_were() -> None:
    logits = torch.randn(2, 8)
    before = logits.clone()
    sample_tokens(logits, torch.tensor([0.2, 0.8]), SamplingOptions(1, top_p=0.5, top_k=3), torch.tensor([1]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_drawn_as_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert draw(logits, grid(300), top_p=0.8) == draw(logits.float(), grid(300), top_p=0.8)


def test_shares_are_exact_where_the_numbers_are() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0]).log()
    eighths = [i / 8 for i in range(8)]
    shares = Counter(draw(logits, eighths))
    assert shares == {0: 4, 1: 2, 2: 2}


def test_logits_that_are_not_finite_give_some_token_of_the_vocabulary() -> None:
    """Their log-probs are NaN, which the training step then counts as one that it must skip."""
    logits = torch.full((2, 6), torch.nan)
    logits[1] = torch.randn(6)
    for options in ({}, {"top_p": 0.9}, {"top_k": 2}, {"temperature": 0.0}):
        tokens = sample_tokens(logits, torch.tensor([0.5, ALMOST_ONE]), SamplingOptions(1, **options), NONE)
        assert int(tokens.min()) >= 0
        assert int(tokens.max()) < 6
