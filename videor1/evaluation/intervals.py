"""Means over questions with 95% confidence intervals.

The questions about one video are not independent, so they form a cluster.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from scipy import stats

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95% confidence interval, which are NaN if the data cannot give one."""

    value: float
    low: float = math.nan
    high: float = math.nan


def mean_of_shares(
    values: Sequence[float], videos: Sequence[Hashable], strata: Sequence[tuple[str, ...]] | None = None
) -> Estimate:
    """Return the mean of values in [0, 1] (accuracies) with the confidence interval of Korn and Graubard (1998).

    This is the interval of Clopper and Pearson for the number of independent questions that would have the clustered
    standard error. If all values are equal, each video counts as one question. With fewer than two videos, the ends of
    the interval are NaN.

    Args:
        values: one value for each question.
        videos: the video of each question.
        strata: (group, category) of each question. The mean is then the mean over the groups of the mean over their
            categories; default: the mean over all questions.
    """
    mean, error, clusters = _clustered(values, videos, strata)
    count = len(values)
    if clusters < 2:
        return Estimate(mean)
    if error > 0 and 0 < mean < 1:
        # The factor accounts for the standard error itself being estimated from the clusters.
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
    """Return the mean of paired differences with Student's confidence interval.

    The interval uses the clustered standard error, with one degree of freedom less than there are videos. With fewer
    than two videos, or if all values are equal, its ends are NaN. The arguments are those of :func:`mean_of_shares`.
    """
    mean, error, clusters = _clustered(values, videos, strata)
    if clusters < 2 or not error > 0:
        return Estimate(mean)
    half_width = _quantile(clusters - 1) * error
    return Estimate(mean, mean - half_width, mean + half_width)


def _clustered(
    values: Sequence[float], videos: Sequence[Hashable], strata: Sequence[tuple[str, ...]] | None
) -> tuple[float, float, int]:
    """Return (mean, its standard error, number of videos).

    The standard error is that of the linearized mean: the terms w_i (x_i - mean of i's stratum) are summed within each
    video, and the variance is C / (C - 1) times the sum of the squares of these sums, for C videos.
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
    # A variance this small is only rounding error.
    return mean, math.sqrt(variance) if variance > 1e-24 else 0.0, clusters


def _quantile(degrees: int) -> float:
    return float(stats.t.ppf((1 + _LEVEL) / 2, degrees))
