"""The picture of a run: whatever its metrics file holds by now."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from videor1.errors import DataError
from videor1.logs.jsonl import JsonlWriter
from videor1.report.curves import draw_curves

STEP = {
    "temporal/p": 0.5, "temporal/p_shuffled": 0.3, "reward": 1.4, "rewards/accuracy/mean": 0.5,
    "rewards/format/mean": 0.9, "kl": 0.01, "entropy": 1.1, "completions/mean_length": 22.5,
    "completions/max_length": 40, "time/rollout": 0.6, "time/update": 0.4, "time/data": 0.0,
}  # fmt: skip
Panels = dict[str, dict[str, tuple[list[float], list[float]]]]


def drawn(folder: Path, text: str) -> Panels:
    """What stands in each panel: title -> label -> (x, y)."""
    (folder / "metrics.jsonl").write_text(text)
    seen: Panels = {}
    close = plt.close

    def look(figure: Any) -> None:
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


def test_a_run_of_many_steps_is_smoothed_and_its_gap_shaded(tmp_path: Path) -> None:
    rows = [{"step": step, **STEP, "reward": 1 + step / 40} for step in range(1, 41)]
    rows[9] |= {"eval/ordered": 0.7, "eval/shuffled": 0.3}
    rows[39] |= {"eval/ordered": 0.9, "eval/shuffled": 0.5}
    seen = drawn(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    assert list(seen["Accuracy while training"]) == ["p, frames in order", "p~, shuffled, where known", "temporal gap"]
    held_out = seen["Held-out accuracy"]
    assert held_out["frames in order"] == ([10, 40], [0.7, 0.9])
    assert held_out["shuffled"][1] == [0.3, 0.5]
    assert "temporal gap" in held_out
    steps, values = seen["Reward"]["total"]
    assert steps == list(range(1, 41))
    assert 1.5 < values[-1] < 2.0  # the mean of the last steps, not the last
    assert values == sorted(values)
    assert list(seen["Seconds a step"]) == ["rollout", "update", "waiting for data"]


def test_a_run_in_progress(tmp_path: Path) -> None:
    """What is missing, null or NaN is left out, and so is the last line, which is half written."""
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"reward": 1.0, "temporal/p": 0.5, "temporal/p_shuffled": None, "entropy": 1.1})
    writer.write(2, {"reward": math.nan, "temporal/p": 0.6})
    writer.close()
    rows = [
        {"step": 3, "reward": math.nan, "kl": math.inf, "temporal/p": math.nan, "temporal/p_shuffled": 0.1},
        {"step": 4, "reward": 2.0},
        {"step": 5},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "curves.png").write_text("an older picture")
    seen = drawn(tmp_path, (tmp_path / "metrics.jsonl").read_text() + lines + '{"step": 6, "rew')
    assert seen["Reward"] == {"total": ([1, 4], [1.0, 2.0])}
    assert seen["KL to the reference, entropy (nats)"] == {"entropy": ([1], [1.1])}
    training = seen["Accuracy while training"]
    assert training["p, frames in order"] == ([1, 2], [0.5, 0.6])
    assert training["p~, shuffled, where known"] == ([3], [0.1])
    assert seen["Held-out accuracy"] == {}


def test_an_empty_file(tmp_path: Path) -> None:
    assert all(lines == {} for lines in drawn(tmp_path, "").values())


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        draw_curves(tmp_path)
