"""The tools of videor1_kernels.testing themselves: one that cannot fail proves nothing."""

from __future__ import annotations

import pytest
import torch

from videor1_kernels.testing import (
    TOLERANCES,
    LargestTensor,
    assert_matches,
    assert_no_worse,
    oracle_inputs,
    poison_padding,
    poisoned_memory,
    rounding,
)


def test_assert_matches_can_fail() -> None:
    one = torch.ones(3)
    for dtype, bound in TOLERANCES.items():
        assert_matches(one.to(dtype), one.double() * (1 + bound.rtol / 2))
        with pytest.raises(AssertionError, match="thing"):
            assert_matches(one.to(dtype), one.double() * (1 + 2 * bound.rtol + 2 * bound.atol), name="thing")


def test_assert_no_worse_can_fail() -> None:
    oracle = torch.linspace(1, 2, 9, dtype=torch.float64)
    baseline = (oracle + 1e-3).float()
    assert_no_worse((oracle - 1e-3).float(), baseline, oracle, terms=1)
    with pytest.raises(AssertionError, match="plain torch"):
        assert_no_worse((oracle + 2e-3).float(), baseline, oracle, terms=1)
    with pytest.raises(AssertionError, match="shape"):
        assert_no_worse(baseline[:1], baseline, oracle, terms=1)


def test_assert_no_worse_allows_the_rounding_of_its_terms_and_no_more() -> None:
    oracle = torch.linspace(1, 2, 9, dtype=torch.float64)
    lucky = oracle  # a baseline without any error
    eps = torch.finfo(torch.float32).eps
    for terms, scale, allowed in ((1, None, 6), (100, None, 42), (100, 10.0, 210)):  # eps (scale + 2 sqrt(terms) scale)
        assert_no_worse(oracle.float() + 0.9 * allowed * eps, lucky, oracle, terms=terms, scale=scale)
        with pytest.raises(AssertionError, match="limit"):
            assert_no_worse(oracle.float() + 1.1 * allowed * eps, lucky, oracle, terms=terms, scale=scale)
    half, half_eps = torch.bfloat16, torch.finfo(torch.bfloat16).eps  # a sum in fp32, rounded once when it is stored
    assert_no_worse((oracle + half_eps).to(half), lucky, oracle, terms=100)
    with pytest.raises(AssertionError, match="limit"):
        assert_no_worse((oracle + 4 * half_eps).to(half), lucky, oracle, terms=100)


def test_rounding_bounds_what_the_order_of_a_sum_changes() -> None:
    """Sums of the same numbers, forwards and backwards, one by one: within the bound, and not by far."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1000, 200, generator=generator) - 0.5
    one, other = (torch.zeros(200) for _ in range(2))
    largest = 0.0
    for forwards, backwards in zip(x, x.flip(0), strict=True):
        one += forwards
        other += backwards
        largest = max(largest, one.abs().max().item(), other.abs().max().item())
    apart = (one - other).abs().max().item()
    assert 0.02 * rounding(1000, largest) < apart < rounding(1000, largest)


def test_oracle_inputs() -> None:
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    index = torch.ones(2, dtype=torch.int64)
    exact, same, none = oracle_inputs(x, index, None)
    assert exact.dtype == torch.float64
    assert exact.requires_grad
    assert exact.is_leaf
    assert same is index
    assert none is None


def test_poison() -> None:
    values = torch.zeros(2, 3, 2)
    poisoned = poison_padding(values, torch.tensor([1, 3]))
    assert poisoned.isnan().any(-1).tolist() == [[False, True, True], [False, False, False]]
    assert not values.isnan().any()
    with poisoned_memory():
        assert torch.empty(4).isnan().all()
        assert torch.empty_like(values).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_largest_tensor_sees_the_backward_pass() -> None:
    x = torch.ones(10, requires_grad=True)
    with LargestTensor() as forward:
        y = (x * 2).sum()
    assert forward.numel == 10
    with LargestTensor() as backward:
        y.backward()
    assert backward.numel == 10
    with LargestTensor() as outer:
        torch.outer(torch.ones(7), torch.ones(11))
    assert outer.numel == 77
