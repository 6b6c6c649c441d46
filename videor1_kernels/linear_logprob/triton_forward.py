"""The product of the linear head, with the softmax statistics taken from its accumulator: no logits in memory.

N rows, H hidden, V vocabulary. A program computes a tile [BLOCK_N, BLOCK_V] of the logits z = x W^T + b. For each row
of the tile it stores m = max z, s = sum exp((z - m) / t) and d = sum exp((z - m) / t) (z - m), and the logit of the
label if the tile holds it. A second kernel merges the tiles of a row. 2NHV operations.

The differences z - m are formed before they are multiplied by 1 / t and log2(e), so that logits of 1e4 lose no
accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from videor1_kernels.dispatch import nearest_capability

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # stands for -inf where differences of it are taken
MERGE_ROWS = 32
MERGE_TILES = 16


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of the product kernel on one architecture."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    group_n: int = 16  # row tiles that share a sweep over the vocabulary: their hidden states stay in the L2 cache
    descriptors: bool = False  # tensor descriptors (TMA) and a persistent grid; else pointers and one program per tile
    flatten: bool = False  # overlap the next tile's loads with this tile's statistics; on sm_90 it serialises wgmma
    programs: int = 1  # of the persistent grid, those that a multiprocessor has room for
    early: bool = False  # read labels and temperatures before the product; on other architectures that spills registers
    bias_block_v: int | None = None  # replaces block_v if there is a bias


# By compute capability; others take the nearest one below. Those with 99 KiB of shared memory have their own entries.
TILES: dict[int, Tile] = {
    80: Tile(128, 128, 64, num_warps=8, num_stages=3),
    86: Tile(128, 128, 32, num_warps=8, num_stages=4),
    89: Tile(128, 128, 32, num_warps=8, num_stages=4),
    90: Tile(128, 256, 64, num_warps=8, num_stages=4, descriptors=True, early=True),
    # With a bias, 256 columns would spill registers: a thread holds half a row and needs as many values of the bias.
    100: Tile(128, 256, 64, num_warps=8, num_stages=4, descriptors=True, flatten=True, bias_block_v=128),
    120: Tile(128, 128, 32, num_warps=8, num_stages=4),
}


def tile_for(hidden: Tensor, weight: Tensor) -> Tile:
    """The tile for the inputs' device; operands that TMA cannot address get one for the kernel with pointers."""
    if hidden.device.type != "cuda":  # the interpreter
        return Tile(32, 64, 32, num_warps=4, num_stages=1, group_n=2, descriptors=_addressable(hidden, weight))
    tile = TILES[nearest_capability(TILES, hidden.device)]
    return tile if not tile.descriptors or _addressable(hidden, weight) else TILES[80]


def _addressable(*operands: Tensor) -> bool:
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.stride(1) == 1
        and x.stride(0) >= x.shape[1]  # not rows that overlap: an expanded one
        for x in operands
    )


@triton.jit
def _tile_at(tile, tiles_n, tiles_v, GROUP_N: tl.constexpr):
    """The (row tile, vocabulary tile) of a tile's number: GROUP_N row tiles sweep over the vocabulary together."""
    group_size = GROUP_N * tiles_v
    group = tile // group_size
    first = group * GROUP_N
    size = min(tiles_n - first, GROUP_N)
    return first + (tile % group_size) % size, (tile % group_size) // size


@triton.jit
def _statistics(
    z,
    label,
    t,
    tile_n,
    tile_v,
    bias,
    parts,
    label_logit,
    N,
    V,
    plane,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Store the statistics of a tile z [BLOCK_N, BLOCK_V] in parts [3, tiles of V, N], and the logits of its labels.

    label and t = 1 / temperature are those of its rows, [BLOCK_N].

    plane is the number of tiles of V times N. The host multiplies, because here an argument of 1 would be a
    compile-time constant, which cannot be cast.
    """
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    here = rows < N
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        z = tl.where(z < LOWEST, LOWEST, z)
    if (tile_v + 1) * BLOCK_V > V:
        z = tl.where((columns < V)[None, :], z, LOWEST)
    mine = here & (label // BLOCK_V == tile_v) & (label >= 0)
    if tl.max(mine.to(tl.int32), 0) > 0:
        found = tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), 1)
        tl.store(label_logit + rows, found, mask=mine)
    top = tl.max(z, 1)  # [BLOCK_N]
    below = z - top[:, None]
    exps = tl.exp2(below * (t * LOG2E)[:, None])
    out = parts + tile_v.to(tl.int64) * N + rows
    tl.store(out, top, mask=here)
    tl.store(out + plane, tl.sum(exps, 1), mask=here)
    tl.store(out + plane + plane, tl.sum(exps * below, 1), mask=here)


@triton.jit
def _of_rows(tile_n, labels, scale, N, BLOCK_N: tl.constexpr):
    """Labels and 1 / temperatures of a row tile, [BLOCK_N]."""
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(labels + rows, mask=rows < N, other=-1).to(tl.int32)
    return label, tl.load(scale + rows, mask=rows < N, other=0.0)


@triton.jit
def product_descriptors(
    hidden,
    weight,
    bias,
    labels,
    scale,
    parts,
    label_logit,
    N,
    V,
    H,
    plane,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLATTEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The product with a persistent grid; hidden and weight are descriptors of [N, H] and [V, H]."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        tile_n, tile_v = _tile_at(tile, tiles_n, tiles_v, GROUP_N)
        if EARLY:
            label, t = _of_rows(tile_n, labels, scale, N, BLOCK_N)
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for h in range(0, H, BLOCK_H):
            x = hidden.load([tile_n * BLOCK_N, h])  # [BLOCK_N, BLOCK_H]
            w = weight.load([tile_v * BLOCK_V, h])  # [BLOCK_V, BLOCK_H]
            z = tl.dot(x, w.T, z, input_precision="ieee")
        if not EARLY:
            label, t = _of_rows(tile_n, labels, scale, N, BLOCK_N)
        _statistics(z, label, t, tile_n, tile_v, bias, parts, label_logit, N, V, plane, BLOCK_N, BLOCK_V, HAS_BIAS)


@triton.jit
def product_pointers(
    hidden,
    weight,
    bias,
    labels,
    scale,
    parts,
    label_logit,
    N,
    V,
    H,
    plane,
    hidden_stride,
    weight_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The product with one tile per program; hidden [N, H] and weight [V, H] have unit stride in H."""
    tile_n, tile_v = _tile_at(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP_N)
    # Rows past the end read the first rows again; their results are not stored.
    rows = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    columns = (tile_v * BLOCK_V + tl.arange(0, BLOCK_V)) % V
    inner = tl.arange(0, BLOCK_H)
    x_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride + inner[None, :]
    w_at = weight + columns.to(tl.int64)[:, None] * weight_stride + inner[None, :]
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        x = tl.load(x_at, mask=(inner < H - h)[None, :], other=0.0)
        w = tl.load(w_at, mask=(inner < H - h)[None, :], other=0.0)
        z = tl.dot(x, w.T, z, input_precision="ieee")
        x_at += BLOCK_H
        w_at += BLOCK_H
    label, t = _of_rows(tile_n, labels, scale, N, BLOCK_N)
    _statistics(z, label, t, tile_n, tile_v, bias, parts, label_logit, N, V, plane, BLOCK_N, BLOCK_V, HAS_BIAS)


@triton.jit
def merge_tiles(
    parts, label_logit, scale, logp, entropy, lse, N, tiles_v, plane, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Write logp, entropy and lse [N], nats, from parts [3, tiles_v, N] and label_logit [N]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = rows < N
    top = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.load(scale + rows, mask=here, other=1.0)
    for first in range(0, tiles_v, BLOCK_T):
        tiles = first + tl.arange(0, BLOCK_T)
        at = parts + tiles.to(tl.int64)[:, None] * N + rows[None, :]  # [BLOCK_T, BLOCK_N]
        inside = (tiles < tiles_v)[:, None] & here[None, :]
        m = tl.load(at, mask=inside, other=LOWEST)
        s = tl.load(at + plane, mask=inside, other=0.0)
        s = tl.where(m > LOWEST, s, 0.0)  # where all tokens of a tile are banned, its sum is of LOWEST - LOWEST
        d = tl.load(at + plane + plane, mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(m, 0))
        shrink = tl.exp2((top - new) * t * LOG2E)
        factor = tl.exp2((m - new[None, :]) * t[None, :] * LOG2E)
        weighted = shrink * (weighted + (top - new) * total) + tl.sum(factor * (d + (m - new[None, :]) * s), 0)
        total = shrink * total + tl.sum(factor * s, 0)
        top = new
    log_total = tl.where(top > LOWEST, tl.log(total), float("nan"))  # no distribution if every token is banned
    label = tl.load(label_logit + rows, mask=here, other=0.0)
    label = tl.where(label > LOWEST, label, float("-inf"))
    tl.store(logp + rows, (label - top) * t - log_total, mask=here)
    tl.store(entropy + rows, log_total - t * weighted / total, mask=here)
    tl.store(lse + rows, top * t + log_total, mask=here)


def product_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, scale: Tensor, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logp, entropy, lse), each fp32 [N], for N of 1 or more.

    hidden [N, H] and weight [V, H] have one dtype and unit stride in H; labels int64 [N] in [0, V); scale fp32 [N]:
    1 / temperature.
    """
    (rows, size), vocabulary = hidden.shape, weight.shape[0]
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    tile = tile or tile_for(hidden, weight)
    block_v = tile.block_v if bias is None else tile.bias_block_v or tile.block_v
    tiles_n, tiles_v = triton.cdiv(rows, tile.block_n), triton.cdiv(vocabulary, block_v)
    parts = hidden.new_empty((3, tiles_v, rows), dtype=torch.float32)
    label_logit, logp, entropy, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(4))
    shared = (
        weight if bias is None else bias,
        labels,
        scale,
        parts,
        label_logit,
        rows,
        vocabulary,
        size,
        tiles_v * rows,
    )
    options = {
        "BLOCK_N": tile.block_n,
        "BLOCK_V": block_v,
        "BLOCK_H": tile.block_h,
        "GROUP_N": tile.group_n,
        "HAS_BIAS": bias is not None,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if tile.descriptors:
        grid = min(tiles_n * tiles_v, tile.programs * _processors(hidden.device))
        product_descriptors[(grid,)](
            TensorDescriptor.from_tensor(hidden, [tile.block_n, tile.block_h]),
            TensorDescriptor.from_tensor(weight, [block_v, tile.block_h]),
            *shared,
            **options,
            FLATTEN=tile.flatten,
            EARLY=tile.early,
        )
    else:
        product_pointers[(tiles_n * tiles_v,)](hidden, weight, *shared, hidden.stride(0), weight.stride(0), **options)
    merge_tiles[(triton.cdiv(rows, MERGE_ROWS),)](
        parts,
        label_logit,
        scale,
        logp,
        entropy,
        lse,
        rows,
        tiles_v,
        tiles_v * rows,
        BLOCK_N=MERGE_ROWS,
        BLOCK_T=MERGE_TILES,
    )
    return logp, entropy, lse


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
