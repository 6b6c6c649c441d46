"""A run's folder belongs to one process at a time, and may be moved, copied and resumed from anywhere."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from patience import PATIENCE
from runs import metrics, run_lines, same_weights, sft_flags, start, train_flags, trainer, wait_for_lines, weights

from videor1 import sft, train
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.logs.lock import LOCK, FolderLock

OPTIONS = {"max_steps": 4, "save_steps": 1, "save_total_limit": 4}


@pytest.mark.parametrize("module", ["videor1.train", "videor1.sft"])
def test_a_second_process_is_refused_and_changes_nothing(
    module: str, assets: Assets, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Until the first one is killed: then a resume goes on at once."""
    flags, command = (train_flags, train) if module == "videor1.train" else (sft_flags, sft)
    long = flags(assets, tmp_path, max_steps=2000, save_steps=2)
    process = start(module, long)
    wait_for_lines(process, tmp_path / "metrics.jsonl", 3)
    for options in (["--resume=auto"], []):
        assert run_main(command.main, [*long, *options]) == 2
        message = capfd.readouterr().err.strip().splitlines()[-1]
        assert f"is in use by process {process.pid} on " in message
        assert f"({module}, since " in message
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    steps = [row["step"] for row in metrics(tmp_path)]
    assert steps == sorted(set(steps))  # no line twice
    assert run_main(command.main, [*flags(assets, tmp_path, max_steps=steps[-1] + 1), "--resume=auto"]) == 0
    after = [row["step"] for row in metrics(tmp_path)]
    assert after == list(range(1, steps[-1] + 2))
    assert not (tmp_path / LOCK).exists()


def test_the_lock_is_given_back_by_whatever_ends_a_run(assets: Assets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        trainer(assets, tmp_path / "run", model_name_or_path="./nowhere")
    assert not (tmp_path / "run").exists()
    run = trainer(assets, tmp_path / "run", **OPTIONS)
    assert (tmp_path / "run" / LOCK).exists()
    run.train()
    assert not (tmp_path / "run" / LOCK).exists()
    with pytest.raises(ConfigError, match="holds a run already"):
        trainer(assets, tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run" / LOCK).exists()
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        trainer(assets, tmp_path / "run", resume="checkpoints/step-99", **OPTIONS)
    assert not (tmp_path / "run" / LOCK).exists()


def test_ranks_of_one_run_share_the_lock(assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main process takes it."""
    taken = []
    acquire = FolderLock.acquire
    monkeypatch.setattr(FolderLock, "acquire", lambda self: (taken.append(self._folder), acquire(self)))
    trainer(assets, tmp_path / "run", max_steps=1).train()
    assert set(taken) == {tmp_path / "run"}


@pytest.fixture
def whole(assets: Assets, tmp_path: Path) -> Path:
    trainer(assets, tmp_path / "whole", **OPTIONS).train()
    return tmp_path / "whole"


def assert_like(run_dir: Path, expected: Path) -> None:
    """Everything but the paths of media in rollouts.jsonl."""
    assert metrics(run_dir) == metrics(expected)
    texts = [[row["completions"] for row in run_lines(folder, "rollouts.jsonl")] for folder in (run_dir, expected)]
    assert texts[0] == texts[1]
    last = [folder / "checkpoints" / "step-4" for folder in (run_dir, expected)]
    assert same_weights(weights(last[0]), weights(last[1]))


def go_on(folder: Path | str) -> None:
    """By the command that a stopped run prints, without any other option."""
    assert run_main(train.main, ["--resume", "auto", "--output_dir", str(folder)]) == 0


def test_a_run_in_a_project_of_relative_paths(
    assets: Assets, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed from another folder, moved alone, copied, and moved with its whole project: always the same run."""
    project = tmp_path / "project"
    shutil.copytree(assets.folder, project / "assets")
    monkeypatch.chdir(project)
    options = OPTIONS | {"model_name_or_path": "assets/model", "dataset_name": "assets/train.json"}
    trainer(assets, Path("runs/one"), **options).train()
    monkeypatch.chdir(tmp_path)

    def back(folder: Path) -> Path:
        for step in (3, 4):
            shutil.rmtree(folder / "checkpoints" / f"step-{step}")
        return folder

    one = back(project / "runs" / "one")
    go_on("project/runs/one")
    assert_like(one, whole)

    copy = back(Path(shutil.copytree(one, tmp_path / "copy")))
    go_on(copy)
    assert_like(copy, whole)
    assert_like(one, whole)

    shutil.move(one, tmp_path / "moved")
    go_on(back(tmp_path / "moved"))
    assert_like(tmp_path / "moved", whole)

    shutil.copytree(tmp_path / "moved", project / "runs" / "two")
    go_on(back(project / "runs" / "two"))
    shutil.move(project, tmp_path / "new")
    go_on(back(tmp_path / "new" / "runs" / "two"))
    assert_like(tmp_path / "new" / "runs" / "two", whole)


def test_a_folder_whose_name_is_not_utf8(assets: Assets, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")
    with pytest.raises(SystemExit) as ended:
        run_main(train.main, train_flags(assets, Path(name), max_steps=1))
    assert ended.value.code == 2
    assert "output_dir: expected a folder whose name is UTF-8 text" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_current_folder_whose_name_is_not_utf8(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.fsencode(tmp_path) + b"/here-\xff"
    os.mkdir(here)
    monkeypatch.chdir(os.fsdecode(here))
    trainer(assets, Path("run"), **OPTIONS).train()
    assert [row["step"] for row in run_lines(Path("run"), "metrics.jsonl")] == [1, 2, 3, 4]
    trainer(assets, Path("run"), resume="auto", **OPTIONS | {"max_steps": 5}).train()
