"""Which packed rows a batch's answers are trained in, and what each row's loss weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from videor1.config import TrainConfig
from videor1.model import VideoLM
from videor1.rewards.advantages import Scored
from videor1.training.passes import Packed, pack
from videor1.types import Group
from videor1_kernels import plan_rows


@dataclass(frozen=True)
class Totals:
    """Of a batch, over all ranks: what means are taken over."""

    completions: int
    tokens: int  # of completions
    micro_batches: int


def totals_of(lengths: Tensor, config: TrainConfig) -> Totals:
    """lengths: int64 [P, G], tokens of the completions."""
    micro_batches = -(-len(lengths) // config.per_device_train_batch_size)
    return Totals(lengths.numel(), int(lengths.sum()), micro_batches)


def add(totals: Sequence[Totals]) -> Totals:
    return Totals(*(sum(column) for column in zip(*map(astuple, totals), strict=True)))


@dataclass(frozen=True)
class TrainingRow:
    """One packed row, which is one forward and backward pass: some groups, or some answers of one."""

    packed: Packed
    groups: tuple[int, ...]  # of the batch; in the order of the row's prompts
    completions: Tensor  # int64 [S]: where the row's completions are among the batch's, prompt by prompt
    weight: float  # factor on the row's loss: the sum over the rows is the loss of the batch


def training_rows(
    model: VideoLM, groups: Sequence[Group], scored: Scored, config: TrainConfig, totals: Totals | None = None
) -> tuple[list[TrainingRow], int]:
    """(rows, number of groups in none of them).

    ``per_device_train_batch_size`` groups are a micro-batch; it is one row, or as many as ``max_tokens_per_row`` asks
    for, with the same loss. Without a KL term a group whose advantages are all 0 has a gradient of exactly 0: it is in
    no row, and counts in the means all the same. ``totals`` are those of all ranks, default: these groups alone.
    """
    totals = totals or totals_of(scored.lengths, config)
    lengths, size = scored.lengths, config.per_device_train_batch_size
    micro_batches = [range(first, min(first + size, len(groups))) for first in range(0, len(groups), size)]
    rows, left_out = [], 0
    for members in micro_batches:
        live = [i for i in members if config.beta or bool(scored.result.advantages[i].any())]
        left_out += len(members) - len(live)
        tokens = int(lengths[members.start : members.stop].sum())
        for parts in plan_rows(
            [len(groups[i].prompt.input_ids) for i in live],
            [lengths[i].tolist() for i in live],
            config.max_tokens_per_row,
        ):
            chosen = [(live[part.group], part.completions) for part in parts]
            packed = pack(
                model,
                [groups[i].prompt for i, _ in chosen],
                [[groups[i].ordered[c].token_ids for c in completions] for i, completions in chosen],
            )
            places = torch.tensor([i * lengths.shape[1] + c for i, completions in chosen for c in completions])
            weight = loss_weight(
                config.loss_type,
                completions=len(places) / totals.completions,
                tokens=int(lengths.flatten()[places].sum()) / tokens,
                micro_batches=totals.micro_batches,
            )
            rows.append(TrainingRow(packed, tuple(i for i, _ in chosen), places, weight))
    return rows, left_out


def loss_weight(loss_type: str, *, completions: float, tokens: float, micro_batches: int) -> float:
    """Factor on a row's loss so that the sum over the rows is the loss of the accumulated batch.

    ``completions`` is the row's share of the batch's completions, ``tokens`` its share of its micro-batch's tokens.
    Means over completions (grpo, dr_grpo) weigh by their share; bnpo, a mean over the tokens of a micro-batch, is
    averaged over micro-batches; dapo is divided by the whole batch's tokens already.
    """
    return {"grpo": completions, "dr_grpo": completions, "bnpo": tokens / micro_batches, "dapo": 1.0}[loss_type]
