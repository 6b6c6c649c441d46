"""One optimizer step of the trainer, phase by phase, on whatever tensors the model is made of: fake ones for a plan,
real ones to check a plan. The passes are the trainer's own; the batch is made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from videor1.config import TrainConfig
from videor1.model import VideoLM
from videor1.model.features import prompt_features
from videor1.plan.setup import Work
from videor1.training.passes import completion_logp, tgrpo_loss

# (prompts' ordered features, their shuffled ones) -> the answers are there
Answer = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


@dataclass(frozen=True)
class TrainingStep:
    """What an optimizer step needs."""

    config: TrainConfig
    model: VideoLM
    frozen: VideoLM | None
    optimizer: torch.optim.Optimizer
    work: Work
    answer: Answer  # the engine


def first_update(step: TrainingStep) -> None:
    """Makes the optimizer's states, as the first update of a run does; afterwards a run is in its steady state."""
    for parameter in step.model.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)


def run_step(step: TrainingStep, phase: Callable[[str], AbstractContextManager[None]]) -> None:
    """The phases of a step in the steady state, each inside ``phase(name)``: rollout (of the local engine), reference
    (where there is a KL term), policy (one forward and backward pass, two where a step has several), optimizer."""
    config, model, row = step.config, step.model, step.work.row
    local = config.rollout.engine == "local"
    ordered: list[Tensor] = []
    if local:
        with phase("rollout"):
            ordered = _rollout(step)
    trained = any(p.requires_grad for p in model.visual.parameters())
    features = [ordered[i] for i in step.work.row_groups] if local and not trained else None
    ref_logp: Tensor | None = None
    if config.beta:
        with phase("reference"), model.as_reference(step.frozen) as reference:
            ref_logp = completion_logp(
                reference, row, temperature=config.temperature, features=features, backend=config.kernels
            )
    advantages = torch.ones(len(row.layout.cu_completions) - 1, device=model.device)
    with phase("policy"):
        for _ in range(min(2, step.work.rows)):  # from the second on the gradients are there before the pass
            result = tgrpo_loss(
                model, row, advantages, config, num_tokens=step.work.batch_tokens, ref_logp=ref_logp, features=features,
            )  # fmt: skip
            result.loss.backward()
    for parameter in model.trainable().values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    with phase("optimizer"):
        step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)


def _rollout(step: TrainingStep) -> list[Tensor]:
    config, model, prompts = step.config, step.model, step.work.prompts
    with model.inference():
        ordered = [f for f in prompt_features(model, prompts) if f is not None]
        shuffled: list[Tensor] = []
        if config.num_shuffled and config.temporal.shuffle_unit == "frame":
            shuffled = [f for f in prompt_features(model, prompts) if f is not None]
        elif config.num_shuffled:
            shuffled = [features.clone() for features in ordered]
    step.answer(ordered, shuffled)
    return ordered


@contextmanager
def no_phase(name: str) -> Iterator[None]:
    """For a step that is not watched."""
    yield
