"""tgrpo_advantages by hand on the reference, and Triton against the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from loss_cases import BACKENDS, BY_HAND, FP32, KINDS, Kind, assert_same_bits, double, strided
from torch import Tensor
from triton_cases import DEVICE

from videor1_kernels import last_backend, tgrpo_advantages
from videor1_kernels.group_advantage import Advantages
from videor1_kernels.testing import assert_matches, poisoned_memory, rounding

# 0 / 0 in groups of equal rewards with eps 0, whose quotient is not used, and what becomes of an infinite accuracy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in (divide|subtract):RuntimeWarning")

NAN = math.nan
SHORT = 100  # tokens: outside the length bonus's range
FIELDS = ("advantages", "rewards", "temporal", "p", "p_shuffled")
RULES, APPLY = ("margin", "threshold", "reference"), ("reward", "advantage")
NORMALIZE, BASELINES = ("std", "none", "batch", "gdpo"), ("mean", "leave_one_out")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # no product of matrices: the interpreter is right in bf16 too
Inputs = Sequence[Tensor | None]


def call(
    accuracy: Sequence[float],
    shuffled: Sequence[float] | None = None,
    format: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Advantages:
    """One prompt."""
    size = len(accuracy)
    rows = accuracy, format or [0.0] * size, shuffled
    first, second, third = (None if row is None else torch.tensor([row], dtype=dtype, device=DEVICE) for row in rows)
    return tgrpo_advantages(first, second, torch.tensor([lengths or [SHORT] * size], device=DEVICE), third, **options)


# By hand.


@pytest.mark.parametrize(
    ("rule", "accuracy", "shuffled", "options", "bonus"),
    [
        # margin: alpha (p - p~), alpha 0.3
        ("margin", [1, 1, 0, 0], [1, 0, 0, 0], {}, 0.3 * 0.25),
        ("margin", [1, 1, 1, 1], [0, 0], {}, 0.3),
        ("margin", [1, 1, 0, 0], [1, 0], {}, 0.0),  # p == p~
        ("margin", [1, 0, 0, 0], [1, 1], {}, 0.0),  # p < p~
        ("margin", [0, 0, 0, 0], [0, 0], {}, 0.0),
        ("margin", [1, 1, 0, 0], [0, 0], {"alpha": 2.0}, 1.0),
        ("margin", [1, 1, 0, 0], [0.5, 0.5, 0.25, 0.25], {"mu": 99.0}, 0.3 * 0.125),  # mu has no part
        # threshold: alpha if p > mu p~, mu 0.8
        ("threshold", [1, 1, 0, 0], [1, 0], {}, 0.3),  # 0.5 > 0.4
        ("threshold", [1, 0, 0, 0], [1, 0], {}, 0.0),  # 0.25 < 0.4
        ("threshold", [0, 0, 0, 0], [0, 0], {}, 0.0),  # 0 > 0 fails
        ("threshold", [1, 0, 0, 0], [1, 0], {"mu": 0.5}, 0.0),  # 0.25 > 0.25 fails
        ("threshold", [1, 0, 0, 0], [1, 0], {"mu": 0.25, "alpha": 0.7}, 0.7),
        # reference: alpha if p >= mu p~
        ("reference", [1, 1, 0, 0], [1, 0], {}, 0.3),
        ("reference", [1, 0, 0, 0], [1, 0], {}, 0.0),
        ("reference", [0, 0, 0, 0], [0, 0], {}, 0.3),  # 0 >= 0 passes
        ("reference", [1, 0, 0, 0], [1, 0], {"mu": 0.5}, 0.3),  # 0.25 >= 0.25 passes
    ],
)
def test_temporal_bonus_by_hand(
    rule: str, accuracy: list[float], shuffled: list[float], options: dict[str, float], bonus: float
) -> None:
    out = call(accuracy, shuffled, rule=rule, **options)
    assert out.temporal.tolist() == pytest.approx([bonus], abs=BY_HAND)
    assert (out.temporal.item() == 0) == (bonus == 0)
    assert out.p.item() == mean(accuracy)
    assert out.p_shuffled.item() == mean(shuffled)
    correct = [bonus if a > 0.1 else 0 for a in accuracy]
    assert out.rewards[0].tolist() == pytest.approx(
        [a + b for a, b in zip(accuracy, correct, strict=True)], abs=BY_HAND
    )
    # Applied to the advantage, the bonus is not in the rewards, and acts where all are correct too.
    other = call(accuracy, shuffled, rule=rule, apply="advantage", **options)
    assert other.rewards[0].tolist() == accuracy
    without = call(accuracy).advantages[0].tolist()
    expected = [a + b for a, b in zip(without, correct, strict=True)]
    assert other.advantages[0].tolist() == pytest.approx(expected, abs=BY_HAND)


@pytest.mark.parametrize(
    ("inputs", "options", "rewards"),
    [
        # Length, 0.2 of 320 to 512 tokens: both ends included, and for correct ones only.
        (([1, 1, 0, 0], None, None, [320, 512, 400, 400]), {}, [1.2, 1.2, 0, 0]),
        (([1, 1, 0, 0], None, None, [319, 513, 400, 400]), {}, [1, 1, 0, 0]),
        (([1, 1, 0, 0], None, None, [400, 100, 400, 400]), {}, [1.2, 1, 0, 0]),  # two are correct, one is in range
        (([1, 0, 0, 0], None, None, [400] * 4), {}, [1, 0, 0, 0]),  # a single correct one gets none
        (([1, 0.1, 0, 0], None, None, [400] * 4), {}, [1, 0.1, 0, 0]),  # 0.1 is not correct
        (([1, 0.2, 0, 0], None, None, [400] * 4), {}, [1.2, 0.4, 0, 0]),
        (([1, 1, 0, 0], None, None, [400] * 4), {"length_bonus": 0}, [1, 1, 0, 0]),
        (([1, 1, 0, 0], None, None, [9, 20, 9, 9]), {"length_bonus": 0.5, "length_range": (10, 20)}, [1, 1.5, 0, 0]),
        (([1, 0.4, 0.4, 0], None, None, [400] * 4), {"correct_above": 0.5}, [1, 0.4, 0.4, 0]),
        (([1, 1, 0, 0], None, [1, 1, 1, 0]), {}, [2, 2, 1, 0]),
        (([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]), {}, [2.075, 2.075, 1, 0]),  # .3 (.5 - .25)
        (([1, 1, 0, 0], [1, 0], [1, 1, 1, 0]), {"rule": "threshold"}, [2.3, 2.3, 1, 0]),
        # p = 1.65 / 4 = .4125 >= .8 * .5. Correct: 1 and .5 (.05 is not, nor is .1: not above .1).
        (([1.0, 0.05, 0.5, 0.1], [0.5, 0.5]), {"rule": "reference"}, [1.3, 0.05, 0.8, 0.1]),
        # p .425 > .8 * .5; correct: the first, second and fourth; in range: the first and the fourth.
        (
            ([1, 0.5, 0, 0.2], [0.5, 0.5], [1, 0, 1, 0], [320, 600, 400, 512]),
            {"rule": "threshold", "alpha": 0.5},
            [1 + 1 + 0.2 + 0.5, 0.5 + 0.5, 0 + 1, 0.2 + 0.2 + 0.5],
        ),
    ],
)
def test_all_parts_by_hand(inputs: tuple[Any, ...], options: dict[str, Any], rewards: list[float]) -> None:
    out = call(*inputs, **options)
    assert out.rewards[0].tolist() == pytest.approx(rewards, abs=BY_HAND)
    centre, spread = mean(rewards), stdev(rewards)
    expected = [(r - centre) / (spread + 1e-4) for r in rewards]
    assert out.advantages[0].tolist() == pytest.approx(expected, abs=BY_HAND)
    plain = call(*inputs, **options, normalize="none")
    assert plain.advantages[0].tolist() == pytest.approx([r - centre for r in rewards], abs=BY_HAND)


@pytest.mark.parametrize(
    ("inputs", "options", "advantages"),
    [
        # rewards 2, 2, 1, 0: mean 1.25, deviations .75 .75 -.25 -1.25, variance 2.75 / 3, std .957427107756338
        (
            ([1, 1, 0, 0], None, [1, 1, 1, 0]),
            {},
            [0.78326764216356, 0.78326764216356, -0.26108921405452, -1.3054460702726],
        ),
        # Two completions d apart: (d / 2) / (d / sqrt 2 + eps).
        (([1, 0],), {"eps": 0.0}, [math.sqrt(0.5), -math.sqrt(0.5)]),
        (([1, 0],), {"eps": 1.0}, [0.5 / (math.sqrt(0.5) + 1), -0.5 / (math.sqrt(0.5) + 1)]),
        (([1], [0]), {}, [0.0]),  # one completion has none
        (([1], [0]), {"apply": "advantage"}, [0.3]),
    ],
)
def test_advantages_by_hand(inputs: tuple[Any, ...], options: dict[str, Any], advantages: list[float]) -> None:
    assert call(*inputs, **options).advantages[0].tolist() == pytest.approx(advantages, abs=BY_HAND)


def z_scores(values: Sequence[float], eps: float) -> list[float]:
    return [(v - mean(values)) / (stdev(values) + eps) for v in values]


def formula(
    inputs: Inputs, rule: str, normalize: str, apply: str, baseline: str, batch_std: Tensor | None, eps: float
) -> list[list[float]]:
    """Advantages of prompts with both branches whole, in plain numbers; alpha 0.3, mu 0.8, a length bonus of 0.2."""
    accuracies, formats, lengths, shuffled = (x.tolist() for x in inputs if x is not None)
    groups, own = [], []
    for acc, form, tokens, others in zip(accuracies, formats, lengths, shuffled, strict=True):
        p, q = mean(acc), mean(others)
        bonus = {"margin": 0.3 * max(p - q, 0), "threshold": 0.3 * (p > 0.8 * q), "reference": 0.3 * (p >= 0.8 * q)}
        right = [float(a > 0.1) for a in acc]
        short = [r * (320 <= n <= 512) * (sum(right) > 1) for r, n in zip(right, tokens, strict=True)]
        given = [bonus[rule] * r for r in right]
        in_reward = apply == "reward"
        rewards = [a + f + 0.2 * s + in_reward * g for a, f, s, g in zip(acc, form, short, given, strict=True)]
        parts = [(1, acc), (1, form), (0.2, short), (in_reward * bonus[rule], right)]
        groups.append((rewards, parts, [0.0] * len(acc) if in_reward else given))
    everything = [r for rewards, *_ in groups for r in rewards]
    for i, (rewards, parts, added) in enumerate(groups):
        size, total = len(rewards), sum(rewards)
        base = [total / size if baseline == "mean" else (total - r) / (size - 1) for r in rewards]
        centred = [r - b for r, b in zip(rewards, base, strict=True)]
        if normalize == "gdpo":
            stretch = 1 if baseline == "mean" else size / (size - 1)
            scored = [[stretch * weight * z for z in z_scores(x, eps)] for weight, x in parts]
            own.append([sum(column) for column in zip(*scored, strict=True)])
        else:
            batch = stdev(everything) if batch_std is None else float(batch_std[i])
            scale = {"std": stdev(rewards) + eps, "none": 1.0, "batch": batch + eps}[normalize]
            own.append([c / scale for c in centred])
        own[-1] = [a + b for a, b in zip(own[-1], added, strict=True)]
    return own


@pytest.mark.grid(rule=RULES, apply=APPLY, normalize=NORMALIZE, baseline=BASELINES, given=[False, True])
def test_advantages_by_formula(rule: str, apply: str, normalize: str, baseline: str, given: bool) -> None:
    """Groups of 2 to 7 with rewards that differ; a deviation that is given for each prompt, and one of all of them."""
    for size, seed in ((2, 0), (4, 1), (7, 2)):
        generator = torch.Generator().manual_seed(seed)
        accuracy, form, shuffled = (torch.rand(5, n, generator=generator).double() for n in (size, size, 3))
        accuracy[:, 0] = 0.05  # not correct
        lengths = torch.randint(300, 540, (5, size), generator=generator)
        inputs = (accuracy, form, lengths, shuffled)
        std = torch.rand(5, generator=generator).double() + 0.1 if given and normalize == "batch" else None
        options = {"rule": rule, "apply": apply, "normalize": normalize, "baseline": baseline, "eps": 0.01}
        out = tgrpo_advantages(*(x.to(DEVICE) for x in inputs), **options, batch_std=std, backend="reference")
        expected = formula(inputs, **options, batch_std=std)
        torch.testing.assert_close(out.advantages.cpu(), torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("alpha", "bonus"), [(0.3, 0.15), (3.0, 1.5)])
def test_gdpo_keeps_the_size_of_the_temporal_bonus(alpha: float, bonus: float) -> None:
    """Accuracies of 1 and 0 and equal formats: std takes the bonus out, gdpo gives alpha (p - p~) z(correct)."""
    z = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    out = call([1, 1, 0, 0], [0, 0], [1] * 4, alpha=alpha, normalize="gdpo")
    expected = [z + bonus * z] * 2 + [-z - bonus * z] * 2
    assert out.advantages[0].tolist() == pytest.approx(expected, abs=BY_HAND)
    assert call([1, 1, 0, 0], [0, 0], [1] * 4, alpha=alpha).advantages[0, 0].item() == pytest.approx(z, rel=1e-3)
    # All correct: it is the same for all of them, and gone.
    assert (call([1, 1, 1, 1], [0, 0], alpha=alpha, normalize="gdpo").advantages == 0).all()


def test_the_batch_counts_groups_of_equal_rewards() -> None:
    """Rewards 2 2 and 1 0: mean 1.25, variance 2.75 / 3. A bonus for all of a group moves the others' advantages."""
    accuracy = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64, device=DEVICE)
    form = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64, device=DEVICE)
    lengths = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    plain = tgrpo_advantages(accuracy, form, lengths, normalize="batch", eps=0.0)
    x = 0.5 / math.sqrt(2.75 / 3)
    assert plain.advantages.flatten().tolist() == pytest.approx([0, 0, x, -x], abs=BY_HAND)
    shuffled = torch.tensor([[0.0], [NAN]], dtype=torch.float64, device=DEVICE)
    raised = tgrpo_advantages(accuracy, form, lengths, shuffled, normalize="batch", eps=0.0)
    x = 0.5 / stdev([2.3, 2.3, 1, 0])
    assert raised.advantages.flatten().tolist() == pytest.approx([0, 0, x, -x], abs=BY_HAND)


@pytest.mark.grid(rule=RULES, apply=APPLY)
def test_no_shuffled_branch(rule: str, apply: str) -> None:
    plain = call([1, 1, 0, 0], None, rule=rule, apply=apply)
    for out in (plain, *(call([1, 1, 0, 0], none, rule=rule, apply=apply) for none in ([NAN, NAN], []))):
        assert math.isnan(out.p_shuffled.item())
        assert out.temporal.item() == 0
        assert torch.equal(out.advantages, plain.advantages)
        assert out.rewards[0].tolist() == [1, 1, 0, 0]


def test_prompts_do_not_mix_and_nan_is_a_missing_completion() -> None:
    accuracy = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    shuffled = torch.tensor([[0.0, 0.0], [NAN, NAN], [0.25, NAN]])
    out = tgrpo_advantages(accuracy, torch.zeros(3, 2), torch.full((3, 2), SHORT), shuffled)
    assert out.p.tolist() == [0.5, 1.0, 0.5]
    assert out.p_shuffled.tolist() == pytest.approx([0.0, NAN, 0.25], nan_ok=True)
    assert out.temporal.tolist() == pytest.approx([0.15, 0.0, 0.075])
    assert out.rewards.tolist() == [pytest.approx([1.15, 0]), [1, 1], pytest.approx([1.075, 0])]
    for row in range(3):
        alone = call(accuracy[row].tolist(), shuffled[row].tolist(), dtype=torch.float32)
        assert torch.equal(alone.advantages[0], out.advantages[row])


TENTHS = [i / 10 for i in range(1, 8)]


@pytest.mark.grid(kind=[*KINDS[:2], *FP32[:1]])
@pytest.mark.parametrize(
    ("accuracy", "format", "lengths"),
    [
        ([0.7] * 7, [1.0] * 7, None),
        ([0.0] * 8, None, None),
        ([1.0] * 8, [1.0] * 8, [400] * 8),
        ([0.1, 0.3, 0.1], [0.2, 0.0, 0.2], None),  # 0.1 + 0.2 and 0.3 differ in their last bit
        ([0.3, 0.5, 0.3], [0.0, 0.0, 0.0], [400, 100, 400]),  # 0.3 + 0.2 (length) and 0.5
        ([1 / 3] * 7, [1 / 21] * 7, None),  # a mean that is not one of the rewards
        (TENTHS, [1.3 - x for x in TENTHS], None),
    ],
)
def test_equal_rewards_give_exactly_zero(
    accuracy: list[float], format: list[float] | None, lengths: list[int] | None, kind: Kind
) -> None:
    backend, dtype = kind
    inputs = {"format": format, "lengths": lengths, "dtype": dtype, "backend": backend}
    inputs["correct_above"] = 1.0 if accuracy is TENTHS else 0.1
    # With eps 0 the quotient would be 0 / 0. Normalised for itself, a length bonus of 0.2 does not balance 0.2.
    single = [{"normalize": "gdpo"}] * (len(set(lengths or [0])) == 1)
    for options in ({}, {"normalize": "none"}, {"eps": 0.0}, {"normalize": "batch", "eps": 0.0}, *single):
        assert (call(accuracy, **inputs, **options).advantages == 0).all()
    # A real difference is not taken for rounding.
    advantages = call([0.5, 0.5 + 1e-5], dtype=dtype, backend=backend).advantages
    assert advantages[0, 0] < 0 < advantages[0, 1]


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), *itertools.product(BACKENDS, DTYPES)])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    out = call([1, 0.5, 0, 0.25], [0.5, 0.25], dtype=dtype, backend=backend)
    for name in FIELDS:
        assert getattr(out, name).dtype == torch.promote_types(dtype, torch.float32)
    exact = call([1, 0.5, 0, 0.25], [0.5, 0.25])
    bound = rounding(30, 2.0)  # sums, a root and a quotient
    torch.testing.assert_close(out.advantages.double(), exact.advantages, rtol=0, atol=bound)
    # 0.1 in any dtype is not above 0.1, 0.2 is.
    bar = call([0.1, 0.2, 0, 1], [0.0], lengths=[400] * 4, dtype=dtype, rule="reference", backend=backend)
    expected = [float(torch.tensor(a, dtype=dtype)) + bonus for a, bonus in ((0.1, 0), (0.2, 0.5), (0, 0), (1, 0.5))]
    assert bar.rewards[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_means_of_groups_of_different_sizes_are_equal(backend: str) -> None:
    """p = p~ must not pass for p > p~ by rounding: three tenths and seven tenths have one mean."""
    for value, size, others in itertools.product((0.1, 0.7, 1 / 3), (3, 7, 8), (6, 11)):
        accuracy = torch.full((1, size), value, device=DEVICE)
        shuffled = torch.full((1, others), value, device=DEVICE)
        shuffled[0, ::3] = NAN
        zeros = torch.zeros(1, size, dtype=torch.int64, device=DEVICE)
        advantages, _, temporal, p, p_shuffled = run((accuracy, accuracy, zeros, shuffled), backend, apply="advantage")
        assert temporal.item() == 0
        assert p.item() == p_shuffled.item()
        assert (advantages == 0).all()


# Triton.


def make(
    prompts: int, size: int, others: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, binary: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accuracies of quarters, right in every dtype; among the shuffled, missing ones and whole rows of them."""
    generator = torch.Generator().manual_seed(seed)

    def quarters(*shape: int) -> Tensor:
        values = torch.randint(5, shape, generator=generator) / 4
        return ((values > 0.5).float() if binary else values).to(DEVICE, dtype)

    accuracy, format = quarters(prompts, size), (quarters(prompts, size) > 0.3).to(dtype)
    lengths = torch.randint(200, 700, (prompts, size), generator=generator)
    lengths.view(-1)[::3] = 320
    lengths.view(-1)[1::3] = 512
    shuffled = quarters(prompts, others)
    shuffled.masked_fill_(torch.rand(prompts, others, generator=generator).to(DEVICE) < 0.3, NAN)
    shuffled[1::3] = NAN
    return accuracy, format, lengths.to(DEVICE), shuffled


def run(inputs: Inputs, backend: str = "triton", **options: Any) -> list[Tensor]:
    out = tgrpo_advantages(*inputs, **options, backend=backend)
    assert last_backend("tgrpo_advantages") == backend
    return [getattr(out, name) for name in FIELDS]


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def check(inputs: Inputs, fp64: bool = True, **options: Any) -> list[Tensor]:
    """Triton against the reference in the inputs' dtypes and, unless their rounding is the question, in fp64."""
    with poisoned_memory():
        ours = run(inputs, **options)
    others = [run(inputs, "reference", **options)]
    if fp64:
        others.append(run([double(x) for x in inputs], "reference", **options))
    for other in others:
        for name, a, o in zip(FIELDS, ours, other, strict=True):
            assert a.dtype == torch.float32
            assert a.shape == o.shape
            assert torch.equal(a.isnan(), o.isnan()), name
            assert_matches(a.nan_to_num(), o.nan_to_num(), torch.float32, name)
            whole = (a == 0, o == 0) if a.dim() == 1 else ((a == 0).all(1), (o == 0).all(1))
            assert torch.equal(*whole), name
    assert_equal(ours, run(inputs, **options))
    return ours


@pytest.mark.grid(dtype=DTYPES, rule=RULES, normalize=NORMALIZE, apply=APPLY, baseline=BASELINES)
def test_every_rule_equals_the_reference(
    dtype: torch.dtype, rule: str, normalize: str, apply: str, baseline: str
) -> None:
    options: dict[str, Any] = {"rule": rule, "normalize": normalize, "apply": apply, "baseline": baseline}
    ours = check(make(37, 8, 4, dtype), **options)
    assert (ours[2] > 0).any()
    assert (ours[2] == 0).any()
    assert (ours[0] != 0).any()
    assert ours[4].isnan().any()
    options |= {"alpha": 0.7, "mu": 0.5, "length_bonus": -0.1, "eps": 0.0, "correct_above": 0.5}
    check(make(13, 5, 3, dtype, seed=1, binary=True), **options)
    if normalize == "batch":
        check(make(13, 5, 3, dtype, seed=1), **options, batch_std=torch.linspace(0.1, 2, 13, device=DEVICE))


@pytest.mark.grid(dtype=DTYPES, rule=RULES, apply=APPLY, backend=BACKENDS)
def test_p_is_the_mean_of_those_that_count_in_it(dtype: torch.dtype, rule: str, apply: str, backend: str) -> None:
    """p by hand, the bonus as of a group of these alone, and every correct completion has it, counted or not."""
    inputs = make(37, 8, 4, dtype, seed=4)
    counted = torch.rand(37, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.6
    counted[5:7] = False
    options: dict[str, Any] = {"rule": rule, "apply": apply, "normalize": "none", "correct_above": 0.25}
    ours = run(inputs, backend, **options, p_mask=counted)
    for i, row in enumerate(counted):
        if not row.any():
            assert ours[3][i].isnan()
            assert ours[2][i] == 0
            continue
        alone = run([x[i : i + 1, row] for x in inputs[:3]] + [inputs[3][i : i + 1]], backend, **options)
        assert_equal([ours[2][i], ours[3][i]], [alone[2][0], alone[3][0]])
    without = run(inputs, backend, **options | {"alpha": 0.0})
    where = 0 if apply == "advantage" else 1
    bonus = torch.where(inputs[0] > 0.25, ours[2][:, None], 0.0)
    torch.testing.assert_close(ours[where] - without[where], bonus, rtol=0, atol=1e-5)
    assert_equal(run(inputs, backend, **options, p_mask=counted | True), run(inputs, backend, **options))
    check(inputs, **options, p_mask=counted)


@pytest.mark.grid(dtype=[torch.float64, *DTYPES], normalize=NORMALIZE, apply=APPLY)
def test_a_bar_for_each_prompt(dtype: torch.dtype, normalize: str, apply: str) -> None:
    """Each group as if it were called alone with its own number, also where an accuracy is the bar itself."""
    inputs = make(37, 8, 4, torch.float32 if dtype == torch.float64 else dtype, seed=3)
    if dtype == torch.float64:
        inputs = tuple(double(x) for x in inputs)
    bars = torch.tensor([0.1, 0.25, 0.5, 0.7, 1.0, -1.0], dtype=torch.float64, device=DEVICE).repeat(7)[:37]
    options: dict[str, Any] = {"normalize": normalize, "apply": apply}
    for backend in ["reference"] if dtype == torch.float64 else BACKENDS:
        ours = run(inputs, backend, **options, correct_above=bars)
        for bar in bars.unique().tolist():
            rows = bars == bar
            alone = run(inputs, backend, **options, correct_above=bar)
            for one, other in zip(ours, alone, strict=True):
                if normalize != "batch" or one is not ours[0]:  # the deviation is one of all groups
                    assert_equal([one[rows]], [other[rows]])
        std = torch.linspace(0.1, 2, 37, dtype=dtype, device=DEVICE) if normalize == "batch" else None
        assert_equal(
            run(inputs, backend, **options, correct_above=torch.full_like(bars, 0.25), batch_std=std),
            run(inputs, backend, **options, correct_above=0.25, batch_std=std),
        )
    if dtype != torch.float64:
        check(inputs, **options, correct_above=bars.to(dtype))


@pytest.mark.parametrize(
    ("prompts", "size", "others"),
    [(1, 1, 1), (3, 1, 4), (5, 2, 1), (130, 4, 4), (65, 8, 0), (3, 33, 70), (2, 520, 3), (2, 3, 600), (0, 4, 4)],
)
def test_shapes(prompts: int, size: int, others: int) -> None:
    """Groups of one, groups wider than a program's share, more prompts than a program takes, none."""
    inputs = make(prompts, size, others)
    ours = check(inputs)
    check((*inputs[:3], None))
    for normalize in ("batch", "gdpo"):
        check(inputs, normalize=normalize, baseline="leave_one_out")
    if size == 1:
        assert (ours[0] == 0).all()


@pytest.mark.grid(rule=RULES, normalize=NORMALIZE, apply=APPLY)
def test_a_bonus_for_all_moves_no_advantage(rule: str, normalize: str, apply: str) -> None:
    """Applied to the advantage, it is all of it."""
    ones, lengths = torch.ones(2, 6, device=DEVICE), torch.zeros(2, 6, dtype=torch.int64, device=DEVICE)
    for shuffled in (torch.zeros(2, 3, device=DEVICE), torch.tensor([[0.5, NAN], [0.0, 1.0]], device=DEVICE)):
        inputs = (ones, torch.zeros_like(ones), lengths, shuffled)
        ours = check(inputs, rule=rule, normalize=normalize, apply=apply)
        assert (ours[2] > 0).all()
        assert torch.equal(ours[0], (ours[2][:, None] * (apply == "advantage")).expand(2, 6))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64, *DTYPES])
def test_dtypes_of_the_lengths(dtype: torch.dtype) -> None:
    accuracy, format, _, shuffled = make(17, 8, 4)
    lengths = torch.tensor([319, 320, 321, 511, 512, 513, 0, 4096], device=DEVICE).expand(17, 8).to(dtype)
    for span in ((320, 512), (319.5, math.inf), (-math.inf, 320)):
        check((accuracy, format, lengths, shuffled), length_range=span)


def test_mixed_dtypes_and_layouts() -> None:
    accuracy, format, lengths, shuffled = inputs = make(9, 6, 4)
    want = check(inputs)
    for moved in (
        (accuracy.half(), format.bfloat16(), lengths.int(), shuffled.half()),
        tuple(strided(x) for x in inputs),
        tuple(x.T.contiguous().T for x in inputs),
    ):
        assert_equal(check(moved), want)
    check((accuracy, format[:1].expand(9, 6), lengths[:, :1].expand(9, 6), shuffled[:1].expand(9, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_and_no_other_dtype(backend: str) -> None:
    inputs = make(9, 4, 2)
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    assert not any(x.requires_grad for x in run(leaves, backend))
    assert_same_bits(lambda: run(inputs, backend))
