"""How the cost of a T-GRPO step grows with frames, tokens of a completion, completions and prompts: ours, and as the
reference code computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from benchmarks import bench_step
from benchmarks.cases import OUR_STEP, REFERENCE_STEP
from benchmarks.options import check_choice
from benchmarks.whole_inputs import Setting
from benchmarks.whole_step import StepCase

AXES: dict[str, tuple[int, ...]] = {
    "frames": (8, 16, 32, 64),
    "completion": (256, 512, 1024, 2048, 4096),
    "generations": (4, 8, 16, 32),
    "prompts": (1, 2, 4, 8, 16, 32),
}


def cases(
    device: torch.device,
    *,
    axis: Sequence[str] = tuple(AXES),
    most: int | None = None,
    shape: Sequence[str] = (),
    prompts: Sequence[int] = (1,),
    frames: int = 16,
    generations: int = 8,
    completion: int | None = None,
) -> list[StepCase]:
    """A case for each size of each axis, up to ``most``; the other arguments are the sizes where another axis grows."""
    for name in axis:
        check_choice("axis", name, AXES, "growth")
    for name, values in (("shape", shape), ("prompts", prompts)):
        if len(values) > 1:
            raise ValueError(f"{name}: growth takes one, got {', '.join(map(str, values))}")
    on_card = device.type == "cuda"
    model = shape[0] if shape else "7b" if on_card else "tiny"
    base = dataclasses.replace(
        bench_step.setting_of(model, prompts[0], device),
        frames=frames,
        generations=generations,
        completion=completion or (256 if on_card else 64),
    )
    return [point(name, value, base) for name in axis for value in AXES[name] if value <= (most or value)]


def point(axis: str, value: int, base: Setting) -> StepCase:
    """One step of each way. Only what has to get going makes a step before it: ours, with its decode workers."""
    case = bench_step.step(dataclasses.replace(base, **{axis: value}))
    contenders = [c for c in case.contenders if c.name in (OUR_STEP, REFERENCE_STEP)]
    return dataclasses.replace(
        case,
        op="growth",
        title=axis,
        contenders=contenders,
        rounds=3 if value * (base.prompts if axis == "completion" else base.completion) <= 1024 else 1,
        memory=base.bf16,  # on a CPU the profiler would hold millions of events
        cold=frozenset({REFERENCE_STEP}),
        slow=True,
    )


def test_growth(run_case):
    run_case()
