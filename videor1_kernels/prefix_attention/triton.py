"""prefix_attention on Triton kernels, for 16-bit inputs: which kernels are launched, with which block sizes.

In fp32 at D = 128 a program's registers cannot hold what these kernels keep in them, neither in full precision nor in
tf32x3, with blocks down to 16 keys. The large products of the reference are better there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from videor1_kernels.dispatch import nearest_capability
from videor1_kernels.prefix_attention.layout import PrefixLayout
from videor1_kernels.prefix_attention.triton_backward import (
    prefix_key_gradients,
    prefix_query_gradient,
    prefix_sum_parts,
)
from videor1_kernels.prefix_attention.triton_forward import prefix_forward
from videor1_kernels.prefix_attention.work import key_items, query_tiles

SUM_ROWS = 32
NARROW = 128  # the largest head dim of BLOCKS


@dataclass(frozen=True)
class Block:
    """The queries and keys of one step of a kernel, and the kernel's launch options."""

    m: int
    n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Blocks:
    """The blocks of the three kernels with matrix products, on one architecture."""

    forward: Block
    query_gradient: Block
    key_gradients: Block
    # Whether dk and dv are of a launch each: the scores are computed twice, the sums take half of the registers.
    apart: bool = field(default=False, kw_only=True)


# By compute capability; others take the nearest one below. Larger blocks spill registers at D = 128.
BLOCKS: dict[int, Blocks] = {
    80: Blocks(Block(128, 32, 8, 3), Block(128, 32, 8, 2), Block(32, 64, 8, 2)),
    86: Blocks(Block(128, 32, 8, 2), Block(128, 32, 8, 2), Block(32, 64, 8, 2)),
    89: Blocks(Block(128, 32, 8, 2), Block(128, 32, 8, 2), Block(32, 64, 8, 2)),
    90: Blocks(Block(128, 64, 8, 3), Block(128, 64, 8, 2), Block(32, 128, 8, 2)),
    100: Blocks(Block(128, 64, 8, 3), Block(128, 32, 8, 2), Block(32, 128, 8, 2)),
    120: Blocks(Block(128, 32, 8, 2), Block(128, 32, 8, 2), Block(32, 64, 8, 2)),
}
# Of a head dim above NARROW, up to 256: a program keeps twice as much of each query and key, and larger blocks spill. A
# product on Hopper and Blackwell has at least 64 rows: dk and dv of as many keys together spill too.
WIDE_BLOCKS: dict[int, Blocks] = {
    80: Blocks(Block(64, 32, 8, 3), Block(64, 32, 8, 2), Block(16, 64, 8, 2)),
    86: Blocks(Block(64, 32, 8, 2), Block(64, 16, 8, 2), Block(16, 64, 8, 2)),
    89: Blocks(Block(64, 32, 8, 2), Block(64, 16, 8, 2), Block(16, 64, 8, 2)),
    90: Blocks(Block(128, 32, 8, 3), Block(128, 32, 8, 2), Block(32, 128, 8, 2), apart=True),
    100: Blocks(Block(128, 32, 8, 3), Block(128, 32, 8, 2), Block(32, 128, 8, 2), apart=True),
    120: Blocks(Block(64, 32, 8, 2), Block(64, 16, 8, 2), Block(16, 64, 8, 2)),
}
INTERPRETED = Blocks(*[Block(64, 64, 4, 1)] * 3)  # the interpreter takes as long for a small block as for a large one


def blocks_for(q: Tensor) -> Blocks:
    """The configuration for q's device and head dim."""
    if q.device.type != "cuda":  # the interpreter
        return INTERPRETED
    known = WIDE_BLOCKS if q.shape[2] > NARROW else BLOCKS
    return known[nearest_capability(known, q.device)]


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """Return out [T, Hq, D] in q's dtype and lse fp32 [Hq, T], of q [T, Hq, D] and k, v [T, Hkv, D]."""
    width, blocks, (q, k, v) = q.shape[2], blocks or blocks_for(q), _operands(q, k, v)
    tokens, heads, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)
    block = blocks.forward
    tiles = query_tiles(layout, block.m)
    prefix_forward[len(tiles), heads](
        q, k, v, out, lse, tiles, *_strides(q, k, v), out.stride(0), tokens, scale, **_options(block, q, k)
    )
    return out[..., :width], lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PrefixLayout,
    scale: float,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of the gradient of ``out``, each in its input's dtype."""
    blocks, dtypes = blocks or blocks_for(q), (q.dtype, k.dtype, v.dtype)
    width = q.shape[2]
    q, k, v, grad, out = _operands(q, k, v, grad.to(out.dtype), out)
    tokens, heads, size = q.shape
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    block = blocks.query_gradient
    tiles = query_tiles(layout, block.m)
    shared = (q, k, v, grad, lse, delta)
    strides = _strides(q, k, v, grad)
    prefix_query_gradient[len(tiles), heads](
        *shared, out, dq, tiles, *strides, dq.stride(0), tokens, scale, **_options(block, q, k)
    )
    block = blocks.key_gradients
    items, sums, slots = key_items(layout, block.n)
    parts = q.new_empty((slots, 2, k.shape[1], block.n, size), dtype=torch.float32)
    arguments = (*shared, dk, dv, parts, items, *strides, dk.stride(0), tokens, scale)
    for of_keys, of_values in ((True, False), (False, True)) if blocks.apart else ((True, True),):
        prefix_key_gradients[len(items), k.shape[1]](
            *arguments, OF_KEYS=of_keys, OF_VALUES=of_values, **_options(block, q, k)
        )
    if len(sums):
        rows = min(SUM_ROWS, block.n)
        prefix_sum_parts[len(sums), k.shape[1], block.n // rows](
            parts, dk, dv, sums, dk.stride(0), D=size, BLOCK_N=block.n, BLOCK=rows, BLOCK_D=_columns(size)
        )
    dq, dk, dv = (x[..., :width].to(dtype) for x, dtype in zip((dq, dk, dv), dtypes, strict=True))
    return dq, dk, dv


def _operands(*inputs: Tensor) -> list[Tensor]:
    """The inputs in one dtype, aligned to 16 bytes, with D padded to a multiple of 16; views that are so stay views."""
    dtype = inputs[0].dtype if len({x.dtype for x in inputs}) == 1 else torch.float32
    padding = -inputs[0].shape[2] % 16
    operands = (F.pad(x.to(dtype), (0, padding)) if padding else x.to(dtype) for x in inputs)
    return [x if _aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in operands]


def _aligned(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.data_ptr() % 16 == x.stride(0) % 16 == x.stride(1) % 16 == 0


def _strides(*operands: Tensor) -> list[int]:
    return [stride for x in operands for stride in x.stride()[:2]]


def _options(block: Block, q: Tensor, k: Tensor) -> dict[str, object]:
    return {
        "D": q.shape[2],
        "REPEAT": q.shape[1] // k.shape[1],
        "BLOCK_M": block.m,
        "BLOCK_N": block.n,
        "BLOCK_D": _columns(q.shape[2]),
        "num_warps": block.num_warps,
        "num_stages": block.num_stages,
    }


def _columns(size: int) -> int:
    return triton.next_power_of_2(max(size, 16))
