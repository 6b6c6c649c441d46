"""Whole runs on prompts of several videos and images: T-GRPO and SFT, resumed to the bit, and what they log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runs
from runs import Lab, run_lines

from videor1.demo.assets import Assets
from videor1.training.loop import Loop

QUESTION = {"problem_type": "free-form", "solution": "<answer>red</answer>", "process": "<think>Red.</think>"}


def data(assets: Assets, folder: Path) -> Path:
    """Two clips and a still in one prompt, a conversation, a clip by its path, and a sample of which one is missing."""
    clips = [entry["path"] for entry in runs.entries(assets.train) if entry["data_type"] == "video"]
    stills = [entry["path"] for entry in runs.entries(assets.train) if entry["data_type"] == "image"]
    one, two, still = (
        {"path": clips[0], "kind": "video"},
        {"path": clips[1], "kind": "video"},
        {"path": stills[0], "kind": "image"},
    )
    rows: list[dict[str, Any]] = [
        QUESTION | {"problem": "<video> and <image> and <video>?", "media": [one, still, two | {"max_frames": 4}]},
        QUESTION
        | {
            "messages": [
                {"role": "user", "content": "<video>"},
                {"role": "assistant", "content": "I see."},
                {"role": "user", "content": "<video>?"},
            ],
            "media": [two, one],
        },
        QUESTION | {"problem": "Which?", "data_type": "video", "path": clips[2]},
        QUESTION | {"problem": "Which?", "media": [one, {"path": "gone.mp4", "kind": "video"}]},
        QUESTION | {"problem": "<image>?", "media": [one]},
        QUESTION | {"problem": "Same?", "media": [still, still], "system": "Be brief."},
    ]
    return runs.write_data(folder / "several.json", rows)


def test_a_run(lab: Lab, assets: Assets, tmp_path: Path) -> None:
    options = {"dataset_name": data(assets, tmp_path), "data__root": assets.folder, "max_steps": 6, "save_steps": 3}
    held_out = {"data__eval_path": options["dataset_name"]}
    lab.make("whole", **options, **held_out, max_completion_length=4).train()
    (evaluated,) = [row for row in runs.metrics(lab.folder / "whole") if "eval/samples" in row]
    assert (evaluated["eval/samples"], evaluated["eval/skipped"]) == (4, 1)  # a bad entry is no sample
    assert evaluated["eval/image"] is not None
    rows = {row["problem"]: row for row in run_lines(lab.folder / "whole", "rollouts.jsonl")}
    mixed = rows["<video> and <image> and <video>?"]
    first, still, last = mixed["permutation"]
    assert still is None
    assert sorted(first) == list(range(len(first)))
    assert sorted(last) == [0, 1, 2, 3]
    assert [item["kind"] for item in mixed["media"]] == ["video", "image", "video"]
    assert all(type(place) is int for place in rows["Which?"]["permutation"])
    assert "media" not in rows["Which?"]
    assert rows["Same?"]["permutation"] is None
    assert "Be brief." in rows["Same?"]["prompt"]
    (missing,) = {
        row["path"] for row in run_lines(lab.folder / "whole", "skipped.jsonl") if row["kind"] == "missing_file"
    }
    assert missing.endswith("gone.mp4")


def test_resumed_runs_and_sft(lab: Lab, assets: Assets, tmp_path: Path) -> None:
    """A run that ended before its second checkpoint goes on to the same bits; SFT trains on the same prompts."""
    options = {"dataset_name": data(assets, tmp_path), "data__root": assets.folder, "max_steps": 4, "save_steps": 2}
    for name in ("rl", "sft"):
        make = lab.make if name == "rl" else lab.sft
        make(f"{name}-whole", **options).train()
        runs.kill(make(name, **options), Loop, "optimizer_step", 4)
        make(name, **options, resume="auto").train()
        runs.assert_same_run(lab.folder / name, lab.folder / f"{name}-whole")
