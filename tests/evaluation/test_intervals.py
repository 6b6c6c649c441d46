"""Confidence intervals against textbook formulas and scipy's own, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from videor1.evaluation.intervals import Estimate, mean_of_differences, mean_of_shares


def exact(right: int, count: int) -> tuple[float, float]:
    """Clopper and Pearson's interval."""
    interval = stats.binomtest(right, count).proportion_ci(method="exact")
    return interval.low, interval.high


def ends(found: Estimate) -> tuple[float, float]:
    return found.low, found.high


def test_independent_answers_give_clopper_and_pearsons_interval() -> None:
    found = mean_of_shares([1.0] * 37 + [0.0] * 63, range(100))
    low, high = exact(37, 100)
    assert found.value == pytest.approx(0.37)
    assert ends(found) == pytest.approx((low, high), abs=2e-3)
    assert found.low <= low <= high <= found.high  # one question less: the spread is estimated


def test_copies_of_a_question_on_one_video_add_nothing() -> None:
    values = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    once = mean_of_shares(list(values), range(60))
    thrice = mean_of_shares(list(np.repeat(values, 3)), list(np.repeat(np.arange(60), 3)))
    naive = mean_of_shares(list(np.repeat(values, 3)), range(180))
    assert (thrice.value, *ends(thrice)) == pytest.approx((once.value, *ends(once)), abs=2e-3)
    assert naive.high - naive.low < 0.65 * (thrice.high - thrice.low)
    # One right and one wrong on nearly every video: the clustered error is far too small, and not taken.
    found = mean_of_shares([1.0, 0.0] * 29 + [1.0, 1.0], [i // 2 for i in range(60)])
    assert ends(found) == pytest.approx(exact(31, 60))
    # All alike.
    right = mean_of_shares([1.0] * 30, [i // 3 for i in range(30)])
    assert (right.value, *ends(right)) == (1.0, pytest.approx(exact(10, 10)[0]), 1.0)  # ten videos
    half = mean_of_shares([0.5] * 30, range(30))
    assert half.low < 0.5 < half.high
    same = mean_of_differences([0.1] * 30, range(30))
    assert same.value == pytest.approx(0.1)
    assert math.isnan(same.low)
    # One video and none give no interval.
    one = mean_of_shares([1.0, 0.0], ["a", "a"])
    assert one.value == 0.5
    assert math.isnan(one.low)
    assert math.isnan(mean_of_differences([1.0, 0.0], ["a", "a"]).high)
    assert math.isnan(mean_of_shares([], []).value)


def test_differences_equal_the_clustered_formula() -> None:
    rng = np.random.default_rng(1)
    videos = rng.integers(0, 25, 120)
    values = rng.integers(-1, 2, 120) + 0.3 * rng.standard_normal(25)[videos]
    found = mean_of_differences(list(values), list(videos))
    mean, clusters = values.mean(), len(set(videos))
    sums = [(values[videos == v] - mean).sum() / len(values) for v in set(videos)]
    error = math.sqrt(clusters / (clusters - 1) * sum(s * s for s in sums))
    half = stats.t.ppf(0.975, clusters - 1) * error
    assert (found.value, *ends(found)) == pytest.approx((mean, mean - half, mean + half))
    # Of single questions: Student's interval.
    values = np.random.default_rng(2).standard_normal(30)
    student = stats.t.interval(0.95, 29, loc=values.mean(), scale=stats.sem(values))
    assert ends(mean_of_differences(list(values), range(30))) == pytest.approx(student)
    # Strata are means of means.
    strata = [("a", "a")] * 4 + [("d", "easy")] * 2 + [("d", "hard")] * 6
    values = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    found = mean_of_shares(values, range(12), strata)
    assert found.value == pytest.approx((1 / 4 + (1.0 + 1 / 3) / 2) / 2)
    # The variance of a weighted sum of independent questions, each stratum's about its own mean.
    weights = np.array([1 / 8] * 4 + [1 / 8] * 2 + [1 / 24] * 6)
    centres = np.array([1 / 4] * 4 + [1.0] * 2 + [1 / 3] * 6)
    error = math.sqrt(12 / 11 * (weights**2 * (np.array(values) - centres) ** 2).sum())
    difference = mean_of_differences(values, range(12), strata)
    assert difference.high - difference.value == pytest.approx(stats.t.ppf(0.975, 11) * error)


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.9])
def test_the_interval_holds_the_truth_as_often_as_it_says(truth: float) -> None:
    """Three questions on each of 60 videos, alike in half of the videos."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        first, alike, others = rng.random(60) < truth, rng.random(60) < 0.5, rng.random((60, 2)) < truth
        answers = np.column_stack([first, np.where(alike[:, None], first[:, None], others)]).astype(float)
        found = mean_of_shares(list(answers.ravel()), list(np.repeat(np.arange(60), 3)))
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 200 <= 1.0
