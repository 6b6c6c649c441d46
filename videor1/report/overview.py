"""Summarize runs in words and tables for the page: progress, key figures, options and skipped samples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from videor1.config.cli import resume_command
from videor1.report.cards import visible
from videor1.report.metrics import Series
from videor1.report.run import LISTED_SKIPS, Run

COUNTS = {"nonfinite_steps": "steps skipped, not finite", "failed_checkpoints": "checkpoints that failed"}


def overview(run: Run) -> dict[str, Any]:
    """Return what the template shows of a run."""
    ordered, shuffled = run.metrics["eval/ordered"], run.metrics["eval/shuffled"]
    steps, high, low = np.intersect1d(ordered.steps, shuffled.steps), ordered, shuffled
    gap = Series(steps, high.values[np.isin(high.steps, steps)] - low.values[np.isin(low.steps, steps)])
    last = run.metrics.last
    progress, finished = state(run)
    figures = [
        ("Held-out accuracy, frames in order", *_change(ordered)),
        ("Held-out accuracy, frames shuffled", *_change(shuffled)),
        ("Temporal gap, held out", *_change(gap)),
        ("Training accuracy, p", *_change(run.metrics["temporal/p"].smoothed())),
        ("Seconds a step", *_median(run.metrics["seconds/step"])),
        ("Tokens seen", f"{last['num_tokens']:,}" if isinstance(last.get("num_tokens"), int) else "", ""),
        ("Samples left out", f"{run.skips.total:,}", ""),
    ]
    figures += [(label, str(last[name]), "") for name, label in COUNTS.items() if last.get(name)]
    return {
        "name": visible(run.name),
        "kind": run.kind,
        "path": visible(run.path),
        "state": progress,
        "written": run.written,
        "figures": [{"label": label, "value": value, "note": note} for label, value, note in figures if value],
        "summary": _test_table(run),
        "options": [
            {"name": visible(name), "value": shown(value), "default": shown(run.defaults.get(name, "(unknown option)"))}
            for name, value in run.changed_options().items()
        ],
        "known_options": bool(run.options),
        "skips": [
            {"split": visible(split), "kind": visible(kind), "count": count}
            for (split, kind), count in run.skips.counts.most_common()
        ],
        "skipped": [
            {name: visible(row.get(name, "")) for name in ("step", "split", "kind", "path", "message")}
            for row in run.skips.rows
        ],
        "unlisted": max(0, run.skips.total - LISTED_SKIPS),
        "problems": [visible(problem) for problem in [*([] if finished else silence(run)), *run.problems]],
        "ranks": len(run.folders),
    }


def state(run: Run) -> tuple[str, bool]:
    """Return (the progress of a run in words, whether it has finished), as far as its options tell."""
    step, most = run.metrics.step, run.option("max_steps")
    if not step:
        return "no step done yet", False
    goal, reached = run.option("stop_at_accuracy"), run.metrics["eval/ordered"].values
    if isinstance(goal, float) and len(reached) and reached[-1] >= goal:
        return f"finished: {step:,} steps, until accuracy {goal:g} was reached", True
    if isinstance(most, int) and most >= 0:
        if step >= most:
            return f"finished: {step:,} of {most:,} steps", True
        return f"{step:,} of {'at most ' if goal else ''}{most:,} steps", False
    epoch, epochs = run.metrics.last.get("epoch"), run.option("num_train_epochs")
    if isinstance(epoch, float) and epoch > 0 and isinstance(epochs, int | float) and run.options:
        total = math.ceil(step * epochs / epoch)
        return (f"finished: {step:,} steps", True) if epoch >= epochs else (f"{step:,} of about {total:,} steps", False)
    return f"{step:,} steps", False


def silence(run: Run) -> list[str]:
    """Return a warning if an unfinished run has written nothing for so long that it must have ended or hang.

    There is no warning during the time that ten lines of metrics or three evaluations take, nor during two minutes
    (ten minutes before the first step).
    """
    steps, evaluations = run.metrics["seconds/step"].values, run.metrics["time/eval"].values
    line_seconds = float(np.median(steps)) * int(run.option("logging_steps") or 1) if len(steps) else 60.0
    if run.silent <= max(120.0, 10 * line_seconds, 3 * float(evaluations.max(initial=0.0))):
        return []
    command = resume_command("sft" if run.kind == "SFT" else "train", run.path)
    return [
        f"Nothing was written for {_duration(run.silent)} before this page was made: the run has ended before its last "
        f"step, or hangs. Go on from its last checkpoint with: {command}"
    ]


def compared_options(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the options whose values differ between the runs, each with the value of every run."""
    names = dict.fromkeys(name for run in runs for name in run.changed_options())
    rows = []
    for name in names:
        values = [shown(run.option(name)) if run.options else "(no config.yaml)" for run in runs]
        if len(set(values)) > 1:
            rows.append({"name": visible(name), "values": values})
    return rows


def shown(value: object) -> str:
    """Return an option's value as the page shows it."""
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _change(series: Series) -> tuple[str, str]:
    if not len(series):
        return "", ""
    first, last = series.values[0], series.values[-1]
    if len(series) == 1:
        return f"{last:.3f}", f"at step {series.steps[0]:,}"
    return f"{first:.3f} → {last:.3f}", f"step {series.steps[0]:,} → {series.steps[-1]:,}"


def _median(series: Series) -> tuple[str, str]:
    return (f"{np.median(series.values):.3g}", "median") if len(series) else ("", "")


def _test_table(run: Run) -> list[dict[str, str]]:
    """Return the table of a finished demonstration's accuracy on its test questions, before and after T-GRPO."""
    before, after = run.summary.get("before"), run.summary.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    chance = run.summary.get("chance")
    return [
        {"label": f"frames {label}", **{name: _number(value) for name, value in values.items()}}
        for label, values in (
            ("in order", {"before": before.get("ordered"), "after": after.get("ordered"), "chance": chance}),
            ("shuffled", {"before": before.get("shuffled"), "after": after.get("shuffled"), "chance": chance}),
        )
    ]


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "—"
