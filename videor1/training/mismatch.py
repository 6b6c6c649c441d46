"""How far the policy that is trained stands from the one that was sampled from.

Both are known by the log-probs of the sampled tokens. With d = logp in training - logp at sampling of a token, and the
importance weight w = exp(d), over tokens drawn from the policy at sampling:

    kl_k3 = mean(w - 1 - d)             estimates KL(sampling || training), in nats a token; every term is 0 or more
    chi2  = mean(w^2) - 1               estimates the chi-square divergence of training from sampling
    ess   = (sum w)^2 / (n sum w^2)     the effective sample size, as a share of the n tokens: 1 where all w are equal

Source: k3 is Schulman's estimator (http://joschu.net/blog/kl-approx.html); the others as verl's rollout correction has
them, by token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightBounds:
    """The bounds of importance weights, and what becomes of a weight outside of them."""

    level: Literal["token", "sequence"]  # whose weight: a token's, or a completion's, the geometric mean of its tokens'
    mode: Literal["truncate", "mask"]  # the weight is set to the bound, or the token has no loss
    low: float | None = None
    high: float | None = None


def mismatch(log_ratios: Sequence[Tensor], bounds: WeightBounds | None = None) -> dict[str, float]:
    """Return the metrics ``sampling/kl_k3``, ``sampling/chi2`` and ``sampling/ess``.

    Args:
        log_ratios: d of each completion's tokens, in nats; NaN where the log-prob at sampling is not known. Such tokens
            are left out; without any other, all metrics are NaN.
        bounds: of the weights; with them also the share of tokens that they change, as ``sampling/truncated`` or
            ``sampling/masked``.
    """
    known = [ratio[~ratio.isnan()].double() for ratio in log_ratios]
    d = torch.cat([torch.empty(0, dtype=torch.float64), *known])
    if not len(d):
        metrics = dict.fromkeys(("sampling/kl_k3", "sampling/chi2", "sampling/ess"), math.nan)
    else:
        scaled = (d - d.max()).exp()  # a common factor of the weights is none of the effective sample size
        metrics = {
            "sampling/kl_k3": float((d.expm1() - d).mean()),
            "sampling/chi2": float((2 * d).expm1().mean()),
            "sampling/ess": float(scaled.sum().square() / (len(d) * scaled.square().sum())),
        }
    if bounds is not None:
        name = {"truncate": "sampling/truncated", "mask": "sampling/masked"}[bounds.mode]
        metrics[name] = _share_outside(known, bounds)
    return metrics


def _share_outside(known: Sequence[Tensor], bounds: WeightBounds) -> float:
    """Return the share of tokens whose weight, or whose completion's, is outside of the bounds; NaN without tokens."""
    outside = total = 0
    for d in known:
        weights = d.exp() if bounds.level == "token" else d.mean().exp().expand(len(d))
        beyond = torch.zeros(len(d), dtype=torch.bool)
        if bounds.low is not None:
            beyond |= weights < bounds.low
        if bounds.high is not None:
            beyond |= weights > bounds.high
        outside, total = outside + int(beyond.sum()), total + len(d)
    return outside / total if total else math.nan
