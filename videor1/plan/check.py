"""Compare a plan with a measurement: run the same passes on real tensors with random weights, on the present device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videor1.config import TrainConfig
from videor1.config.cli import parse
from videor1.model.load import pick_device
from videor1.plan.phases import TrainingStep, first_update, no_phase, run_step
from videor1.plan.plan import GIB, Plan, plan
from videor1.plan.setup import TEXT_TOKENS, Target, build_policy, make_work, shape_of
from videor1.rollout import Branch, LocalEngine, Request, SamplingOptions
from videor1.rollout.local.kv_cache import MIB
from videor1.seeding import derive_seed
from videor1.side_by_side import as_on_a_card
from videor1.training.optim import make_optimizer
from videor1_kernels.testing import PeakMemory

WITHIN = 0.1  # largest relative error of a plan that passes the check


@dataclass(frozen=True)
class Compared:
    """The bytes that a phase adds to those allocated before it, planned and measured."""

    phase: str
    planned: int
    measured: int

    @property
    def ratio(self) -> float:
        """Planned bytes divided by measured bytes."""
        return self.planned / max(1, self.measured)


def measured(
    config: TrainConfig, shape: Any, device: torch.device, *, text_tokens: int = TEXT_TOKENS
) -> tuple[dict[str, int], int]:
    """Measure a step with random weights on the prompts and completion lengths of the plan.

    A CPU makes the passes as a card does, which is what the plan is of.

    Args:
        config: the options of the run.
        shape: the model's configuration.
        device: the device to measure on.
        text_tokens: text tokens of a prompt.

    Returns:
        (bytes that each phase of a step adds to those allocated before it, peak of allocated bytes). The peak is 0 on a
        CPU.
    """
    target = Target(device.type == "cuda", config.bf16 if config.bf16 is not None else device.type == "cuda")
    torch.manual_seed(derive_seed(config.seed, "plan"))
    model = build_policy(shape, config, target, device)
    frozen = model.frozen_copy() if config.beta and not config.lora.rank else None
    work = make_work(config, model, lambda *size: torch.zeros(*size, dtype=torch.uint8), text_tokens)
    optimizer = make_optimizer(model.trainable(), config)
    options = SamplingOptions(config.max_completion_length, config.temperature, config.top_p, config.top_k)
    kv_mib = config.rollout.kv_mib
    engine = LocalEngine(
        model,
        options,
        max_rows=config.rollout_batch_size,
        kv_bytes=None if kv_mib is None else kv_mib * MIB,
        cuda_graphs=config.rollout.cuda_graphs,
        backend=config.kernels,
    )

    def answer(ordered: Sequence[Tensor], shuffled: Sequence[Tensor]) -> None:
        requests = []
        for i, prompt in enumerate(work.prompts):
            first = Branch(config.num_generations, ("ordered", i), ordered[i])
            other = Branch(config.num_shuffled, ("shuffled", i), shuffled[i]) if shuffled else None
            requests.append(Request(prompt, config.seed, first, other))
        engine.generate(requests)

    step = TrainingStep(config, model, frozen, optimizer, work, answer)
    with as_on_a_card():
        first_update(step)
        run_step(step, no_phase)  # The first step compiles kernels and allocates workspaces.
    found: dict[str, int] = {}
    most = 0

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        nonlocal most
        with PeakMemory(device) as memory:
            yield
        found[name] = memory.bytes
        if device.type == "cuda":
            most = max(most, torch.cuda.max_memory_allocated(device))

    with as_on_a_card():
        run_step(step, phase)
    return found, most


def compare(made: Plan, found: dict[str, int]) -> list[Compared]:
    """Compare a plan with the measured bytes of each phase."""
    return [Compared(phase.name, phase.beyond, found[phase.name]) for phase in made.phases]


def check_command(argv: Sequence[str]) -> int:
    """Print a plan beside a measurement, for ``python -m videor1.plan --check [options of videor1.train]``.

    Returns:
        The exit code: 0 if the planned peak is within 10% of the measured peak. On a CPU, where no peak is measured,
        the phase with the most measured memory is compared.
    """
    config = parse(
        TrainConfig, argv, prog="python -m videor1.plan --check", description="Compare a memory plan with a card."
    )
    device = pick_device(config.device)
    config.device = device.type
    shape = shape_of(config.model_name_or_path, config.demo)
    made = plan(config, shape)
    found, most = measured(config, shape, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{made.model}: {made.settings}; on {name}, torch {torch.__version__}")
    print("beyond what was there, GiB".ljust(28) + "planned".rjust(10) + "measured".rjust(10) + "ratio".rjust(8))
    rows = compare(made, found)
    for row in rows:
        print(row.phase.ljust(28) + f"{row.planned / GIB:10.4f}{row.measured / GIB:10.4f}{row.ratio:8.3f}")
    if most:
        print("allocated at the worst".ljust(28) + f"{made.peak / GIB:10.3f}{most / GIB:10.3f}{made.peak / most:8.3f}")
        return int(abs(made.peak - most) > WITHIN * most)
    worst = max(rows, key=lambda row: row.measured)
    return int(abs(worst.ratio - 1) > WITHIN)
