"""Videos that others have made: one hand-written data file, three T-GRPO steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from media import real_video
from runs import last_metrics, metrics, run_lines, trainer, weights

from videor1.demo.assets import Assets

NAMES = ("nasa.mp4", "pancake.mkv", "av1.mkv", "rotated_90.mov", "corrupted.mp4")


def test_three_steps_on_real_videos(assets: Assets, tmp_path: Path) -> None:
    paths = [real_video(name) for name in NAMES]
    data = tmp_path / "real.json"
    data.write_text(
        json.dumps(
            [
                {
                    "problem_id": path.stem,
                    "problem": "What happens first?",
                    "data_type": "video",
                    "problem_type": "multiple choice",
                    "options": ["A. The left one", "B. The right one"],
                    "solution": "<answer>A</answer>",
                    "path": path.name,
                }
                for path in paths
            ]
        )
    )
    run = trainer(
        assets,
        tmp_path / "run",
        dataset_name=data,
        data__root=paths[0].parent,
        max_steps=3,
        data__workers=1,
        video__max_pixels=100352,
        video__min_pixels=100352,
        per_device_train_batch_size=2,
        data__shuffle=False,
    )
    final = run.train()
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["nonfinite_steps"] == 0 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    (line,) = run_lines(tmp_path / "run", "skipped.jsonl")
    assert line["path"] == str(paths[-1].resolve())
    assert last_metrics(tmp_path / "run")["data/skipped"] == 1
    assert last_metrics(tmp_path / "run")[f"data/skipped/{line['kind']}"] == 1
    used = [line["problem_id"] for line in run_lines(tmp_path / "run", "rollouts.jsonl")]
    assert used == ["nasa", "pancake", "av1", "rotated_90", "nasa", "pancake"]
    assert all(line["permutation"] for line in run_lines(tmp_path / "run", "rollouts.jsonl"))
    assert all(torch.isfinite(tensor).all() for tensor in weights(final).values())
