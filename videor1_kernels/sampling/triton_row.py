"""Parts of the sampling kernel that read a row: its tiles, its sums, and the place where a sum is reached.

V vocabulary. A row is S segments of L ids; a tile [S, C] holds C of each, and its reads are S runs of C. Sums are kept
in each place of a tile and added up after the last one: no thread waits for another inside a pass.

A score is a logit as far as drawing goes: finite, or -inf if banned. A weight is exp((score - top) / t) in units of
1 / UNITS, int64: sums are exact, the same in whatever order, and what one pass over the row finds the next finds too.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
STAGES = tl.constexpr(4)  # tiles under way: with one, a pass would wait for the memory's latency at every tile


@triton.jit
def score_of(z, drawable):
    """Logit fp32 -> score. NaN is the least of the finite, and infinities are the ends of these."""
    return tl.where(drawable, tl.minimum(tl.maximum(z, -LARGEST), LARGEST), float("-inf"))


@triton.jit
def weight(score, top, scale, UNITS: tl.constexpr):
    """Score -> weight, of -inf 0; scale: log2(e) / temperature."""
    return (tl.exp2((score - top) * scale) * UNITS).to(tl.int64)


@triton.jit
def aim(u, total):
    """The sum to exceed: u of the total, and no less than 0 and less than all of it whatever u and rounding are."""
    return tl.minimum((tl.where(u > 0, u, 0.0) * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def without(score, ids, banned, K, V):
    for k in range(0, K):
        token = tl.load(banned + k)
        token = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)
        score = tl.where(ids == token, float("-inf"), score)
    return score


@triton.jit
def marks_of(banned, K, V, L, C: tl.constexpr):
    """Bits, int64: bit i is set if a tile whose number is i modulo 64 holds a banned token."""
    marks = tl.zeros((), tl.int64)
    for k in range(0, K):
        token = tl.load(banned + k)
        token = tl.where((token >= 0) & (token < V), token, 0)
        marks |= tl.full((), 1, tl.int64) << ((token % L) // C % 64)
    return marks


@triton.jit
def marked(marks, i):
    return ((marks >> (i % 64)) & 1) != 0


@triton.jit
def tile(base, i, V, L, banned, K, marks, S: tl.constexpr, C: tl.constexpr, BANNED: tl.constexpr):
    """-> ids, logits fp32 and scores of tile i, each [S, C]."""
    ids = tl.arange(0, S)[:, None] * L + (i * C + tl.arange(0, C)[None, :])
    z = tl.load(base + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    score = score_of(z, ids < V)
    if BANNED:  # noqa: SIM102 (the one is decided when this is compiled)
        if marked(marks, i):
            score = without(score, ids, banned, K, V)
    return ids, z, score


@triton.jit
def count_above(
    base,
    V,
    L,
    banned,
    K,
    marks,
    bound,
    top,
    scale,
    S: tl.constexpr,
    C: tl.constexpr,
    BANNED: tl.constexpr,
    UNITS: tl.constexpr,
):
    """-> the number and the weight of the scores from ``bound`` on, the least of them, the greatest of the others."""
    counts = tl.zeros((S, C), tl.int32)
    weights = tl.zeros((S, C), tl.int64)
    least = tl.full((S, C), float("inf"), tl.float32)
    others = tl.full((S, C), float("-inf"), tl.float32)
    for i in tl.range(0, L // C, num_stages=STAGES):
        _, _, score = tile(base, i, V, L, banned, K, marks, S, C, BANNED)
        over = score >= bound
        counts += over.to(tl.int32)
        weights += tl.where(over, weight(score, top, scale, UNITS), 0)
        least = tl.minimum(least, tl.where(over, score, float("inf")))
        others = tl.maximum(others, tl.where(over, float("-inf"), score))
    return tl.sum(counts).to(tl.int64), tl.sum(weights), tl.min(least), tl.max(others)


@triton.jit
def amounts(score, ids, threshold, last, top, scale, TIES: tl.constexpr, UNITS: tl.constexpr):
    """What an id adds to a sum: 1 for a score equal to the threshold, or the weight of one that is kept."""
    if TIES:
        return (score == threshold).to(tl.int64)
    kept = (score > threshold) | ((score == threshold) & (ids <= last))
    return tl.where(kept, weight(score, top, scale, UNITS), 0)


@triton.jit
def segment_sums(
    base,
    V,
    L,
    banned,
    K,
    marks,
    threshold,
    last,
    top,
    scale,
    TIES: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BANNED: tl.constexpr,
    UNITS: tl.constexpr,
):
    """-> the sum of amounts of each segment, int64 [S]."""
    sums = tl.zeros((S, C), tl.int64)
    for i in tl.range(0, L // C, num_stages=STAGES):
        ids, _, score = tile(base, i, V, L, banned, K, marks, S, C, BANNED)
        sums += amounts(score, ids, threshold, last, top, scale, TIES, UNITS)
    return tl.sum(sums, 1)


@triton.jit
def first_in_row(
    base,
    V,
    L,
    banned,
    K,
    sums,
    target,
    threshold,
    last,
    top,
    scale,
    TIES: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BANNED: tl.constexpr,
    UNITS: tl.constexpr,
):
    """-> the first id at which the sum of amounts exceeds ``target``; ``sums``: those of the segments."""
    segment = tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32))
    passed = tl.sum(tl.where(tl.arange(0, S) < segment, sums, 0))
    first = segment * L
    end = tl.minimum(first + L, V)
    found = end
    while (found == end) & (first < end):
        ids = first + tl.arange(0, S * C)
        z = tl.load(base + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        score = score_of(z, ids < end)
        if BANNED:
            score = without(score, ids, banned, K, V)
        part = amounts(score, ids, threshold, last, top, scale, TIES, UNITS)
        found = tl.min(tl.where(passed + tl.cumsum(part, 0) > target, tl.minimum(ids, end), end))
        passed += tl.sum(part)
        first += S * C
    return tl.minimum(found, V - 1)
