"""Videos that others have made: one hand-written data file, three T-GRPO steps."""

from __future__ import annotations

from pathlib import Path

import torch
from media import real_video
from runs import last_metrics, metrics, run_lines, trainer, weights, write_data

from videor1.demo.assets import Assets

NAMES = ("nasa.mp4", "pancake.mkv", "av1.mkv", "rotated_90.mov", "corrupted.mp4")
QUESTION = {"problem": "What happens first?", "data_type": "video", "problem_type": "multiple choice"}
QUESTION |= {"options": ["A. The left one", "B. The right one"], "solution": "<answer>A</answer>"}


def test_three_steps_on_real_videos(assets: Assets, tmp_path: Path) -> None:
    paths = [real_video(name) for name in NAMES]
    questions = [QUESTION | {"problem_id": path.stem, "path": path.name} for path in paths]
    run = tmp_path / "run"
    data = {"dataset_name": write_data(tmp_path / "real.json", questions), "data__root": paths[0].parent}
    data |= {"data__workers": 1, "data__shuffle": False, "video__max_pixels": 50176, "video__min_pixels": 50176}
    final = trainer(assets, run, **data, max_steps=3, per_device_train_batch_size=2).train()
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["nonfinite_steps"] == 0 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    (line,) = run_lines(run, "skipped.jsonl")
    assert line["path"] == str(paths[-1].resolve())
    assert last_metrics(run)["data/skipped"] == last_metrics(run)[f"data/skipped/{line['kind']}"] == 1
    rollouts = run_lines(run, "rollouts.jsonl")
    assert " ".join(row["problem_id"] for row in rollouts) == "nasa pancake av1 rotated_90 nasa pancake"
    assert all(rollout["permutation"] for rollout in rollouts)
    assert all(torch.isfinite(tensor).all() for tensor in weights(final).values())
