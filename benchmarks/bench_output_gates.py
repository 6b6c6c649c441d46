"""sigmoid_mul and gated_rms_norm: what Qwen3.5 multiplies its attentions' outputs with in a decode step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from videor1_kernels import gated_rms_norm, sigmoid_mul
from videor1_kernels.output_gates import reference

OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "sigmoid_mul": (sigmoid_mul, reference.sigmoid_mul),
    "gated_rms_norm": (gated_rms_norm, lambda x, gate, weight: reference.gated_rms_norm(x, gate, weight, 1e-6)),
}


def cases(device: torch.device) -> list[Case]:
    if device.type != "cuda":
        return [_case(op, "tiny", rows, (4, 64), torch.float32) for op in OPERATIONS for rows in (12, 48)]
    sizes = {"sigmoid_mul": (16, 256), "gated_rms_norm": (32, 128)}
    return [_case(op, "Qwen3.5-9B", rows, sizes[op], torch.bfloat16) for op in OPERATIONS for rows in (12, 192)]


def _case(op: str, model: str, rows: int, heads: tuple[int, int], dtype: torch.dtype) -> Case:
    call, plain = OPERATIONS[op]
    return Case(
        op=op,
        title="in a layer of a decode step",
        size={"model": model, "R": rows, "heads": heads[0], "D": heads[1], "dtype": str(dtype).removeprefix("torch.")},
        dtype=dtype,
        inputs=functools.partial(_inputs, op, rows, heads, dtype),
        # The reference in fp64; the error is relative to the norm.
        expected=lambda xs: [Expected("out", "out", plain(*(x.double() for x in xs)).flatten(0, -2), gradient=True)],
        work=lambda xs: Work(0.0, xs[0].nbytes + sum(x.nbytes for x in xs), ""),
        contenders=(
            Contender(OURS, lambda xs: _step(call, xs), graph=True),
            Contender("torch (our reference)", lambda xs: _step(plain, xs), graph=True),
            Contender("torch.compile of our reference", lambda xs: _step(torch.compile(plain), xs), graph=True),
        ),
    )


def _inputs(op: str, rows: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(rows, *heads), (rows, *heads), heads[1:]]
    made = [torch.randn(*size, generator=generator, device=device).to(dtype) for size in sizes]
    return [x.flatten(1) for x in made[:2]] if op == "sigmoid_mul" else made


def _step(call: Callable[..., Tensor], inputs: list[Tensor]) -> Step:
    def step() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"out": call(*inputs)}

    return step


def test_output_gates(run_case):
    run_case()
