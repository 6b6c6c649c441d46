"""The picture of a run: whatever its metrics file holds by now."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from videor1.errors import DataError
from videor1.logs.jsonl import JsonlWriter
from videor1.report.curves import draw_curves

STEP = {
    "temporal/p": 0.5,
    "temporal/p_shuffled": 0.3,
    "reward": 1.4,
    "rewards/accuracy/mean": 0.5,
    "rewards/format/mean": 0.9,
    "kl": 0.01,
    "entropy": 1.1,
    "completions/mean_length": 22.5,
    "completions/max_length": 40,
    "time/rollout": 0.6,
    "time/update": 0.4,
    "time/data": 0.0,
}
EVAL = {"eval/ordered": 0.7, "eval/shuffled": 0.3}


def drawn(folder: Path, text: str) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """What stands in each panel: title -> label -> (x, y)."""
    import matplotlib.pyplot as plt

    (folder / "metrics.jsonl").write_text(text)
    seen = {}
    close = plt.close

    def look(figure) -> None:
        for axis in figure.axes:
            lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
            lines |= {c.get_label(): ([], []) for c in axis.collections}
            seen[axis.get_title(loc="left")] = {label: xy for label, xy in lines.items() if label[0] != "_"}
        close(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", look)
        path = draw_curves(folder)
    assert path == folder / "curves.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
        picture.load()
    assert not plt.get_fignums()
    assert len(seen) == 6
    return seen


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_run_of_many_steps_is_smoothed_and_its_gap_shaded(tmp_path: Path) -> None:
    rows = [{"step": step, **STEP, "reward": 1 + step / 40} for step in range(1, 41)]
    rows[9] |= EVAL
    rows[39] |= {name: value + 0.2 for name, value in EVAL.items()}
    seen = drawn(tmp_path, lines_of(rows))
    assert list(seen["Accuracy while training"]) == ["p, frames in order", "p~, shuffled, where known", "temporal gap"]
    held_out = seen["Held-out accuracy"]
    assert held_out["frames in order"] == ([10, 40], [0.7, pytest.approx(0.9)])
    assert held_out["shuffled"][1] == [0.3, 0.5]
    assert "temporal gap" in held_out
    steps, values = seen["Reward"]["total"]
    assert steps == list(range(1, 41))
    assert 1.5 < values[-1] < 2.0  # the mean of the last steps, not the last
    assert values == sorted(values)
    assert list(seen["Seconds a step"]) == ["rollout", "update", "waiting for data"]


def test_one_row(tmp_path: Path) -> None:
    seen = drawn(tmp_path, lines_of([{"step": 1, **STEP}]))
    assert seen["KL to the reference, entropy (nats)"] == {"KL": ([1], [0.01]), "entropy": ([1], [1.1])}
    assert seen["Held-out accuracy"] == {}


def test_an_empty_file(tmp_path: Path) -> None:
    assert all(lines == {} for lines in drawn(tmp_path, "").values())


def test_missing_names_null_and_nan_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "reward": 1.0, "temporal/p": 0.5, "temporal/p_shuffled": None},
        {"step": 2, "reward": None, "temporal/p": 0.6},
        {"step": 3, "reward": math.nan, "kl": math.inf, "temporal/p": math.nan, "temporal/p_shuffled": 0.1},
        {"step": 4, "reward": 2.0},
        {"step": 5},
    ]
    seen = drawn(tmp_path, lines_of(rows))
    assert seen["Reward"] == {"total": ([1, 4], [1.0, 2.0])}
    assert seen["KL to the reference, entropy (nats)"] == {}
    training = seen["Accuracy while training"]
    assert training["p, frames in order"] == ([1, 2], [0.5, 0.6])
    assert training["p~, shuffled, where known"] == ([3], [0.1])


def test_a_run_in_progress_whose_last_line_is_half_written(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        writer.write(step, {**STEP, "reward": math.nan if step == 1 else 1.5})
    writer.close()
    (tmp_path / "curves.png").write_text("an older picture")
    seen = drawn(tmp_path, (tmp_path / "metrics.jsonl").read_text() + '{"step": 3, "rew')
    assert seen["Reward"]["total"] == ([2], [1.5])


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        draw_curves(tmp_path)
