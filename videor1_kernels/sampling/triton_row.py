"""The parts of the sampling kernel that read a row: its tiles, its sums, and the place where a sum is reached.

A row of V logits is S segments of L ids. A tile [S, C] holds C ids of each segment, so it is read as S runs of C. A
pass keeps one sum for each place of a tile and adds these up after the last tile, so no thread waits for another.

The score of a token is what its logit means for drawing: finite, or -inf if the token is banned. Its weight is
exp((score - top) / t) in units of 1 / UNITS, an int64. So sums of weights are exact and do not depend on their order,
and two passes over a row find the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
STAGES = tl.constexpr(4)  # tiles under way: with one, a pass would wait for the memory's latency at every tile


class Weighing(NamedTuple):
    """How scores become weights."""

    top: Any  # the largest score
    scale: Any  # log2(e) / temperature
    units: Any  # of a weight of 1


class Row(NamedTuple):
    """A row of logits, and how it is cut."""

    base: Any  # pointer to its first logit
    V: Any
    L: Any
    banned: Any  # pointer to the banned ids, int64
    K: Any  # how many they are
    marks: Any  # which tiles hold one, see marks_of


@triton.jit
def score_of(z, drawable):
    """The score of an fp32 logit. NaN counts as the least finite number, an infinity as the nearest one."""
    return tl.where(drawable, tl.minimum(tl.maximum(z, -LARGEST), LARGEST), float("-inf"))


@triton.jit
def weight(score, weighing):
    """The weight of a score, which is 0 for -inf."""
    return (tl.exp2((score - weighing.top) * weighing.scale) * weighing.units).to(tl.int64)


@triton.jit
def aim(u, total):
    """The sum that the drawn token exceeds: u times the total, kept between 0 and total - 1."""
    return tl.minimum((tl.where(u > 0, u, 0.0) * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def without_banned(score, ids, row):
    """The scores, with -inf for the banned ids."""
    for k in range(0, row.K):
        token = tl.load(row.banned + k)
        token = tl.where((token >= 0) & (token < row.V), token, -1).to(tl.int32)
        score = tl.where(ids == token, float("-inf"), score)
    return score


@triton.jit
def marks_of(banned, K, V, L, C: tl.constexpr):
    """An int64 whose bit i is set if a tile whose number is i modulo 64 holds a banned token."""
    marks = tl.zeros((), tl.int64)
    for k in range(0, K):
        token = tl.load(banned + k)
        token = tl.where((token >= 0) & (token < V), token, 0)
        marks |= tl.full((), 1, tl.int64) << ((token % L) // C % 64)
    return marks


@triton.jit
def marked(marks, i):
    """Whether tile i may hold a banned token."""
    return ((marks >> (i % 64)) & 1) != 0


@triton.jit
def tile(row, i, S: tl.constexpr, C: tl.constexpr, BANNED: tl.constexpr):
    """The ids, fp32 logits and scores of tile i, each [S, C]."""
    ids = tl.arange(0, S)[:, None] * row.L + (i * C + tl.arange(0, C)[None, :])
    z = tl.load(row.base + ids, mask=ids < row.V, other=float("-inf")).to(tl.float32)
    score = score_of(z, ids < row.V)
    if BANNED:  # noqa: SIM102 (this one is decided at compile time)
        if marked(row.marks, i):
            score = without_banned(score, ids, row)
    return ids, z, score


@triton.jit
def peaks(row, begin, end, GREEDY: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BANNED: tl.constexpr):
    """Of the tiles from ``begin`` up to ``end``: the largest score at each place, with GREEDY the first id that has it,
    and the largest logit, that of a banned token too; +inf instead of what has no log-probability.
    """
    lanes = tl.full((S, C), float("-inf"), tl.float32)
    first = tl.zeros((S, C), tl.int32)
    highest = tl.full((S, C), float("-inf"), tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        ids, z, score = tile(row, i, S, C, BANNED)
        if GREEDY:
            first = tl.where(score > lanes, ids, first)
        lanes = tl.maximum(lanes, score)
        highest = tl.maximum(highest, tl.where(z < float("inf"), z, float("inf")))
    return lanes, first, tl.max(highest)


@triton.jit
def weigh(
    row, begin, end, weighing, floor, TOP_K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BANNED: tl.constexpr
):
    """Of the tiles from ``begin`` up to ``end``: the weight of each segment, int64 [S], and with TOP_K the number of
    scores from ``floor`` on, those whose weight may not be 0.
    """
    sums = tl.zeros((S, C), tl.int64)
    eligible = tl.zeros((S, C), tl.int32)
    for i in tl.range(begin, end, num_stages=STAGES):
        _, _, score = tile(row, i, S, C, BANNED)
        sums += weight(score, weighing)
        if TOP_K:
            eligible += (score >= floor).to(tl.int32)
    return tl.sum(sums, 1), tl.sum(eligible)


@triton.jit
def write(
    tokens,
    logp,
    row,
    token,
    crest,
    total,
    temperature,
    weighing,
    S: tl.constexpr,
    C: tl.constexpr,
    BANNED: tl.constexpr,
):
    """Write a row's token and its log-probability; crest: the largest logit of all, total: of the weights.

    The tiles with a banned token are read in their order, because their sum is one of floating point.
    """
    banned_sum = 0.0  # relative to the crest, which may be far above the top
    if BANNED:
        for i in range(0, row.L // C):
            if marked(row.marks, i):
                ids, z, score = tile(row, i, S, C, BANNED)
                held = (score == float("-inf")) & (ids < row.V)
                part = tl.where(held, tl.exp2((tl.where(held, z, crest) - crest) * weighing.scale), 0.0)
                banned_sum += tl.sum(part)
    share = tl.exp2((weighing.top - crest) * weighing.scale).to(tl.float64)  # 1, unless a banned one is the crest
    norm = total.to(tl.float64) * (1.0 / weighing.units) * share + banned_sum
    z = tl.load(row.base + token).to(tl.float64)
    result = (z - crest.to(tl.float64)) / temperature - tl.log(norm)
    result = tl.where(tl.abs(crest) < float("inf"), result, float("nan"))
    tl.store(tokens, token.to(tl.int64))
    tl.store(logp, result.to(tl.float32))


@triton.jit
def count_above(row, bound, weighing, S: tl.constexpr, C: tl.constexpr, BANNED: tl.constexpr):
    """The number and the weight of the scores from ``bound`` on, the least of these, and the greatest of the others."""
    counts = tl.zeros((S, C), tl.int32)
    weights = tl.zeros((S, C), tl.int64)
    least = tl.full((S, C), float("inf"), tl.float32)
    others = tl.full((S, C), float("-inf"), tl.float32)
    for i in tl.range(0, row.L // C, num_stages=STAGES):
        _, _, score = tile(row, i, S, C, BANNED)
        over = score >= bound
        counts += over.to(tl.int32)
        weights += tl.where(over, weight(score, weighing), 0)
        least = tl.minimum(least, tl.where(over, score, float("inf")))
        others = tl.maximum(others, tl.where(over, float("-inf"), score))
    return tl.sum(counts).to(tl.int64), tl.sum(weights), tl.min(least), tl.max(others)


@triton.jit
def amounts(score, ids, threshold, last, weighing, TIES: tl.constexpr):
    """What each id adds to a sum: with TIES 1 if its score equals the threshold, else its weight if it is kept.

    Kept are the scores above the threshold, and of those equal to it the ids up to ``last``.
    """
    if TIES:
        return (score == threshold).to(tl.int64)
    kept = (score > threshold) | ((score == threshold) & (ids <= last))
    return tl.where(kept, weight(score, weighing), 0)


@triton.jit
def segment_sums(
    row, threshold, last, weighing, TIES: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BANNED: tl.constexpr
):
    """The sum of the amounts of each segment, int64 [S]."""
    sums = tl.zeros((S, C), tl.int64)
    for i in tl.range(0, row.L // C, num_stages=STAGES):
        ids, _, score = tile(row, i, S, C, BANNED)
        sums += amounts(score, ids, threshold, last, weighing, TIES)
    return tl.sum(sums, 1)


@triton.jit
def first_in_row(
    row,
    sums,
    target,
    threshold,
    last,
    weighing,
    TIES: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BANNED: tl.constexpr,
):
    """The first id at which the sum of amounts exceeds ``target``; sums: those of the segments."""
    segment = tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32))
    passed = tl.sum(tl.where(tl.arange(0, S) < segment, sums, 0))
    first = segment * row.L
    end = tl.minimum(first + row.L, row.V)
    found = end
    while (found == end) & (first < end):
        ids = first + tl.arange(0, S * C)
        z = tl.load(row.base + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        score = score_of(z, ids < end)
        if BANNED:
            score = without_banned(score, ids, row)
        part = amounts(score, ids, threshold, last, weighing, TIES)
        found = tl.min(tl.where(passed + tl.cumsum(part, 0) > target, tl.minimum(ids, end), end))
        passed += tl.sum(part)
        first += S * C
    return tl.minimum(found, row.V - 1)
