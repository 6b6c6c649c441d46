"""Rewards and advantages of the completions of a batch of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from videor1.answer import whole_text
from videor1.config import RewardConfig, TrainConfig
from videor1.rewards.judge import TemporalJudge
from videor1.rewards.scoring import format_rewards, malformed_reason, overlong_penalty
from videor1.rewards.structured import MALFORMED
from videor1.types import Group, Sample
from videor1_kernels import Advantages, tgrpo_advantages


@dataclass(frozen=True)
class Scored:
    """Rewards and advantages of P groups of G ordered completions."""

    accuracy: Tensor  # [P, G]
    format: Tensor  # [P, G], custom rewards and the overlong penalty included
    lengths: Tensor  # int64 [P, G], tokens that the model wrote: none of what the chat template opened
    shuffled_accuracy: Tensor  # [P, Gs]; NaN: no such completion, or it was skipped; Gs is 0 without any
    decisive: Tensor  # [P, Gs]: what the temporal bonus is computed from: as far as it matters, the same with all run
    # As ``videor1_kernels.Advantages``, with two exceptions. p_shuffled is NaN where shuffled completions were skipped,
    # and so is temporal where the bonus would have changed nothing: the rewards of such a group may lack a constant,
    # but its advantages are exact.
    result: Advantages
    above: Tensor | None = None  # fp64 [P]: what a correct completion's accuracy exceeds; None: one for all
    malformed: Tensor | None = None  # int64 [P, G]: 0, or 1 + the index in MALFORMED of the fault of a completion
    sampled: Tensor | None = None  # bool [P, G]: the completions that the policy sampled; None: all


def score_groups(
    groups: Sequence[Group], config: TrainConfig, device: torch.device | str = "cpu", *, opened: str = ""
) -> Scored:
    """Compute the rewards of every completion, then T-GRPO's advantages of the ordered ones.

    Accuracies and rewards that a group holds already (``Group.accuracies``, ``Group.rewards``) are not computed again,
    and those that take time must be among them. Where rewards are divided by
    the standard deviation of a batch, they are only centred here: :func:`divided` divides them once all are known.

    Args:
        device: where the advantages are computed. All returned tensors are on the CPU.
        opened: what the chat template opened every answer with (``VideoLM.opened_text``).
    """
    if not groups:
        return _empty_scored(config)
    judges = [_judge(group, config, opened) for group in groups]
    accuracy = torch.tensor([judge.ordered + judge.offline for judge in judges])
    completions = [(completion.text, g.prompt.sample) for g in groups for completion in g.ordered]
    texts, samples = [text for text, _ in completions], [sample for _, sample in completions]
    known = {name: [reward for g in groups for reward in g.rewards[name]] for name in groups[0].rewards}
    format_reward = torch.tensor(format_rewards(texts, samples, config.reward, opened=opened, known=known))
    format_reward = format_reward.reshape(len(groups), -1)
    lengths = torch.tensor([[len(c.token_ids) for c in g.ordered] for g in groups])
    if cache := config.mask_overlong:
        limit = config.max_completion_length
        format_reward += torch.tensor([[overlong_penalty(n, limit, cache) for n in row] for row in lengths.tolist()])
    shuffled = torch.full((len(groups), max(max(g.shuffled_asked, len(g.shuffled)) for g in groups)), torch.nan)
    decisive = shuffled.clone()
    skipped, unknown = (torch.zeros(len(groups), dtype=torch.bool) for _ in range(2))
    for i, (group, judge) in enumerate(zip(groups, judges, strict=True)):
        finished = len(judge.shuffled)
        shuffled[i, :finished] = decisive[i, :finished] = torch.tensor(judge.shuffled)
        skipped[i] = finished < group.shuffled_asked
        if skipped[i] and judge.decided:
            decisive[i, finished : group.shuffled_asked] = 0.0  # Any value gives the same bonus.
        elif skipped[i] and judge.needed is False:
            decisive[i], unknown[i] = torch.nan, True
    above = torch.tensor([config.reward.above(g.prompt.sample.problem_type) for g in groups], dtype=torch.float64)
    sampled = torch.tensor([[c.source is None for c in g.ordered] for g in groups])
    result = _advantages((accuracy, format_reward, lengths, decisive), config, device, above, sampled)
    p_shuffled = result.p_shuffled.cpu().masked_fill(skipped, torch.nan)
    bonus = result.temporal.cpu().masked_fill(unknown, torch.nan)
    values = Advantages(result.advantages.cpu(), result.rewards.cpu(), bonus, result.p.cpu(), p_shuffled)
    faults = [fault_number(whole_text(opened, text), s, config.reward) for text, s in completions]
    malformed = torch.tensor(faults).reshape(len(groups), -1)
    return Scored(accuracy, format_reward, lengths, shuffled, decisive, values, above, malformed, sampled)


def divided(scored: Scored, std: Tensor, config: TrainConfig, device: torch.device | str = "cpu") -> Scored:
    """Return ``scored`` with advantages whose centred rewards are divided by ``std`` [P], each prompt's, plus eps."""
    if not len(std):
        return scored
    inputs = (scored.accuracy, scored.format, scored.lengths, scored.decisive)
    advantages = _advantages(inputs, config, device, scored.above, scored.sampled, std).advantages.cpu()
    return replace(scored, result=replace(scored.result, advantages=advantages))


def _advantages(
    inputs: Sequence[Tensor],
    config: TrainConfig,
    device: torch.device | str,
    above: Tensor | None,
    sampled: Tensor | None,
    std: Tensor | None = None,
) -> Advantages:
    """Call the kernel with accuracies, formats, lengths and shuffled accuracies, and the options' values."""
    reward, temporal = config.reward, config.temporal
    accuracy, format_reward, lengths, decisive = (tensor.to(device) for tensor in inputs)
    normalize = config.normalize
    if config.scales_by_batch:
        normalize = "none" if std is None else "batch"
    return tgrpo_advantages(
        accuracy,
        format_reward,
        lengths,
        decisive if decisive.shape[1] else None,
        rule=temporal.rule,
        alpha=temporal.alpha,
        mu=temporal.mu,
        apply=config.temporal_apply,
        correct_above=above.to(device) if above is not None and reward.correct_above_for else reward.correct_above,
        length_bonus=reward.length_bonus if config.len_control else 0.0,
        length_range=reward.length_range,
        normalize=normalize,
        eps=config.advantage_eps,
        baseline=config.advantage_baseline,
        batch_std=None if std is None else std.to(device),
        p_mask=None if sampled is None or bool(sampled.all()) else sampled.to(device),
        backend=config.kernels,
    )


def fault_number(answer: str, sample: Sample, reward: RewardConfig) -> int:
    """Return 0, or 1 + the index in MALFORMED of what is wrong with a whole answer."""
    reason = malformed_reason(answer, sample.solution, sample.problem_type, lenient=reward.lenient)
    return 1 + MALFORMED.index(reason) if reason else 0


def _judge(group: Group, config: TrainConfig, opened: str) -> TemporalJudge:
    """Return a judge to which all completions of the group have been reported.

    It computes accuracies only, which is all that counts of the shuffled completions.
    """
    sampled, offline = ([c for c in group.ordered if (c.source is None) is own] for own in (True, False))
    judge = TemporalJudge(
        group.prompt.sample,
        config,
        ordered=len(sampled),
        shuffled=group.shuffled_asked,
        known=group.accuracies,
        opened=opened,
        offline=offline,
    )
    for completion in sampled:
        judge.ordered_done(completion)
    for completion in group.shuffled:
        judge.shuffled_done(completion)
    return judge


def _empty_scored(config: TrainConfig) -> Scored:
    """Return the rewards and advantages of no group."""
    matrix, vector = torch.empty(0, config.num_generations), torch.empty(0)
    advantages = Advantages(matrix, matrix, vector, vector, vector)
    shuffled = torch.empty(0, config.num_shuffled)
    return Scored(
        matrix, matrix, matrix.long(), shuffled, shuffled, advantages, vector.double(), matrix.long(), matrix.bool()
    )
