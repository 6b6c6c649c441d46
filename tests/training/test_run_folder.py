"""A run's folder belongs to one process at a time, and may be moved, copied and resumed from anywhere."""

import os
import shutil
from pathlib import Path

import pytest
from runs import Lab, metrics, run_lines, same_weights, trainer, weights
from spies import spy

from videor1 import train
from videor1.config.cli import run_main
from videor1.errors import ConfigError
from videor1.logs.lock import LOCK, FolderLock

OPTIONS = {"max_steps": 2, "save_steps": 1, "save_total_limit": 2}


def test_the_lock_is_given_back_by_whatever_ends_a_run(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main process takes it; ranks of one run share it. test_resume.py holds it against another process."""
    taken = spy(monkeypatch, FolderLock, "acquire", lambda _, lock: lock._folder)
    run_dir = lab.folder / "run"
    with pytest.raises(ConfigError, match="no folder"):
        trainer(lab.assets, run_dir, model_name_or_path="./nowhere")
    assert not run_dir.exists()
    run = trainer(lab.assets, run_dir, **OPTIONS)
    assert (run_dir / LOCK).exists()
    run.train()
    assert not (run_dir / LOCK).exists()
    for options, message in (({}, "holds a run already"), ({"resume": "checkpoints/step-9"}, "no checkpoint folder")):
        with pytest.raises(ConfigError, match=message):
            trainer(lab.assets, run_dir, **OPTIONS, **options)
        assert not (run_dir / LOCK).exists()
    assert set(taken) == {run_dir}


def assert_like(run_dir: Path, expected: Path) -> None:
    """Everything but the paths of media in rollouts.jsonl."""
    assert metrics(run_dir) == metrics(expected)
    texts = [[row["completions"] for row in run_lines(folder, "rollouts.jsonl")] for folder in (run_dir, expected)]
    assert texts[0] == texts[1]
    last = [folder / "checkpoints" / "step-2" for folder in (run_dir, expected)]
    assert same_weights(weights(last[0]), weights(last[1]))


def go_on(folder: Path | str) -> None:
    """From the first step, by the command that a stopped run prints, without any other option."""
    shutil.rmtree(Path(folder) / "checkpoints" / "step-2")
    assert run_main(train.main, ["--resume", "auto", "--output_dir", str(folder)]) == 0


def test_a_run_in_a_project_of_relative_paths(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed from another folder, copied, moved alone, and moved with its whole project: always the same run."""
    whole, project = lab.folder / "whole", lab.folder / "project"
    trainer(lab.assets, whole, **OPTIONS).train()
    shutil.copytree(lab.assets.folder, project / "lab.assets")
    monkeypatch.chdir(project)
    options = OPTIONS | {"model_name_or_path": "lab.assets/model", "dataset_name": "lab.assets/train.json"}
    trainer(lab.assets, Path("runs/one"), **options).train()
    monkeypatch.chdir(lab.folder)

    go_on("project/runs/one")
    one = project / "runs" / "one"
    assert_like(one, whole)

    copy = Path(shutil.copytree(one, lab.folder / "copy"))
    go_on(copy)
    assert_like(copy, whole)
    assert_like(one, whole)

    shutil.move(copy, project / "runs" / "two")
    go_on(project / "runs" / "two")
    shutil.move(project, lab.folder / "new")
    go_on(lab.folder / "new" / "runs" / "two")
    assert_like(lab.folder / "new" / "runs" / "two", whole)


def test_a_current_folder_whose_name_is_not_utf8(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not matter; the run's own is refused, see tests/config/test_ranges.py."""
    name = os.fsdecode(os.fsencode(lab.folder) + b"/run-\xff")
    os.mkdir(name)
    monkeypatch.chdir(name)
    trainer(lab.assets, Path("run"), **OPTIONS).train()
    trainer(lab.assets, Path("run"), resume="auto", **OPTIONS | {"max_steps": 3}).train()
    assert [row["step"] for row in run_lines(Path("run"), "metrics.jsonl")] == [1, 2, 3]
