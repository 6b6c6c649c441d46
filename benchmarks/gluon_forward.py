"""A variant of the fused log-prob forward on Hopper, in Gluon: ``python -m benchmarks.gluon_forward`` compiles it.

One warp loads tiles of hidden states and weights by TMA into a ring; two groups of four warps take tiles in turns.
While one multiplies, the other forms the statistics of the tile before, which in the shipped kernel nothing hides:
about 8% of its time by arithmetic. A tile has 128 x 128 logits, because a thread then holds 128 sums; 64 x 256 spills
registers. Per product it reads a third more from the L2 cache than the shipped kernel's tile of 128 x 256.

Nothing has run it: Gluon has no interpreter. ``benchmarks.tune`` measures it on a card and compares its results, and no
backend takes it. Its statistics are those of ``triton_forward.py``, whose kernel merges its partial results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from videor1_kernels.linear_logprob.triton_forward import MERGE_ROWS, MERGE_TILES, merge_tiles

LOG2E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-1e38)
LOAD = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # before Triton 3.9
BLOCK_N, BLOCK_V, BLOCK_H, STAGES, GROUP_N = 128, 128, 64, 6, 16
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


@gluon.jit
def _tile_at(tile, tiles_n, tiles_v, GROUP_N: gl.constexpr):
    group_size = GROUP_N * tiles_v
    group = tile // group_size
    first = group * GROUP_N
    size = gl.minimum(tiles_n - first, GROUP_N)
    return first + (tile % group_size) % size, (tile % group_size) // size


@gluon.jit
def _produce(
    hidden,
    weight,
    ring,
    tiles_n,
    tiles_v,
    H,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the tiles that this program has, in order, into the ring."""
    xs, ws, full, empty = ring
    step = 0
    for tile in range(gl.program_id(0), tiles_n * tiles_v, gl.num_programs(0)):
        tile_n, tile_v = _tile_at(tile, tiles_n, tiles_v, GROUP_N)
        for h in range(0, H, BLOCK_H):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES) & 1 ^ 1)
            mbarrier.expect(full.index(stage), hidden.block_type.nbytes + weight.block_type.nbytes)
            LOAD(hidden, [tile_n * BLOCK_N, h], full.index(stage), xs.index(stage))
            LOAD(weight, [tile_v * BLOCK_V, h], full.index(stage), ws.index(stage))
            step += 1


@gluon.jit
def _consume(
    which: gl.constexpr,
    ring,
    memory,
    numbers,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Every second tile of the program: its product, then its statistics, as ``_statistics`` of triton_forward.py."""
    xs, ws, full, empty = ring
    labels, scale, parts, label_logit = memory
    N, V, H, plane, tiles_n, tiles_v = numbers
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_V, 16]
    )
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    steps = (H + BLOCK_H - 1) // BLOCK_H
    step = which * steps
    first = gl.program_id(0) + which * gl.num_programs(0)
    for tile in range(first, tiles_n * tiles_v, 2 * gl.num_programs(0)):
        tile_n, tile_v = _tile_at(tile, tiles_n, tiles_v, GROUP_N)
        z = gl.zeros([BLOCK_N, BLOCK_V], gl.float32, LAYOUT)
        for k in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            z = warpgroup_mma(xs.index(stage), ws.index(stage).permute((1, 0)), z, is_async=True)
            z = warpgroup_mma_wait(num_outstanding=1, deps=(z,))
            if k > 0:  # the product before has been done with its stage
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            step += 1
        z = warpgroup_mma_wait(num_outstanding=0, deps=(z,))
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        step += steps  # of the other's tile
        rows = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, ROWS)
        columns = tile_v * BLOCK_V + gl.arange(0, BLOCK_V, COLUMNS)
        here = rows < N
        label = gl.load(labels + rows, mask=here, other=-1).to(gl.int32)
        t = gl.load(scale + rows, mask=here, other=0.0)
        if (tile_v + 1) * BLOCK_V > V:
            z = gl.where((columns < V)[None, :], z, LOWEST)
        mine = here & (label // BLOCK_V == tile_v) & (label >= 0)
        if gl.max(mine.to(gl.int32), 0) > 0:
            found = gl.sum(gl.where(columns[None, :] == label[:, None], z, 0.0), 1)
            gl.store(label_logit + rows, found, mask=mine)
        top = gl.max(z, 1)
        below = z - top[:, None]
        exps = gl.exp2(below * (t * LOG2E)[:, None])
        out = parts + tile_v.to(gl.int64) * N + rows
        gl.store(out, top, mask=here)
        gl.store(out + plane, gl.sum(exps, 1), mask=here)
        gl.store(out + plane + plane, gl.sum(exps * below, 1), mask=here)


@gluon.jit
def product_in_turns(
    hidden,
    weight,
    labels,
    scale,
    parts,
    label_logit,
    N,
    V,
    H,
    plane,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Statistics of the tiles, as ``product_descriptors`` of triton_forward.py stores them, without a bias."""
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    tiles_v = (V + BLOCK_V - 1) // BLOCK_V
    xs = gl.allocate_shared_memory(hidden.dtype, [STAGES, BLOCK_N, BLOCK_H], hidden.layout)
    ws = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_V, BLOCK_H], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    ring = (xs, ws, full, empty)
    memory = (labels, scale, parts, label_logit)
    numbers = (N, V, H, plane, tiles_n, tiles_v)
    gl.warp_specialize(
        [
            (_consume, (0, ring, memory, numbers, BLOCK_N, BLOCK_V, BLOCK_H, GROUP_N, STAGES)),
            (_consume, (1, ring, memory, numbers, BLOCK_N, BLOCK_V, BLOCK_H, GROUP_N, STAGES)),
            (_produce, (hidden, weight, ring, tiles_n, tiles_v, H, BLOCK_N, BLOCK_V, BLOCK_H, GROUP_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def statistics(hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logp, entropy, lse), each fp32 [N], of bf16 or fp16 hidden [N, H] and weight [V, H]; scale fp32 [N]."""
    (rows, _), vocabulary = hidden.shape, weight.shape[0]
    tiles_v = triton.cdiv(vocabulary, BLOCK_V)
    parts = hidden.new_empty((3, tiles_v, rows), dtype=torch.float32)
    label_logit, logp, entropy, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(4))
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    arguments, options = _launch(hidden, weight, labels, scale, parts, label_logit)
    product_in_turns[(processors,)](*arguments, **options)
    merge_tiles[(triton.cdiv(rows, MERGE_ROWS),)](
        *(parts, label_logit, scale, logp, entropy, lse, rows, tiles_v, tiles_v * rows),
        BLOCK_N=MERGE_ROWS,
        BLOCK_T=MERGE_TILES,
    )
    return logp, entropy, lse


def _launch(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, parts: Tensor, label_logit: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[hidden.dtype]
    described = (
        TensorDescriptor.from_tensor(x, [block, BLOCK_H], gl.NVMMASharedLayout.get_default_for([block, BLOCK_H], dtype))
        for x, block in ((hidden, BLOCK_N), (weight, BLOCK_V))
    )
    (rows, size), vocabulary = hidden.shape, weight.shape[0]
    plane = triton.cdiv(vocabulary, BLOCK_V) * rows
    options = {
        "BLOCK_N": BLOCK_N,
        "BLOCK_V": BLOCK_V,
        "BLOCK_H": BLOCK_H,
        "GROUP_N": GROUP_N,
        "STAGES": STAGES,
        "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "num_warps": 4,
    }
    return (*described, labels, scale, parts, label_logit, rows, vocabulary, size, plane), options


def compiled() -> dict[str, Any]:
    """What it compiles to for sm_90, at the 7B's shapes: registers, spills, and the instructions of its loops."""
    import re
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    from triton.runtime import driver

    from benchmarks import compiling, launches
    from benchmarks.sass import count_loops

    driver.set_active(compiling._Target(90))
    rows, vocabulary, size = launches.MODEL
    hidden, weight = (torch.empty(n, size, dtype=torch.bfloat16) for n in (rows, vocabulary))
    labels, scale = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    arguments, options = _launch(hidden, weight, labels, scale, scale, scale)
    kernel = product_in_turns.warmup(*arguments, **options, grid=(132,))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage, code = (compiling._inspect(cubin, option) for option in ("-res-usage", "-sass"))
    found = count_loops(code)
    assert found is not None
    return {
        "triton": triton.__version__,
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "shared memory": kernel.metadata.shared,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "loops": [asdict(loop) for loop in found.own],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.gluon_forward", description=__doc__).parse_args(arguments)
    print(json.dumps(compiled(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
