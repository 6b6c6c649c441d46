"""Draw the curves of a run into a picture beside its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from videor1.report.metrics import Series, combine, read_metrics
from videor1.report.panels import LABELS, PHASE_LABELS

DECAY = 0.85  # decay of the moving averages


@dataclass(frozen=True)
class Panel:
    """One chart of the picture. It resembles a chart of the report, with fewer lines and no note."""

    title: str
    names: tuple[str, ...]  # names of the series
    gap: bool = False  # whether to shade between the two lines, which are accuracies
    labels: Mapping[str, str] = field(default_factory=dict)  # labels by series that replace those of the report


PANELS = (
    Panel(
        "Accuracy while training",
        ("temporal/p", "temporal/p_shuffled"),
        gap=True,
        labels={"temporal/p_shuffled": "p~, shuffled, where known"},
    ),
    Panel("Held-out accuracy", ("eval/ordered", "eval/shuffled"), gap=True, labels={"eval/shuffled": "shuffled"}),
    Panel("Reward", ("reward", "rewards/accuracy/mean", "rewards/format/mean")),
    Panel("KL to the reference, entropy (nats)", ("kl", "entropy")),
    Panel("Completion length (tokens)", ("completions/mean_length", "completions/max_length")),
    Panel(
        "Seconds a step",
        ("time/rollout", "time/update", "time/data"),
        labels={f"time/{phase}": PHASE_LABELS.get(phase, phase) for phase in ("rollout", "update", "data")},
    ),
)


def draw_curves(run_dir: Path) -> Path:
    """Draw reward, p and p~ (with the gap shaded), KL, entropy, length and step time into ``curves.png``.

    It reads metrics.jsonl, and also works on a run in progress.

    Returns:
        The path of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(run_dir / "metrics.jsonl", {name for panel in PANELS for name in panel.names})
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        colors = iter(("tab:blue", "tab:orange", "tab:green"))
        for name in panel.names:
            series, label = metrics[name], panel.labels.get(name) or LABELS[name]
            if len(series):
                color = next(colors)
                style = {"alpha": 0.25} if series.smooths else {"marker": "o", "label": label}
                axis.plot(series.steps, series.values, color=color, **style)
                if series.smooths:
                    axis.plot(series.steps, series.smoothed(DECAY).values, color=color, label=label)
        if panel.gap and all(len(metrics[name]) for name in panel.names):
            steps, *between = combine(*(metrics[name] for name in panel.names))
            upper, lower = (Series(steps, values).smoothed(DECAY).values for values in between)
            axis.fill_between(steps, upper, lower, alpha=0.12, label="temporal gap")
            axis.set_ylim(0, 1.02)
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
