"""Packing of a batch's completions into training rows, and the weight of each row's loss."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from videor1.config import TrainConfig
from videor1.model import VideoLM
from videor1.model.packing import LEAST_TRAINED_TOKENS, even_batches
from videor1.rewards.advantages import Scored
from videor1.training.passes import Packed, pack
from videor1.types import Group
from videor1_kernels import plan_rows


@dataclass(frozen=True)
class Totals:
    """The counts of a batch, over all ranks, that the loss's means divide by: of completions that count."""

    completions: int
    tokens: int  # in the completions
    micro_batches: int


def counting(groups: Sequence[Group], config: TrainConfig) -> Tensor:
    """Return which completions count in the loss, bool [P, G]: all, or those that ended."""
    every = [[completion.finished or not config.mask_truncated_completions for completion in g.ordered] for g in groups]
    return torch.tensor(every, dtype=torch.bool).reshape(len(groups), -1 if groups else config.num_generations)


def batch_totals(lengths: Tensor, config: TrainConfig, counts: Tensor | None = None) -> Totals:
    """Return the totals of one rank's batch.

    Args:
        lengths: int64 [P, G], tokens of each completion.
        counts: bool [P, G], the completions that count; None: all.
    """
    micro_batches = -(-len(lengths) // config.per_device_train_batch_size)
    counted = lengths.flatten() if counts is None else lengths[counts]
    return Totals(len(counted), int(counted.sum()), micro_batches)


def sum_totals(totals: Sequence[Totals]) -> Totals:
    """Add the totals of all ranks."""
    return Totals(*(sum(column) for column in zip(*map(astuple, totals), strict=True)))


@dataclass(frozen=True)
class TrainingRow:
    """One packed row: some groups, or some completions of one group, in one forward and backward pass."""

    packed: Packed
    groups: tuple[int, ...]  # indices into the batch's groups, in the order of the row's prompts
    completions: Tensor  # int64 [S]: indices of the row's completions among the batch's, prompt by prompt
    weight: float  # factor on the row's loss, so that the sum over all rows is the loss of the batch
    rollout_logp: Tensor  # fp32 [N], as the sampler gave them; NaN where it gave none
    counts: Tensor  # bool [S], the completions that count in the loss


def training_rows(
    model: VideoLM, groups: Sequence[Group], scored: Scored, config: TrainConfig, totals: Totals | None = None
) -> tuple[list[TrainingRow], int]:
    """Pack the groups of a batch into training rows.

    ``per_device_train_batch_size`` groups are a micro-batch; it is one row, or as many as ``max_tokens_per_row`` asks
    for, with the same loss; on a CPU it is several, see ``even_batches``. Without a KL term and an entropy bonus a
    group whose advantages are all 0 has a gradient of exactly 0: it is in no row, but still counts in the means. Nor is
    one of which no completion counts.

    Args:
        totals: those of all ranks; None: of these groups alone.

    Returns:
        (rows, number of groups that are in no row).
    """
    counts = counting(groups, config)
    totals = totals or batch_totals(scored.lengths, config, counts)
    lengths, size = scored.lengths, config.per_device_train_batch_size
    counted = lengths * counts
    micro_batches = [range(first, min(first + size, len(groups))) for first in range(0, len(groups), size)]
    rows, left_out = [], 0
    for members in micro_batches:
        moved = (scored.result.advantages != 0) | bool(config.beta or config.entropy_coef)
        trained = [i for i in members if bool((moved[i] & counts[i]).any())]
        left_out += len(members) - len(trained)
        tokens = int(counted[members.start : members.stop].sum())
        for chosen in _plan(trained, groups, lengths, config.max_tokens_per_row, model.device):
            packed = pack(
                model,
                [groups[i].prompt for i, _ in chosen],
                [[groups[i].ordered[c].token_ids for c in completions] for i, completions in chosen],
            )
            places = torch.tensor([i * lengths.shape[1] + c for i, completions in chosen for c in completions])
            weight = loss_weight(
                config.loss_type,
                completions=int(counts.flatten()[places].sum()) / totals.completions,
                tokens=int(counted.flatten()[places].sum()) / max(1, tokens),
                micro_batches=totals.micro_batches,
            )
            sampled = torch.cat([groups[i].ordered[c].logp for i, completions in chosen for c in completions])
            kept = counts.flatten()[places]
            rows.append(TrainingRow(packed, tuple(i for i, _ in chosen), places, weight, sampled, kept))
    return rows, left_out


def _plan(
    trained: Sequence[int], groups: Sequence[Group], lengths: Tensor, limit: int | None, device: torch.device
) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
    """Yield the rows of a micro-batch: groups, each with its completions in the row."""

    def tokens(i: int) -> int:
        return len(groups[i].prompt.input_ids) + int(lengths[i].sum())

    for batch in even_batches(trained, tokens, sys.maxsize, device, least=LEAST_TRAINED_TOKENS):
        prompts, completions = zip(
            *((len(groups[i].prompt.input_ids), lengths[i].tolist()) for i in batch), strict=True
        )
        for parts in plan_rows(prompts, completions, limit):
            yield [(batch[part.group], part.completions) for part in parts]


def loss_weight(loss_type: str, *, completions: float, tokens: float, micro_batches: int) -> float:
    """Return the factor on a row's loss, so that the sum over the rows is the loss of the accumulated batch.

    Losses that are means over completions are weighted by the row's share of the completions. bnpo, a mean over the
    tokens of a micro-batch, is weighted by the row's share of those and averaged over micro-batches. dapo, cispo and
    vespo have been divided by the tokens of the whole batch already.

    Args:
        completions: the row's share of the batch's completions.
        tokens: the row's share of its micro-batch's completion tokens.
        micro_batches: number of micro-batches of the whole batch.
    """
    if loss_type in ("dapo", "cispo", "vespo"):
        return 1.0
    return tokens / micro_batches if loss_type == "bnpo" else completions
