"""The terms of GRPO's loss on Triton: ratio, clip, KL, and the coefficient d loss / d logp of every token.

N tokens, S completions. A program takes a segment: a completion, or a part of one if ratios are per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.grpo_loss.reference import GrpoLossOptions

BLOCK = 512  # 1024 takes twice the registers, and some are spilled


@triton.jit
def _expm1(x):
    """exp(x) - 1 without cancellation near 0: below 1/8 a series, whose next term is less than fp32's rounding."""
    series = x * (1 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040))))))
    return tl.where(tl.abs(x) < 0.125, series, tl.exp(x) - 1)


@triton.jit
def terms_kernel(
    logp,
    old_logp,
    ref_logp,
    mask,
    starts,
    stops,
    completions,
    advantages,
    tokens,
    whole,
    coefficient,
    sums,
    segments,
    clip_low,
    clip_high,
    kl_clamp,
    beta,
    denominator,
    HAS_OLD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    KL: tl.constexpr,
    SEQUENCE: tl.constexpr,
    PER_COMPLETION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write coefficient [N] and sums [3, segments]: of loss, KL and clipped tokens.

    Segment i is tokens starts[i] to stops[i] - 1, of completion completions[i]. tokens [S]: the unmasked tokens of each
    completion. The weight of a token is 1 / (its completion's tokens * denominator) with PER_COMPLETION, else
    1 / (whole * denominator).
    """
    segment = tl.program_id(0)
    first = tl.load(starts + segment)
    stop = tl.load(stops + segment)
    completion = tl.load(completions + segment)
    advantage = tl.load(advantages + completion).to(tl.float32)
    count = tl.maximum(tl.load(tokens + completion), 1).to(tl.float32)
    share = count if PER_COMPLETION else tl.maximum(tl.load(whole), 1).to(tl.float32)
    weight = tl.div_rn(1.0, share * denominator)
    mean = 0.0
    if SEQUENCE and HAS_OLD:
        gaps = tl.zeros((BLOCK,), tl.float32)
        for block in range(first, stop, BLOCK):
            at = block + tl.arange(0, BLOCK)
            here = at < stop
            if HAS_MASK:
                here = here & (tl.load(mask + at, mask=here, other=0) != 0)
            new = tl.load(logp + at, mask=here, other=0.0).to(tl.float32)
            gaps += new - tl.load(old_logp + at, mask=here, other=0.0).to(tl.float32)
        mean = tl.sum(gaps, 0) / count
    # Clipping takes the gradient away from a ratio that is too small for A < 0, or too large for A > 0.
    floor = tl.where(advantage < 0, 1 - clip_low, float("-inf")) if CLIP_LOW else float("-inf")
    ceiling = tl.where(advantage > 0, 1 + clip_high, float("inf")) if CLIP_HIGH else float("inf")
    losses = tl.zeros((BLOCK,), tl.float32)
    kls = tl.zeros((BLOCK,), tl.float32)
    clips = tl.zeros((BLOCK,), tl.float32)
    for block in range(first, stop, BLOCK):
        at = block + tl.arange(0, BLOCK)  # [BLOCK]
        inside = at < stop
        here = inside
        if HAS_MASK:
            here = here & (tl.load(mask + at, mask=inside, other=0) != 0)
        new = tl.load(logp + at, mask=here, other=0.0).to(tl.float32)
        gap = tl.zeros((BLOCK,), tl.float32)
        if HAS_OLD:
            if SEQUENCE:
                gap += mean
            else:
                gap = new - tl.load(old_logp + at, mask=here, other=0.0).to(tl.float32)
        ratio = tl.exp(gap)
        clipped = (ratio < floor) | (ratio > ceiling)
        ratio = tl.where(ratio < floor, floor, tl.where(ratio > ceiling, ceiling, ratio))
        # A zero advantage has no policy term, even where the ratio has overflowed.
        term = tl.where(advantage == 0, 0.0, -ratio * advantage)
        slope = tl.where(clipped, 0.0, term)
        if KL:
            apart = tl.load(ref_logp + at, mask=here, other=0.0).to(tl.float32) - new
            x = tl.where(apart > kl_clamp, kl_clamp, tl.where(apart < -kl_clamp, -kl_clamp, apart))  # NaN stays NaN
            growth = _expm1(x)
            kl = growth - x
            kls += tl.where(here, kl, 0.0)
            term += beta * kl
            slope -= beta * tl.where(tl.abs(apart) > kl_clamp, 0.0, growth)
        losses += tl.where(here, weight * term, 0.0)
        clips += tl.where(here & clipped, 1.0, 0.0)
        tl.store(coefficient + at, tl.where(here, weight * slope, 0.0), mask=inside)
    tl.store(sums + segment, tl.sum(losses, 0))
    tl.store(sums + segments + segment, tl.sum(kls, 0))
    tl.store(sums + 2 * segments + segment, tl.sum(clips, 0))


def terms(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    mask: Tensor | None,
    segments: tuple[Tensor, Tensor, Tensor],
    advantages: Tensor,
    tokens: Tensor,
    whole: Tensor,
    options: GrpoLossOptions,
    coefficient: Tensor,
) -> Tensor:
    """Return sums fp32 [3, segments] of loss terms, KL and clipped tokens, and fill in ``coefficient`` fp32 [N].

    segments: (starts, stops, completions), int64. With importance_level "sequence" a segment is a whole completion.
    tokens int64 [S]: the unmasked tokens of every completion; whole int64 scalar: those of all completions.
    """
    starts, stops, completions = segments
    sums = logp.new_empty((3, len(starts)), dtype=torch.float32)
    if not len(starts):
        return sums
    denominator = {
        "grpo": float(len(tokens)),
        "bnpo": 1.0,
        "dr_grpo": float(len(tokens) * (options.max_completion_length or 0)),
        "dapo": float(options.num_tokens or 0),
    }[options.loss_type]
    only_constant = options.loss_type in ("dr_grpo", "dapo")
    terms_kernel[(len(starts),)](
        logp,
        logp if old_logp is None else old_logp,
        logp if ref_logp is None else ref_logp,
        logp if mask is None else mask.view(torch.uint8),
        starts,
        stops,
        completions,
        advantages,
        tokens,
        torch.ones_like(whole) if only_constant else whole,
        coefficient,
        sums,
        len(starts),
        options.clip_low or 0.0,
        options.clip_high or 0.0,
        options.kl_clamp,
        options.beta,
        denominator,
        HAS_OLD=old_logp is not None,
        HAS_MASK=mask is not None,
        CLIP_LOW=options.clip_low is not None,
        CLIP_HIGH=options.clip_high is not None,
        KL=options.beta > 0,
        SEQUENCE=options.importance_level == "sequence",
        PER_COMPLETION=options.loss_type == "grpo",
        BLOCK=BLOCK,
        num_warps=4,
    )
    return sums
