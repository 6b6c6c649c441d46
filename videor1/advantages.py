"""From the answers of a batch of groups to rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from videor1.config import TrainConfig
from videor1.rewards import score
from videor1.types import Completion, Group, Sample
from videor1_kernels import Advantages, tgrpo_advantages


@dataclass(frozen=True)
class Scored:
    """Rewards of P groups of G ordered completions. Values as in ``videor1_kernels.Advantages``."""

    accuracy: Tensor  # [P, G]
    format: Tensor  # [P, G], custom rewards included
    lengths: Tensor  # int64 [P, G], tokens
    shuffled_accuracy: Tensor  # [P, Gs]; a row of NaN: no shuffled branch; Gs is 0 without any
    result: Advantages


def score_groups(groups: Sequence[Group], config: TrainConfig) -> Scored:
    """Accuracy and format rewards of every answer, then T-GRPO's advantages of the ordered ones."""
    accuracy, form = _score([g.ordered for g in groups], groups, config)
    width = max(len(g.shuffled) for g in groups)
    shuffled = torch.full((len(groups), width), torch.nan)
    for row, group in zip(shuffled, groups, strict=True):
        if group.shuffled:
            row[: len(group.shuffled)] = _score([group.shuffled], [group], config)[0][0]
    lengths = torch.tensor([[len(c.token_ids) for c in g.ordered] for g in groups])
    reward, temporal = config.reward, config.temporal
    result = tgrpo_advantages(
        accuracy,
        form,
        lengths,
        shuffled if width else None,
        rule=temporal.rule,
        alpha=temporal.alpha,
        mu=temporal.mu,
        apply=config.temporal_apply,
        correct_above=reward.correct_above,
        length_bonus=reward.length_bonus if config.len_control else 0.0,
        length_range=reward.length_range,
        normalize=config.normalize,
        eps=config.advantage_eps,
    )
    return Scored(accuracy, form, lengths, shuffled, result)


def _score(
    answers: Sequence[Sequence[Completion]], groups: Sequence[Group], config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """(accuracy, format), each [P, G]; custom reward functions see all texts in one call."""
    texts = [completion.text for answer in answers for completion in answer]
    samples: list[Sample] = [g.prompt.sample for g, answer in zip(groups, answers, strict=True) for _ in answer]
    accuracy, form = score(texts, samples, config.reward)
    shape = (len(groups), len(answers[0]))
    return torch.tensor(accuracy).reshape(shape), torch.tensor(form).reshape(shape)
