"""What the report's charts draw."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from report_runs import decoded, drawn, lines, make_run, report, step_row

from videor1.config import TemporalConfig
from videor1.report.metrics import Series, read_metrics


def test_the_moving_average_and_the_points_under_it(tmp_path: Path) -> None:
    rows = [step_row(step) | {"kl": 1.0 if step <= 40 else 3.0} for step in range(1, 81)]
    made = report(make_run(tmp_path / "run", rows=rows))
    steps, values = drawn(made.figures["kl"], "KL")
    assert steps == list(range(1, 81))
    assert values[39] == pytest.approx(1.0)  # without the bias of a start at 0
    weights = (1 - 2 / 11) ** np.arange(50)
    assert values[49] == pytest.approx((weights[:10].sum() * 3 + weights[10:].sum()) / weights.sum(), rel=1e-5)
    faint = [trace for trace in made.figures["kl"]["data"] if trace.get("opacity") == 0.3]
    assert [decoded(trace["y"]) for trace in faint] == [[1.0] * 40 + [3.0] * 40]
    assert "exponential moving average over about 10 lines" in made.words
    assert drawn(made.figures["rate"], "learning rate")[1][-1] == pytest.approx(80e-6)  # a schedule: as it is


def test_gaps_shares_and_seconds(tmp_path: Path) -> None:
    made = report(make_run(tmp_path / "run", steps=30))
    # The gap is shaded where both are known.
    bottom, top = made.figures["accuracy"]["data"][:2]
    assert top["fill"] == "tonexty"
    assert decoded(bottom["x"]) == decoded(top["x"]) == [step for step in range(1, 31) if step % 5]
    assert decoded(bottom["y"]) == pytest.approx([0.3] * 24)
    assert all(high > 0.49 for high in decoded(top["y"]))
    held_out = made.figures["held-out"]["data"]
    assert decoded(held_out[1]["y"]) == pytest.approx([0.55, 0.6, 0.65])
    assert decoded(held_out[0]["y"]) == pytest.approx([0.3] * 3)
    assert drawn(made.figures["skipped"], "skipped: never started")[1] == pytest.approx([0.25] * 30)
    assert drawn(made.figures["skipped"], "stopped: begun and left")[1] == pytest.approx([0.1] * 30)
    phases = ["waiting for data", "rollout", "rewards", "reference policy", "update"]
    assert [trace["name"] for trace in made.figures["times"]["data"]] == phases
    assert "not the whole step" in made.words
    # Two updates a rollout: its time is shared by them. And the whole step was measured.
    again = [step_row(step) | {"time/step": 4.0} for step in range(1, 31)]
    made = report(make_run(tmp_path / "two", rows=again, num_iterations=2))
    traces = {trace["name"]: decoded(trace["y"])[-1] for trace in made.figures["times"]["data"]}
    other = 4 - 1.5 - (0.1 + 2 + 0.05 + 0.5) / 2
    assert [traces[name] for name in ("rollout", "update", "other")] == pytest.approx([1.0, 1.5, other])
    assert "Seconds a step 4 " in made.words
    assert "not the whole step" not in made.words


def test_values_of_zero_alone_are_drawn(tmp_path: Path) -> None:
    """A logarithmic axis has no 0."""
    still = [step_row(step) | {"grad_norm": 0.0} for step in range(1, 31)]
    some, none = make_run(tmp_path / "some"), make_run(tmp_path / "none", rows=still)
    assert report(some).figures["grad"]["layout"]["yaxis"]["type"] == "log"
    alone = report(none).figures["grad"]
    assert alone["layout"]["yaxis"].get("type", "linear") == "linear"
    assert drawn(alone, "gradient norm")[1] == [0.0] * 30
    both = report(some, none)
    assert both.figures["grad"]["layout"]["yaxis"]["type"] == "log"
    assert "All 0, and so not on this axis, in none." in both.words


def test_several_runs_in_the_same_charts(tmp_path: Path) -> None:
    one = make_run(tmp_path / "x" / "run", steps=30, learning_rate=1e-5)
    other = make_run(tmp_path / "y" / "run", steps=60, temporal=TemporalConfig(rule="threshold"))
    made = report(one, other)
    traces = made.figures["reward"]["data"]
    assert [trace["name"] for trace in traces if trace.get("showlegend") is not False] == ["x/run", "y/run"]
    assert {(t["legendgroup"], t["line"]["color"]) for t in traces} == {("x/run", "#3b7dd8"), ("y/run", "#d9660a")}
    assert {t["line"]["dash"] for t in traces if "dash" in t["line"]} == {"solid", "dash", "dot"}
    assert "Solid: total, dashed: accuracy, dotted: format." in made.words
    assert [t["orientation"] for t in made.figures["times"]["data"]] == ["h"] * 5
    assert "Option x/run y/run max_steps 30 60 learning_rate 1e-05 1e-06 temporal.rule margin threshold" in made.words
    assert "2 runs compared" in made.words
    like = make_run(tmp_path / "like", learning_rate=1e-5)
    assert "In no option." in report(one, like).words
    (like / "config.yaml").unlink()
    assert "max_steps 30 (no config.yaml)" in report(one, like).words


def test_a_long_run_is_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    run, row = make_run(tmp_path / "run", steps=1, max_steps=6000), step_row(1)
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 6001):
            spike = {"entropy": 99.0} if step == 4321 else {}
            file.write(json.dumps(row | {"step": step, "kl": math.sin(step)} | spike) + "\n")
    made = report(run)
    assert "The longest series has 6,000 points; at most 2,000 of each are drawn" in made.words
    for figure in made.figures.values():
        assert all(len(decoded(trace["x"])) <= 2000 for trace in figure["data"])
    faint = next(trace for trace in made.figures["entropy"]["data"] if trace.get("opacity") == 0.3)
    assert max(decoded(faint["y"])) == 99.0  # what stands out is kept
    steps, _ = drawn(made.figures["entropy"], "entropy")
    assert (steps[0], steps[-1]) == (1, 6000)
    assert made.size - len(made.parts["script"]) < 3e6  # the plain scripts are plotly's, and the page's few lines


def test_series(tmp_path: Path) -> None:
    series = Series(np.arange(1, 101), np.arange(100.0))
    assert series.thinned(100) is series
    thin = series.thinned(10)
    assert len(thin) <= 10
    assert {thin.values[0], thin.values[-1]} == {0.0, 99.0}
    assert series.spread(5).steps.tolist() == [1, 26, 51, 75, 100]
    few = Series(np.arange(3), np.array([1.0, 5.0, 2.0]))
    assert few.smoothed() is few.smoothed(0.5) is few
    assert series.smoothed(0.5).values[:3] == pytest.approx([0.0, (0.5 * 0 + 1) / 1.5, (0.25 * 0 + 0.5 * 1 + 2) / 1.75])
    # Of several lines about a step the last counts.
    lines(tmp_path / "metrics.jsonl", [{"step": 2, "kl": 1.0}, {"step": 1, "kl": 3.0}, {"step": 2, "kl": 2.0}])
    series = read_metrics(tmp_path / "metrics.jsonl", ["kl"])["kl"]
    assert (series.steps.tolist(), series.values.tolist()) == ([1, 2], [3.0, 2.0])
