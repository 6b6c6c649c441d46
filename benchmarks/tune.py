"""Sweep what the kernels leave open on one card: ``python -m benchmarks.tune``. Prints one table last.

Each sweep is gated by its first variant's result: the tiles of the fused log-prob forward (and the way without it:
cuBLAS logits by chunks and a row kernel), the rows of a chunk of linear_grpo_loss, the block and warps of the row
kernels, and the blocks of the three attention kernels. The winners go into ``WAYS`` (linear_logprob/triton.py),
``TILES`` (triton_forward.py), ``MIN_CHUNK_ROWS`` (products.py), ``BLOCK`` and ``NUM_WARPS`` (triton_rows.py), and
``BLOCKS`` (prefix_attention/triton.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_linear_grpo_loss import call as call_loss
from benchmarks.bench_prefix_attention import AttentionInputs
from benchmarks.bench_prefix_attention import cases as attention_cases
from benchmarks.measure import Clock, ceilings, l2_flush, plain_stopwatch
from benchmarks.options import default_device
from benchmarks.shapes import HeadInputs, Size, head_inputs, qwen_7b
from videor1_kernels.linear_logprob import products, triton_forward, triton_rows
from videor1_kernels.linear_logprob import triton as head
from videor1_kernels.linear_logprob.triton_forward import Tile, product_statistics
from videor1_kernels.prefix_attention import triton as attention
from videor1_kernels.prefix_attention.triton import Block, Blocks

Variant = tuple[str, Callable[[], Tensor]]
HALF_SHARED_MEMORY = 113 << 10  # bytes of a Hopper's or Blackwell's multiprocessor for each of two programs
TOLERANCE = 2e-3  # between variants: the order of fp32 sums only


def tiles(capability: int) -> Iterator[Tile]:
    """Tiles worth a try; a smaller accumulator leaves registers, or room for a second program, a larger reads less."""
    descriptors = capability >= 9
    for (n, v, warps), stages, group in itertools.product(
        [(128, 256, 8), (128, 128, 4), (128, 128, 8), (256, 128, 8), (64, 256, 4)], (3, 4), (8, 16)
    ):
        tile = Tile(n, v, 64, warps, stages, group, descriptors=descriptors, early=capability == 9)
        yield tile
        if descriptors and warps == 4 and stages * (n + v) * 128 <= HALF_SHARED_MEMORY:
            yield replace(tile, programs=2)
        if capability == 10:  # on Hopper it puts a wait behind every matrix instruction
            yield replace(tile, flatten=True)


def forward_variants(inputs: HeadInputs) -> Iterator[Variant]:
    hidden, weight, labels = inputs.hidden.detach(), inputs.weight.detach(), inputs.labels
    scale = torch.ones(len(labels), device=hidden.device)
    operands = hidden, weight, labels, None, scale
    capability = torch.cuda.get_device_capability(hidden.device)[0] if hidden.is_cuda else 0

    def fused(tile: Tile) -> Callable[[], Tensor]:
        return lambda: product_statistics(hidden, weight, labels, None, scale, tile)[0]

    yield "forward: as shipped", lambda: head.statistics(*operands)[0]
    yield "forward: torch.mm by chunks, row kernel", lambda: head.statistics(*operands, way="chunks")[0]
    if capability == 9:
        from benchmarks import gluon_forward  # whose API is another in some of the supported versions of Triton

        yield "forward: Gluon, two groups in turns", lambda: gluon_forward.statistics(hidden, weight, labels, scale)[0]
    for tile in tiles(capability):
        yield f"forward: {tile}", fused(tile)


def loss_variants(inputs: HeadInputs, rows: Sequence[int]) -> Iterator[Variant]:
    def with_rows(count: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            before = products.MIN_CHUNK_ROWS, products.CHUNK_BYTES
            products.MIN_CHUNK_ROWS, products.CHUNK_BYTES = count, 0
            try:
                return _loss(inputs)
            finally:
                products.MIN_CHUNK_ROWS, products.CHUNK_BYTES = before

        return call

    yield "loss: as shipped", lambda: _loss(inputs)
    for count in rows:
        yield f"loss: chunks of {count} rows", with_rows(count)


def row_variants(inputs: HeadInputs) -> Iterator[Variant]:
    def with_block(block: int, warps: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            before = triton_rows.BLOCK, triton_rows.NUM_WARPS
            triton_rows.BLOCK, triton_rows.NUM_WARPS = block, warps
            try:
                return _loss(inputs)
            finally:
                triton_rows.BLOCK, triton_rows.NUM_WARPS = before

        return call

    for block, warps in itertools.product((2048, 4096, 8192, 16384), (4, 8, 16)):
        if block // (32 * warps) >= 8:
            yield f"row kernels: block {block}, {warps} warps", with_block(block, warps)


def attention_variants(inputs: AttentionInputs) -> Iterator[Variant]:
    """One kernel's block changed at a time; the result is the output and the three gradients, scaled by their norms."""
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    shipped = attention.blocks_for(q)

    def run(blocks: Blocks) -> Callable[[], Tensor]:
        def call() -> Tensor:
            out, lse = attention.forward(q, k, v, inputs.layout, 0.1, blocks)
            results = (out, *attention.backward(inputs.grad, q, k, v, out, lse, inputs.layout, 0.1, blocks))
            return torch.stack([x.float().norm() / inputs.grad.float().norm() for x in results])

        return call

    yield "attention: as shipped", run(shipped)
    for kernel in ("forward", "query_gradient", "key_gradients"):
        wide, narrow = (64, 128), (32, 64, 128)
        for m, n in itertools.product(*((narrow, wide) if kernel == "key_gradients" else (wide, narrow))):
            for warps, stages in itertools.product((4, 8), (2, 3)):
                block = Block(m, n, warps, stages)
                yield f"attention: {kernel} {block}", run(replace(shipped, **{kernel: block}))


def _loss(inputs: HeadInputs) -> Tensor:
    result = call_loss(inputs, "triton")
    result.loss.backward()
    inputs.hidden.grad = inputs.weight.grad = None
    return result.logp


def sweep(variants: Iterator[Variant], flops: float, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Gate and time each variant; one that does not compile, or is wrong, is a row that says so."""
    clock, flush = Clock(device), l2_flush(device)
    first: Tensor | None = None
    rows = []
    for name, call in variants:
        row: dict[str, Any] = {"variant": name}
        try:
            found = call().detach().clone()
            first = found if first is None else first
            row["apart"] = float((found - first).abs().max())
            if not row["apart"] <= TOLERANCE:
                raise AssertionError(f"{row['apart']:.3g} away from the first variant")
            call()
            seconds = plain_stopwatch(clock)(lambda call=call: _discard(call()), flush, rounds)  # type: ignore[misc]
            row["ms"] = statistics.median(seconds) * 1e3
            row["tflops"] = flops / row["ms"] / 1e9
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
        rows.append(row)
        print(_line(row, None), flush=True)
    return rows


def _line(row: dict[str, Any], ceiling: float | None) -> str:
    if "failed" in row:
        return f"| {row['variant']} | {row['failed']} | | |"
    share = "" if ceiling is None else f"{100 * row['tflops'] / ceiling:.1f}"
    return f"| {row['variant']} | {row['ms']:.3f} | {row['tflops']:.1f} | {share} |"


def _discard(value: object) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=default_device(), help="cuda where there is one")
    parser.add_argument("--tokens", type=int, nargs=2, default=(8192, 16384), help="N of the forward and of the loss")
    parser.add_argument("--rows", type=int, nargs="+", default=(2048, 4096, 4608, 8192), help="of a chunk of the loss")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write tune.json into this folder")
    options = parser.parse_args(arguments)
    if options.device.type != "cuda":
        parser.error(f"expected a CUDA device: there is nothing to tune on {options.device}")
    sizes: list[Size] = [qwen_7b(count) for count in options.tokens]
    flops = [2.0 * s.tokens * s.hidden * s.vocab for s in sizes]
    inputs = head_inputs(sizes[0], options.device)
    rows = sweep(forward_variants(inputs), flops[0], options.device, options.rounds)
    inputs = head_inputs(sizes[1], options.device)
    for variants in (loss_variants(inputs, options.rows), row_variants(inputs)):
        rows += sweep(variants, 3 * flops[1], options.device, options.rounds)
    case = next(case for case in attention_cases(options.device) if case.title == "forward + backward")
    packed = case.inputs(options.device)
    rows += sweep(attention_variants(packed), case.work(packed).flops, options.device, options.rounds)
    ceiling = ceilings(options.device)
    if options.out is not None:
        shipped = {capability: asdict(tile) for capability, tile in triton_forward.TILES.items()}
        found = {"ceilings": ceiling.to_json(), "shipped": shipped, "rows": rows}
        (options.out / "tune.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n| variant | ms | TF/s | % of torch.mm |\n|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row.get("ms", float("inf"))):
        print(_line(row, ceiling.gemm_tflops))
    return 0


if __name__ == "__main__":
    sys.exit(main())
