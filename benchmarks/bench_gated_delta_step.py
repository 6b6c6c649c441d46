"""gated_delta_step and causal_conv_step: what a linear layer of a decode step does between its products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from videor1_kernels import causal_conv_step, gated_delta_step


@dataclass(frozen=True)
class StepInputs:
    """The tensors of a call by name; ``state``, which the call changes, as it was before."""

    tensors: Mapping[str, Tensor]
    state: Tensor

    def double(self) -> StepInputs:
        return StepInputs({name: x.double() for name, x in self.tensors.items()}, self.state.double())


Call = Callable[..., Tensor]


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        sizes = [("Qwen3.5, 32 heads", rows, (16, 32), 128, torch.bfloat16) for rows in (12, 192)]
    else:
        sizes = [("small", 12, (2, 4), 32, torch.float32), ("small", 12, (2, 4), 32, torch.bfloat16)]
    made = (("gated_delta_step", _delta_inputs, gated_delta_step), ("causal_conv_step", _conv_inputs, _conv))
    return [_case(op, *size, inputs, call) for size in sizes for op, inputs, call in made]


def _conv(**tensors: Tensor) -> Tensor:
    backend = tensors.pop("backend", "auto")
    return causal_conv_step(**tensors, activation="silu", backend=backend)  # type: ignore[arg-type]


def _case(
    op: str,
    model: str,
    rows: int,
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    inputs: Callable[..., StepInputs],
    call: Call,
) -> Case:
    reference = functools.partial(call, backend="reference")
    return Case(
        op=op,
        title="in a layer of a decode step",
        size={"model": model, "R": rows, "Hk": heads[0], "Hv": heads[1], "D": dim, "dtype": str(dtype)[6:]},
        dtype=dtype,
        inputs=functools.partial(inputs, rows, heads, dim, dtype),
        expected=functools.partial(_expected, reference),
        # The state is read and written.
        work=lambda x: Work(0.0, float(2 * x.state.nbytes + sum(t.nbytes for t in x.tensors.values())), ""),
        contenders=(
            Contender(OURS, lambda x: _step(call, x), graph=True),
            Contender("torch (our reference)", lambda x: _step(reference, x), graph=True),
        ),
    )


def _delta_inputs(rows: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, device: torch.device) -> StepInputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tokens = {name: normal(rows, n, dim).to(dtype) for name, n in (("q", heads[0]), ("k", heads[0]), ("v", heads[1]))}
    gates = {"g": -normal(rows, heads[1]).abs(), "beta": normal(rows, heads[1]).sigmoid().to(dtype)}
    return StepInputs(tokens | gates, normal(rows, heads[1], dim, dim))


def _conv_inputs(rows: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, device: torch.device) -> StepInputs:
    generator = torch.Generator(device).manual_seed(0)
    channels = (2 * heads[0] + heads[1]) * dim
    x, weight, state = (
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in ((rows, channels), (channels, 4), (rows, channels, 3))
    )
    return StepInputs({"x": x, "weight": weight}, state)


def _step(call: Call, inputs: StepInputs) -> Step:
    """The state goes on from call to call, as in a rollout; the first call is the one that is compared."""
    state = inputs.state.clone()

    def step() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"out": call(**inputs.tensors, state=state)}

    return step


def _expected(reference: Call, inputs: StepInputs) -> list[Expected]:
    exact = inputs.double()
    with torch.no_grad():
        out = reference(**exact.tensors, state=exact.state)
    return [Expected("out", "out", out.flatten(0, -2), gradient=True)]


def test_gated_delta_step(run_case):
    run_case()
