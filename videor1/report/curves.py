"""The curves of a run, as one picture beside its metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from videor1.logs.jsonl import read_jsonl


def draw_curves(run_dir: Path) -> Path:
    """Draw reward, p and p~ (the gap shaded), KL, entropy, length and step time into ``curves.png``; returns its path.

    Reads metrics.jsonl and works on a run in progress.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_jsonl(run_dir / "metrics.jsonl")
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    panels: list[tuple[str, list[tuple[str, str]]]] = [
        (
            "Accuracy while training",
            [("temporal/p", "p, frames in order"), ("temporal/p_shuffled", "p~, shuffled, where known")],
        ),
        ("Held-out accuracy", [("eval/ordered", "frames in order"), ("eval/shuffled", "shuffled")]),
        ("Reward", [("reward", "total"), ("rewards/accuracy/mean", "accuracy"), ("rewards/format/mean", "format")]),
        ("KL to the reference, entropy (nats)", [("kl", "KL"), ("entropy", "entropy")]),
        ("Answer length (tokens)", [("completions/mean_length", "mean"), ("completions/max_length", "longest")]),
        ("Seconds a step", [("time/rollout", "rollout"), ("time/update", "update"), ("time/data", "waiting for data")]),
    ]
    for axis, (title, lines) in zip(axes.flat, panels, strict=True):
        colors = iter(("tab:blue", "tab:orange", "tab:green"))
        for key, label in lines:
            steps, values = _series(rows, key)
            if steps:
                sparse = len(steps) <= 20
                color = next(colors)
                style = {"marker": "o", "label": label} if sparse else {"alpha": 0.25}
                axis.plot(steps, values, color=color, **style)
                if not sparse:
                    axis.plot(steps, _smooth(values), color=color, label=label)
        first, second = (dict(zip(*_series(rows, key), strict=True)) for key, _ in lines[:2])
        if "ccuracy" in title and first and second:
            common = sorted(first.keys() & second.keys())
            smooth = len(common) > 20
            upper, lower = ([s[step] for step in common] for s in (first, second))
            axis.fill_between(common, _smooth(upper) if smooth else upper, _smooth(lower) if smooth else lower,
                              alpha=0.12, label="temporal gap")  # fmt: skip
            axis.set_ylim(0, 1.02)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = {row["step"]: row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])}
    return list(points), list(points.values())


def _smooth(values: list[float], factor: float = 0.85) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = factor * total + value, factor * weight + 1.0
        smoothed.append(total / weight)
    return smoothed
