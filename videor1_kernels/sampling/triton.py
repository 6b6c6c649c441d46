"""sample_tokens on Triton: one launch, one program a row, no sort. R rows, V vocabulary, K banned ids.

Passes over a row, of which all but the first read from L2:

    temperature 0       2  the largest logit; the sum of exponentials
    no truncation       2  the same, and a segment (a 64th of the row) read again to find the token in it
    top_k, top_p, both  3  the same, and the listing of candidates: those from a bound on that the largest logit at each
                           place of a tile gives, which are few where the distribution is not flat. What is left,
                           thresholds, ties and the token, is found among them in registers.
    more than 4096      4  at least: bisections until 4096 are between the bounds, each a pass (about 8 where logits are
    candidates             spread, 44 at most); two to list them and to sum the kept; one to count ties where not all
                           that equal the threshold are kept; and all this again where top_p follows top_k

A program runs on one multiprocessor, which takes 64 bytes a clock from L2 and makes 16 exponentials: at V = 152064 in
bf16 and 1.75 GHz a pass takes 2.7 us at least, and 5.4 us where exponentials are summed. The floor of a launch of no
more rows than multiprocessors is thus 8 us without truncation, 11 us with few candidates. This is arithmetic, not a
measurement.

Banned ids are compared in the tiles that hold one, with each of them: a few dozen cost little.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.sampling.reference import REACHED, Options
from videor1_kernels.sampling.triton_list import candidates, climb, cut, first_listed, image, read_list, value
from videor1_kernels.sampling.triton_row import LARGEST, STAGES, first_in_row, marked, marks_of, segment_sums, tile, weight

SEGMENTS, COLUMNS = 64, 32  # of a tile; with twice as many the compiler spills registers
NUM_WARPS = 16


@triton.jit
def share(total, top_p):
    """The weight that top_p asks for; top_p: int64, in units of 2^-62."""
    return tl.maximum(tl.ceil(total.to(tl.float64) * 2.0**-62 * top_p).to(tl.int64), 1)


@triton.jit
def sample_kernel(logits, uniform, banned, tokens, logp, listed, counts, stride, V, L, K, scale, temperature, reach,
                  top_k, top_p, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BANNED: tl.constexpr,
                  UNITS: tl.constexpr, S: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """logits [R, V], uniform [R], banned [K] -> tokens, logp [R]. listed int32 [R, 2, S * C], counts int32 [R]: scratch.

    scale: log2(e) / temperature. reach: how far below the largest logit an exponential is surely less than a unit.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    marks = tl.zeros((), tl.int64)
    if BANNED:
        marks = marks_of(banned, K, V, L, C)

    lanes = tl.full((S, C), float("-inf"), tl.float32)  # the largest score at each place of a tile
    first = tl.zeros((S, C), tl.int32)
    highest = tl.full((S, C), float("-inf"), tl.float32)  # of all, banned ones too; +inf for what has no log-prob
    for i in tl.range(0, L // C, num_stages=STAGES):
        ids, z, score = tile(base, i, V, L, banned, K, marks, S, C, BANNED)
        if GREEDY:
            first = tl.where(score > lanes, ids, first)
        lanes = tl.maximum(lanes, score)
        highest = tl.maximum(highest, tl.where(z < float("inf"), z, float("inf")))
    top = tl.maximum(tl.max(lanes), -LARGEST)
    crest = tl.max(highest)

    floor = tl.maximum(top - reach, -LARGEST)  # the weights of lower ones are 0
    sums = tl.zeros((S, C), tl.int64)
    eligible = tl.zeros((S, C), tl.int32)
    banned_sum = 0.0  # relative to the crest
    for i in tl.range(0, L // C, num_stages=STAGES):
        ids, z, score = tile(base, i, V, L, banned, K, marks, S, C, BANNED)
        sums += weight(score, top, scale, UNITS)
        if TOP_K:
            eligible += (score >= floor).to(tl.int32)
        if BANNED:
            if marked(marks, i):
                held = (score == float("-inf")) & (ids < V)
                banned_sum += tl.sum(tl.where(held, tl.exp2((tl.where(held, z, crest) - crest) * scale), 0.0))
    parts = tl.sum(sums, 1)  # [S]
    total = tl.sum(parts)
    whole_sum = total.to(tl.float64) * (1.0 / UNITS) * tl.exp2((top - crest) * scale).to(tl.float64) + banned_sum

    if GREEDY:
        token = tl.min(tl.where(lanes == top, first, V - 1))
    else:
        u = tl.load(uniform + row).to(tl.float64)
        u = tl.where(u > 0, u, 0.0)
        bound = float("-inf")
        last = tl.full((), -1, tl.int32)  # the last id of those equal to the threshold that is kept
        if TOP_K or TOP_P:
            slots = listed + row * (2 * S * C)
            count = counts + row
            high = image(top) + 1
            if TOP_K:
                need = tl.minimum(tl.sum(eligible), top_k).to(tl.int64)
                low = climb(lanes, (lanes >= floor).to(tl.int64), need, image(floor), high)
            else:
                need = share(total, top_p)
                low = climb(lanes, weight(lanes, top, scale, UNITS), need, image(floor), high)
            number = candidates(base, V, L, banned, K, marks, slots, count, low, high, S, C, BANNED)
            whole = number <= S * C
            threshold, above, kept, ties, whole = cut(
                base, V, L, banned, K, marks, slots, count, number, whole, low, high, need, top, scale,
                not TOP_K, S, C, BANNED, UNITS,
            )  # fmt: skip
            each = weight(value(threshold), top, scale, UNITS)
            if TOP_K:
                take = need - above  # of the ties
            else:
                take = (need - kept + each - 1) // tl.maximum(each, 1)
            if TOP_K and TOP_P:
                need = share(kept + take * each, top_p)
                threshold, above, kept, ties, whole = cut(
                    base, V, L, banned, K, marks, slots, count, above + ties, whole, threshold, high, need, top, scale, True,
                    S, C, BANNED, UNITS,
                )  # fmt: skip
                each = weight(value(threshold), top, scale, UNITS)
                take = (need - kept + each - 1) // tl.maximum(each, 1)
            bound = value(threshold)
            total = kept + take * each
            target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
            last = V - 1
            if whole:
                scores, places = read_list(slots, count, S * C)
                if take < ties:
                    last = first_listed(places, (scores == bound).to(tl.int64), take - 1, V)
                chosen = (scores > bound) | ((scores == bound) & (places <= last))
                token = first_listed(places, tl.where(chosen, weight(scores, top, scale, UNITS), 0), target, V)
            else:
                if take < ties:
                    tied = segment_sums(
                        base, V, L, banned, K, marks, bound, last, top, scale, True, S, C, BANNED, UNITS
                    )  # fmt: skip
                    last = first_in_row(
                        base, V, L, banned, K, tied, take - 1, bound, last, top, scale, True, S, C, BANNED, UNITS
                    )  # fmt: skip
                parts = segment_sums(
                    base, V, L, banned, K, marks, bound, last, top, scale, False, S, C, BANNED, UNITS
                )  # fmt: skip
                token = first_in_row(
                    base, V, L, banned, K, parts, target, bound, last, top, scale, False, S, C, BANNED, UNITS
                )  # fmt: skip
        else:
            target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
            token = first_in_row(
                base, V, L, banned, K, parts, target, bound, last, top, scale, False, S, C, BANNED, UNITS
            )  # fmt: skip

    z = tl.load(base + token).to(tl.float64)
    result = (z - crest.to(tl.float64)) / temperature - tl.log(whole_sum)
    result = tl.where(tl.abs(crest) < float("inf"), result, float("nan"))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logp + row, result.to(tl.float32))


def sample_tokens(logits: Tensor, uniform: Tensor, banned: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """-> (tokens int64 [R], logp fp32 [R])."""
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    size = SEGMENTS * COLUMNS
    greedy, by_count, by_weight = options.temperature == 0, options.top_k > 0, options.top_p < 1
    listing = (by_count or by_weight) and not greedy
    listed = torch.empty((rows, 2, size) if listing else 0, dtype=torch.int32, device=logits.device)
    counts = torch.empty(rows if listing else 0, dtype=torch.int32, device=logits.device)
    if rows:
        temperature = options.temperature or 1.0
        scale = math.log2(math.e) / temperature
        sample_kernel[(rows,)](
            logits, uniform.contiguous(), tokens if banned is None else banned.contiguous(), tokens, logp, listed,
            counts, logits.stride(0), vocabulary, triton.cdiv(vocabulary, size) * COLUMNS,
            0 if banned is None else len(banned), scale, temperature, 64 / scale, options.top_k,
            max(int(options.top_p * REACHED * 2**62), 2**32),
            GREEDY=greedy, TOP_K=by_count and not greedy, TOP_P=by_weight and not greedy, BANNED=banned is not None,
            UNITS=2.0 ** min(44, 62 - vocabulary.bit_length()), S=SEGMENTS, C=COLUMNS,
            num_warps=NUM_WARPS, maxnreg=128,
        )  # fmt: skip
    return tokens, logp
