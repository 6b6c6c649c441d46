"""Whole runs of SFT on conversations, resumed to the bit, and the rows that they skip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runs
from batches import opened
from runs import Lab

from videor1.demo.assets import Assets
from videor1.training.loop import Loop


def data(assets: Assets, folder: Path) -> Path:
    """Conversations with media in several turns, one that ends with the question, and rows that are none."""
    clips = [entry["path"] for entry in runs.entries(assets.train) if entry["data_type"] == "video"]
    media = [{"path": clip, "kind": "video"} for clip in clips[:2]]
    user = lambda text: {"role": "user", "content": text}  # noqa: E731
    says = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    asked = {"problem_type": "temporal grounding", "solution": '<answer>{"time": [0.5, 1]}</answer>'}
    rows: list[dict[str, Any]] = [
        {"messages": [user("<video> What?"), says("A square."), user("<video>?"), says("Two.")], "media": media},
        {"messages": [user("Two and two?"), says("4"), user("Sure?"), says("Yes.")], "data_type": "text"},
        asked
        | {
            "messages": [user("<video>"), says("I see."), user("When?")],
            "media": media[:1],
            "process": "<think>Hm.</think>",
        },
        {"messages": [user("Hello"), says("<|im_end|>")], "data_type": "text"},
        {"messages": [says("Hello")], "data_type": "text"},
        {"messages": [user("Hello"), says("<video>")], "media": media[:1]},
    ]
    return runs.write_data(folder / "talks.json", rows)


def test_a_run_and_its_resume(lab: Lab, assets: Assets, tmp_path: Path) -> None:
    options = {"dataset_name": data(assets, tmp_path), "data__root": assets.folder, "max_steps": 4, "save_steps": 2}
    lab.sft("whole", **options).train()
    runs.kill(lab.sft("cut", **options), Loop, "optimizer_step", 4)
    lab.sft("cut", **options, resume="auto").train()
    runs.assert_same_run(lab.folder / "cut", lab.folder / "whole")
    with opened(lab.sft("seen", **options | {"data__shuffle": False}), 3) as examples:
        assert [len(one.earlier) > 0 for one in examples] == [True, True, True]
    skipped = {row["kind"] for row in runs.run_lines(lab.folder / "whole", "skipped.jsonl")}
    assert {"messages", "placeholders"} <= skipped
