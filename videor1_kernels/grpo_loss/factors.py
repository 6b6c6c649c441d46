"""The detached factors of a token's terms: the importance correction of a sampler, and weights that a caller gives.

N tokens, S completions. A token's term is u (w policy + beta kl). w = exp(old_logp - rollout_logp), by itself or by the
geometric mean over its completion, is held within bounds; or what lies outside them is left out, by u = 0. Where
rollout_logp is NaN, it is not known and counts as old_logp, so that w = 1 before the bounds. In VESPO the
policy's own weight is one number per completion, which takes the place of w.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from videor1_kernels.grpo_loss.records import Completions, GrpoLossOptions

FAR_BELOW = math.log(1e-8)


def token_factors(
    old_logp: Tensor,
    completions: Completions,
    mask: Tensor | None,
    lengths: Tensor,
    tokens: Tensor,
    options: GrpoLossOptions,
    logp: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return w and u [N] of ``old_logp``'s dtype, each None where it is 1 everywhere.

    old_logp [N] in the dtype to compute in, and logp, which VESPO needs, where it is another; mask: bool [N], the
    tokens that count (None: all), so that the others may hold anything; lengths and tokens [S]: those of each
    completion, all and unmasked.
    """
    w = u = out = None
    if completions.token_weight is not None:
        u = _filled(completions.token_weight, mask, old_logp.dtype)
    if completions.importance_weight is not None:
        w = _filled(completions.importance_weight, mask, old_logp.dtype)
    if options.importance_correction != "none":
        assert completions.rollout_logp is not None
        known = ~completions.rollout_logp.isnan()
        known = known if mask is None else known & mask
        gap = _filled(old_logp, known, old_logp.dtype) - _filled(completions.rollout_logp, known, old_logp.dtype)
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
        if options.loss_type == "vespo" and out is not None:
            w = w.masked_fill(out, 0.0)
    if options.loss_type == "vespo" and len(lengths) and not (w is None and logp is None):
        w = _gamma_weights(old_logp, logp, w, completions.advantages, mask, lengths, options)
    return w, u


def _gamma_weights(
    old_logp: Tensor,
    logp: Tensor | None,
    w: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    options: GrpoLossOptions,
) -> Tensor:
    """VESPO's weight of each token [N]: e^lambda W^k e^(-lambda W), with W the ratio of its whole completion times w.

    The bounds of the logarithms are those of TRL.
    """
    parts = []
    if logp is not None:
        parts.append((logp - old_logp).clamp(-20.0, 20.0))
    if w is not None:
        parts.append(w.log().clamp(FAR_BELOW, 20.0))
    total = _filled(sum(parts[1:], parts[0]), mask, old_logp.dtype)
    log_weight = torch.segment_reduce(total, "sum", lengths=lengths, initial=0.0, unsafe=True).clamp(FAR_BELOW, 20.0)
    good = advantages >= 0  # [S]
    k = torch.full_like(log_weight, options.vespo_k_neg).masked_fill(good, options.vespo_k_pos)
    rate = torch.full_like(log_weight, options.vespo_lambda_neg).masked_fill(good, options.vespo_lambda_pos)
    weights = (rate + k * log_weight - rate * log_weight.exp()).exp()
    return weights.repeat_interleave(lengths, output_size=len(old_logp))


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
