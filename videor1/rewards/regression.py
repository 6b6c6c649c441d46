"""Regression: how near a number is to the right one, as a relative error or as mean relative accuracy."""

from __future__ import annotations

import math

import numpy as np


def closeness(output: float | None, truth: float | None) -> float:
    """Return 1 - min(1, (|o - g| + 1e-9) / (|g| + 1e-9)), the reward of Video-R1; 0 for None and NaN."""
    if output is None or truth is None:
        return 0.0
    error = (abs(output - truth) + 1e-9) / (abs(truth) + 1e-9)
    return 0.0 if math.isnan(error) else 1.0 - min(1.0, error)


def mean_relative_accuracy(value: float | None, truth: float | None) -> float:
    """Return the share of the thresholds 0.5, 0.55, ..., 0.95 (t) with |o - g| / |g| <= 1 - t; a truth of 0 needs 0.

    0 for None and NaN.

    Source:
        VSI-Bench (arXiv 2412.14171), whose published code compares with <= at the thresholds of a linspace.
    """
    if value is None or truth is None:
        return 0.0
    if truth == 0:
        return float(value == 0)
    # The published code uses linspace, whose rounding decides at the thresholds themselves.
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.mean(abs(np.float64(value) - truth) / abs(truth) <= 1 - np.linspace(0.5, 0.95, 10)))
