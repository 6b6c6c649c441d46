"""Forward kernel of prefix attention: one program per tile of queries and query head, with one online softmax.

T tokens of a packed row, Hq query heads, Hkv key heads, D head dim. Scores are multiplied by log2(e), for exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(at, first, stop, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr):
    """Rows first, first + 1, ... of a head, [BLOCK, BLOCK_D]; 0 past D and, with CUT, from row ``stop`` on."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    values = at + first.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if CUT:
        return tl.load(values, mask=((first + rows) < stop)[:, None] & (columns < D)[None, :], other=0.0)
    if D != BLOCK_D:
        return tl.load(values, mask=(columns < D)[None, :], other=0.0)
    return tl.load(values)


@triton.jit
def query_tile(tiles):
    """This program's row of work.query_tiles: (first, stop, prompt, prompt_stop, own)."""
    tile = tiles + tl.program_id(0) * 5
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)


@triton.jit
def whole_block(
    k, v, k_row, v_row, i, whole, prompt, own, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Block i of the keys and values that every query of a tile sees whole: ``whole`` of the prompt, then its own."""
    at = tl.where(i < whole, prompt + i * BLOCK_N, own + (i - whole) * BLOCK_N)
    k_block = load_rows(k, at, at, k_row, D, BLOCK_N, BLOCK_D, False)
    v_block = load_rows(v, at, at, v_row, D, BLOCK_N, BLOCK_D, False)
    return k_block, v_block


@triton.jit
def cut_block(k, v, k_row, v_row, at, last, queries, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys and values ``at`` to ``last`` - 1, and which of the queries see which of them."""
    keys = at + tl.arange(0, BLOCK_N)
    seen = (keys < last)[None, :] & (keys[None, :] <= queries[:, None])
    k_block = load_rows(k, at, last, k_row, D, BLOCK_N, BLOCK_D, True)
    v_block = load_rows(v, at, last, v_row, D, BLOCK_N, BLOCK_D, True)
    return k_block, v_block, seen


@triton.jit
def fold(q, k_block, v_block, seen, scale, high, total, acc, MASKED: tl.constexpr):
    """Add a block of keys to a running softmax: high = max score, total = sum exp2(score - high), acc = those of v."""
    scores = tl.dot(q, k_block.T) * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(high, tl.max(scores, 1))
    shrink = tl.exp2(high - new)
    weights = tl.exp2(scores - new[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_block.dtype), v_block, acc * shrink[:, None])
    return new, total, acc


@triton.jit
def prefix_forward(
    q,
    k,
    v,
    out,
    lse,
    tiles,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    o_row,
    T,
    scale,
    D: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write out [T, Hq, D] and lse fp32 [Hq, T], nats, for the ``tiles`` of work.query_tiles.

    q, k and v have any strides of their rows and heads.
    """
    first, stop, prompt, prompt_stop, own = query_tile(tiles)
    head = tl.program_id(1)
    q += head.to(tl.int64) * q_head
    k += (head // REPEAT).to(tl.int64) * k_head
    v += (head // REPEAT).to(tl.int64) * v_head
    queries = first + tl.arange(0, BLOCK_M)
    factor = scale * LOG2E
    q_block = load_rows(q, first, stop, q_row, D, BLOCK_M, BLOCK_D, True)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # First the blocks of keys that every query of the tile sees whole, of the prompt and then of its own segment.
    whole = (prompt_stop - prompt) // BLOCK_N
    earlier = (first + 1 - own) // BLOCK_N
    for i in range(0, whole + earlier):
        k_block, v_block = whole_block(k, v, k_row, v_row, i, whole, prompt, own, D, BLOCK_N, BLOCK_D)
        high, total, acc = fold(q_block, k_block, v_block, 0, factor, high, total, acc, False)
    # Then the last keys of the prompt, and those of the segment up to the diagonal.
    rest = tl.cdiv(prompt_stop - prompt, BLOCK_N) - whole
    end = tl.minimum(first + BLOCK_M, stop)
    near = tl.cdiv(end - own, BLOCK_N) - earlier
    for i in range(0, rest + near):
        at = tl.where(i < rest, prompt + whole * BLOCK_N, own + (earlier + i - rest) * BLOCK_N)
        last = tl.where(i < rest, prompt_stop, end)
        k_block, v_block, seen = cut_block(k, v, k_row, v_row, at, last, queries, D, BLOCK_N, BLOCK_D)
        high, total, acc = fold(q_block, k_block, v_block, seen, factor, high, total, acc, True)

    columns = tl.arange(0, BLOCK_D)
    at = out + queries.to(tl.int64)[:, None] * o_row + head * D + columns[None, :]
    here = queries < stop
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=here[:, None] & (columns < D)[None, :])
    tl.store(lse + head.to(tl.int64) * T + queries, (high + tl.log2(total)) * LN2, mask=here)
