"""Dynamic sampling (DAPO): replace groups whose completions all earn the same reward by groups of new prompts.

Such a group has advantages of 0 and teaches nothing.
"""

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

REFILLS = ("sampling/refilled", "sampling/zero_variance_dropped")  # names of the metrics


@dataclass(frozen=True)
class Batch:
    """Prompts with their sampled and scored completions."""

    groups: list[Group]
    features: list[Tensor | None]  # vision features of each group's prompt, frames in order
    scored: Scored
    rollout: Rollout  # statistics and failures of every prompt that was sampled for, replaced ones included
    refilled: int = 0  # new groups with variance that replaced a group, or filled the place of a failed prompt
    dropped: int = 0  # groups that were sampled but are not in the batch

    def counts(self) -> dict[str, int]:
        """Return the metrics of dynamic sampling."""
        return dict(zip(REFILLS, (self.refilled, self.dropped), strict=True))

    def has_variance(self) -> list[bool]:
        """Return for each group whether any of its advantages is not 0."""
        return self.scored.result.advantages.any(1).tolist()


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Return one batch with the groups of all ``batches``, end to end."""
    first, *others = batches
    for other in others:
        first = Batch(
            first.groups + other.groups,
            first.features + other.features,
            _map_tensors(_concatenate_tensors, first.scored, other.scored),
            _join_rollouts(first.rollout, other.rollout),
            first.refilled + other.refilled,
            first.dropped + other.dropped,
        )
    return first


def refill(batch: Batch, size: int, rounds: int, sample: Callable[[int], Batch]) -> Batch:
    """Replace the groups without variance by new groups that have some, as far as those are found.

    A group for which no replacement is found stays, so that the batch never shrinks. A new group without variance is
    used only for a place that is empty because its prompt failed, and dropped otherwise.

    Args:
        size: number of groups of a full batch; ``batch`` has fewer where prompts failed.
        rounds: the most calls of ``sample``.
        sample: samples and scores that many new prompts.
    """
    for _ in range(rounds):
        missing = size - sum(batch.has_variance())
        if not missing:
            break
        batch = _replace_groups(batch, sample(missing), size)
    return batch


def _replace_groups(batch: Batch, new: Batch, size: int) -> Batch:
    """Return ``batch`` with groups of ``new`` in the places of failed prompts and of groups without variance.

    Groups of ``new`` with variance first fill the empty places of failed prompts, then replace groups without variance.
    Groups of ``new`` without variance fill the places that are still empty.
    """
    count = len(batch.groups)
    chosen = list(range(count))  # indices into the groups of both batches, in the order of the result
    replaceable = [i for i, varies in enumerate(batch.has_variance()) if not varies]
    varying = [count + i for i, varies in enumerate(new.has_variance()) if varies]
    constant = [count + i for i, varies in enumerate(new.has_variance()) if not varies]
    refilled = len(varying)
    while varying and len(chosen) < size:
        chosen.append(varying.pop(0))
    for place, replacement in zip(replaceable, varying, strict=False):
        chosen[place] = replacement
    while constant and len(chosen) < size:
        chosen.append(constant.pop(0))
    groups, features = batch.groups + new.groups, batch.features + new.features
    dropped = [i for i in range(len(groups)) if i not in chosen]
    return Batch(
        [groups[i] for i in chosen],
        [features[i] for i in chosen],
        _map_tensors(lambda tensor: tensor[chosen], _map_tensors(_concatenate_tensors, batch.scored, new.scored)),
        _join_rollouts(batch.rollout, new.rollout),
        batch.refilled + refilled,
        batch.dropped + len(dropped),
    )


def _map_tensors(function: Callable[..., Tensor], *scored: Scored) -> Scored:
    """Apply ``function`` field by field; its arguments are the same field of each of ``scored``, where all have it."""

    def apply(name: str, owners: Sequence[Any]) -> Any:
        values = [getattr(owner, name) for owner in owners]
        return None if any(value is None for value in values) else function(*values)

    result = {f.name: apply(f.name, [s.result for s in scored]) for f in fields(Advantages)}
    own = {f.name: apply(f.name, scored) for f in fields(Scored) if f.name != "result"}
    return Scored(**own, result=Advantages(**result))


def _concatenate_tensors(*parts: Tensor) -> Tensor:
    """Concatenate along the groups; rows of different width are padded with NaN (for absent shuffled completions)."""
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
    return Rollout(one.groups + other.groups, stats, failed, one.slow + other.slow)
