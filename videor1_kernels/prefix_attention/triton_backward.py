"""Backward kernels of prefix attention. With P = exp(scale q k^T - lse), dP = dO v^T and delta = sum(dO * O) of a row:

    dS = P (dP - delta),   dV = P^T dO,   dK = scale dS^T q,   dQ = scale dS k.

A program of dQ takes a tile of queries, as in the forward pass, and writes delta too. A program of dK and dV takes a
tile of keys. Their queries may be split over several programs, whose partial sums are added in a fixed order: the same
bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from videor1_kernels.prefix_attention.triton_forward import LOG2E, cut_block, load_rows, query_tile, whole_block


@triton.jit
def _query_gradient(q, grad, high, delta, k_block, v_block, seen, factor, acc, MASKED: tl.constexpr):
    """acc + dS k for one block of keys, without the scale."""
    weights = tl.exp2(tl.dot(q, k_block.T) * factor - high[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    d_weights = tl.dot(grad, v_block.T)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k_block.dtype), k_block, acc)


@triton.jit
def prefix_query_gradient(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    out,
    dq,
    tiles,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    g_row,
    g_head,
    o_row,
    T,
    scale,
    D: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write dq [T, Hq, D] and delta fp32 [Hq, T], with the loops of the forward kernel.

    o_row is the row stride of out and of dq.
    """
    first, stop, prompt, prompt_stop, own = query_tile(tiles)
    head = tl.program_id(1)
    q += head.to(tl.int64) * q_head
    k += (head // REPEAT).to(tl.int64) * k_head
    v += (head // REPEAT).to(tl.int64) * v_head
    grad += head.to(tl.int64) * g_head
    queries = first + tl.arange(0, BLOCK_M)
    here = queries < stop
    factor = scale * LOG2E
    q_block = load_rows(q, first, stop, q_row, D, BLOCK_M, BLOCK_D, True)
    g_block = load_rows(grad, first, stop, g_row, D, BLOCK_M, BLOCK_D, True)
    high = tl.load(lse + head.to(tl.int64) * T + queries, mask=here, other=0.0) * LOG2E
    o_block = load_rows(out + head * D, first, stop, o_row, D, BLOCK_M, BLOCK_D, True)
    row_delta = tl.sum(g_block.to(tl.float32) * o_block.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * T + queries, row_delta, mask=here)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    whole = (prompt_stop - prompt) // BLOCK_N
    earlier = (first + 1 - own) // BLOCK_N
    for i in range(0, whole + earlier):
        k_block, v_block = whole_block(k, v, k_row, v_row, i, whole, prompt, own, D, BLOCK_N, BLOCK_D)
        acc = _query_gradient(q_block, g_block, high, row_delta, k_block, v_block, 0, factor, acc, False)
    rest = tl.cdiv(prompt_stop - prompt, BLOCK_N) - whole
    end = tl.minimum(first + BLOCK_M, stop)
    near = tl.cdiv(end - own, BLOCK_N) - earlier
    for i in range(0, rest + near):
        at = tl.where(i < rest, prompt + whole * BLOCK_N, own + (earlier + i - rest) * BLOCK_N)
        last = tl.where(i < rest, prompt_stop, end)
        k_block, v_block, seen = cut_block(k, v, k_row, v_row, at, last, queries, D, BLOCK_N, BLOCK_D)
        acc = _query_gradient(q_block, g_block, high, row_delta, k_block, v_block, seen, factor, acc, True)

    columns = tl.arange(0, BLOCK_D)
    at = dq + queries.to(tl.int64)[:, None] * o_row + head * D + columns[None, :]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=here[:, None] & (columns < D)[None, :])


@triton.jit
def prefix_key_gradients(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    dk_out,
    dv_out,
    parts,
    items,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    g_row,
    g_head,
    dk_row,
    T,
    scale,
    D: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OF_KEYS: tl.constexpr,
    OF_VALUES: tl.constexpr,
):
    """Write dk and dv [T, Hkv, D] for the ``items`` of work.key_items; only one of them without OF_VALUES or OF_KEYS.

    A partial result goes into parts fp32 [slots, 2, Hkv, BLOCK_N, D]. The query heads of a key head are summed in
    registers.
    """
    item = items + tl.program_id(0) * 5
    key_head, key_heads = tl.program_id(1), tl.num_programs(1)
    key, key_stop = tl.load(item), tl.load(item + 1)
    first, stop, slot = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    keys = key + tl.arange(0, BLOCK_N)
    seen_from = tl.where(keys < key_stop, keys, stop)  # a key is seen by the queries from here on
    factor = scale * LOG2E
    k_block = load_rows(k + key_head.to(tl.int64) * k_head, key, key_stop, k_row, D, BLOCK_N, BLOCK_D, True)
    v_block = load_rows(v + key_head.to(tl.int64) * v_head, key, key_stop, v_row, D, BLOCK_N, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    blocks = tl.cdiv(stop - first, BLOCK_M)
    for i in range(0, REPEAT * blocks):  # the queries of one head, then those of the next
        head = key_head.to(tl.int64) * REPEAT + i // blocks
        at = first + (i % blocks) * BLOCK_M
        queries = at + tl.arange(0, BLOCK_M)
        q_block = load_rows(q + head * q_head, at, stop, q_row, D, BLOCK_M, BLOCK_D, True)
        g_block = load_rows(grad + head * g_head, at, stop, g_row, D, BLOCK_M, BLOCK_D, True)
        high = tl.load(lse + head * T + queries, mask=queries < stop, other=float("inf")) * LOG2E  # inf: weights of 0
        row_delta = tl.load(delta + head * T + queries, mask=queries < stop, other=0.0)
        weights = tl.exp2(tl.dot(k_block, q_block.T) * factor - high[None, :])
        weights = tl.where(seen_from[:, None] <= queries[None, :], weights, 0.0)
        if OF_VALUES:
            dv = tl.dot(weights.to(g_block.dtype), g_block, dv)
        if OF_KEYS:
            d_weights = tl.dot(v_block, g_block.T)
            d_scores = weights * (d_weights - row_delta[None, :])
            dk = tl.dot(d_scores.to(q_block.dtype), q_block, dk)
    dk *= scale
    columns = tl.arange(0, BLOCK_D)
    inside = (columns < D)[None, :]
    if slot < 0:
        at = keys.to(tl.int64)[:, None] * dk_row + key_head * D + columns[None, :]
        mask = (keys < key_stop)[:, None] & inside
        if OF_KEYS:
            tl.store(dk_out + at, dk.to(dk_out.dtype.element_ty), mask=mask)
        if OF_VALUES:
            tl.store(dv_out + at, dv.to(dv_out.dtype.element_ty), mask=mask)
    else:
        size = key_heads.to(tl.int64) * (BLOCK_N * D)
        at = slot * 2 * size + key_head * (BLOCK_N * D) + tl.arange(0, BLOCK_N)[:, None] * D + columns[None, :]
        if OF_KEYS:
            tl.store(parts + at, dk, mask=inside)
        if OF_VALUES:
            tl.store(parts + size + at, dv, mask=inside)


@triton.jit
def prefix_sum_parts(
    parts,
    dk_out,
    dv_out,
    sums,
    dk_row,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up the partial results of BLOCK_N keys, in order; a program does BLOCK of these keys."""
    entry = sums + tl.program_id(0) * 4
    key_head, key_heads = tl.program_id(1), tl.num_programs(1)
    key, key_stop, slot, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    rows = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    inside = (columns < D)[None, :]
    size = key_heads.to(tl.int64) * (BLOCK_N * D)
    at = parts + slot * 2 * size + key_head * (BLOCK_N * D) + rows[:, None] * D + columns[None, :]
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for _part in range(0, count):
        dk += tl.load(at, mask=inside, other=0.0)
        dv += tl.load(at + size, mask=inside, other=0.0)
        at += 2 * size
    out = (key + rows).to(tl.int64)[:, None] * dk_row + key_head * D + columns[None, :]
    mask = (key + rows < key_stop)[:, None] & inside
    tl.store(dk_out + out, dk.to(dk_out.dtype.element_ty), mask=mask)
    tl.store(dv_out + out, dv.to(dv_out.dtype.element_ty), mask=mask)
