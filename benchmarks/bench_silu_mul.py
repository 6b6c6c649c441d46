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
    return [_case("Qwen2.5-VL-7B", rows, 18944, torch.bfloat16, rank) for rank in (0, 64) for rows in (12, 192)]


def _case(model: str, rows: int, width: int, dtype: torch.dtype, rank: int = 0) -> Case:
    """With ``rank``, LoRA adapters of gate and up are added first."""
    size = {"model": model, "R": rows, "I": width, "dtype": str(dtype).removeprefix("torch.")}
    return Case(
        op="silu_mul",
        title="in a layer of a decode step" + (", with LoRA" if rank else ""),
        size=size | ({"rank": rank} if rank else {}),
        dtype=dtype,
        inputs=functools.partial(_inputs, rows, width, dtype, rank),
        # The reference in fp64; the error is relative to the norm.
        expected=lambda xs: [Expected("out", "out", reference(*(x.double() for x in xs)), gradient=True)],
        work=lambda xs: Work(0.0, 1.5 * xs[0].nbytes + sum(x.nbytes for x in xs[1:]), ""),
        contenders=(
            Contender(OURS, lambda xs: _step(silu_mul, xs), graph=True),
            Contender("torch (our reference)", lambda xs: _step(reference, xs), graph=True),
            Contender("torch.compile of our reference", lambda xs: _step(torch.compile(reference), xs), graph=True),
        ),
    )


def _inputs(rows: int, width: int, dtype: torch.dtype, rank: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(rows, 2 * width), *([(rows, 2 * rank), (2 * width, rank)] if rank else [])]
    return [torch.randn(*size, generator=generator, device=device).to(dtype) for size in sizes]


def _step(call: Callable[..., Tensor], inputs: list[Tensor]) -> Step:
    def step() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"out": call(*inputs)}

    return step


def test_silu_mul(run_case):
    run_case()
