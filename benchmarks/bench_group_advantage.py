"""tgrpo_advantages: rewards and advantages of all prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from videor1_kernels import Advantages, tgrpo_advantages
from videor1_kernels.group_advantage.reference import AdvantageOptions
from videor1_kernels.group_advantage.reference import tgrpo_advantages as reference

G, SHUFFLED = 8, 4
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
OPTIONS = AdvantageOptions("margin", 0.3, 0.8, 0.1, 0.2, (320, 512), "std", 1e-4, "reward")
OUTPUTS = [field.name for field in dataclasses.fields(Advantages)]


def cases(device: torch.device) -> list[Case]:
    prompts = 4096

    def inputs(device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        accuracy, form = uniform(prompts, G).round(), uniform(prompts, G).round()
        lengths = uniform(prompts, G).mul(700).long()
        return accuracy, form, lengths, uniform(prompts, SHUFFLED).round()

    return [
        Case(
            op="tgrpo_advantages",
            title="forward",
            size={"prompts": prompts, "completions": G, "shuffled": SHUFFLED, "dtype": "float32"},
            dtype=torch.float32,
            inputs=inputs,
            expected=_expected,
            work=lambda x: Work(0.0, sum(t.nbytes for t in x) + 2 * x[0].nbytes + 3 * x[0].nbytes // G, ""),
            contenders=(
                Contender(OURS, _ours),
                Contender("torch (our reference)", lambda x: _reference(reference, x)),
                *(_on_gpu if device.type == "cuda" else ()),
            ),
        )
    ]


def _ours(inputs: Inputs) -> Step:
    def step() -> Mapping[str, Tensor]:
        out = tgrpo_advantages(*inputs)
        return {name: getattr(out, name) for name in OUTPUTS}

    return step


def _reference(call: Callable[..., tuple[Tensor, ...]], inputs: Inputs) -> Step:
    return lambda: dict(zip(OUTPUTS, call(*inputs, OPTIONS), strict=True))


_on_gpu = (
    Contender(f"{OURS} in a CUDA graph", _ours, graph=True),
    Contender("torch.compile of our reference", lambda x: _reference(torch.compile(reference), x)),
)


def _expected(inputs: Inputs) -> list[Expected]:
    accuracy, form, lengths, shuffled = inputs
    values = reference(accuracy.double(), form.double(), lengths, shuffled.double(), OPTIONS)
    # Rewards that differ by rounding alone are equal: 1e-5 of an advantage is what fp32 can differ by.
    return [Expected(name, name, value, bound=1e-5) for name, value in zip(OUTPUTS, values, strict=True)]


def test_group_advantage(run_case):
    run_case()
