"""Steps that are not finite, disks that are full, and runs that cannot begin."""

import contextlib
import dataclasses
import errno
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from runs import Lab, ctrl_c, largest_file, last_metrics, same_weights, start, train_flags
from spies import spy, wrap

import videor1.training.checkpoint
import videor1.training.tgrpo
from videor1.config.cli import run_main
from videor1.errors import ConfigError, TrainingStopped
from videor1.logs.jsonl import JsonlWriter
from videor1.train import main
from videor1.training.checkpoint import checkpoints
from videor1.training.optim import state_tensors
from videor1.training.tgrpo import Trainer

Poison = Callable[[pytest.MonkeyPatch, Trainer, Any, float], None]


def poison_loss(patch: pytest.MonkeyPatch, run: Trainer, steps: Any, value: float = math.nan) -> None:
    """The loss of these steps (from 0) is NaN or Inf."""

    def poisoned(original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return dataclasses.replace(result, loss=result.loss + value) if run.step in steps else result

    wrap(patch, videor1.training.tgrpo, "tgrpo_loss", poisoned)


def poison_gradient(_: pytest.MonkeyPatch, run: Trainer, steps: Any, value: float = math.nan) -> None:
    """One element of one gradient is NaN or Inf while the loss is finite."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] += value if run.step in steps else 0.0
        return gradient

    list(run.model.trainable().values())[-1].register_hook(hook)


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in checkpoints(run_dir)]


@pytest.mark.parametrize(
    ("poison", "value"), [(poison_loss, math.nan), (poison_loss, math.inf), (poison_gradient, math.inf)]
)
def test_a_nonfinite_step_changes_nothing(
    poison: Poison, value: float, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights nor the optimizer; and two in all, never in a row, do not stop the run."""
    run = lab.make(max_steps=5, max_nonfinite_steps=2, gradient_accumulation_steps=2)
    poison(monkeypatch, run, {1, 3}, value)

    def state(_: None) -> dict[str, torch.Tensor]:
        tensors = state_tensors(run.optimizer, run.model.trainable()) | run.model.trainable()
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    states = spy(monkeypatch, run, "train_batch", state)
    run.train()
    changed = [not same_weights(before, after) for before, after in itertools.pairwise(states)]
    assert changed == [False, True, False, True]
    assert [row["nonfinite_steps"] for row in lab.rows()] == [0, 1, 1, 2, 2]
    assert lab.rows()[1]["grad_norm"] is None  # JSON has no NaN


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_too_many_nonfinite_steps_stop_the_run(poison: Poison, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4 is due for a checkpoint, but is not finite."""
    options = {"max_nonfinite_steps": 3, "save_steps": 2, "num_iterations": 2, "logging_steps": 10}
    run = lab.make(max_steps=20, **options)
    poison(monkeypatch, run, range(3, 20), math.nan)
    with pytest.raises(TrainingStopped, match=r"3 steps in a row .* the newest checkpoint is .+step-2\. Lower"):
        run.train()
    assert run.step == last_metrics(lab.folder)["step"] == 6
    assert last_metrics(lab.folder)["nonfinite_steps"] == 3
    assert steps(lab.folder) == [2]


@pytest.mark.parametrize(
    ("options", "poisoned", "message", "kept"),
    [
        ({"max_steps": 9, "max_nonfinite_steps": 2}, {4, 5}, r"newest .*step-4, was finite.*is .*step-2", [2, 4]),
        ({"max_steps": 9, "max_nonfinite_steps": 1}, {0}, "there is no checkpoint yet", []),
        ({"max_steps": 5}, {4}, "", [2, 4, 5]),  # the last step is saved all the same, and pushes nothing out
        ({"max_steps": 8, "save_steps": 3, "num_iterations": 2, "save_total_limit": 3}, {}, "", [4, 6, 8]),
    ],
)
def test_which_checkpoints_are_kept_and_named(
    options: dict[str, Any], poisoned: Any, message: str, kept: list[int], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lab.make(**{"save_steps": 2, "save_total_limit": 1} | options)
    poison_gradient(monkeypatch, run, poisoned)
    with pytest.raises(TrainingStopped, match=message) if message else contextlib.nullcontext():
        assert run.train().name == f"step-{kept[-1]}"
    assert steps(lab.folder) == kept


def test_the_row_of_nonfinite_steps_survives_a_resume(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop in the middle of them saves, so that it is known after the resume how many there were."""
    options: dict[str, Any] = {"max_steps": 6, "max_nonfinite_steps": 3, "save_steps": 1}
    run = lab.make(**options)
    poison_gradient(monkeypatch, run, {2, 3, 4, 5})
    ctrl_c(monkeypatch, run, 3)
    with pytest.raises(KeyboardInterrupt, match="step-4"):
        run.train()
    assert steps(lab.folder) == [1, 2, 4]  # 1 is the newest that a finite step has followed
    run = lab.make(resume="auto", **options)
    poison_gradient(monkeypatch, run, {4})
    with pytest.raises(TrainingStopped):
        run.train()
    assert run.step == 5


@pytest.mark.parametrize("limit", [1, 2])
def test_nonfinite_steps_push_out_no_checkpoint(
    limit: int, lab: Lab, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Steps 4 and 5 of 7 are not finite: nothing is saved in them, and 2 stays until a step after 3 is finite."""
    options = {"max_steps": 7, "max_nonfinite_steps": 3, "save_steps": 1, "save_total_limit": limit}
    run = lab.make(**options)
    poison_gradient(monkeypatch, run, {3, 4})
    seen = watch(monkeypatch, run, "_save")
    run.train()
    assert seen[2:] == [(3, [2, 3]), (4, [2, 3]), (5, [2, 3]), (6, [3, 6]), (7, [6, 7])]
    assert "step 5: no checkpoint, since the step was not finite" in capfd.readouterr().err


def test_the_one_checkpoint_before_nonfinite_steps_goes_after_a_finite_one(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lab.make(max_steps=5, save_steps=2, save_total_limit=1)
    seen = watch(monkeypatch, run, "_report")
    run.train()
    assert seen == [(1, []), (2, []), (3, [2]), (4, [2]), (5, [4])]  # before each step's checkpoint
    assert steps(lab.folder) == [4, 5]


def watch(patch: pytest.MonkeyPatch, run: Trainer, name: str) -> list[tuple[int, list[int]]]:
    """(step, the steps of the checkpoints) after every call of a method."""
    return spy(patch, run, name, lambda *_, **__: (run.step, steps(run.run_dir)))


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def half(_: Any, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    full()


@contextlib.contextmanager
def full_disk(place: str) -> Iterator[None]:
    module = videor1.training.checkpoint
    patched = {
        "model": (module, "save_model", half),
        "state": (module.json, "dumps", full),
        "sync": (os, "fsync", full),
    }
    with pytest.MonkeyPatch.context() as patch:
        if place in patched:
            patch.setattr(*patched[place])
        with largest_file(6_000_000) if place == "optimizer" else contextlib.nullcontext():
            yield  # 4.4 MB of weights fit, 8.8 MB of moments do not


@pytest.mark.parametrize("place", ["model", "optimizer", "state", "sync"])
def test_a_full_disk_while_saving(
    place: str, lab: Lab, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second of three checkpoints fails: the first survives, the run goes on and counts it."""
    run = lab.make(max_steps=3, save_steps=1)
    folder = lab.folder / "checkpoints"

    def save(original: Any, **how: bool) -> Path:
        with full_disk(place) if run.step == 2 else contextlib.nullcontext():
            return original(**how)

    wrap(monkeypatch, run, "_save", save)
    files = lambda *_, **__: {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}  # noqa: E731
    contents = spy(monkeypatch, run, "_save", files)
    run.train()
    assert contents[0] == contents[1] != contents[2]
    assert sorted(path.name for path in folder.iterdir()) == ["step-1", "step-3"]
    assert last_metrics(lab.folder)["failed_checkpoints"] == 1
    assert "checkpoint step-2 could not be written" in capfd.readouterr().err


def test_a_full_disk_at_the_last_checkpoint(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    with largest_file(1_000_000):
        assert run_main(main, train_flags(lab.assets, lab.folder, max_steps=2)) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: checkpoint step-2 could not be written to {lab.folder / 'checkpoints'}: ")
    assert error.endswith("there is no checkpoint yet")
    assert list((lab.folder / "checkpoints").iterdir()) == []
    # With room again, the run goes on as if it had not happened.
    assert run_main(main, train_flags(lab.assets, lab.folder, max_steps=2, resume="auto")) == 0


def test_a_full_disk_at_a_line_of_metrics(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:

    def write(original: Any, self: JsonlWriter, step: int, row: Any) -> None:
        if self.path.name == "metrics.jsonl" and step == 3:
            self._file.write(b'{"half')
            full()
        original(self, step, row)

    with monkeypatch.context() as patch:
        wrap(patch, JsonlWriter, "write", write)
        assert run_main(main, train_flags(lab.assets, lab.folder, max_steps=4, save_steps=2)) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {lab.folder} cannot be written to: ")
    assert error.endswith(f"the last whole checkpoint is {lab.folder / 'checkpoints' / 'step-2'}")
    lab.make(max_steps=4, save_steps=2, resume="auto").train()
    assert [row["step"] for row in lab.rows()] == [1, 2, 3, 4]


def test_other_errors_of_the_system_are_not_renamed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Trainer) -> None:
        raise OSError(errno.ECHILD, "a bug")

    monkeypatch.setattr(Trainer, "train_batch", broken)
    with pytest.raises(OSError, match="a bug"):
        lab.make(max_steps=1).train()


def test_unwritable_output_dir_is_one_message(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    (lab.folder / "file").write_text("")
    assert run_main(main, train_flags(lab.assets, lab.folder / "file" / "run", max_steps=1)) == 2
    assert capfd.readouterr().err.startswith("error: output_dir: ")


def test_a_second_ctrl_c_ends_at_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lab.make(max_steps=3)
    ctrl_c(monkeypatch, run, 0, times=2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert (run.step, steps(lab.folder)) == (0, [])
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_cannot_save_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lab.make(max_steps=3)
    ctrl_c(monkeypatch, run, 0)
    with largest_file(1_000_000), pytest.raises(TrainingStopped, match=r"step-1 could not be written"):
        run.train()


def test_steps_follow_from_the_epochs(lab: Lab) -> None:
    """4 samples, 2 prompts a rollout of 2 updates, 1.5 epochs: 3 rollouts, 6 steps."""
    options = {"per_device_train_batch_size": 2, "num_iterations": 2}
    run = lab.make(num_train_epochs=1.5, save_only_model=True, **options)
    final = run.train()
    assert run.step == run.total_steps == last_metrics(lab.folder)["data/draws"] == 6
    assert not (final / "trainer").exists()
    with pytest.raises(ConfigError, match="save_only_model"):
        lab.make(resume="auto").train()


def test_averaged_lines_equal_the_means_of_single_ones(lab: Lab) -> None:
    lab.make("each", max_steps=5).train()
    lab.make("every", max_steps=5, logging_steps=2).train()
    each, every = lab.rows("each"), lab.rows("every")
    assert [row["step"] for row in every] == [2, 4, 5]
    assert every[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2, rel=1e-12)
    assert every[1]["learning_rate"] == pytest.approx((each[2]["learning_rate"] + each[3]["learning_rate"]) / 2)
    assert every[1]["data/draws"] == each[3]["data/draws"]
    assert every[2] == each[4]


def test_the_command_ends_well(lab: Lab) -> None:
    """The one run as a real command that is left alone."""
    process = start("videor1.train", train_flags(lab.assets, lab.folder, max_steps=1))
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert f"Saved {lab.folder / 'checkpoints' / 'step-1'}" in stdout
    assert f"Report: {lab.folder / 'report.html'}" in stdout
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "skipped.jsonl", "curves.png", "report.html"):
        assert (lab.folder / name).exists(), name
