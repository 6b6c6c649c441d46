"""Dynamic sampling (DAPO): prompts whose answers all earn alike teach nothing and are replaced by the next ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from videor1.rewards.advantages import Scored
from videor1.rollout import Rollout, RolloutStats
from videor1.types import Group
from videor1_kernels import Advantages

REFILLS = ("sampling/refilled", "sampling/zero_variance_dropped")  # metrics


@dataclass(frozen=True)
class Batch:
    """Answered and scored prompts."""

    groups: list[Group]
    features: list[Tensor | None]  # vision features of each group's prompt, frames in order
    scored: Scored
    rollout: Rollout  # its statistics and failures are those of every prompt that was asked, replaced ones too
    refilled: int = 0  # groups that replaced another, or one that failed
    dropped: int = 0  # groups without variance that are not in the batch

    def counts(self) -> dict[str, int]:
        """Metrics."""
        return dict(zip(REFILLS, (self.refilled, self.dropped), strict=True))

    def live(self) -> list[bool]:
        """Whether a group has an advantage that is not 0."""
        return self.scored.result.advantages.any(1).tolist()


def joined(batches: Sequence[Batch]) -> Batch:
    """The groups of all, end to end."""
    first, *others = batches
    for other in others:
        first = Batch(
            first.groups + other.groups,
            first.features + other.features,
            _each(_stack, first.scored, other.scored),
            _join_rollouts(first.rollout, other.rollout),
            first.refilled + other.refilled,
            first.dropped + other.dropped,
        )
    return first


def refill(batch: Batch, size: int, rounds: int, answer: Callable[[int], Batch]) -> Batch:
    """The batch with groups that have variance in the places of those that have none, as far as they are found.

    Args:
        size: groups of a full batch; fewer where some failed.
        rounds: at most so many calls of ``answer``.
        answer: asks that many new prompts.

    A group that no other replaces stays: the batch is never smaller than without. A new group without variance is used
    for a place that is empty (its prompt failed) and dropped otherwise.
    """
    for _ in range(rounds):
        live = batch.live()
        missing = size - sum(live)
        if not missing:
            break
        batch = _replace(batch, answer(missing), size)
    return batch


def _replace(batch: Batch, new: Batch, size: int) -> Batch:
    """Groups of ``new`` with variance go first into empty places, then into those of groups that have none; others of
    ``new`` into what is empty still."""
    count = len(batch.groups)
    chosen = list(range(count))  # into the groups of both, in the new batch's order
    dead = [i for i, live in enumerate(batch.live()) if not live]
    better = [count + i for i, live in enumerate(new.live()) if live]
    others = [count + i for i, live in enumerate(new.live()) if not live]
    refilled = len(better)
    while better and len(chosen) < size:
        chosen.append(better.pop(0))
    for place, replacement in zip(dead, better, strict=False):
        chosen[place] = replacement
    while others and len(chosen) < size:
        chosen.append(others.pop(0))
    groups, features = batch.groups + new.groups, batch.features + new.features
    dropped = [i for i in range(len(groups)) if i not in chosen]
    return Batch(
        [groups[i] for i in chosen],
        [features[i] for i in chosen],
        _each(lambda tensor: tensor[chosen], _each(_stack, batch.scored, new.scored)),
        _join_rollouts(batch.rollout, new.rollout),
        batch.refilled + refilled,
        batch.dropped + len(dropped),
    )


def _each(function: Callable[..., Tensor], *scored: Scored) -> Scored:
    """``function`` of every tensor, the same one of each argument."""

    def apply(name: str, owners: Sequence[Any]) -> Tensor:
        return function(*(getattr(owner, name) for owner in owners))

    result = {f.name: apply(f.name, [s.result for s in scored]) for f in fields(Advantages)}
    own = {f.name: apply(f.name, scored) for f in fields(Scored) if f.name != "result"}
    return Scored(**own, result=Advantages(**result))


def _stack(*parts: Tensor) -> Tensor:
    """The groups of all parts; NaN where one had no such shuffled answer."""
    if parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        parts = tuple(torch.nn.functional.pad(p, (0, width - p.shape[1]), value=torch.nan) for p in parts)
    return torch.cat(parts)


def _join_rollouts(one: Rollout, other: Rollout) -> Rollout:
    stats = RolloutStats(
        **{f.name: getattr(one.stats, f.name) + getattr(other.stats, f.name) for f in fields(RolloutStats)}
    )
    stats.kv_bytes = max(one.stats.kv_bytes, other.stats.kv_bytes)
    failed = one.failed | {len(one.groups) + i: reason for i, reason in other.failed.items()}
    return Rollout(one.groups + other.groups, stats, failed)
