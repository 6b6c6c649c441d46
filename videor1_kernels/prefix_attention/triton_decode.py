"""prefix_decode_attention on a Triton kernel, for 16-bit inputs: one launch, and the host never waits for the device.

R rows, Hq query heads, Hkv key heads, D head dim, T = R tiles (:attr:`DecodeLayout.tiles`: a prefix and rows that share
it). A program reads a part of the keys and values of one head once: from a tile's prefix for all rows of the tile, or
from the suffix of one row. It leaves its part of the softmax in memory: unnormalised sums, the maximum and the total. A
counter tells which program of a row and head finishes last; that one merges all parts, in the order of the keys. So the
bits do not depend on the order of arrival, and no second launch is needed. The grid has room for the longest lengths,
so a CUDA graph of a call serves all lengths; a program without keys ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.checks import capturing, fail
from videor1_kernels.dispatch import nearest_capability
from videor1_kernels.prefix_attention.decode_layout import TILE_ROWS, DecodeInputs, DecodeLayout
from videor1_kernels.prefix_attention.triton import NARROW, Block
from videor1_kernels.prefix_attention.triton_forward import LOG2E, fold, load_rows

# By compute capability; others take the nearest one below. A product on Hopper and Blackwell has at least 64 queries,
# enough for the 8 rows of a tile with 8 heads each. Blocks of keys are small so that two programs or more share a
# multiprocessor on Hopper and Blackwell: one starts or merges while another reads. With 4 warps sm_80 spills registers
# at D = 128.
BLOCKS: dict[int, Block] = {
    80: Block(64, 32, 8, 3),
    86: Block(64, 32, 8, 2),
    89: Block(64, 32, 8, 2),
    90: Block(64, 32, 4, 3),
    100: Block(64, 64, 8, 3),
    120: Block(64, 32, 8, 2),
}
# Of a head dim above NARROW, up to 256. Two programs share a multiprocessor on Hopper alone: on Blackwell the sums of
# one fill the tensor memory, elsewhere the registers.
WIDE_BLOCKS: dict[int, Block] = {
    80: Block(64, 32, 8, 3),
    86: Block(64, 16, 8, 3),
    89: Block(64, 16, 8, 3),
    90: Block(64, 16, 4, 3),
    100: Block(64, 32, 8, 3),
    120: Block(64, 32, 8, 2),
}
INTERPRETED = Block(64, 64, 4, 1)
PROGRAMS = 2  # that run at once on a multiprocessor
INTERPRETED_PROGRAMS = 8
MOST_SPLITS = 32  # parts of a prefix or a suffix
MERGED_HEADS, MERGED_SPLITS = 8, 8  # heads and parts that are merged at a time


@triton.jit
def _cut(length, splits, BLOCK_N: tl.constexpr):
    """Cut ``length`` keys into at most ``splits`` parts of whole blocks -> (parts, keys of each but the last)."""
    blocks = (length + BLOCK_N - 1) // BLOCK_N
    own = (blocks + splits - 1) // splits
    return (blocks + own - 1) // tl.maximum(own, 1), own * BLOCK_N


@triton.jit
def _inside(lengths, capacity):
    """The lengths, kept between 1 and the capacity."""
    return tl.minimum(tl.maximum(lengths, 1), capacity).to(tl.int32)


@triton.jit
def _merge(
    sums,
    tops,
    totals,
    out,
    row,
    kv_head,
    q_heads,
    prefix_parts,
    suffix_parts,
    prefix_splits,
    splits,
    D: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write out[row, kv_head * REPEAT + i] from the parts of its softmax.

    They are read with ``.cg``, past the L1 cache, because programs on other multiprocessors wrote them.
    """
    columns = tl.arange(0, BLOCK_D)
    parts = prefix_parts + suffix_parts
    for first_head in range(0, REPEAT, BLOCK_H):
        head = first_head + tl.arange(0, BLOCK_H)
        q_head = row.to(tl.int64) * q_heads + kv_head * REPEAT + tl.minimum(head, REPEAT - 1)
        high = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        for first in range(0, parts, BLOCK_S):
            part = first + tl.arange(0, BLOCK_S)
            split = tl.where(part < prefix_parts, part, part - prefix_parts + prefix_splits)
            at = q_head[None, :] * splits + split[:, None]  # [BLOCK_S, BLOCK_H]
            there = (part < parts)[:, None] & (head >= 0)[None, :]
            top = tl.load(tops + at, mask=there, other=float("-inf"), cache_modifier=".cg")
            own = tl.load(totals + at, mask=there, other=0.0, cache_modifier=".cg")
            values = tl.load(
                sums + at[:, :, None] * D + columns[None, None, :],
                mask=there[:, :, None] & (columns < D)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )  # [BLOCK_S, BLOCK_H, BLOCK_D]
            new = tl.maximum(high, tl.max(top, 0))
            shrink = tl.exp2(high - new)
            weights = tl.exp2(top - new[None, :])
            total = total * shrink + tl.sum(weights * own, 0)
            acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * values, 0)
            high = new
        target = (row.to(tl.int64) * q_heads + kv_head * REPEAT + head)[:, None] * D + columns[None, :]
        mask = (head < REPEAT)[:, None] & (columns < D)[None, :]
        tl.store(out + target, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


# These sizes change as completions end, so the kernel is not compiled anew for their values.
@triton.jit(do_not_specialize=["R", "C", "prefix_splits", "suffix_splits", "early"])
def prefix_decode(
    q,
    prefix_k,
    prefix_v,
    suffix_k,
    suffix_v,
    out,
    sums,
    tops,
    totals,
    arrived,
    tiles,
    prefix_lengths,
    suffix_lengths,
    suffix_slots,
    q_row,
    q_head,
    pk_row,
    pk_head,
    pv_row,
    pv_head,
    sk_slot,
    sk_row,
    sk_head,
    sv_slot,
    sv_row,
    sv_head,
    kv_heads,
    R,
    C,
    prefix_splits,
    suffix_splits,
    early,
    scale,
    D: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The grid's first axis is R * (prefix_splits + suffix_splits) * kv_heads, with the heads next to each other. Its
    second are the blocks of BLOCK_M of a tile's TILE_ROWS * BLOCK_R queries; BLOCK_R is REPEAT, the query heads of a
    key head, padded to a power of 2. The prefixes of ``early`` tiles come first, as they are the longest work if many
    rows share them; then the suffixes; then the other tiles, most of which are spare.

    With splits = prefix_splits + suffix_splits: sums fp32 [R, Hq, splits, D]; tops, in powers of 2, and totals fp32
    [R, Hq, splits]. arrived int32 [R, Hkv] counts the programs that are done, and is 0 before and after a launch.
    """
    kv_head = tl.program_id(0) % kv_heads
    item = tl.program_id(0) // kv_heads
    block = tl.program_id(1)
    splits = prefix_splits + suffix_splits
    before_suffixes = early * prefix_splits
    of_suffix = (item >= before_suffixes) & (item < before_suffixes + R * suffix_splits)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    head = m % BLOCK_R
    slots = tl.arange(0, TILE_ROWS)
    if of_suffix:
        own_row = (item - before_suffixes) // suffix_splits
        split = (item - before_suffixes) % suffix_splits
        length = tl.where(block * BLOCK_M < BLOCK_R, _inside(tl.load(suffix_lengths + own_row), C), 0)
        slot = tl.load(suffix_slots + own_row) if HAS_SLOTS else own_row.to(tl.int64)
        k = suffix_k + slot * sk_slot + kv_head.to(tl.int64) * sk_head
        v = suffix_v + slot * sv_slot + kv_head.to(tl.int64) * sv_head
        rows = tl.where(slots == 0, own_row, -1)
        query_rows = tl.where(m < BLOCK_R, own_row, -1)
    else:
        item = tl.where(item < before_suffixes, item, item - R * suffix_splits)
        split = item % prefix_splits
        tile = tiles + item // prefix_splits * (2 + TILE_ROWS)
        length = tl.load(tile + 1)
        first_key = tl.load(tile).to(tl.int64)
        k = prefix_k + first_key * pk_row + kv_head.to(tl.int64) * pk_head
        v = prefix_v + first_key * pv_row + kv_head.to(tl.int64) * pv_head
        rows = tl.load(tile + 2 + slots)
        query_rows = tl.load(tile + 2 + m // BLOCK_R, mask=m // BLOCK_R < TILE_ROWS, other=-1)
    k_row = tl.where(of_suffix, sk_row, pk_row)
    v_row = tl.where(of_suffix, sv_row, pv_row)
    parts, size = _cut(length, tl.where(of_suffix, suffix_splits, prefix_splits), BLOCK_N)
    if split >= parts:
        return
    first = split * size
    stop = tl.minimum(first + size, length)

    columns = tl.arange(0, BLOCK_D)
    query_heads = kv_head * REPEAT + head
    asked = (query_rows >= 0) & (head < REPEAT)
    cells = asked[:, None] & (columns < D)[None, :]
    queries = q + query_rows.to(tl.int64)[:, None] * q_row + query_heads.to(tl.int64)[:, None] * q_head
    q_block = tl.load(queries + columns[None, :], mask=cells, other=0.0)  # [BLOCK_M, BLOCK_D]
    factor = scale * LOG2E
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(0, (stop - first + BLOCK_N - 1) // BLOCK_N):
        key = first + i * BLOCK_N
        k_block = load_rows(k, key, stop, k_row, D, BLOCK_N, BLOCK_D, True)
        v_block = load_rows(v, key, stop, v_row, D, BLOCK_N, BLOCK_D, True)
        seen = (key + tl.arange(0, BLOCK_N) < stop)[None, :]
        high, total, acc = fold(q_block, k_block, v_block, seen, factor, high, total, acc, True)
    q_heads = kv_heads * REPEAT
    at = (query_rows.to(tl.int64) * q_heads + query_heads) * splits + split + tl.where(of_suffix, prefix_splits, 0)
    tl.store(sums + at[:, None] * D + columns[None, :], acc, mask=cells)
    tl.store(tops + at, high, mask=asked)
    tl.store(totals + at, total, mask=asked)

    here = (rows >= 0) & (slots * BLOCK_R < (block + 1) * BLOCK_M) & ((slots + 1) * BLOCK_R > block * BLOCK_M)
    prefixes = tl.load(prefix_lengths + rows, mask=here, other=1)
    prefix_parts, _ = _cut(prefixes, prefix_splits, BLOCK_N)
    suffixes = _inside(tl.load(suffix_lengths + rows, mask=here, other=1), C)
    suffix_parts, _ = _cut(suffixes, suffix_splits, BLOCK_N)
    counters = arrived + rows.to(tl.int64) * kv_heads + kv_head
    # Release: the first barrier puts the stores of all threads before the count. Acquire: the thread that finds the
    # count complete sees what every counted program stored, and after the second barrier so do the other threads.
    tl.debug_barrier()
    before = tl.atomic_add(counters, tl.full((TILE_ROWS,), 1, tl.int32), mask=here, sem="acq_rel")
    last = here & (before + 1 == (prefix_parts + suffix_parts) * ((BLOCK_R + BLOCK_M - 1) // BLOCK_M))
    tl.debug_barrier()
    if tl.max(last.to(tl.int32), 0) > 0:
        tl.store(counters, tl.zeros((TILE_ROWS,), tl.int32), mask=last)  # for the next launch
        for i in range(0, TILE_ROWS):
            chosen = last & (slots == i)
            if tl.max(chosen.to(tl.int32), 0) > 0:
                _merge(
                    sums,
                    tops,
                    totals,
                    out,
                    tl.sum(tl.where(chosen, rows, 0), 0),
                    kv_head,
                    q_heads,
                    tl.sum(tl.where(chosen, prefix_parts, 0), 0),
                    tl.sum(tl.where(chosen, suffix_parts, 0), 0),
                    prefix_splits,
                    splits,
                    D,
                    REPEAT,
                    BLOCK_D,
                    BLOCK_H,
                    BLOCK_S,
                )


@dataclass(frozen=True)
class Workspace:
    """The memory in which the programs of a launch exchange their parts; see :func:`prefix_decode`."""

    sums: Tensor
    tops: Tensor
    totals: Tensor
    arrived: Tensor


_workspaces: WeakKeyDictionary[DecodeLayout, dict[tuple[int, ...], Workspace]] = WeakKeyDictionary()


def workspace(layout: DecodeLayout, q: Tensor, kv_heads: int, splits: int) -> Workspace:
    """The workspace of a layout, made at its first call and kept as long as it; a launch leaves its counters at 0."""
    rows, heads, size = q.shape
    known = _workspaces.setdefault(layout, {})
    key = (heads, kv_heads, splits, size)
    if key in known:
        return known[key]
    made = Workspace(
        sums=q.new_empty((rows, heads, splits, size), dtype=torch.float32),
        tops=q.new_empty((rows, heads, splits), dtype=torch.float32),
        totals=q.new_empty((rows, heads, splits), dtype=torch.float32),
        arrived=torch.zeros(rows, kv_heads, dtype=torch.int32, device=q.device),
    )
    # While a graph is being captured, only its replays write the zeros: no other call may rely on them.
    if not capturing(q):
        known[key] = made
    return made


def block_for(q: Tensor) -> Block:
    """The configuration for q's device and head dim."""
    if q.device.type != "cuda":
        return INTERPRETED
    known = WIDE_BLOCKS if q.shape[2] > NARROW else BLOCKS
    return known[nearest_capability(known, q.device)]


def splits_for(
    rows: int, kv_heads: int, prefix_tokens: int, capacity: int, programs: int, block_n: int
) -> tuple[int, int]:
    """Into how many parts to cut a prefix and a suffix, so that ``programs`` programs have about as many keys each.

    Only sizes that the host knows are used: ``prefix_tokens``, the size of the prefixes' memory, as if every TILE_ROWS
    rows had a prefix of their own; and ``capacity``, that of a suffix.
    """
    share = max(block_n, -(-kv_heads * (prefix_tokens + rows * capacity) // programs))
    prefix = -(-prefix_tokens // triton.cdiv(rows, TILE_ROWS))
    return min(max(1, -(-prefix // share)), MOST_SPLITS), min(max(1, -(-capacity // share)), MOST_SPLITS)


def prefix_decode_attention(
    inputs: DecodeInputs, layout: DecodeLayout, scale: float, block: Block | None = None
) -> Tensor:
    """The attention's output [R, Hq, D], in q's dtype.

    Lengths stay on the device and are not checked: one outside 1 to C is taken as 1 or C. Calls with the same layout
    share a workspace, so only one of them may run at a time, on one stream for example. Before a call is captured in a
    CUDA graph, another with the same layout has to run, and the layout has to live as long as the graph.
    """
    q, prefix_k, prefix_v, suffix_k, suffix_v, suffix_lengths = inputs
    rows, heads, size = q.shape
    kv_heads, capacity = suffix_k.shape[2], suffix_k.shape[1]
    if not rows:
        return torch.empty_like(q)
    if not capacity:
        raise fail("prefix_decode_attention", "suffix_k", "room for the new token, C of 1 or more", capacity)
    block, dtype = block or block_for(q), q.dtype
    q, prefix_k, prefix_v, suffix_k, suffix_v = _operands(q, prefix_k, prefix_v, suffix_k, suffix_v)
    splits = splits_for(rows, kv_heads, len(prefix_k), capacity, _programs(q), block.n)
    space = workspace(layout, q, kv_heads, sum(splits))
    out = q.new_empty(q.shape)
    repeat = heads // kv_heads
    padded = triton.next_power_of_2(repeat)
    grid = (rows * sum(splits) * kv_heads, triton.cdiv(TILE_ROWS * padded, block.m))
    prefix_decode[grid](
        q,
        prefix_k,
        prefix_v,
        suffix_k,
        suffix_v,
        out,
        space.sums,
        space.tops,
        space.totals,
        space.arrived,
        layout.tiles,
        layout.prefix_lengths,
        suffix_lengths.contiguous(),
        None if layout.suffix_slots is None else layout.suffix_slots.contiguous(),
        *(stride for x in (q, prefix_k, prefix_v, suffix_k, suffix_v) for stride in x.stride()[:-1]),
        kv_heads,
        rows,
        capacity,
        *splits,
        triton.cdiv(rows, 4),
        scale,
        D=size,
        REPEAT=repeat,
        BLOCK_R=padded,
        HAS_SLOTS=layout.suffix_slots is not None,
        TILE_ROWS=TILE_ROWS,
        BLOCK_M=block.m,
        BLOCK_N=block.n,
        BLOCK_D=triton.next_power_of_2(max(size, 16)),
        BLOCK_H=min(MERGED_HEADS, padded),
        BLOCK_S=MERGED_SPLITS,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
    )
    return out.to(dtype)


def _programs(q: Tensor) -> int:
    if q.device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(q.device).multi_processor_count


def _operands(*inputs: Tensor) -> list[Tensor]:
    """The inputs in one dtype, with the numbers of a head side by side; views that are so already stay views."""
    dtype = inputs[0].dtype if len({x.dtype for x in inputs}) == 1 else torch.float32
    return [x if x.stride(-1) == 1 else x.contiguous() for x in (x.to(dtype) for x in inputs)]
