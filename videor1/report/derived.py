"""Series made from those of metrics.jsonl: shares of the shuffled answers, and where the seconds of a step go."""

from __future__ import annotations

import dataclasses

import numpy as np

from videor1.report.metrics import EMPTY, Metrics, Series, combine

PHASES = ("data", "rollout", "reward", "reference", "update")  # of a step, as time/... in metrics.jsonl
PER_BATCH = PHASES[:4]  # spent once for all updates of a rollout


def with_derived(metrics: Metrics, iterations: int) -> Metrics:
    """Adds ``share/skipped`` and ``share/stopped`` (of the shuffled answers asked for), ``seconds/<phase>`` and
    ``seconds/other`` of a step, and ``seconds/step``: the whole step where it was measured (``time/step``), else the
    sum of its phases.

    ``iterations``: updates per rollout, each of which repeats the rollout's times in its line.
    """
    series = dict(metrics.series)
    for name in ("skipped", "stopped"):
        steps, part, asked = combine(metrics[f"rollout/shuffled_{name}"], metrics["rollout/shuffled_asked"])
        series[f"share/{name}"] = Series(steps[asked > 0], part[asked > 0] / asked[asked > 0])
    total = EMPTY
    for phase in PHASES:
        seconds = metrics[f"time/{phase}"]
        if len(seconds):
            seconds = Series(seconds.steps, seconds.values / (iterations if phase in PER_BATCH else 1))
            steps, before, own = combine(total, seconds)
            total = Series(steps, before + own) if len(total) else seconds
            series[f"seconds/{phase}"] = seconds
    series["seconds/step"] = whole = metrics["time/step"] if len(metrics["time/step"]) else total
    if whole is not total:
        steps, known, all_of_it = combine(total, whole)
        series["seconds/other"] = Series(steps, np.maximum(all_of_it - known, 0))
    return dataclasses.replace(metrics, series={name: one for name, one in series.items() if len(one)})
