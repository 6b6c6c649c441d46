"""Run one optimizer step of the trainer phase by phase: on fake tensors for a plan, on real tensors to check a plan.

The passes are the trainer's own, and the batch is artificial.
"""

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

# Generates the completions of all prompts, from (their features in order, their shuffled features).
Generate = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


@dataclass(frozen=True)
class TrainingStep:
    """The objects that an optimizer step needs."""

    config: TrainConfig
    model: VideoLM
    frozen: VideoLM | None  # the reference model, where it is a model of its own
    optimizer: torch.optim.Optimizer
    work: Work
    answer: Generate  # the rollout engine


def first_update(step: TrainingStep) -> None:
    """Create the optimizer's states, as the first update of a run does. The run is then in its steady state."""
    for parameter in step.model.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)


def run_step(step: TrainingStep, phase: Callable[[str], AbstractContextManager[None]]) -> None:
    """Run the phases of a step in the steady state, each inside the context ``phase(name)``.

    The phases are ``rollout`` (of the local engine), ``reference`` (if there is a KL term), ``policy`` (one forward and
    backward pass, or two if a step has several) and ``optimizer``.
    """
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
        for _ in range(min(2, step.work.rows)):  # From the second pass on, gradients are allocated before the pass.
            result = tgrpo_loss(
                model, row, advantages, config, num_tokens=step.work.batch_tokens, ref_logp=ref_logp, features=features
            )
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
    """A context for ``run_step`` that records nothing."""
    yield
