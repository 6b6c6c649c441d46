"""One token per row from logits: temperature, banned tokens, top-k, top-p, by inverting the cumulative distribution.

Each row brings its own uniform numbers, so its tokens do not depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingOptions:
    """How a completion is drawn."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off


def sample_tokens(logits: Tensor, uniform: Tensor, options: SamplingOptions, banned: Tensor) -> Tensor:
    """Draw int64 [R] from logits [R, V].

    Tokens in ``banned`` (int64 ids) have probability 0. top_k keeps the k likeliest; top_p then keeps the shortest
    list of likeliest tokens whose probabilities sum to at least top_p (the likeliest always stays). The kept ones are
    renormalised and the token is the first whose cumulative probability exceeds ``uniform`` [R] in [0, 1), likeliest
    first.
    """
    logits = logits.float().index_fill(-1, banned, -torch.inf)
    if options.temperature == 0:
        return logits.argmax(-1)
    k = min(options.top_k or logits.shape[-1], logits.shape[-1])
    # Ties in the order of the ids, so that a row draws the same on every machine.
    values, tokens = (x[:, :k] for x in logits.sort(dim=-1, descending=True, stable=True))
    probs = (values / options.temperature).softmax(-1)
    cumulative = probs.cumsum(-1)
    if options.top_p < 1:
        kept = cumulative - probs < options.top_p  # [R, k]
        probs = probs * kept
        cumulative = probs.cumsum(-1)
    # The largest kept entry closes the interval: a uniform just below 1 must not fall off its end through rounding.
    target = uniform[:, None] * cumulative[:, -1:]
    # Logits of NaN have no such entry: any token serves, its log-prob is NaN and the training step is then skipped.
    last = ((probs > 0).sum(-1, keepdim=True) - 1).clamp_min(0)
    chosen = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return tokens.gather(-1, chosen)[:, 0]
