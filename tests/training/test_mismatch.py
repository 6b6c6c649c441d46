"""The divergences of two policies by their sampled tokens: in plain numbers, and against their exact values."""

import math
from typing import Any

import pytest
import torch

from videor1.training.mismatch import WeightBounds, mismatch

NAN = math.nan
COMPLETIONS = [[0.0, 0.5, -1.25, NAN], [], [NAN, NAN], [2.0], [-0.1, 0.2, 0.4], [1e-9, -1e-9]]


def test_by_formula() -> None:
    """In fp64, tokens without a log-prob left out."""
    d = [x for completion in COMPLETIONS for x in completion if not math.isnan(x)]
    w = [math.exp(x) for x in d]
    expected = {
        "sampling/kl_k3": math.fsum(v - 1 - x for v, x in zip(w, d, strict=True)) / len(d),
        "sampling/chi2": math.fsum(v * v for v in w) / len(d) - 1,
        "sampling/ess": math.fsum(w) ** 2 / (len(d) * math.fsum(v * v for v in w)),
    }
    found = mismatch([torch.tensor(c, dtype=torch.float64) for c in COMPLETIONS])
    assert found == pytest.approx(expected, rel=1e-12)
    # Rounding of fp32 log-probs must not drown a small divergence, nor a large one overflow a share.
    tiny = mismatch([torch.tensor([1e-5, -1e-5])])
    assert tiny["sampling/kl_k3"] == pytest.approx(0.5e-10, rel=1e-4)
    assert mismatch([torch.tensor([800.0, 800.0, 0.0, 0.0])])["sampling/ess"] == pytest.approx(0.5)


def test_they_estimate_the_divergences() -> None:
    """Tokens in the proportions of the policy q that they are drawn from, against sums over the vocabulary."""
    counts, p = [5, 3, 2], [0.3, 0.3, 0.4]
    q = [n / 10 for n in counts]
    d = torch.tensor([math.log(a / b) for a, b, n in zip(p, q, counts, strict=True) for _ in range(n)])
    found = mismatch([d.double()])
    assert found["sampling/kl_k3"] == pytest.approx(sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
    chi2 = sum((a - b) ** 2 / b for a, b in zip(p, q, strict=True))
    assert found["sampling/chi2"] == pytest.approx(chi2)
    assert found["sampling/ess"] == pytest.approx(1 / (1 + chi2))


@pytest.mark.parametrize(
    ("bounds", "outside"),
    [
        # Weights by token: 1, 1.65, 0.29; 7.39; 0.90, 1.22, 1.49; 1, 1. By completion: 0.78; 7.39; 1.18; 1.
        ({"level": "token", "high": 2.0}, 1),
        ({"level": "token", "low": 0.5, "high": 1.4}, 4),
        ({"level": "token", "low": 0.95}, 2),
        ({"level": "sequence", "low": 0.5, "high": 1.5}, 1),  # products of the weights: 0.47; 7.39; 1.65; 1
        ({"level": "sequence", "low": 0.8, "high": 1.1}, 7),
        ({"level": "token", "low": 0.0, "high": math.inf}, 0),
    ],
)
@pytest.mark.parametrize(("mode", "name"), [("truncate", "sampling/truncated"), ("mask", "sampling/masked")])
def test_shares_outside_of_bounds(bounds: dict[str, Any], outside: int, mode: Any, name: str) -> None:
    found = mismatch([torch.tensor(c) for c in COMPLETIONS], WeightBounds(mode=mode, **bounds))
    assert found.keys() - mismatch([]).keys() == {name}
    assert found[name] == pytest.approx(outside / 9)


def test_a_weight_on_its_bound_is_inside() -> None:
    ratios = [torch.tensor([0.0, 0.0])]
    for level in ("token", "sequence"):
        assert mismatch(ratios, WeightBounds(level, "mask", 1.0, 1.0))["sampling/masked"] == 0


def test_nothing_is_known() -> None:
    bounds = WeightBounds("sequence", "truncate", high=2.0)
    for ratios in ([], [torch.empty(0)], [torch.full((3,), NAN)]):
        found = mismatch(ratios, bounds)
        assert len(found) == 4
        assert all(map(math.isnan, found.values()))
