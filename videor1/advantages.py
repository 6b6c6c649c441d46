"""From the answers of a batch of groups to rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from videor1.config import TrainConfig
from videor1.rewards import accuracy_reward, score
from videor1.types import Group
from videor1_kernels import Advantages, tgrpo_advantages


@dataclass(frozen=True)
class Scored:
    """Rewards of P groups of G ordered completions. Values as in ``videor1_kernels.Advantages``."""

    accuracy: Tensor  # [P, G]
    format: Tensor  # [P, G], custom rewards included
    lengths: Tensor  # int64 [P, G], tokens
    shuffled_accuracy: Tensor  # [P, Gs]; a row of NaN: no shuffled branch; Gs is 0 without any
    result: Advantages


def score_groups(groups: Sequence[Group], config: TrainConfig, device: torch.device | str = "cpu") -> Scored:
    """Accuracy and format rewards of every answer, then T-GRPO's advantages of the ordered ones, worked out on
    ``device``. All that is returned is on the CPU."""
    answered = [(completion.text, g.prompt.sample) for g in groups for completion in g.ordered]
    accuracy, form = (
        torch.tensor(rewards).reshape(len(groups), -1)
        for rewards in score([text for text, _ in answered], [sample for _, sample in answered], config.reward)
    )
    shuffled = torch.full((len(groups), max(len(g.shuffled) for g in groups)), torch.nan)
    reward, temporal = config.reward, config.temporal
    for row, group in zip(shuffled, groups, strict=True):
        truth, kind = group.prompt.sample.solution, group.prompt.sample.problem_type
        for i, completion in enumerate(group.shuffled):  # only their accuracy counts: no other reward is asked for
            row[i] = accuracy_reward(completion.text, truth, kind, lenient=reward.lenient)
    lengths = torch.tensor([[len(c.token_ids) for c in g.ordered] for g in groups])
    result = tgrpo_advantages(
        accuracy.to(device),
        form.to(device),
        lengths.to(device),
        shuffled.to(device) if shuffled.shape[1] else None,
        rule=temporal.rule,
        alpha=temporal.alpha,
        mu=temporal.mu,
        apply=config.temporal_apply,
        correct_above=reward.correct_above,
        length_bonus=reward.length_bonus if config.len_control else 0.0,
        length_range=reward.length_range,
        normalize=config.normalize,
        eps=config.advantage_eps,
        backend=config.kernels,
    )
    values = (result.advantages, result.rewards, result.temporal, result.p, result.p_shuffled)
    return Scored(accuracy, form, lengths, shuffled, Advantages(*(value.cpu() for value in values)))
