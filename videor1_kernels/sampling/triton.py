"""sample_tokens on Triton, without a sort. R rows, V vocabulary, K banned ids.

Where rows are many, one launch, and one program per row. Where they are few, several programs share a row, in two
launches, or in three if it truncates (triton_split.py). The results are the same bits.

A row is passed over several times. All passes but the first read it from the L2 cache:

    temperature 0       2  one finds the largest logit, the other sums exponentials
    no truncation       2  the same two; then the token's segment, a 64th of the row, is read once more
    top_k, top_p, both  3  the same two, and one that lists the candidates: the scores from a bound on. The bound comes
                           from the largest score at each place of a tile, and leaves few candidates unless the
                           distribution is flat. Thresholds, ties and the token are then found in registers.
    over 2048           5  or more: each bisection of the bounds is a pass, until 2048 candidates lie between them (some
    candidates             8 for scores that spread, 44 at most); one lists these, one sums what is kept, and one counts
                           ties if not all of them are kept. If top_p follows top_k, it may bisect and list again.
                           One program makes all of these passes, however many share the row.

A program runs on one multiprocessor, which per clock reads 64 bytes from L2, computes 16 exponentials and converts 16
numbers to int64. At V = 152064, bf16 and 1.755 GHz a whole pass takes at least 2.7 us, and 5.4 us if it sums
exponentials. By instructions (benchmarks/static.py, H200, top_p with few candidates) a launch of one program per row
takes 28 us without truncation and 62 us with top_p, as long as there are no more rows than multiprocessors. With 11
programs for each of 12 rows the passes take 5 us and 13 us together; and each launch more takes 2 to 3 us from the host
and about 1 us in a CUDA graph. This is arithmetic, not a measurement.

Each tile that holds a banned id is compared with all K of them: dozens cost little, thousands much.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.sampling.reference import REACHED, SampleTokensOptions
from videor1_kernels.sampling.triton_list import bounds, candidates, draw_truncated
from videor1_kernels.sampling.triton_row import LARGEST, Row, Weighing, aim, first_in_row, marks_of, peaks, weigh, write
from videor1_kernels.sampling.triton_split import MOST_SPLITS, list_kernel, peak_kernel, weigh_kernel

SEGMENTS, COLUMNS = 64, 32  # of a tile; with twice as many the compiler spills registers
NUM_WARPS = 16
REGISTERS = 128  # the most that a thread of 16 warps can have; without this the compiler spills some for occupancy
INTERPRETED_PROCESSORS = 8


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

    lanes, first, crest = peaks(row, 0, L // C, GREEDY, S, C, BANNED)
    top = tl.maximum(tl.max(lanes), -LARGEST)
    weighing = Weighing(top, scale, UNITS)
    floor = tl.maximum(top - reach, -LARGEST)
    sums, eligible = weigh(row, 0, L // C, weighing, floor, TOP_K, S, C, BANNED)
    total = tl.sum(sums)

    u = tl.load(uniform + number).to(tl.float64)
    if GREEDY:
        token = tl.min(tl.where(lanes == top, first, V - 1))
    elif TOP_K or TOP_P:
        own, count = listed + number * (2 * S * C), counts + number
        low, high, need = bounds(lanes, eligible, floor, total, weighing, top_k, top_p, TOP_K)
        listed_now = candidates(row, own, count, low, high, S, C, BANNED)
        token = draw_truncated(
            row, own, count, listed_now, low, high, need, u, weighing, top_p, TOP_K, TOP_P, S, C, BANNED
        )
    else:
        token = first_in_row(row, sums, aim(u, total), float("-inf"), -1, weighing, False, S, C, BANNED)
    write(tokens + number, logp + number, row, token, crest, total, temperature, weighing, S, C, BANNED)


def splits_for(rows: int, tiles: int, processors: int) -> int:
    """How many programs share a row of ``tiles`` tiles: about as many as there are multiprocessors, all rows together.

    More of them than tiles, or than MOST_SPLITS, gain nothing; nor do more that leave the longest share as it is.
    """
    splits = max(1, min(processors // max(1, rows), tiles, MOST_SPLITS))
    return triton.cdiv(tiles, triton.cdiv(tiles, splits))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def sample_tokens(
    logits: Tensor, uniform: Tensor, banned: Tensor | None, options: SampleTokensOptions, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [R] and logp fp32 [R]. splits: the programs of a row, by default :func:`splits_for`."""
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logp = torch.empty(rows, dtype=torch.float32, device=device)
    if not rows:
        return tokens, logp
    greedy = options.temperature == 0
    by_count, by_weight = options.top_k > 0 and not greedy, options.top_p < 1 and not greedy
    truncated = by_count or by_weight
    size = SEGMENTS * COLUMNS
    tiles = triton.cdiv(vocabulary, size)
    splits = splits or splits_for(rows, tiles, _processors(device))
    temperature = options.temperature or 1.0
    scale = math.log2(math.e) / temperature

    uniform, ids = uniform.contiguous(), tokens if banned is None else banned.contiguous()
    row = (logits.stride(0), vocabulary, tiles * COLUMNS, 0 if banned is None else len(banned))
    weighing = (scale, temperature, 64 / scale)
    truncation = (options.top_k, max(int(options.top_p * REACHED * 2**62), 2**32))
    tile: dict[str, Any] = {
        "BANNED": banned is not None,
        "S": SEGMENTS,
        "C": COLUMNS,
        "num_warps": NUM_WARPS,
        "maxnreg": REGISTERS,
    }
    units = {"UNITS": 2.0 ** min(44, 62 - vocabulary.bit_length())}
    by = {"TOP_K": by_count, "TOP_P": by_weight}

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    listed = scratch(rows if truncated else 0, 2, size)
    if splits == 1:
        counts = scratch(len(listed))
        sample_kernel[(rows,)](
            logits,
            uniform,
            ids,
            tokens,
            logp,
            listed,
            counts,
            *row,
            *weighing,
            *truncation,
            GREEDY=greedy,
            **by,
            **units,
            **tile,
        )
        return tokens, logp
    grid = (rows * splits,)
    summits, counts = scratch(rows, splits, 2, dtype=torch.float32), scratch(rows, 2)
    numbers, weights = scratch(rows, splits), scratch(rows, splits, SEGMENTS, dtype=torch.int64)
    places = scratch(len(listed), splits, size, dtype=torch.float32)
    peak_kernel[grid](
        logits, ids, summits, numbers, places, counts, *row, splits, GREEDY=greedy, TRUNCATED=truncated, **tile
    )
    weigh_kernel[grid](
        logits,
        uniform,
        ids,
        tokens,
        logp,
        summits,
        numbers,
        weights,
        counts,
        *row,
        splits,
        *weighing,
        GREEDY=greedy,
        TOP_K=by_count,
        TRUNCATED=truncated,
        MOST=MOST_SPLITS,
        **units,
        **tile,
    )
    if truncated:
        list_kernel[grid](
            logits,
            uniform,
            ids,
            tokens,
            logp,
            summits,
            numbers,
            weights,
            places,
            listed,
            counts,
            *row,
            splits,
            *weighing,
            *truncation,
            MOST=MOST_SPLITS,
            **by,
            **units,
            **tile,
        )
    return tokens, logp
