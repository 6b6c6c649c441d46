"""Reference of sample_tokens in plain torch. R rows, V vocabulary.

Softmaxes and cumulative sums run along a row, and the sums are of integers. So the result of a row depends neither on
the rows beside it nor on the order of summation. Only truncation sorts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype

UNITS = 2.0**60  # probabilities are counted in units of 2^-60, as int64: those of a row sum to about UNITS
REACHED = 1 - 2.0**-40  # a sum of this part of top_p has reached it: only rounding makes such a difference


@dataclass(frozen=True)
class SampleTokensOptions:
    """The checked options of a call."""

    temperature: float
    top_p: float  # 1: off
    top_k: int  # 0: off; else below V


def sample_tokens(
    logits: Tensor, uniform: Tensor, banned: Tensor | None, options: SampleTokensOptions
) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [R] and logp [R] in the compute dtype."""
    scores = logits.to(compute_dtype(logits))  # [R, V]
    limits = torch.finfo(scores.dtype)
    # Every score is finite, except those of banned tokens: so every row has a distribution over what may be drawn.
    allowed = scores.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
    if banned is not None:
        allowed.index_fill_(1, banned, -torch.inf)
    if options.temperature == 0:
        tokens = allowed.argmax(1, keepdim=True)  # [R, 1]; the first of equals
    else:
        weights = _tempered(allowed, options.temperature).softmax(1).mul_(UNITS).to(torch.int64)
        if options.top_k or options.top_p < 1:
            weights = truncated(allowed, weights, options.top_k, options.top_p)
        cumulative = weights.cumsum(1)
        total = cumulative[:, -1:]  # above 0
        target = (uniform[:, None].double() * total).long().clamp_min_(0).minimum(total - 1)
        tokens = torch.searchsorted(cumulative, target, right=True)  # [R, 1]: the first above the target
    # In fp64: torch's sum of 152064 fp32 exponentials is wrong by 1e-5.
    logp = _tempered(scores, options.temperature or 1.0).log_softmax(1, dtype=torch.float64).gather(1, tokens)
    return tokens[:, 0], logp[:, 0].to(scores.dtype)


def truncated(allowed: Tensor, weights: Tensor, top_k: int, top_p: float) -> Tensor:
    """The weights int64 [R, V], with 0 for the tokens that top_k and top_p leave out."""
    order = _likeliest(allowed, top_k)  # [R, V or k]
    ranked = weights.gather(1, order)
    if top_p < 1:
        cumulative = ranked.cumsum(1)
        need = (cumulative[:, -1:].double() * (top_p * REACHED)).ceil().long()
        ranked.masked_fill_(cumulative - ranked >= need, 0)  # those before it are enough
    return torch.zeros_like(weights).scatter_(1, order, ranked)


def _likeliest(allowed: Tensor, top_k: int) -> Tensor:
    """The ids of the k likeliest tokens (0: of all), likeliest first, the lower id first among equals."""
    if top_k:  # below V
        values, order = allowed.topk(top_k + 1, dim=1)  # much faster than a sort; equal values come in any order
        if not bool((values[:, 1:] == values[:, :-1]).any()):
            return order[:, :top_k]
    return allowed.sort(dim=1, descending=True, stable=True).indices[:, : top_k or None]


def _tempered(scores: Tensor, temperature: float) -> Tensor:
    """scores / t, less a constant of each row: the difference comes first, because it is exact where it matters."""
    if temperature == 1:
        return scores
    return (scores - scores.amax(1, keepdim=True)) / temperature
