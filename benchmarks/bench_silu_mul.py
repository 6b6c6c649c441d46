"""silu_mul: the gated activation between the products of a decode step's feed-forward layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from videor1_kernels import silu_mul
from videor1_kernels.silu_mul.reference import silu_mul as reference


def cases(device: torch.device) -> list[Case]:
    if device.type != "cuda":  # the demonstration's model
        return [_case("demo", 12, 384, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return [_case("Qwen2.5-VL-7B", rows, 18944, torch.bfloat16) for rows in (12, 192)]


def _case(model: str, rows: int, width: int, dtype: torch.dtype) -> Case:
    return Case(
        op="silu_mul",
        title="in a layer of a decode step",
        size={"model": model, "R": rows, "I": width, "dtype": str(dtype).removeprefix("torch.")},
        dtype=dtype,
        inputs=functools.partial(_inputs, rows, width, dtype),
        # The reference in fp64; the error is relative to the norm.
        expected=lambda x: [Expected("out", "out", reference(x.double()), gradient=True)],
        work=lambda x: Work(0.0, 1.5 * x.nbytes, ""),
        contenders=(
            Contender(OURS, lambda x: _step(silu_mul, x), graph=True),
            Contender("torch (our reference)", lambda x: _step(reference, x), graph=True),
            Contender("torch.compile of our reference", lambda x: _step(torch.compile(reference), x), graph=True),
        ),
    )


def _inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, 2 * width, generator=generator, device=device).to(dtype)


def _step(call: Callable[[Tensor], Tensor], gate_up: Tensor) -> Step:
    def step() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"out": call(gate_up)}

    return step


def test_silu_mul(run_case):
    run_case()
