"""Reference in plain torch.

The loss is linear in the terms of its tokens. So the gradient of a token is one coefficient, d loss / d logp, which
depends only on the log-probs of its completion. The forward pass forms it and keeps it.

N tokens, S completions. Per token, with weight w (see ``token_weights``), ratio r and x = clamp(ref_logp - logp):
coefficient = w (-r A [not clipped] + beta (1 - exp(x)) [not clamped]), with the factors of :mod:`.factors` where there
are any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from videor1_kernels.checks import IGNORED, compute_dtype
from videor1_kernels.grpo_loss.factors import token_factors
from videor1_kernels.grpo_loss.records import LOG_WEIGHTED, Completions, GrpoLossOptions, ceilings
from videor1_kernels.grpo_loss.rows import KnownRows
from videor1_kernels.linear_logprob import reference as head
from videor1_kernels.linear_logprob.inputs import HeadInputs


class Terms(NamedTuple):
    """What the log-probs determine of a loss."""

    loss: Tensor  # scalar
    coefficient: Tensor  # [N]: d loss / d logp
    kl: Tensor  # scalar
    clip_fraction: Tensor  # scalar
    weight: Tensor  # [N]: the factor of a token's term in the loss


class Result(NamedTuple):
    """What every implementation of grpo_loss returns."""

    loss: Tensor  # scalar
    logp: Tensor  # [N]; 0 at masked tokens
    kl: Tensor  # scalar
    clip_fraction: Tensor  # scalar
    coefficient: Tensor  # [N]: d loss / d logp
    skipped_rows: Tensor  # int64 scalar: tokens whose coefficient is 0


class LinearResult(NamedTuple):
    """What every implementation of linear_grpo_loss returns. The gradients are those of loss / norm."""

    loss: Tensor  # scalar
    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    kl: Tensor  # scalar
    clip_fraction: Tensor  # scalar
    skipped_rows: Tensor  # int64 scalar: tokens whose coefficient is 0, and that of their entropy
    d_hidden: Tensor | None  # [N, H]; None where it is not needed, as the two below
    d_weight: Tensor | None  # [V, H], in the dtype that it was summed in
    d_bias: Tensor | None  # [V], in the dtype that it was summed in
    norm: Tensor  # scalar, a power of two


def grpo_loss(logp: Tensor, completions: Completions, mask: Tensor | None, options: GrpoLossOptions) -> Result:
    """The loss from log-probs [N], and its gradient. mask: bool [N], the tokens that count; None: all."""
    terms = loss_terms(logp, completions, mask, options)
    shown = logp.to(terms.loss.dtype, copy=True)
    if mask is not None:
        shown.masked_fill_(~mask, 0.0)
    skipped = (terms.coefficient == 0).sum()
    return Result(terms.loss, shown, terms.kl, terms.clip_fraction, terms.coefficient, skipped)


def linear_grpo_loss(
    inputs: HeadInputs,
    completions: Completions,
    options: GrpoLossOptions,
    needs: Sequence[bool],
    known: KnownRows | None = None,
) -> LinearResult:
    """The loss from hidden states, and those gradients of hidden, weight and bias that ``needs`` asks for.

    Rows whose coefficient is 0 take no part in the gradients. ``known`` is what kernels need; this does not.
    """
    logp, entropy, lse = head.forward(inputs)
    counted = inputs.labels != IGNORED
    loss, coefficient, kl, clip_fraction, weight = loss_terms(logp, completions, counted, options)
    bonus = None  # [N]: d loss / d entropy
    idle = coefficient == 0
    if options.entropy_coef > 0:
        bonus = -options.entropy_coef * weight
        loss = loss + (bonus * entropy).sum()
        idle &= bonus == 0
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if any(needs):
        gradients = head.backward(inputs, (coefficient, bonus), entropy, lse, needs)
    return LinearResult(loss, logp, entropy, kl, clip_fraction, idle.sum(), *gradients, torch.ones_like(loss))


def loss_terms(logp: Tensor, completions: Completions, mask: Tensor | None, options: GrpoLossOptions) -> Terms:
    """The loss, its gradient per token, and the statistics; arguments as for :func:`grpo_loss`."""
    dtype = compute_dtype(logp)
    if mask is None:
        mask = torch.ones_like(logp, dtype=torch.bool)
    # Masked entries may hold anything, NaN included.
    logp = logp.to(dtype).masked_fill(~mask, 0.0)
    old_logp, ref_logp = (
        None if values is None else values.to(dtype).masked_fill(~mask, 0.0)
        for values in (completions.old_logp, completions.ref_logp)
    )
    boundaries = completions.cu_seqlens.long()
    lengths = boundaries.diff()  # [S]
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=logp.device), lengths, output_size=len(logp))
    counted = torch.cat([boundaries.new_zeros(1), mask.long().cumsum(0)])
    tokens = counted[boundaries[1:]] - counted[boundaries[:-1]]  # [S], unmasked
    weight = token_weights(tokens, completions.counted(), options, dtype)[sequence].masked_fill(~mask, 0.0)  # [N]
    advantage = completions.advantages.to(dtype)[sequence]  # [N]
    old, new = (logp, None) if old_logp is None else (old_logp, logp)
    on_policy, whole = token_factors(old, completions, mask, lengths, tokens, options, new)

    log_ratio = logp - old
    if options.importance_level == "sequence" and len(lengths):
        sums = torch.segment_reduce(log_ratio, "sum", lengths=lengths, initial=0.0)  # [S]
        log_ratio = (sums / tokens.clamp(min=1))[sequence]
    unbounded = log_ratio.exp()
    ratio, clipped = _clip(unbounded, advantage, options)
    clipped &= mask
    gain = advantage if on_policy is None else torch.where(advantage == 0, 0.0, advantage * on_policy)
    term, slope = _policy_terms(ratio, clipped, gain, advantage, logp, options)
    kl = torch.zeros_like(logp)
    if options.beta > 0:
        assert ref_logp is not None
        gap = ref_logp - logp
        x = gap.clamp(-options.kl_clamp, options.kl_clamp)
        growth = x.expm1()
        kl = growth - x
        change = torch.where(gap.abs() <= options.kl_clamp, growth, 0.0)
        if options.kl_by_ratio:
            shared = kl
            if options.importance_level == "sequence" and on_policy is None and whole is None and len(lengths):
                kept = kl.masked_fill(~mask, 0.0)
                sums = torch.segment_reduce(kept, "sum", lengths=lengths, initial=0.0)  # [S]
                shared = (sums / tokens.clamp(min=1))[sequence]
            kl, change = unbounded * kl, unbounded * (change - shared)
        term = term + options.beta * kl
        slope = slope - options.beta * change
    if whole is not None:
        weight = weight * whole
        term, slope = (torch.where(weight == 0, 0.0, values) for values in (term, slope))
    total = mask.sum().clamp(min=1)
    return Terms(
        loss=(weight * term).sum(),
        coefficient=weight * slope,
        kl=(kl * mask).sum() / total,
        clip_fraction=clipped.sum().to(dtype) / total,
        weight=weight,
    )


def _clip(ratio: Tensor, advantage: Tensor, options: GrpoLossOptions) -> tuple[Tensor, Tensor]:
    """The ratio within its bounds, and where it was outside, both [N].

    CISPO's are bounds of a weight, whatever the advantage; others leave the side that costs the policy nothing open.
    """
    clipped = torch.zeros_like(ratio, dtype=torch.bool)
    any_sign = options.loss_type == "cispo"
    if options.clip_low is not None:
        clipped |= (advantage != 0 if any_sign else advantage < 0) & (ratio < 1 - options.clip_low)
        ratio = torch.where(clipped, 1 - options.clip_low, ratio)
    positive, negative = ceilings(options)
    for sign, ceiling in ((1, positive), (-1, positive if any_sign else negative)):
        if ceiling < math.inf:
            above = (advantage > 0 if sign > 0 else advantage < 0) & (ratio > ceiling)
            ratio = torch.where(above, ceiling, ratio)
            clipped |= above
    return ratio, clipped


def _policy_terms(
    ratio: Tensor, clipped: Tensor, gain: Tensor, advantage: Tensor, logp: Tensor, options: GrpoLossOptions
) -> tuple[Tensor, Tensor]:
    """The policy term of each token and its derivative by the log-prob, [N]; gain: advantage times weight.

    No gain, no term, even where the ratio has overflowed.
    """
    if options.loss_type == "sapo":
        temperature = torch.full_like(ratio, options.sapo_temperature_neg)
        temperature.masked_fill_(advantage > 0, options.sapo_temperature_pos)
        at = temperature * (ratio - 1)
        steep = torch.where(ratio.isinf(), 0.0, at.sigmoid() * (-at).sigmoid() * ratio)
        return torch.where(gain == 0, 0.0, -gain * at.sigmoid() * (4 / temperature)), -gain * 4 * steep
    if options.loss_type == "vespo":
        ratio = torch.ones_like(ratio)  # it is in the weight
    term = torch.where(gain == 0, 0.0, -ratio * gain)
    if options.loss_type in LOG_WEIGHTED:
        return torch.where(term == 0, 0.0, term * logp), term
    return term, term.masked_fill(clipped, 0.0)


def token_weights(tokens: Tensor, completions: int | Tensor, options: GrpoLossOptions, dtype: torch.dtype) -> Tensor:
    """The factor [S] that the terms of a completion's tokens have in the loss.

    tokens [S]: how many each has; completions: how many count.
    """
    ones = torch.ones(len(tokens), dtype=dtype, device=tokens.device)
    if options.divisor == "completion":
        return ones / (tokens.clamp(min=1) * completions)
    if options.divisor == "call":
        return ones / tokens.sum().clamp(min=1)
    if options.divisor == "completions":
        return ones / completions
    if options.divisor == "length":
        assert options.max_completion_length is not None
        return ones / (completions * options.max_completion_length)
    assert options.num_tokens is not None
    return ones / options.num_tokens
