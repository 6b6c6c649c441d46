"""The terms of GRPO's loss on Triton: ratio, clip, KL, and the coefficient d loss / d logp of every token.

N tokens, S completions. A program takes a segment: a completion, or a part of one if ratios are per token.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.grpo_loss.factors import token_factors
from videor1_kernels.grpo_loss.records import LOG_WEIGHTED, Completions, GrpoLossOptions, ceilings
from videor1_kernels.grpo_loss.reference import Result

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
    on_policy,
    factor,
    starts,
    stops,
    completions,
    advantages,
    tokens,
    whole,
    coefficient,
    shown,
    sums,
    counts,
    segments,
    clip_low,
    clip_high,
    most_positive,
    most_negative,
    soft_positive,
    soft_negative,
    kl_clamp,
    beta,
    denominator,
    HAS_OLD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ON_POLICY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    LOG_WEIGHTED: tl.constexpr,
    RATIO: tl.constexpr,
    SOFT: tl.constexpr,
    KL_BY_RATIO: tl.constexpr,
    MEAN_KL: tl.constexpr,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    KL: tl.constexpr,
    SEQUENCE: tl.constexpr,
    PER_COMPLETION: tl.constexpr,
    PER_WHOLE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write coefficient [N] and sums [3, segments]: of loss, KL and clipped tokens.

    Segment i is tokens starts[i] to stops[i] - 1, of completion completions[i]. tokens [S]: the unmasked tokens of each
    completion. The weight of a token is 1 / denominator, divided by its completion's tokens with PER_COMPLETION, and by
    ``whole`` with PER_WHOLE; ``factor`` [N] multiplies it, and ``on_policy`` [N] the policy term. With MEAN_KL the KL
    terms are multiplied by the ratio of a whole completion, which has its gradient through each of the tokens alike.

    With WHOLE, segment i is completion i: ``starts`` is cu_seqlens [S+1], and stops, completions and tokens are not
    read. Then shown [N], the log-probs with 0 at masked tokens, and counts [2, segments], of unmasked tokens and of
    coefficients that are not 0, are written too.
    """
    segment = tl.program_id(0)
    first = tl.load(starts + segment).to(tl.int64)
    if WHOLE:
        stop = tl.load(starts + segment + 1).to(tl.int64)
        completion = segment
        unmasked = stop - first
        if HAS_MASK:
            kept = tl.zeros((BLOCK,), tl.int32)
            for block in range(first, stop, BLOCK):
                at = block + tl.arange(0, BLOCK)
                kept += (tl.load(mask + at, mask=at < stop, other=0) != 0).to(tl.int32)
            unmasked = tl.sum(kept, 0).to(tl.int64)
        live = tl.zeros((BLOCK,), tl.int32)
    else:
        stop = tl.load(stops + segment).to(tl.int64)
        completion = tl.load(completions + segment)
        unmasked = tl.load(tokens + completion).to(tl.int64)
    advantage = tl.load(advantages + completion).to(tl.float32)
    count = tl.maximum(unmasked, 1).to(tl.float32)
    share = 1.0
    if PER_COMPLETION:
        share = count
    if PER_WHOLE:
        share = share * tl.maximum(tl.load(whole), 1).to(tl.float32)
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
    mean_kl = 0.0
    if MEAN_KL:
        kl_sums = tl.zeros((BLOCK,), tl.float32)
        for block in range(first, stop, BLOCK):
            at = block + tl.arange(0, BLOCK)
            here = at < stop
            if HAS_MASK:
                here = here & (tl.load(mask + at, mask=here, other=0) != 0)
            apart = tl.load(ref_logp + at, mask=here, other=0.0).to(tl.float32)
            apart -= tl.load(logp + at, mask=here, other=0.0).to(tl.float32)
            x = tl.where(apart > kl_clamp, kl_clamp, tl.where(apart < -kl_clamp, -kl_clamp, apart))
            kl_sums += _expm1(x) - x
        mean_kl = tl.sum(kl_sums, 0) / count
    # Clipping takes the gradient away from a ratio that is too small for A < 0, or too large for A > 0. A weight of the
    # log-prob is bounded on both sides.
    if LOG_WEIGHTED:
        floors = advantage != 0
        ceils = advantage != 0
    else:
        floors = advantage < 0
        ceils = advantage > 0
    floor = tl.where(floors, 1 - clip_low, float("-inf")) if CLIP_LOW else float("-inf")
    ceiling = tl.where(ceils, 1 + clip_high, float("inf")) if CLIP_HIGH else float("inf")
    ceiling = tl.minimum(
        ceiling, tl.where(advantage > 0, most_positive, tl.where(advantage < 0, most_negative, float("inf")))
    )
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
        unbounded = ratio
        if not RATIO:  # it is in on_policy already
            ratio = tl.full((BLOCK,), 1.0, tl.float32)
        clipped = (ratio < floor) | (ratio > ceiling)
        ratio = tl.where(ratio < floor, floor, tl.where(ratio > ceiling, ceiling, ratio))
        gain = advantage
        if HAS_ON_POLICY:
            gain = tl.where(advantage == 0, 0.0, advantage * tl.load(on_policy + at, mask=here, other=0.0))
        # No advantage or no weight, no policy term, even where the ratio has overflowed.
        term = tl.where(gain == 0, 0.0, -ratio * gain)
        slope = tl.where(clipped, 0.0, term)
        if LOG_WEIGHTED:
            slope = term
            term = tl.where(term == 0, 0.0, term * new)
        if SOFT:
            temperature = tl.where(advantage > 0, soft_positive, soft_negative)
            z = temperature * (ratio - 1)
            small = tl.exp(-tl.abs(z))
            term = tl.where(gain == 0, 0.0, -gain * tl.where(z >= 0, 1.0, small) / (1 + small) * (4 / temperature))
            steep = tl.where(ratio == float("inf"), 0.0, small / ((1 + small) * (1 + small)) * ratio)
            slope = -gain * 4 * steep
        if KL:
            apart = tl.load(ref_logp + at, mask=here, other=0.0).to(tl.float32) - new
            x = tl.where(apart > kl_clamp, kl_clamp, tl.where(apart < -kl_clamp, -kl_clamp, apart))  # NaN stays NaN
            growth = _expm1(x)
            kl = growth - x
            change = tl.where(tl.abs(apart) > kl_clamp, 0.0, growth)
            if KL_BY_RATIO:
                change = unbounded * (change - (mean_kl if MEAN_KL else kl))
                kl = unbounded * kl
            kls += tl.where(here, kl, 0.0)
            term += beta * kl
            slope -= beta * change
        clips += tl.where(here & clipped, 1.0, 0.0)
        own = weight
        if HAS_FACTOR:
            own = weight * tl.load(factor + at, mask=here, other=0.0)
            here = here & (own != 0)
        losses += tl.where(here, own * term, 0.0)
        slope = tl.where(here, own * slope, 0.0)
        tl.store(coefficient + at, slope, mask=inside)
        if WHOLE:
            live += (slope != 0).to(tl.int32)
            tl.store(shown + at, new, mask=inside)
    if WHOLE:
        tl.store(counts + segment, unmasked)
        tl.store(counts + segments + segment, tl.sum(live, 0).to(tl.int64))
    tl.store(sums + segment, tl.sum(losses, 0))
    tl.store(sums + segments + segment, tl.sum(kls, 0))
    tl.store(sums + 2 * segments + segment, tl.sum(clips, 0))


@triton.jit
def finish_kernel(sums, counts, loss, kl, clip_fraction, skipped, N, segments, BLOCK: tl.constexpr):
    """Write the loss, KL and clipped tokens by unmasked token, and how many tokens have a coefficient of 0."""
    losses = tl.zeros((BLOCK,), tl.float32)
    kls = tl.zeros((BLOCK,), tl.float32)
    clips = tl.zeros((BLOCK,), tl.float32)
    unmasked = tl.zeros((BLOCK,), tl.int64)
    live = tl.zeros((BLOCK,), tl.int64)
    for block in range(0, segments, BLOCK):
        at = block + tl.arange(0, BLOCK)  # [BLOCK]
        here = at < segments
        losses += tl.load(sums + at, mask=here, other=0.0)
        kls += tl.load(sums + segments + at, mask=here, other=0.0)
        clips += tl.load(sums + 2 * segments + at, mask=here, other=0.0)
        unmasked += tl.load(counts + at, mask=here, other=0)
        live += tl.load(counts + segments + at, mask=here, other=0)
    share = tl.maximum(tl.sum(unmasked, 0), 1).to(tl.float32)
    tl.store(loss, tl.sum(losses, 0))
    tl.store(kl, tl.div_rn(tl.sum(kls, 0), share))
    tl.store(clip_fraction, tl.div_rn(tl.sum(clips, 0), share))
    tl.store(skipped, N - tl.sum(live, 0))


def whole_terms(logp: Tensor, completions: Completions, mask: Tensor | None, options: GrpoLossOptions) -> Result:
    """Return the loss of whole completions, and its gradient.

    Two launches, or three where a mask decides what all tokens are divided by; a few more for the factors of tokens.
    """
    cu_seqlens, advantages, segments = completions.cu_seqlens, completions.advantages, len(completions.advantages)
    coefficient, shown = (logp.new_empty(len(logp), dtype=torch.float32) for _ in range(2))
    sums = logp.new_empty((3, segments), dtype=torch.float32)
    loss, kl, clip_fraction = (logp.new_empty((), dtype=torch.float32) for _ in range(3))
    counts, skipped = (logp.new_empty(shape, dtype=torch.int64) for shape in ((2, segments), ()))
    boundaries = cu_seqlens.contiguous()
    if segments:
        by_all = options.divisor == "call"
        whole = mask.sum() if by_all and mask is not None else None
        factors = _factors_of_whole(logp, completions, mask, options)
        values = (logp, completions.old_logp, completions.ref_logp, mask, *factors)
        _launch(
            tuple(None if x is None else x.contiguous() for x in values),
            (boundaries, boundaries, boundaries),
            advantages.contiguous(),
            boundaries,
            whole,
            completions.counted(),
            len(logp) if by_all and mask is None else 1,
            options,
            (coefficient, shown, sums, counts),
        )
    finish_kernel[(1,)](sums, counts, loss, kl, clip_fraction, skipped, len(logp), segments, BLOCK=128, num_warps=4)
    return Result(loss, shown, kl, clip_fraction, coefficient, skipped)


def _factors_of_whole(
    logp: Tensor, completions: Completions, mask: Tensor | None, options: GrpoLossOptions
) -> tuple[Tensor | None, Tensor | None]:
    vespo = options.loss_type == "vespo" and completions.old_logp is not None
    given = completions.token_weight is not None or completions.importance_weight is not None
    if options.importance_correction == "none" and not given and not vespo:
        return None, None
    boundaries = completions.cu_seqlens.long()
    lengths = tokens = boundaries.diff()
    if mask is not None:
        tokens = torch.cat([boundaries.new_zeros(1), mask.long().cumsum(0)])[boundaries].diff()
    old, new = (logp, None) if completions.old_logp is None else (completions.old_logp, logp.float())
    return token_factors(old.float(), completions, mask, lengths, tokens, options, new)


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
    *,
    factors: tuple[Tensor | None, Tensor | None] = (None, None),
    completions: int | Tensor | None = None,
) -> Tensor:
    """Return sums fp32 [3, segments] of loss terms, KL and clipped tokens, and fill in ``coefficient`` fp32 [N].

    segments: (starts, stops, completions), int64. With importance_level "sequence" a segment is a whole completion.
    tokens int64 [S]: the unmasked tokens of every completion; whole int64 scalar: those of all completions.
    factors: those of :func:`~.factors.token_factors`; completions: how many count (None: S).
    """
    sums = logp.new_empty((3, len(segments[0])), dtype=torch.float32)
    if len(segments[0]):
        _launch(
            (logp, old_logp, ref_logp, mask, *factors),
            segments,
            advantages,
            tokens,
            whole if options.divisor == "call" else None,
            len(advantages) if completions is None else completions,
            1,
            options,
            (coefficient, None, sums, None),
        )
    return sums


def _launch(
    values: tuple[Tensor | None, ...],
    segments: tuple[Tensor, Tensor, Tensor],
    advantages: Tensor,
    tokens: Tensor,
    whole: Tensor | None,
    completions: int | Tensor,
    total: int,
    options: GrpoLossOptions,
    outputs: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
) -> None:
    """Launch :func:`terms_kernel`.

    Args:
        values: log-probs, old ones, reference ones, mask, and the factors of the policy terms and of the whole terms.
        whole, total: what weights are divided by: the former if it is given, else the latter.
        completions: how many count.
        outputs: coefficient, shown, sums, counts; shown and counts for whole completions alone.
    """
    logp, old_logp, ref_logp, mask, on_policy, factor = values
    assert logp is not None
    coefficient, shown, sums, counts = outputs
    if options.divisor in ("completion", "completions", "length") and isinstance(completions, Tensor):
        whole, completions = completions, 1
    number = completions if isinstance(completions, int) else 1
    denominator = {
        "completion": float(number),
        "completions": float(number),
        "call": 1.0,
        "length": float(number * (options.max_completion_length or 0)),
        "num_tokens": float(options.num_tokens or 0),
    }[options.divisor]
    alone = options.importance_level == "token" or on_policy is not None or factor is not None
    # Where ceilings are those of the clip alone, the kernel forms them.
    positive, negative = ceilings(options)
    terms_kernel[(sums.shape[1],)](
        logp,
        logp if old_logp is None else old_logp,
        logp if ref_logp is None else ref_logp,
        logp if mask is None else mask.view(torch.uint8),
        logp if on_policy is None else on_policy,
        logp if factor is None else factor,
        *segments,
        advantages,
        tokens,
        tokens if whole is None else whole,
        coefficient,
        coefficient if shown is None else shown,
        sums,
        tokens if counts is None else counts,
        sums.shape[1],
        options.clip_low or 0.0,
        options.clip_high or 0.0,
        positive if options.delta is not None else math.inf,
        negative,
        options.sapo_temperature_pos,
        options.sapo_temperature_neg,
        options.kl_clamp,
        options.beta,
        denominator * total,
        HAS_OLD=old_logp is not None,
        HAS_MASK=mask is not None,
        HAS_ON_POLICY=on_policy is not None,
        HAS_FACTOR=factor is not None,
        LOG_WEIGHTED=options.loss_type in LOG_WEIGHTED,
        RATIO=options.loss_type != "vespo",
        SOFT=options.loss_type == "sapo",
        KL_BY_RATIO=options.kl_by_ratio,
        MEAN_KL=options.kl_by_ratio and not alone,
        CLIP_LOW=options.clip_low is not None,
        CLIP_HIGH=options.clip_high is not None,
        KL=options.beta > 0,
        SEQUENCE=options.importance_level == "sequence",
        PER_COMPLETION=options.divisor == "completion",
        PER_WHOLE=whole is not None,
        WHOLE=counts is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )
