"""The sampling kernel for few rows: several programs share a row, in two launches, or in three if it truncates.

Each program has a range of the row's tiles. What it finds, it leaves in memory for the next launch:

    peak_kernel     the largest score and logit; if top_k or top_p truncates, the largest score at each place of a tile
    weigh_kernel    the weight of each segment. Without truncation the last program of a row to arrive adds them up,
                    finds the token and writes it.
    list_kernel     with truncation: the candidates. The last program to arrive finds thresholds, ties and the token.

No program waits for another: a counter tells which one arrives last. The first launch sets the counters to 0. What is
exchanged is maxima and integers, so neither the number of programs nor their order changes a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from videor1_kernels.sampling.triton_list import append, bounds, draw_truncated
from videor1_kernels.sampling.triton_row import LARGEST, Row, Weighing, aim, first_in_row, marks_of, peaks, weigh, write

MOST_SPLITS = 16  # programs of a row


@triton.jit
def _part(logits, banned, stride, V, L, K, splits, BANNED: tl.constexpr, C: tl.constexpr):
    """This program's row: (its number, the row, the program's number in it, its first tile, the one after its last)."""
    number = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    marks = tl.zeros((), tl.int64)
    if BANNED:
        marks = marks_of(banned, K, V, L, C)
    tiles = L // C
    row = Row(logits + number * stride, V, L, banned, K, marks)
    return number, row, split, split * tiles // splits, (split + 1) * tiles // splits


@triton.jit
def _summit(summits, number, splits, MOST: tl.constexpr):
    """The largest score of a row, which is finite, and its largest logit."""
    split = tl.arange(0, MOST)
    at = summits + 2 * (number * splits + split)
    top = tl.max(tl.load(at, mask=split < splits, other=float("-inf")))
    crest = tl.max(tl.load(at + 1, mask=split < splits, other=float("-inf")))
    return tl.maximum(top, -LARGEST), crest


@triton.jit
def _segments(weights, number, splits, MOST: tl.constexpr, S: tl.constexpr):
    """The weight of each segment of a row, int64 [S]."""
    split = tl.arange(0, MOST)[:, None]
    at = weights + (number * splits + split) * S + tl.arange(0, S)[None, :]
    return tl.sum(tl.load(at, mask=split < splits, other=0, cache_modifier=".cg"), 0)


@triton.jit
def _arrives_last(arrived, splits):
    """Whether the other programs of the row have arrived; then what they have stored may be read, with ``.cg``.

    The first barrier puts the stores of all threads before the count; the second puts their loads after it.
    """
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="acq_rel")
    tl.debug_barrier()
    return before + 1 == splits


@triton.jit(do_not_specialize=["splits"])
def peak_kernel(
    logits,
    banned,
    summits,
    numbers,
    places,
    counts,
    stride,
    V,
    L,
    K,
    splits,
    GREEDY: tl.constexpr,
    TRUNCATED: tl.constexpr,
    BANNED: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
):
    """Store the largest score and logit in summits fp32 [R, splits, 2]; if GREEDY, the first id that has this score in
    numbers int32 [R, splits]; if TRUNCATED, the largest score at each place in places fp32 [R, splits, S * C].

    counts int32 [R, 2], of candidates and of programs that have arrived, becomes 0.
    """
    number, row, split, begin, end = _part(logits, banned, stride, V, L, K, splits, BANNED, C)
    lanes, first, crest = peaks(row, begin, end, GREEDY, S, C, BANNED)
    top = tl.max(lanes)
    at = number * splits + split
    tl.store(summits + 2 * at, top)
    tl.store(summits + 2 * at + 1, crest)
    if GREEDY:
        tl.store(numbers + at, tl.min(tl.where(lanes == top, first, V - 1)))
    if TRUNCATED:
        place = tl.arange(0, S)[:, None] * C + tl.arange(0, C)[None, :]
        tl.store(places + at * (S * C) + place, lanes)
    if split == 0:
        tl.store(counts + 2 * number + tl.arange(0, 2), tl.zeros((2,), tl.int32))


@triton.jit(do_not_specialize=["splits"])
def weigh_kernel(
    logits,
    uniform,
    banned,
    tokens,
    logp,
    summits,
    numbers,
    weights,
    counts,
    stride,
    V,
    L,
    K,
    splits,
    scale,
    temperature,
    reach,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TRUNCATED: tl.constexpr,
    BANNED: tl.constexpr,
    UNITS: tl.constexpr,
    MOST: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
):
    """Store the weights of the segments in weights int64 [R, splits, S], and with TOP_K the number of scores that have
    one in numbers int32 [R, splits]; unless TRUNCATED, write tokens and logp [R]. MOST: a power of 2, from splits on.
    """
    number, row, split, begin, end = _part(logits, banned, stride, V, L, K, splits, BANNED, C)
    top, crest = _summit(summits, number, splits, MOST)
    weighing = Weighing(top, scale, UNITS)
    floor = tl.maximum(top - reach, -LARGEST)
    sums, eligible = weigh(row, begin, end, weighing, floor, TOP_K, S, C, BANNED)
    at = number * splits + split
    tl.store(weights + at * S + tl.arange(0, S), sums)
    if TOP_K:
        tl.store(numbers + at, eligible)
    if not TRUNCATED:  # noqa: SIM102 (this one is decided at compile time)
        if _arrives_last(counts + 2 * number + 1, splits):
            sums = _segments(weights, number, splits, MOST, S)
            total = tl.sum(sums)
            if GREEDY:
                others = tl.arange(0, MOST)
                own = number * splits + others
                tops = tl.load(summits + 2 * own, mask=others < splits, other=float("-inf"))
                first = tl.load(numbers + own, mask=others < splits, other=0)
                token = tl.min(tl.where(tops == top, first, V - 1))
            else:
                u = tl.load(uniform + number).to(tl.float64)
                token = first_in_row(row, sums, aim(u, total), float("-inf"), -1, weighing, False, S, C, BANNED)
            write(tokens + number, logp + number, row, token, crest, total, temperature, weighing, S, C, BANNED)


@triton.jit(do_not_specialize=["splits"])
def list_kernel(
    logits,
    uniform,
    banned,
    tokens,
    logp,
    summits,
    numbers,
    weights,
    places,
    listed,
    counts,
    stride,
    V,
    L,
    K,
    splits,
    scale,
    temperature,
    reach,
    top_k,
    top_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BANNED: tl.constexpr,
    UNITS: tl.constexpr,
    MOST: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
):
    """Write tokens and logp [R]; listed int32 [R, 2, S * C] is scratch memory."""
    number, row, _, begin, end = _part(logits, banned, stride, V, L, K, splits, BANNED, C)
    top, _ = _summit(summits, number, splits, MOST)
    weighing = Weighing(top, scale, UNITS)
    floor = tl.maximum(top - reach, -LARGEST)
    total = tl.sum(_segments(weights, number, splits, MOST, S))
    lanes = tl.full((S, C), float("-inf"), tl.float32)
    eligible = tl.zeros((), tl.int32)
    place = tl.arange(0, S)[:, None] * C + tl.arange(0, C)[None, :]
    for other in range(0, splits):
        at = number * splits + other
        lanes = tl.maximum(lanes, tl.load(places + at * (S * C) + place))
        if TOP_K:
            eligible += tl.load(numbers + at)
    low, high, need = bounds(lanes, eligible, floor, total, weighing, top_k, top_p, TOP_K)
    own, count = listed + number * (2 * S * C), counts + 2 * number
    append(row, own, count, begin, end, low, high, "gpu", S, C, BANNED)
    if _arrives_last(count + 1, splits):
        found = tl.load(count, cache_modifier=".cg").to(tl.int64)
        u = tl.load(uniform + number).to(tl.float64)
        token = draw_truncated(row, own, count, found, low, high, need, u, weighing, top_p, TOP_K, TOP_P, S, C, BANNED)
        # Read once more: to keep them while the token is searched would spill registers.
        _, crest = _summit(summits, number, splits, MOST)
        total = tl.sum(_segments(weights, number, splits, MOST, S))
        write(tokens + number, logp + number, row, token, crest, total, temperature, weighing, S, C, BANNED)
