"""add_rms_norm: the addition and the norm before a product of a decode step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from videor1_kernels import add_rms_norm, dispatch
from videor1_kernels.add_rms_norm.reference import add_rms_norm as reference

EPS = 1e-6
Inputs = tuple[Tensor, Tensor, Tensor]  # x [R, H], weight [H], residual [R, H]
Call = Callable[..., tuple[Tensor, Tensor]]


def cases(device: torch.device) -> list[Case]:
    if device.type != "cuda":  # the demonstration's model
        return [_case("demo", 12, 128, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return [_case("Qwen2.5-VL-7B", rows, 3584, torch.bfloat16) for rows in (12, 192)]


def _case(model: str, rows: int, width: int, dtype: torch.dtype) -> Case:
    return Case(
        op="add_rms_norm",
        title="before a layer of a decode step",
        size={"model": model, "R": rows, "H": width, "dtype": str(dtype).removeprefix("torch.")},
        dtype=dtype,
        inputs=functools.partial(_inputs, rows, width, dtype),
        expected=_expected,
        work=lambda x: Work(0.0, 2 * (x[0].nbytes + x[2].nbytes) + x[1].nbytes, ""),
        contenders=(
            Contender(OURS, lambda x: _step(_ours, x), graph=True),
            Contender(f"{OURS}, without its checks", _unchecked, graph=True),
            Contender("torch (our reference)", lambda x: _step(reference, x), graph=True),
            Contender("torch.rms_norm of a sum", lambda x: _step(_fused, x), graph=True),
            Contender("torch.compile of our reference", lambda x: _step(torch.compile(reference), x), graph=True),
        ),
    )


def _inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((rows, width), (width,), (rows, width))
    x, weight, residual = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
    return x, weight, residual


def _ours(x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, weight, residual=residual, eps=eps)


def _unchecked(inputs: Inputs) -> Step:
    """As a decoder calls it, whose shapes are the same in every layer and step."""
    call = dispatch.resolve("add_rms_norm", "auto", inputs[0].device, inputs[0].dtype).add_rms_norm
    return _step(call, inputs)


def _fused(x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return torch.rms_norm(summed, summed.shape[-1:], weight, eps), summed


def _step(call: Call, inputs: Inputs) -> Step:
    def step() -> Mapping[str, Any]:
        with torch.no_grad():
            return dict(zip(("normed", "summed"), call(*inputs, EPS), strict=True))

    return step


def _expected(inputs: Inputs) -> list[Expected]:
    """The reference in fp64; errors are relative to the norm."""
    values = reference(*(x.double() for x in inputs), EPS)
    return [Expected(n, n, value, gradient=True) for n, value in zip(("normed", "summed"), values, strict=True)]


def test_add_rms_norm(run_case):
    run_case()
