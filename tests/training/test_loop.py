"""Steps that are not finite, disks that are full, and runs that cannot begin."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from runs import largest_file, last_metrics, metrics, same_weights, start, train_flags, trainer

import videor1.training
import videor1.training.checkpoint
import videor1.training.optim
import videor1.training.tgrpo
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError, TrainingStopped
from videor1.logs.jsonl import JsonlWriter
from videor1.train import main
from videor1.training.checkpoint import checkpoints
from videor1.training.loop import Loop
from videor1.training.tgrpo import Trainer


def snapshot(run: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and optimizer state."""
    parameters = run.model.trainable()
    moments = videor1.training.optim.state_tensors(run.optimizer, parameters)
    return {n: p.detach().clone() for n, p in parameters.items()}, {n: t.clone() for n, t in moments.items()}


def poison_loss(monkeypatch: pytest.MonkeyPatch, run: Trainer, steps: set[int], value: float) -> None:
    """The loss of these steps (from 0) is multiplied by NaN or Inf."""
    original = videor1.training.tgrpo.tgrpo_loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return dataclasses.replace(result, loss=result.loss + value) if run.step in steps else result

    monkeypatch.setattr(videor1.training.tgrpo, "tgrpo_loss", poisoned)


def poison_gradient(_: pytest.MonkeyPatch, run: Trainer, steps: set[int], value: float) -> None:
    """One element of one gradient is NaN or Inf while the loss is finite."""
    parameter = list(run.model.trainable().values())[-1]

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        if run.step not in steps:
            return None
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    parameter.register_hook(hook)


def record_states(monkeypatch: pytest.MonkeyPatch, run: Trainer) -> list[Any]:
    """Weights and optimizer before the first and after every step."""
    states = [snapshot(run)]
    original = run.optimizer_step

    def recording(*args: Any, **options: Any) -> None:
        try:
            original(*args, **options)
        finally:
            states.append(snapshot(run))

    monkeypatch.setattr(run, "optimizer_step", recording)
    return states


def same(one: Any, other: Any) -> bool:
    return all(same_weights(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_a_nonfinite_step_changes_nothing(
    poison: Callable[..., None], value: float, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(assets, tmp_path, max_steps=6, max_nonfinite_steps=2, gradient_accumulation_steps=2)
    poison(monkeypatch, run, {1, 2 + 1}, value)
    states = record_states(monkeypatch, run)
    run.train()
    changed = [not same(before, after) for before, after in itertools.pairwise(states)]
    assert changed == [True, False, True, False, True, True]  # and two in all, never in a row, do not stop the run
    assert [row["nonfinite_steps"] for row in metrics(tmp_path)] == [0, 1, 1, 2, 2, 2]
    assert metrics(tmp_path)[1]["grad_norm"] is None  # JSON has no NaN


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_too_many_nonfinite_steps_stop_the_run(
    poison: Callable[..., None], assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with two updates a rollout, and lines averaged over more steps than there were.

    Step 4 is due for a checkpoint, but is not finite."""
    run = trainer(
        assets, tmp_path, max_steps=20, max_nonfinite_steps=3, save_steps=2, num_iterations=2, logging_steps=10
    )
    poison(monkeypatch, run, set(range(3, 20)), math.nan)
    with pytest.raises(TrainingStopped, match=r"3 steps in a row .* the newest checkpoint is \S+step-2\. Lower"):
        run.train()
    assert run.step == 6
    assert last_metrics(tmp_path)["nonfinite_steps"] == 3
    assert last_metrics(tmp_path)["step"] == 6
    assert [step for step, _ in checkpoints(tmp_path)] == [2]


def test_the_row_of_nonfinite_steps_survives_a_resume(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop in the middle of them saves, so that it is known after the resume how many there were."""
    options: dict[str, Any] = {"max_steps": 6, "max_nonfinite_steps": 3, "save_steps": 1}
    run = trainer(assets, tmp_path, **options)
    poison_gradient(monkeypatch, run, {2, 3, 4, 5}, math.nan)
    original = run.train_batch

    def batch() -> None:
        original()
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run, "train_batch", batch)
    with pytest.raises(KeyboardInterrupt, match="step-4"):
        run.train()
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2, 4]  # 1 is the newest that a finite step has followed
    run = trainer(assets, tmp_path, resume="auto", **options)
    poison_gradient(monkeypatch, run, {4}, math.nan)
    with pytest.raises(TrainingStopped):
        run.train()
    assert run.step == 5


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in checkpoints(run_dir)]


def watch(monkeypatch: pytest.MonkeyPatch, run: Trainer) -> list[tuple[int, list[int]]]:
    """(step, the steps of the checkpoints after it) of every batch."""
    seen: list[tuple[int, list[int]]] = []
    original = run._save

    def saving(**how: bool) -> Path:
        path = original(**how)
        seen.append((run.step, steps(run.run_dir)))
        return path

    monkeypatch.setattr(run, "_save", saving)
    return seen


@pytest.mark.parametrize("limit", [1, 2])
def test_nonfinite_steps_push_out_no_checkpoint(
    limit: int, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Steps 4 to 7 of 9 are not finite: nothing is saved in them, and 2 stays until a step after 3 is finite."""
    options = {"max_steps": 9, "max_nonfinite_steps": 5, "save_steps": 1, "save_total_limit": limit}
    run = trainer(assets, tmp_path, **options)
    poison_gradient(monkeypatch, run, {3, 4, 5, 6}, math.nan)
    seen = watch(monkeypatch, run)
    run.train()
    assert seen[2:] == [(3, [2, 3]), *((step, [2, 3]) for step in (4, 5, 6, 7)), (8, [3, 8]), (9, [8, 9])]
    assert "step 5: no checkpoint, since the step was not finite" in capfd.readouterr().err


def test_the_one_checkpoint_before_nonfinite_steps_goes_after_a_finite_one(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(assets, tmp_path, max_steps=7, save_steps=3, save_total_limit=1)
    seen: list[list[int]] = []
    original = run._report
    monkeypatch.setattr(run, "_report", lambda row, **how: (seen.append(steps(tmp_path)), original(row, **how)))
    run.train()
    assert seen == [[], [], [], [3], [3], [3], [6]]  # before each step's checkpoint
    assert steps(tmp_path) == [6, 7]


def test_the_message_tells_a_checkpoint_that_no_finite_step_has_followed(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(assets, tmp_path, max_steps=9, max_nonfinite_steps=2, save_steps=2, save_total_limit=1)
    poison_gradient(monkeypatch, run, {4, 5}, math.nan)
    with pytest.raises(TrainingStopped, match=r"no step after the newest .*step-4, was finite.* before it is .*step-2"):
        run.train()
    assert steps(tmp_path) == [2, 4]


def test_the_message_without_a_checkpoint(assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(assets, tmp_path, max_steps=9, max_nonfinite_steps=1)
    poison_gradient(monkeypatch, run, {0}, math.nan)
    with pytest.raises(TrainingStopped, match="there is no checkpoint yet"):
        run.train()
    assert steps(tmp_path) == []


def test_the_last_step_is_saved_though_it_was_not_finite_and_pushes_nothing_out(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(assets, tmp_path, max_steps=5, save_steps=2, save_total_limit=1)
    poison_gradient(monkeypatch, run, {4}, math.nan)
    final = run.train()
    assert final.name == "step-5"
    assert steps(tmp_path) == [2, 4, 5]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["model", "optimizer", "state", "sync"])
def test_a_full_disk_while_saving(
    place: str, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second of three checkpoints fails: the first survives, the run goes on and counts it."""
    run = trainer(assets, tmp_path, max_steps=5, save_steps=2)
    full = OSError(errno.ENOSPC, "No space left on device")
    seen: dict[str, Any] = {}
    original = run._save

    def saving(**how: bool) -> Path:
        if run.step != 4:
            return original(**how)
        before = contents(tmp_path / "checkpoints")
        with monkeypatch.context() as patch:
            if place == "model":  # some of it is written

                def half(model: Any, folder: Path) -> None:
                    (folder / "model.safetensors").write_bytes(b"half")
                    raise full

                patch.setattr(videor1.training.checkpoint, "save_model", half)
                original(**how)
            elif place == "optimizer":  # 4.4 MB of weights fit, 8.8 MB of moments do not
                with largest_file(6_000_000):
                    original(**how)
            elif place == "state":

                def fail(*_: Any, **__: Any) -> str:
                    raise full

                patch.setattr(videor1.training.checkpoint.json, "dumps", fail)
                original(**how)
            else:

                def no_sync(_: Path) -> None:
                    raise full

                patch.setattr(videor1.training.checkpoint, "_sync", no_sync)
                original(**how)
        seen["unchanged"] = contents(tmp_path / "checkpoints") == before
        seen["names"] = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        return tmp_path

    monkeypatch.setattr(run, "_save", saving)
    run.train()
    assert seen == {"unchanged": True, "names": ["step-2"]}
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 5]
    assert last_metrics(tmp_path)["failed_checkpoints"] == 1
    assert "checkpoint step-4 could not be written" in capfd.readouterr().err


def test_a_full_disk_at_the_last_checkpoint(assets: Assets, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with largest_file(1_000_000):
        code = run_main(main, train_flags(assets, tmp_path, max_steps=2))
    assert code == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: checkpoint step-2 could not be written to {tmp_path / 'checkpoints'}: ")
    assert error.endswith("there is no checkpoint yet")
    assert list((tmp_path / "checkpoints").iterdir()) == []
    # With room again, the run goes on as if it had not happened.
    assert run_main(main, train_flags(assets, tmp_path, max_steps=2, resume="auto")) == 0


def test_a_full_disk_at_a_line_of_metrics(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = JsonlWriter.write

    def write(self: JsonlWriter, step: int, row: Any) -> None:
        if self.path.name == "metrics.jsonl" and step == 3:
            self._file.write(b'{"half')
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, step, row)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlWriter, "write", write)
        code = run_main(main, train_flags(assets, tmp_path, max_steps=4, save_steps=2))
    kept = tmp_path / "checkpoints" / "step-2"
    assert code == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {tmp_path} cannot be written to: ")
    assert error.endswith(f"the last whole checkpoint is {kept}")
    run = trainer(assets, tmp_path, max_steps=4, save_steps=2, resume="auto")
    run.train()
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]


def test_other_errors_of_the_system_are_not_renamed(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Loop) -> None:
        raise OSError(errno.ECHILD, "a bug")

    monkeypatch.setattr(Trainer, "train_batch", broken)
    with pytest.raises(OSError, match="a bug"):
        trainer(assets, tmp_path, max_steps=1).train()


def test_unwritable_output_dir_is_one_message(
    assets: Assets, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run_main(main, train_flags(assets, tmp_path / "file" / "run", max_steps=1)) == 2
    assert capfd.readouterr().err.startswith("error: output_dir: ")


def test_a_second_ctrl_c_ends_at_once(assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(assets, tmp_path, max_steps=3)
    original = run.train_batch

    def batch() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        original()

    monkeypatch.setattr(run, "train_batch", batch)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.step == 0
    assert checkpoints(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_cannot_save_says_so(assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(assets, tmp_path, max_steps=3)
    original = run.train_batch

    def batch() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        original()

    monkeypatch.setattr(run, "train_batch", batch)
    with largest_file(1_000_000), pytest.raises(TrainingStopped, match=r"step-1 could not be written"):
        run.train()


def test_steps_follow_from_the_epochs(assets: Assets, tmp_path: Path) -> None:
    """4 samples, 2 prompts a rollout of 2 updates, 1.5 epochs: 3 rollouts, 6 steps."""
    run = trainer(
        assets, tmp_path, num_train_epochs=1.5, per_device_train_batch_size=2, num_iterations=2, save_only_model=True
    )
    final = run.train()
    assert run.step == run.total_steps == 6
    assert last_metrics(tmp_path)["data/draws"] == 6
    assert not (final / "trainer").exists()
    with pytest.raises(ConfigError, match="save_only_model"):
        trainer(assets, tmp_path, resume="auto").train()


def test_averaged_lines_equal_the_means_of_single_ones(assets: Assets, tmp_path: Path) -> None:
    trainer(assets, tmp_path / "each", max_steps=5).train()
    trainer(assets, tmp_path / "every", max_steps=5, logging_steps=2).train()
    each, every = metrics(tmp_path / "each"), metrics(tmp_path / "every")
    assert [row["step"] for row in every] == [2, 4, 5]
    assert every[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2, rel=1e-12)
    assert every[1]["learning_rate"] == pytest.approx((each[2]["learning_rate"] + each[3]["learning_rate"]) / 2)
    assert every[1]["data/draws"] == each[3]["data/draws"]
    assert every[2] == each[4]


def test_the_command_ends_well(assets: Assets, tmp_path: Path) -> None:
    """The one run as a real command that is left alone."""
    process = start("videor1.train", train_flags(assets, tmp_path, max_steps=2))
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert f"Saved {tmp_path / 'checkpoints' / 'step-2'}" in stdout
    assert f"Report: {tmp_path / 'report.html'}" in stdout
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "skipped.jsonl", "curves.png", "report.html"):
        assert (tmp_path / name).exists(), name
