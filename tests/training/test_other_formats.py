"""A T-GRPO step on rows of verl's and ms-swift's format is the step on the same rows in this trainer's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import Lab, run_lines, weights
from streams import parquet

from videor1.demo.assets import Assets

TEXT = "First <video>, then <video>: which?"


def rows_of(name: str, clips: list[str]) -> list[dict[str, Any]]:
    """Two rows of two videos each, in a format."""
    rows: list[dict[str, Any]] = []
    for number, pair in enumerate((clips[:2], clips[1::-1])):
        turns = [{"role": "user", "content": TEXT}]
        told = {"problem_type": "free-form", "problem_id": number}
        videos = [{"video": pair[0], "max_frames": None}, {"video": pair[1], "max_frames": 4}]
        media = [{"path": pair[0], "kind": "video"}, {"path": pair[1], "kind": "video", "max_frames": 4}]
        rows.append(
            {
                "verl": {"prompt": turns, "videos": videos, "reward_model": {"style": "rule", "ground_truth": "red"}}
                | {"data_source": "", "extra_info": told},
                "swift": {"messages": turns, "videos": videos, "solution": "red"} | told,
                "video-r1": {"problem": TEXT, "media": media, "solution": "<answer>red</answer>"} | told,
            }[name]
        )
    return rows


def write(name: str, clips: list[str], folder: Path, kind: str) -> Path:
    """Such rows as a JSON list or as Parquet."""
    (folder / name).mkdir()
    path = folder / name / f"data.{kind}"
    if kind == "parquet":
        parquet(path, rows_of(name, clips))
    else:
        path.write_text(json.dumps(rows_of(name, clips)), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "kind"), [("verl", "parquet"), ("swift", "json")])
def test_a_step_on_two_videos(
    name: str, kind: str, lab: Lab, assets: Assets, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clips = [entry["path"] for entry in runs.entries(assets.train) if entry["data_type"] == "video"]
    made = {}
    for format in (name, "video-r1"):
        data = write(format, clips, tmp_path, kind)
        capfd.readouterr()
        last = lab.make(
            format, dataset_name=data, data__root=assets.folder, max_steps=1, max_completion_length=4
        ).train()
        notes = [line for line in capfd.readouterr().err.splitlines() if "data.format auto" in line]
        assert len(notes) == 1
        assert str(data) in notes[0]
        assert f"data.format auto: {format} (" in notes[0]
        made[format] = run_lines(lab.folder / format, "rollouts.jsonl"), weights(last)
    (lines, trained), (expected, reference) = made.values()
    assert [len(line["permutation"]) for line in lines] == [2] * len(lines)
    for field in ("prompt", "permutation", "media", "completions", "problem_id"):
        assert [line.get(field) for line in lines] == [line.get(field) for line in expected]
    assert trained.keys() == reference.keys()
    assert all((trained[key] == reference[key]).all() for key in trained)
