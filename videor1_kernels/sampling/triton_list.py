"""The parts of the sampling kernel that find the threshold of top_k and top_p in a list of candidates.

A list holds up to S * C candidates, a few registers of each thread. It has no order, because only sums of integers are
asked of it. It holds all candidates of a row if they are few enough, else those between two bounds around the
threshold. A bound is an image: an int32 that stands for an fp32 number, in the same order, so that bisection ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from videor1_kernels.sampling.triton_row import STAGES, aim, count_above, first_in_row, segment_sums, tile, weight

# The interval of scores is halved this often, which usually leaves few candidates. Then that of images is, which ends.
HALVINGS = tl.constexpr(12)


@triton.jit
def image(x):
    """The image of an fp32 number; -0 and 0 have the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value(key):
    """The fp32 number of an image."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def climb(scores, amounts, need, low, high):
    """The greatest image t in [low, high) from which on the scores' amounts sum to ``need``, or low without one."""
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)
        if tl.sum(tl.where(scores >= value(middle), amounts, 0)) >= need:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def first_listed(ids, amounts, target, V):
    """The first id at which the sum of amounts, in order of id, exceeds ``target``."""
    low = tl.full((), -1, tl.int32)
    high = V - 1
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.sum(tl.where(ids <= middle, amounts, 0)) > target:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def append(
    row,
    listed,
    count,
    begin,
    end,
    low,
    high,
    SCOPE: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BANNED: tl.constexpr,
):
    """Add the scores whose image is in [low, high), of the tiles from ``begin`` up to ``end``, to a list.

    listed int32 [2, S * C] takes the first S * C; count int32 [1] counts them all. SCOPE: who may add, "cta" or "gpu".
    """
    for i in tl.range(begin, end, num_stages=STAGES):
        ids, _, score = tile(row, i, S, C, BANNED)
        inside = (score >= value(low)) & (score < value(high))
        place = tl.atomic_add(count + tl.zeros((S, C), tl.int32), 1, mask=inside, sem="relaxed", scope=SCOPE)
        room = inside & (place < S * C)
        tl.store(listed + place, score.to(tl.int32, bitcast=True), mask=room)
        tl.store(listed + S * C + place, ids, mask=room)


@triton.jit
def candidates(row, listed, count, low, high, S: tl.constexpr, C: tl.constexpr, BANNED: tl.constexpr):
    """List the scores of the row whose image is in [low, high), at most S * C of them. Returns their number."""
    tl.debug_barrier()  # other threads may still be reading an earlier list
    tl.store(count, 0)
    tl.debug_barrier()
    append(row, listed, count, 0, row.L // C, low, high, "cta", S, C, BANNED)
    tl.debug_barrier()
    return tl.load(count).to(tl.int64)


@triton.jit
def read_list(listed, count, SIZE: tl.constexpr):
    """The scores and ids of a list, each [SIZE]; -inf and 0 beyond the last.

    They are read again whenever they are needed, because keeping them would take registers; with ``.cg``, past the L1
    cache, because programs on other multiprocessors may have written them.
    """
    at = tl.arange(0, SIZE)
    inside = at < tl.load(count, cache_modifier=".cg")
    bits = tl.load(listed + at, mask=inside, other=0, cache_modifier=".cg")
    scores = tl.where(inside, bits.to(tl.float32, bitcast=True), float("-inf"))
    return scores, tl.load(listed + SIZE + at, mask=inside, other=0, cache_modifier=".cg")


@triton.jit
def cut(
    row,
    listed,
    count,
    number,
    whole,
    low,
    high,
    need,
    weighing,
    BY_WEIGHT: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BANNED: tl.constexpr,
):
    """Find the greatest threshold in [low, high) from which on the row holds ``need``, a weight or a number of scores.

    From ``low`` on the row holds that much, in ``number`` scores; from ``high`` on it has none. whole: whether all
    these scores are listed. Returns (threshold, number above it, weight above it, number equal to it, whole).
    """
    number_beyond = tl.zeros((), tl.int64)  # of the scores from ``high`` on
    weight_beyond = tl.zeros((), tl.int64)
    if not whole:
        end = high
        step = tl.zeros((), tl.int32)
        while (number - number_beyond > S * C) & (low + 1 < high):
            middle = (low & high) + ((low ^ high) >> 1)
            halfway = image(0.5 * value(low) + 0.5 * value(high - 1))
            middle = tl.where((step < HALVINGS) & (halfway > low) & (halfway < high), halfway, middle)
            n, w, least, others = count_above(row, value(middle), weighing, S, C, BANNED)
            reached = (w if BY_WEIGHT else n) >= need
            low = tl.where(reached, image(least), low)
            number = tl.where(reached, n, number)
            high = tl.where(reached, high, image(others) + 1)
            number_beyond = tl.where(reached, number_beyond, n)
            weight_beyond = tl.where(reached, weight_beyond, w)
            step += 1
        candidates(row, listed, count, low, high, S, C, BANNED)
        whole = (high == end) & (number <= S * C)
    scores, _ = read_list(listed, count, S * C)
    weights = weight(scores, weighing)
    single = low + 1 == high  # then perhaps more of them than can be listed
    if BY_WEIGHT:
        threshold = climb(scores, weights, need - weight_beyond, low, high)
    else:
        threshold = climb(scores, (scores >= value(low)).to(tl.int64), need - number_beyond, low, high)
    bound = value(threshold)
    over = scores > bound
    ties = tl.where(single, number - number_beyond, tl.sum((scores == bound).to(tl.int64)))
    return (
        threshold,
        number_beyond + tl.sum(over.to(tl.int64)),
        weight_beyond + tl.sum(tl.where(over, weights, 0)),
        ties,
        whole,
    )


@triton.jit
def share(total, top_p):
    """The part of the total weight that top_p asks for."""
    return tl.maximum(tl.ceil(total.to(tl.float64) * 2.0**-62 * top_p).to(tl.int64), 1)


@triton.jit
def bounds(lanes, eligible, floor, total, weighing, top_k, top_p, TOP_K: tl.constexpr):
    """The images [low, high) between which the threshold of top_k, or without it that of top_p, lies, and what the row
    has to hold from there on.

    lanes [S, C]: the largest score at each place of a tile. A bound from which on these alone hold what is needed is a
    bound for the row.
    """
    high = image(weighing.top) + 1
    if TOP_K:
        need = tl.minimum(eligible, top_k).to(tl.int64)
        low = climb(lanes, (lanes >= floor).to(tl.int64), need, image(floor), high)
    else:
        need = share(total, top_p)
        low = climb(lanes, weight(lanes, weighing), need, image(floor), high)
    return low, high, need


@triton.jit
def draw_truncated(
    row,
    listed,
    count,
    number,
    low,
    high,
    need,
    u,
    weighing,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BANNED: tl.constexpr,
):
    """The token that ``u`` draws from what first top_k and then top_p keep.

    low, high and need: of :func:`bounds`. number: of the scores between them, which are listed as far as there is room.
    """
    threshold, above, kept, ties, whole = cut(
        row, listed, count, number, number <= S * C, low, high, need, weighing, not TOP_K, S, C, BANNED
    )
    each = weight(value(threshold), weighing)
    if TOP_K:
        take = need - above  # of the ties, lower ids first
        if TOP_P:
            need = share(kept + take * each, top_p)
            threshold, above, kept, ties, whole = cut(
                row, listed, count, above + ties, whole, threshold, high, need, weighing, True, S, C, BANNED
            )
            each = weight(value(threshold), weighing)
    if TOP_P:
        take = (need - kept + each - 1) // tl.maximum(each, 1)
    bound = value(threshold)
    target = aim(u, kept + take * each)
    last = row.V - 1  # the last id at which a tie is kept
    if whole:
        scores, ids = read_list(listed, count, S * C)
        if take < ties:
            last = first_listed(ids, (scores == bound).to(tl.int64), take - 1, row.V)
        stays = (scores > bound) | ((scores == bound) & (ids <= last))
        token = first_listed(ids, tl.where(stays, weight(scores, weighing), 0), target, row.V)
    else:
        if take < ties:
            sums = segment_sums(row, bound, last, weighing, True, S, C, BANNED)
            last = first_in_row(row, sums, take - 1, bound, last, weighing, True, S, C, BANNED)
        sums = segment_sums(row, bound, last, weighing, False, S, C, BANNED)
        token = first_in_row(row, sums, target, bound, last, weighing, False, S, C, BANNED)
    return token
