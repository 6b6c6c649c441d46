"""The detached factors of a token's terms: the importance correction of a sampler, and weights that a caller gives.

N tokens, S completions. A token's term is u (w policy + beta kl). w = exp(old_logp - rollout_logp), by itself or by the
geometric mean over its completion, is held within bounds; or what lies outside them is left out, by u = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels.grpo_loss.records import Completions, GrpoLossOptions


def token_factors(
    old_logp: Tensor,
    completions: Completions,
    mask: Tensor | None,
    lengths: Tensor,
    tokens: Tensor,
    options: GrpoLossOptions,
) -> tuple[Tensor | None, Tensor | None]:
    """Return w and u [N] of ``old_logp``'s dtype, each None where it is 1 everywhere.

    old_logp [N] in the dtype to compute in; mask: bool [N], the tokens that count (None: all), so that the others may
    hold anything; lengths and tokens [S]: the tokens of each completion, all and unmasked.
    """
    w = u = None
    if completions.token_weight is not None:
        u = _filled(completions.token_weight, mask, old_logp.dtype)
    if options.importance_correction != "none":
        assert completions.rollout_logp is not None
        gap = _filled(old_logp, mask, old_logp.dtype) - _filled(completions.rollout_logp, mask, old_logp.dtype)
        if options.importance_correction == "sequence" and len(lengths):
            sums = torch.segment_reduce(gap, "sum", lengths=lengths, initial=0.0, unsafe=True)  # [S]
            gap = (sums / tokens.clamp(min=1)).repeat_interleave(lengths, output_size=len(gap))
        w = gap.exp()
        low, high = options.correction_min, options.correction_max
        if options.correction_mode == "mask":
            out = torch.zeros_like(w, dtype=torch.bool)
            if low is not None:
                out |= w < low
            if high is not None:
                out |= w > high
            u = (torch.ones_like(w) if u is None else u).masked_fill(out, 0.0)
        elif low is not None or high is not None:
            w = w.clamp(low, high)
    return w, u


def _filled(values: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    values = values.to(dtype)
    return values if mask is None else values.masked_fill(~mask, 0.0)


def counted_tokens(completion_mask: Tensor, cu_seqlens: Tensor, size: int) -> Tensor:
    """Which of ``size`` tokens belong to completions that count, bool. ``cu_seqlens`` may still hold anything."""
    if not len(completion_mask):
        return completion_mask.new_ones(size)
    places = torch.arange(size, device=cu_seqlens.device)
    at = torch.bucketize(places, cu_seqlens[1:].long().contiguous(), right=True)
    return completion_mask[at.clamp(max=len(completion_mask) - 1)]
