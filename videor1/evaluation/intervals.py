"""Means over questions with 95% confidence intervals; the questions on one video, not independent, are a cluster."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from scipy import stats

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95% confidence interval; NaN ends where the data cannot give one."""

    value: float
    low: float = math.nan
    high: float = math.nan


def mean_of_shares(
    values: Sequence[float], videos: Sequence[Hashable], strata: Sequence[tuple[str, ...]] | None = None
) -> Estimate:
    """The mean of values in [0, 1] (accuracies), with the interval of Korn and Graubard (1998): Clopper and Pearson's
    with the number of independent questions that gives the clustered standard error.

    Where all values are alike, each video counts as one question. NaN ends with less than two videos.

    Args:
        values: one for each question.
        videos: what each question is about.
        strata: (group, category) of each question: the mean over the groups of the mean over their categories;
            None: over all questions.
    """
    mean, error, clusters = _clustered(values, videos, strata)
    count = len(values)
    if clusters < 2:
        return Estimate(mean)
    if error > 0 and 0 < mean < 1:
        # The standard error itself is estimated, from the clusters.
        factor = _quantile(count - 1) / _quantile(clusters - 1)
        effective = mean * (1 - mean) / error**2 * factor**2
        if set(values) <= {0.0, 1.0}:
            effective = min(effective, count)
    else:
        effective = clusters
    right, tail = mean * effective, (1 - _LEVEL) / 2
    low = stats.beta.ppf(tail, right, effective - right + 1) if mean > 0 else 0.0
    high = stats.beta.ppf(1 - tail, right + 1, effective - right) if mean < 1 else 1.0
    return Estimate(mean, float(low), float(high))


def mean_of_differences(
    values: Sequence[float], videos: Sequence[Hashable], strata: Sequence[tuple[str, ...]] | None = None
) -> Estimate:
    """The mean of paired differences, with Student's interval on the clustered standard error (degrees of freedom:
    videos less one). NaN ends with less than two videos, or where all values are alike."""
    mean, error, clusters = _clustered(values, videos, strata)
    if clusters < 2 or not error > 0:
        return Estimate(mean)
    half = _quantile(clusters - 1) * error
    return Estimate(mean, mean - half, mean + half)


def _clustered(
    values: Sequence[float], videos: Sequence[Hashable], strata: Sequence[tuple[str, ...]] | None
) -> tuple[float, float, int]:
    """(mean, its standard error, number of videos).

    The error is that of the linearised mean, sum_i w_i (x_i - mean of i's stratum), summed within each video, with
    the factor C / (C - 1) for C videos.
    """
    if not values:
        return math.nan, math.nan, 0
    strata = [()] * len(values) if strata is None else strata
    counts = Counter(strata)
    groups = Counter(stratum[:1] for stratum in counts)
    weights = [1 / (len(groups) * groups[stratum[:1]] * counts[stratum]) for stratum in strata]
    sums: dict[tuple[str, ...], float] = defaultdict(float)
    for value, stratum in zip(values, strata, strict=True):
        sums[stratum] += value
    centres = {stratum: sums[stratum] / counts[stratum] for stratum in counts}
    residuals: dict[Hashable, float] = defaultdict(float)
    for value, video, stratum, weight in zip(values, videos, strata, weights, strict=True):
        residuals[video] += weight * (value - centres[stratum])
    mean = sum(centres[s] / (len(groups) * groups[s[:1]]) for s in counts)
    clusters = len(residuals)
    variance = sum(r * r for r in residuals.values()) * clusters / max(clusters - 1, 1)
    # What rounding alone has left is no spread.
    return mean, math.sqrt(variance) if variance > 1e-24 else 0.0, clusters


def _quantile(degrees: int) -> float:
    return float(stats.t.ppf((1 + _LEVEL) / 2, degrees))
