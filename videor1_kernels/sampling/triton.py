"""sample_tokens on Triton: one launch, one program per row, no sort. R rows, V vocabulary, K banned ids.

A program passes over its row several times. All passes but the first read it from the L2 cache:

    temperature 0       2  one finds the largest logit, the other sums exponentials
    no truncation       2  the same two; then the token's segment, a 64th of the row, is read once more
    top_k, top_p, both  3  the same two, and one that lists the candidates: the scores from a bound on. The bound comes
                           from the largest score at each place of a tile, and leaves few candidates unless the
                           distribution is flat. Thresholds, ties and the token are then found in registers.
    over 2048           5  or more: each bisection of the bounds is a pass, until 2048 candidates lie between them (some
    candidates             8 for scores that spread, 44 at most); one lists these, one sums what is kept, and one counts
                           ties if not all of them are kept. If top_p follows top_k, it may bisect and list again.

A program runs on one multiprocessor, which per clock reads 64 bytes from L2, computes 16 exponentials and converts 16
numbers to int64. At V = 152064, bf16 and 1.755 GHz a pass takes at least 2.7 us, and 5.4 us if it sums exponentials. So
a launch of no more rows than multiprocessors takes at least 8 us without truncation and 11 us with few candidates. This
is arithmetic, not a measurement.

Each tile that holds a banned id is compared with all K of them: dozens cost little, thousands much.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.sampling.reference import REACHED, SampleTokensOptions
from videor1_kernels.sampling.triton_list import draw_truncated
from videor1_kernels.sampling.triton_row import (
    LARGEST,
    STAGES,
    Row,
    Weighing,
    aim,
    first_in_row,
    marked,
    marks_of,
    tile,
    weight,
)

SEGMENTS, COLUMNS = 64, 32  # of a tile; with twice as many the compiler spills registers
NUM_WARPS = 16
REGISTERS = 128  # the most that a thread of 16 warps can have; without this the compiler spills some for occupancy


@triton.jit
def sample_kernel(
    logits,
    uniform,
    banned,
    tokens,
    logp,
    listed,
    counts,
    stride,
    V,
    L,
    K,
    scale,
    temperature,
    reach,
    top_k,
    top_p,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BANNED: tl.constexpr,
    UNITS: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
):
    """Write tokens and logp [R], from logits [R, V], uniform [R] and banned [K].

    listed int32 [R, 2, S * C] and counts int32 [R] are scratch memory. scale: log2(e) / temperature. reach: a score
    that far below the largest has a weight of 0. top_p: int64, in units of 2^-62.
    """
    number = tl.program_id(0).to(tl.int64)
    marks = tl.zeros((), tl.int64)
    if BANNED:
        marks = marks_of(banned, K, V, L, C)
    row = Row(logits + number * stride, V, L, banned, K, marks)

    lanes = tl.full((S, C), float("-inf"), tl.float32)  # the largest score at each place of a tile
    first = tl.zeros((S, C), tl.int32)
    highest = tl.full((S, C), float("-inf"), tl.float32)  # of all, banned ones too; +inf for what has no log-prob
    for i in tl.range(0, L // C, num_stages=STAGES):
        ids, z, score = tile(row, i, S, C, BANNED)
        if GREEDY:
            first = tl.where(score > lanes, ids, first)
        lanes = tl.maximum(lanes, score)
        highest = tl.maximum(highest, tl.where(z < float("inf"), z, float("inf")))
    top = tl.maximum(tl.max(lanes), -LARGEST)
    crest = tl.max(highest)

    weighing = Weighing(top, scale, UNITS)
    floor = tl.maximum(top - reach, -LARGEST)
    sums = tl.zeros((S, C), tl.int64)
    eligible = tl.zeros((S, C), tl.int32)  # for top_k: those whose weight may not be 0
    banned_sum = 0.0  # relative to the crest, which may be far above the top
    for i in tl.range(0, L // C, num_stages=STAGES):
        ids, z, score = tile(row, i, S, C, BANNED)
        sums += weight(score, weighing)
        if TOP_K:
            eligible += (score >= floor).to(tl.int32)
        if BANNED:  # noqa: SIM102 (this one is decided at compile time)
            if marked(marks, i):
                held = (score == float("-inf")) & (ids < V)
                banned_sum += tl.sum(tl.where(held, tl.exp2((tl.where(held, z, crest) - crest) * scale), 0.0))
    parts = tl.sum(sums, 1)  # [S]
    total = tl.sum(parts)

    u = tl.load(uniform + number).to(tl.float64)
    if GREEDY:
        token = tl.min(tl.where(lanes == top, first, V - 1))
    elif TOP_K or TOP_P:
        token = draw_truncated(
            row,
            listed + number * (2 * S * C),
            counts + number,
            lanes,
            tl.sum(eligible),
            floor,
            total,
            u,
            weighing,
            top_k,
            top_p,
            TOP_K,
            TOP_P,
            S,
            C,
            BANNED,
        )
    else:
        token = first_in_row(row, parts, aim(u, total), float("-inf"), -1, weighing, False, S, C, BANNED)

    share = tl.exp2((top - crest) * scale).to(tl.float64)  # 1, unless a banned one is the crest
    norm = total.to(tl.float64) * (1.0 / UNITS) * share + banned_sum
    z = tl.load(row.base + token).to(tl.float64)
    result = (z - crest.to(tl.float64)) / temperature - tl.log(norm)
    result = tl.where(tl.abs(crest) < float("inf"), result, float("nan"))
    tl.store(tokens + number, token.to(tl.int64))
    tl.store(logp + number, result.to(tl.float32))


def sample_tokens(
    logits: Tensor, uniform: Tensor, banned: Tensor | None, options: SampleTokensOptions
) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [R] and logp fp32 [R]."""
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    greedy = options.temperature == 0
    by_count, by_weight = options.top_k > 0 and not greedy, options.top_p < 1 and not greedy
    size = SEGMENTS * COLUMNS
    listing = rows if by_count or by_weight else 0
    listed = torch.empty((listing, 2, size), dtype=torch.int32, device=logits.device)
    counts = torch.empty(listing, dtype=torch.int32, device=logits.device)
    if rows:
        temperature = options.temperature or 1.0
        scale = math.log2(math.e) / temperature
        sample_kernel[(rows,)](
            logits,
            uniform.contiguous(),
            tokens if banned is None else banned.contiguous(),
            tokens,
            logp,
            listed,
            counts,
            logits.stride(0),
            vocabulary,
            triton.cdiv(vocabulary, size) * COLUMNS,
            0 if banned is None else len(banned),
            scale,
            temperature,
            64 / scale,
            options.top_k,
            max(int(options.top_p * REACHED * 2**62), 2**32),
            GREEDY=greedy,
            TOP_K=by_count,
            TOP_P=by_weight,
            BANNED=banned is not None,
            UNITS=2.0 ** min(44, 62 - vocabulary.bit_length()),
            S=SEGMENTS,
            C=COLUMNS,
            num_warps=NUM_WARPS,
            maxnreg=REGISTERS,
        )
    return tokens, logp
