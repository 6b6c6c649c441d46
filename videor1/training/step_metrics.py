"""The metrics of a training step, computed from the reports of all ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from videor1.rewards.advantages import Scored
from videor1.rewards.slow import SlowCounts
from videor1.rewards.structured import MALFORMED
from videor1.rollout import Rollout
from videor1.training.batch import Batch, concatenate
from videor1.training.mismatch import WeightBounds, mismatch
from videor1.training.rows import TrainingRow
from videor1.types import Group
from videor1_kernels import GrpoLoss


@dataclass(frozen=True)
class StepReport:
    """One rank's part of a step, small enough to be gathered from all ranks."""

    batch: Batch  # without media and features
    tokens: list[float]  # completion tokens of each row
    means: dict[str, list[float]]  # mean of each row, by name: kl, entropy, clip_fraction
    log_ratios: list[Tensor]  # of each completion in a row: log-prob in training less that at sampling, in nats
    packed_tokens: int  # prompt and completion tokens of all rows
    left_out: int  # groups that are in no row


def make_step_report(
    batch: Batch, rows: Sequence[TrainingRow], results: Sequence[GrpoLoss], left_out: int
) -> StepReport:
    """Return this rank's report of its completions and its training passes."""
    logps = [c.logp for g in batch.groups for c in g.ordered]
    log_ratios = []
    for row, result in zip(rows, results, strict=True):
        sampled = [logps[i] for i in row.completions.tolist()]
        trained = result.logp.cpu().split([len(logp) for logp in sampled])
        log_ratios += [ours - theirs for ours, theirs in zip(trained, sampled, strict=True)]
    names = ("kl", "entropy", "clip_fraction")
    groups = [replace(g, prompt=replace(g.prompt, media=None)) for g in batch.groups]
    stats = Rollout([], batch.rollout.stats, batch.rollout.failed, batch.rollout.slow)
    return StepReport(
        replace(batch, groups=groups, features=[None] * len(groups), rollout=stats),
        [float(len(row.packed.labels)) for row in rows],
        {name: [_row_mean(getattr(result, name)) for result in results] for name in names},
        log_ratios,
        sum(row.packed.layout.total_tokens for row in rows),
        left_out,
    )


SLOW = ("rewards/failed", "time/reward_calls", "time/reward_cache_hits", "time/reward_retries")  # names of the metrics


def slow_metrics(counts: SlowCounts) -> dict[str, int]:
    """Return the metrics of the rewards that take time.

    Which calls are made depends on what a cache holds, so that these are time/*.
    """
    return dict(zip(SLOW, (counts.failed, counts.calls, counts.cache_hits, counts.retries), strict=True))


def step_metrics(
    reports: Sequence[StepReport], phases: Mapping[str, float], seconds: float, bounds: WeightBounds | None = None
) -> dict[str, Any]:
    """Return the metrics of a step.

    They have TRL's names, plus ``temporal/*``, ``rollout/*``, ``sampling/*``, ``pass/*`` and ``time/*``.

    Args:
        phases: seconds of each phase, by the metric's name.
        seconds: of the whole step.
        bounds: of the importance weights that correct for the policy at sampling; None: there is no correction.
    """
    batch = concatenate([report.batch for report in reports])
    groups, scored = batch.groups, batch.scored
    failed = sum(len(report.batch.rollout.failed) for report in reports)
    if not groups:
        return {"num_tokens": 0, "rollout/failed": failed, "pass/rows": 0, **slow_metrics(batch.rollout.slow), **phases}
    result, lengths = scored.result, scored.lengths
    log_ratios = [ratio for report in reports for ratio in report.log_ratios]
    gap = torch.cat([torch.empty(0), *log_ratios]).abs()
    gap = gap[~gap.isnan()]  # NaN where a server returned no log-probs.
    video = torch.tensor([g.shuffled_asked > 0 for g in groups])
    known, stats = ~result.p_shuffled.isnan(), batch.rollout.stats
    tokens = [count for report in reports for count in report.tokens]

    def token_mean(name: str) -> float:
        """Return the mean over the completion tokens of all training rows."""
        means = [mean for report in reports for mean in report.means[name]]
        return sum(m * n for m, n in zip(means, tokens, strict=True)) / sum(tokens) if tokens else math.nan

    return {
        "num_tokens": stats.tokens + sum(len(g.prompt.input_ids) for g in groups),
        "reward": float(result.rewards.mean()),
        "reward_std": float(result.rewards.std(1).mean()),
        "rewards/accuracy/mean": float(scored.accuracy.mean()),
        "rewards/accuracy/std": float(scored.accuracy.std()),
        "rewards/format/mean": float(scored.format.mean()),
        "rewards/format/std": float(scored.format.std()),
        **_malformed(groups, scored),
        "kl": token_mean("kl"),
        "entropy": token_mean("entropy"),
        "clip_ratio/region_mean": token_mean("clip_fraction"),
        "frac_reward_zero_std": float((result.rewards.std(1) < 1e-6).float().mean()),
        "completions/mean_length": float(lengths.float().mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": 1 - _mean([c.finished for g in groups for c in g.ordered]),
        "offline/share": _mean([c.source is not None for g in groups for c in g.ordered]),
        "offline/accuracy": _offline_accuracy(scored),
        "offline/left_out": sum(g.prompt.offline_left_out for g in groups),
        "temporal/p": _mean(result.p[video].tolist()),
        "temporal/p_shuffled": _mean(result.p_shuffled[known].tolist()),
        "temporal/p_shuffled_unknown": int((video & ~known).sum()),
        "temporal/bonus": _mean(result.temporal[video & ~result.temporal.isnan()].tolist()),
        "temporal/rewarded": _mean((result.temporal[video & ~result.temporal.isnan()] > 0).tolist()),
        "rollout/decode_steps": stats.decode_steps,
        "rollout/row_steps": stats.row_steps,
        "rollout/shuffled_asked": stats.shuffled_asked,
        "rollout/shuffled_skipped": stats.shuffled_skipped,
        "rollout/shuffled_stopped": stats.shuffled_stopped,
        "rollout/kv_mib": stats.kv_bytes / 2**20,
        "rollout/retries": stats.retries,
        "rollout/failed": failed,
        "sampling/sampling_logp_difference/mean": float(gap.mean()),  # NaN where there is none
        "sampling/sampling_logp_difference/max": float(gap.max()) if len(gap) else math.nan,
        **mismatch(log_ratios, bounds),
        "pass/rows": len(tokens),
        "pass/tokens": sum(report.packed_tokens for report in reports),
        "pass/groups_left_out": sum(report.left_out for report in reports),
        **batch.counts(),
        **slow_metrics(batch.rollout.slow),
        **phases,
        "time/tokens_per_second": stats.tokens / seconds,
    }


def _malformed(groups: Sequence[Group], scored: Scored) -> dict[str, int]:
    """Return how many completions from ordered frames have a malformed answer: all, by problem type, and by fault."""
    if scored.malformed is None:
        return {}
    counts: Counter[str] = Counter()
    for group, row in zip(groups, scored.malformed.tolist(), strict=True):
        kind = group.prompt.sample.problem_type.replace(" ", "_")
        for fault in filter(None, row):
            counts.update((f"rewards/malformed/{kind}", f"rewards/malformed/{kind}/{MALFORMED[fault - 1]}"))
    return {"rewards/malformed": int((scored.malformed > 0).sum()), **dict(sorted(counts.items()))}


def _offline_accuracy(scored: Scored) -> float:
    """Return the mean accuracy of the answers that the data bring; NaN without any."""
    return math.nan if scored.sampled is None else float(scored.accuracy[~scored.sampled].mean())


def _row_mean(values: Tensor | None) -> float:
    return 0.0 if values is None else float(values.float().mean())


def _mean(values: Sequence[Any]) -> float:
    return sum(map(float, values)) / len(values) if values else float("nan")
