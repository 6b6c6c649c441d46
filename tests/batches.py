"""A trainer opened up: its batch's parts one by one, and the gradient that a step sees."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from videor1.rollout import Rollout
from videor1.training.distributed import ranks
from videor1.training.tgrpo import Trainer
from videor1.types import Completion, Group, Prompt


@contextmanager
def opened(run: Any, count: int) -> Iterator[list[Any]]:
    """Keep a trainer's run open, so that its parts can be called one by one; gives the first records of its source."""
    with run._open():
        yield run.source.take(count)


def groups_of(run: Trainer, prompts: Sequence[Prompt]) -> list[Group]:
    return [group for group in run.rollout(prompts)[0].groups if group is not None]


def cut_unequally(groups: list[Group]) -> list[Group]:
    lengths = itertools.count(1)

    def cut(completion: Completion) -> Completion:
        length = min(next(lengths), len(completion.token_ids))
        ids, logp = completion.token_ids[:length], completion.logp[:length]
        return dataclasses.replace(completion, token_ids=ids, logp=logp)

    return [dataclasses.replace(group, ordered=tuple(map(cut, group.ordered))) for group in groups]


def gradients(
    run: Trainer, prompts: list[Prompt], groups: list[Group], batch: int, max_tokens_per_row: int | None = None
) -> dict[str, Tensor]:
    """The gradient that an optimizer step sees when the groups come in micro-batches of ``batch``."""
    config = run.config
    config.max_tokens_per_row = max_tokens_per_row
    config.per_device_train_batch_size = batch
    config.gradient_accumulation_steps = len(groups) // batch
    captured: dict[str, Tensor] = {}

    def capture(_: Any, parameters: dict[str, Any], *__: Any) -> tuple[float, bool]:
        captured.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
        for parameter in parameters.values():
            parameter.grad = None
        return 1.0, True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "guarded_step", capture)
        patch.setattr(run.source, "take", lambda count: prompts[:count])
        patch.setattr(run, "rollout", lambda _: (Rollout(list(groups)), [None] * len(groups)))
        run.train_batch()
    return captured
