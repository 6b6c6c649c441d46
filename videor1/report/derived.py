"""Derive series from those of metrics.jsonl: shares of the shuffled completions, and the seconds of each phase."""

from __future__ import annotations

import dataclasses

import numpy as np

from videor1.report.metrics import EMPTY, Metrics, Series, combine

PHASES = ("data", "rollout", "reward", "reference", "update")  # phases of a step, named time/... in metrics.jsonl
PER_BATCH = PHASES[:4]  # phases that run once for all updates of a rollout


def with_derived(metrics: Metrics, iterations: int) -> Metrics:
    """Add derived series to those of metrics.jsonl.

    These are ``share/skipped`` and ``share/stopped`` (shares of the requested shuffled completions), and the seconds of
    a step in each phase (``seconds/<phase>``), outside of all phases (``seconds/other``) and in total
    (``seconds/step``). The total is ``time/step`` if that was measured, else the sum of the phases.

    Args:
        metrics: the series of metrics.jsonl.
        iterations: number of updates per rollout; the line of each update repeats the times of the rollout.
    """
    series = dict(metrics.series)
    for name in ("skipped", "stopped"):
        steps, part, requested = combine(metrics[f"rollout/shuffled_{name}"], metrics["rollout/shuffled_asked"])
        series[f"share/{name}"] = Series(steps[requested > 0], part[requested > 0] / requested[requested > 0])
    total = EMPTY
    for phase in PHASES:
        seconds = metrics[f"time/{phase}"]
        if len(seconds):
            seconds = Series(seconds.steps, seconds.values / (iterations if phase in PER_BATCH else 1))
            steps, before, own = combine(total, seconds)
            total = Series(steps, before + own) if len(total) else seconds
            series[f"seconds/{phase}"] = seconds
    series["seconds/step"] = whole_step = metrics["time/step"] if len(metrics["time/step"]) else total
    if whole_step is not total:
        steps, in_phases, in_step = combine(total, whole_step)
        series["seconds/other"] = Series(steps, np.maximum(in_step - in_phases, 0))
    return dataclasses.replace(metrics, series={name: one for name, one in series.items() if len(one)})
