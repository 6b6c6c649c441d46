"""tgrpo_advantages against numbers worked out by hand (means and ddof-1 deviations written out beside them)."""

import math
from statistics import mean, stdev

import pytest
import torch
from bounds import BY_HAND

from videor1_kernels import tgrpo_advantages
from videor1_kernels.testing import poisoned_memory, rounding

NAN = math.nan
SHORT = 100  # tokens: outside the length bonus's range


def call(accuracy, shuffled=None, format=None, lengths=None, dtype=torch.float64, **options):
    """One prompt."""
    size = len(accuracy)
    return tgrpo_advantages(
        torch.tensor([accuracy], dtype=dtype),
        torch.tensor([format or [0.0] * size], dtype=dtype),
        torch.tensor([lengths or [SHORT] * size]),
        None if shuffled is None else torch.tensor([shuffled], dtype=dtype),
        **options,
    )


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
def test_temporal_bonus_by_hand(rule, accuracy, shuffled, options, bonus):
    out = call(accuracy, shuffled, rule=rule, **options)
    assert out.temporal.tolist() == pytest.approx([bonus], abs=BY_HAND)
    assert (out.temporal.item() == 0) == (bonus == 0)
    assert out.p.item() == mean(accuracy)
    assert out.p_shuffled.item() == mean(shuffled)
    assert out.rewards[0].tolist() == pytest.approx([a + (bonus if a > 0.1 else 0) for a in accuracy], abs=BY_HAND)


def test_no_bonus_by_hand():
    # rewards 2, 2, 1, 0: mean 1.25, deviations .75 .75 -.25 -1.25, variance 2.75 / 3, std .957427107756338
    out = call([1, 1, 0, 0], format=[1, 1, 1, 0])
    assert out.rewards[0].tolist() == [2, 2, 1, 0]
    expected = [0.78326764216356, 0.78326764216356, -0.26108921405452, -1.3054460702726]
    assert out.advantages[0].tolist() == pytest.approx(expected, abs=BY_HAND)
    assert out.temporal.item() == 0
    assert math.isnan(out.p_shuffled.item())


def test_apply_reward_by_hand():
    # bonus .3 * (.5 - .25) = .075; rewards 2.075, 2.075, 1, 0: mean 1.2875, deviations .7875 .7875 -.2875 -1.2875,
    # squares .62015625 * 2 + .08265625 + 1.65765625 = 2.980625, std sqrt(.99354166...) = .996765604173...
    out = call([1, 1, 0, 0], [1, 0, 0, 0], format=[1, 1, 1, 0])
    assert out.rewards[0].tolist() == pytest.approx([2.075, 2.075, 1, 0], abs=BY_HAND)
    expected = [0.7899760989751624, 0.7899760989751624, -0.288403972641726, -1.2915482253085988]
    assert out.advantages[0].tolist() == pytest.approx(expected, abs=BY_HAND)


def test_apply_reward_threshold_by_hand():
    # rewards 2.3, 2.3, 1, 0: mean 1.4, deviations .9 .9 -.4 -1.4, squares 3.74, std 1.11654228...
    out = call([1, 1, 0, 0], [1, 0], format=[1, 1, 1, 0], rule="threshold")
    expected = [0.8059877498875918, 0.8059877498875918, -0.35821677772781857, -1.2537587220473652]
    assert out.advantages[0].tolist() == pytest.approx(expected, abs=BY_HAND)


@pytest.mark.parametrize(("rule", "bonus"), [("margin", 0.075), ("threshold", 0.3), ("reference", 0.3)])
def test_apply_advantage_by_hand(rule, bonus):
    out = call([1, 1, 0, 0], [1, 0, 0, 0], format=[1, 1, 1, 0], rule=rule, apply="advantage")
    assert out.rewards[0].tolist() == [2, 2, 1, 0]  # the bonus is not in them
    expected = [0.78326764216356 + bonus, 0.78326764216356 + bonus, -0.26108921405452, -1.3054460702726]
    assert out.advantages[0].tolist() == pytest.approx(expected, abs=BY_HAND)
    assert out.temporal.item() == pytest.approx(bonus)


def test_apply_advantage_acts_where_all_are_correct():
    out = call([1, 1, 1], [0, 0, 0], apply="advantage")
    assert out.advantages[0].tolist() == pytest.approx([0.3] * 3)
    assert call([1, 1, 1], [0, 0, 0], apply="reward").advantages[0].tolist() == [0, 0, 0]
    assert call([0, 0, 0], [0, 0, 0], rule="reference", apply="advantage").advantages[0].tolist() == [0, 0, 0]


def test_mixed_accuracies_by_hand():
    # p = 1.65 / 4 = .4125, p~ = .5; reference: .4125 >= .4. Correct: 1 and .5 (.05 is not, nor is .1: not above .1).
    out = call([1.0, 0.05, 0.5, 0.1], [0.5, 0.5], rule="reference")
    assert out.rewards[0].tolist() == pytest.approx([1.3, 0.05, 0.8, 0.1], abs=BY_HAND)
    expected = [1.230743422113691, -0.8552623780790055, 0.39634110203661244, -0.7718221460712978]
    assert out.advantages[0].tolist() == pytest.approx(expected, abs=BY_HAND)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_correct_means_above_the_bar_in_any_dtype(dtype):
    out = call([0.1, 1.0], [0.0], dtype=dtype, rule="reference")
    assert out.rewards[0].tolist() == pytest.approx([float(torch.tensor(0.1, dtype=dtype)), 1.3], abs=1e-6)


@pytest.mark.parametrize(
    ("accuracy", "lengths", "options", "bonus"),
    [
        ([1, 1, 0, 0], [320, 512, 400, 400], {}, [0.2, 0.2, 0, 0]),  # both ends included, correct ones only
        ([1, 1, 0, 0], [319, 513, 400, 400], {}, [0, 0, 0, 0]),
        ([1, 1, 0, 0], [400, 100, 400, 400], {}, [0.2, 0, 0, 0]),  # two are correct, one of them in range
        ([1, 0, 0, 0], [400, 400, 400, 400], {}, [0, 0, 0, 0]),  # a single correct one gets none
        ([1, 0.1, 0, 0], [400, 400, 400, 400], {}, [0, 0, 0, 0]),  # 0.1 is not correct
        ([1, 0.2, 0, 0], [400, 400, 400, 400], {}, [0.2, 0.2, 0, 0]),
        ([1, 1, 0, 0], [400, 400, 400, 400], {"length_bonus": 0}, [0, 0, 0, 0]),
        ([1, 1, 0, 0], [10, 21, 10, 10], {"length_bonus": 0.5, "length_range": (10, 20)}, [0.5, 0, 0, 0]),
        ([1, 0.4, 0.4, 0], [400, 400, 400, 400], {"correct_above": 0.5}, [0, 0, 0, 0]),
    ],
)
def test_length_bonus_by_hand(accuracy, lengths, options, bonus):
    out = call(accuracy, lengths=lengths, **options)
    assert out.rewards[0].tolist() == pytest.approx([a + b for a, b in zip(accuracy, bonus, strict=True)], abs=BY_HAND)


def test_all_parts_by_hand():
    # p .425 > .8 * .5; correct: the first, second and fourth; in range: the first and the fourth.
    out = call([1, 0.5, 0, 0.2], [0.5, 0.5], [1, 0, 1, 0], [320, 600, 400, 512], rule="threshold", alpha=0.5)
    expected = [1 + 1 + 0.2 + 0.5, 0.5 + 0.5, 0 + 1, 0.2 + 0.2 + 0.5]
    assert out.rewards[0].tolist() == pytest.approx(expected, abs=BY_HAND)
    centre, spread = mean(expected), stdev(expected)
    assert out.advantages[0].tolist() == pytest.approx([(r - centre) / (spread + 1e-4) for r in expected], abs=BY_HAND)


def test_normalize_none_and_eps():
    out = call([1, 1, 0, 0], format=[1, 1, 1, 0], normalize="none")
    assert out.advantages[0].tolist() == [0.75, 0.75, -0.25, -1.25]
    # Two completions d apart: (d / 2) / (d / sqrt 2 + eps).
    assert call([1, 0], eps=0.0).advantages[0].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    assert call([1, 0], eps=1.0).advantages[0].tolist() == pytest.approx(
        [0.5 / (math.sqrt(0.5) + 1), -0.5 / (math.sqrt(0.5) + 1)]
    )


@pytest.mark.parametrize("rule", ["margin", "threshold", "reference"])
@pytest.mark.parametrize("apply", ["reward", "advantage"])
def test_no_shuffled_branch(rule, apply):
    plain = call([1, 1, 0, 0], None, rule=rule, apply=apply)
    for shuffled in ([NAN, NAN], []):
        out = call([1, 1, 0, 0], shuffled, rule=rule, apply=apply)
        assert math.isnan(out.p_shuffled.item())
        assert out.temporal.item() == 0
        assert torch.equal(out.advantages, plain.advantages)
        assert out.rewards[0].tolist() == [1, 1, 0, 0]


def test_prompts_do_not_mix_and_nan_is_a_missing_completion():
    accuracy = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    shuffled = torch.tensor([[0.0, 0.0], [NAN, NAN], [0.25, NAN]])
    out = tgrpo_advantages(accuracy, torch.zeros(3, 2), torch.full((3, 2), SHORT), shuffled)
    assert out.p.tolist() == [0.5, 1.0, 0.5]
    assert out.p_shuffled.tolist()[0] == 0.0
    assert math.isnan(out.p_shuffled[1])
    assert out.p_shuffled[2] == 0.25
    assert out.temporal.tolist() == pytest.approx([0.15, 0.0, 0.075])
    assert out.rewards.tolist() == [pytest.approx([1.15, 0]), [1, 1], pytest.approx([1.075, 0])]
    for row in range(3):
        alone = tgrpo_advantages(
            accuracy[row : row + 1], torch.zeros(1, 2), torch.full((1, 2), SHORT), shuffled[row : row + 1]
        )
        assert torch.equal(alone.advantages[0], out.advantages[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["std", "none"])
@pytest.mark.parametrize(
    ("accuracy", "format", "lengths"),
    [
        ([0.7] * 7, [1.0] * 7, None),
        ([0.0] * 8, None, None),
        ([1.0] * 8, [1.0] * 8, [400] * 8),
        ([0.1, 0.3, 0.1], [0.2, 0.0, 0.2], None),  # 0.1 + 0.2 and 0.3 differ in their last bit
        ([0.3, 0.5, 0.3], [0.0, 0.0, 0.0], [400, 100, 400]),  # 0.3 + 0.2 (length) and 0.5
        ([1 / 3] * 5, [0.1] * 5, None),
    ],
)
def test_equal_rewards_give_exactly_zero(accuracy, format, lengths, normalize, dtype):
    out = call(accuracy, format=format, lengths=lengths, normalize=normalize, dtype=dtype)
    assert (out.advantages == 0).all()
    # With eps 0 the quotient would be 0 / 0.
    assert (call(accuracy, format=format, lengths=lengths, eps=0.0, dtype=dtype).advantages == 0).all()


def test_a_real_difference_is_not_taken_for_rounding():
    out = call([0.5, 0.5 + 1e-5], dtype=torch.float32)
    assert out.advantages[0, 0] < 0 < out.advantages[0, 1]


def test_equal_accuracies_have_equal_means_in_groups_of_any_size():
    """p == p~ exactly, or the margin's dust would cost a backward pass."""
    for value in (0.7, 0.1, 1 / 3):
        for size, shuffled in ((8, 4), (7, 3), (6, 5)):
            out = call([value] * size, [value] * shuffled, apply="advantage", dtype=torch.float32)
            assert out.temporal.item() == 0
            assert (out.advantages == 0).all()


def test_one_completion_has_no_advantage():
    out = call([1.0], [0.0])
    assert out.advantages.tolist() == [[0.0]]
    assert out.rewards[0].tolist() == [pytest.approx(1.3)]
    assert call([1.0], [0.0], apply="advantage").advantages.tolist() == [[pytest.approx(0.3)]]


def test_no_prompts():
    out = tgrpo_advantages(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 2))
    assert out.advantages.shape == out.rewards.shape == (0, 4)
    assert out.temporal.shape == out.p.shape == out.p_shuffled.shape == (0,)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes(dtype, result):
    out = call([1, 0.5, 0, 0.25], [0.5, 0.25], dtype=dtype)
    for value in (out.advantages, out.rewards, out.temporal, out.p, out.p_shuffled):
        assert value.dtype == result
        assert not value.requires_grad
    exact = call([1, 0.5, 0, 0.25], [0.5, 0.25])
    bound = rounding(30, 2.0)  # sums, a root and a quotient
    torch.testing.assert_close(out.advantages.double(), exact.advantages, rtol=0, atol=bound)


def test_completion_order_does_not_matter_and_bits_repeat():
    torch.manual_seed(0)
    accuracy, format = torch.rand(5, 8, dtype=torch.float64), torch.rand(5, 8, dtype=torch.float64)
    lengths, shuffled = torch.randint(200, 600, (5, 8)), torch.rand(5, 4, dtype=torch.float64)
    out = tgrpo_advantages(accuracy, format, lengths, shuffled)
    order = torch.randperm(8)
    other = tgrpo_advantages(accuracy[:, order], format[:, order], lengths[:, order], shuffled.flip(1))
    torch.testing.assert_close(other.advantages, out.advantages[:, order], rtol=0, atol=BY_HAND)
    with poisoned_memory():
        assert torch.equal(tgrpo_advantages(accuracy, format, lengths, shuffled).advantages, out.advantages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": torch.zeros(2)}, r"accuracy: expected shape \[P, G\], got \[2\]"),
        ({"accuracy": torch.zeros(2, 0)}, "accuracy: expected at least one completion per prompt"),
        ({"format": torch.zeros(2, 4)}, r"format: expected shape \[2, 3\], got \[2, 4\]"),
        ({"lengths": torch.zeros(3, 2)}, r"lengths: expected shape \[2, 3\], got \[3, 2\]"),
        ({"lengths": torch.zeros(2, 3, dtype=torch.bool)}, "lengths: expected dtype int64"),
        ({"shuffled_accuracy": torch.zeros(3, 2)}, r"shuffled_accuracy: expected shape \[2, Gs\], got \[3, 2\]"),
        ({"shuffled_accuracy": torch.full((2, 2), math.inf)}, "shuffled_accuracy: expected finite values, or NaN"),
        ({"accuracy": torch.full((2, 3), NAN)}, "accuracy: expected finite values, got 6 that are NaN or infinite"),
        ({"format": torch.full((2, 3), math.inf)}, "format: expected finite values, got 6"),
        ({"rule": "margins"}, r"rule: expected one of .* got 'margins' \(did you mean 'margin'\?\)"),
        ({"apply": "both"}, "apply: expected one of 'reward', 'advantage', got 'both'"),
        ({"normalize": "group"}, "normalize: expected one of 'std', 'none', got 'group'"),
        ({"alpha": -0.1}, "alpha: expected a finite number of 0 or more, got -0.1"),
        ({"mu": NAN}, "mu: expected a finite number of 0 or more, got nan"),
        ({"eps": -1}, "eps: expected a finite number of 0 or more, got -1"),
        ({"length_bonus": "0.2"}, "length_bonus: expected a finite number, got '0.2'"),
        ({"length_range": (512, 320)}, r"length_range: expected \(low, high\) with low <= high, got \(512, 320\)"),
        ({"backend": "native"}, "backend 'native' cannot run on cpu"),
    ],
)
def test_errors(change, message):
    arguments = {"accuracy": torch.zeros(2, 3), "format": torch.zeros(2, 3), "lengths": torch.zeros(2, 3)} | change
    with pytest.raises(ValueError, match=f"tgrpo_advantages: {message}"):
        tgrpo_advantages(**arguments)
