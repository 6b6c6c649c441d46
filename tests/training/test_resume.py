"""A run that was interrupted anywhere and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from runs import (
    Killed,
    assert_same_run,
    entries,
    kill_at,
    last_metrics,
    metrics,
    session_members,
    sft_flags,
    sft_trainer,
    start,
    train_flags,
    trainer,
    wait_for_lines,
    write_data,
)

import videor1.training
import videor1.training.checkpoint
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.logs.jsonl import JsonlWriter
from videor1.rollout import LocalEngine
from videor1.training.checkpoint import checkpoints
from videor1.training.loop import Loop
from videor1.training.sft import SFTTrainer
from videor1.training.tgrpo import Trainer

# Everything at once: mixed media, a bad sample, two prompts a step, two updates a rollout, a schedule, averaged lines.
HARD = {
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "logging_steps": 3,
    "eval_steps": 4,
    "save_steps": 2,
    "max_steps": 8,
    "save_total_limit": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora__rank": 4, "lora__dropout": 0.3, "lora__alpha": 8, "gradient_checkpointing": True},
    "bf16": {"bf16": True, "freeze_vision": True, "beta": 0, "temporal__shuffle_unit": "temporal_patch"},
    "sft": {"per_device_train_batch_size": 2, "max_length": 400, "lora__rank": 4, "lora__dropout": 0.3},
}


class MixedRuns:
    """Runs of the variants on files with a bad sample and a bad entry, and an evaluation with a bad sample; and the
    uninterrupted ones that they must equal, each made once."""

    def __init__(self, assets: Assets, make_folder: Callable[[str], Path]) -> None:
        self.assets, self._make_folder, self._whole = assets, make_folder, dict[str, Path]()
        folder = make_folder("mixed")
        train, sft = entries(assets.train), entries(assets.sft)
        bad = train[0] | {"path": str(assets.folder / "clips" / "gone.mp4")}
        self._data = {
            "train": write_data(folder / "train.json", [*train, bad, {"problem": "no more"}]),
            "sft": write_data(folder / "sft.json", [*sft, sft[0] | {"path": bad["path"]}]),
        }
        self._dev = write_data(folder / "dev.json", [*entries(assets.dev), bad])

    def options(self, variant: str = "full", **more: Any) -> dict[str, Any]:
        split = "sft" if variant == "sft" else "train"
        given = {"dataset_name": self._data[split], "data__eval_path": self._dev, "data__root": self.assets.folder}
        chosen = HARD | given | VARIANTS[variant] | more
        if variant == "sft":
            del chosen["num_iterations"]
        return chosen

    def make(self, folder: Path, variant: str = "full", **more: Any) -> Trainer | SFTTrainer:
        maker = sft_trainer if variant == "sft" else trainer
        return maker(self.assets, folder, **self.options(variant, **more))

    def resume(self, folder: Path, variant: str = "full", **more: Any) -> Path:
        return self.make(folder, variant, resume="auto", **more).train()

    def whole(self, variant: str = "full") -> Path:
        """The folder of the uninterrupted run."""
        if variant not in self._whole:
            self._whole[variant] = self._make_folder(f"whole-{variant}")
            self.make(self._whole[variant], variant).train()
        return self._whole[variant]

    def assert_resumes(self, folder: Path, variant: str = "full") -> None:
        """To the run that was not interrupted."""
        self.resume(folder, variant)
        assert_same_run(folder, self.whole(variant))


@pytest.fixture(scope="module")
def mixed_runs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> MixedRuns:
    return MixedRuns(assets, tmp_path_factory.mktemp)


Place = tuple[Any, str, int]  # owner, name and number of the call that raises instead
PLACES: dict[str, Place] = {
    "first update": (Loop, "optimizer_step", 1),
    "between two updates of a rollout": (Loop, "optimizer_step", 6),
    "rollout": (LocalEngine, "generate", 5),
    "metrics line": (JsonlWriter, "write", 10),
    "evaluation": (Loop, "_evaluate", 1),
    "checkpoint not renamed": (videor1.training.checkpoint, "_sync", 3),
    "checkpoint renamed": (Loop, "_due", 6),
    "last checkpoint": (videor1.training.checkpoint, "save_model", 4),
}


@pytest.fixture
def killed_at(mixed_runs: MixedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains into the test's folder until a place, where the run ends."""

    def train(place: Place, variant: str = "full", **more: Any) -> None:
        with monkeypatch.context() as patch:
            kill_at(patch, *place)
            with pytest.raises(Killed):
                mixed_runs.make(tmp_path, variant, **more).train()

    return train


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_then_resumed(
    place: str, mixed_runs: MixedRuns, killed_at: Callable[..., None], tmp_path: Path
) -> None:
    killed_at(PLACES[place])
    mixed_runs.assert_resumes(tmp_path)


@pytest.mark.parametrize("variant", ["lora", "bf16"])
def test_killed_twice(variant: str, mixed_runs: MixedRuns, killed_at: Callable[..., None], tmp_path: Path) -> None:
    killed_at((Loop, "optimizer_step", 5), variant)
    killed_at((LocalEngine, "generate", 2), variant, resume="auto")
    mixed_runs.assert_resumes(tmp_path, variant)


def test_the_runs_do_something(mixed_runs: MixedRuns) -> None:
    """What the comparisons compare: weights that move by dropout, KL, both branches, and skips."""
    for variant in ("full", "lora", "bf16"):
        rows = [row for row in metrics(mixed_runs.whole(variant)) if "loss" in row]
        assert [row["step"] for row in rows] == [3, 6, 8]
        assert all(row["grad_norm"] > 0 for row in rows)
        assert any(row["rollout/shuffled_asked"] > 0 for row in rows)
        assert rows[-1]["data/skipped/missing_file"] >= 1
        assert rows[-1]["data/skipped/missing_field"] == 1
    assert [row["step"] for row in metrics(mixed_runs.whole()) if "eval/ordered" in row] == [4, 8]


def test_sft_killed_then_resumed(mixed_runs: MixedRuns, killed_at: Callable[..., None], tmp_path: Path) -> None:
    killed_at((SFTTrainer, "optimizer_step", 6), "sft")
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]
    mixed_runs.assert_resumes(tmp_path, "sft")


def test_resume_of_a_finished_run_changes_nothing(mixed_runs: MixedRuns) -> None:
    run_dir = mixed_runs.whole()
    before = {path: path.read_bytes() for path in run_dir.rglob("*.jsonl")}
    assert mixed_runs.resume(run_dir) == run_dir / "checkpoints" / "step-8"
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*.jsonl")}


def test_back_to_an_earlier_checkpoint(mixed_runs: MixedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later checkpoints go once the new continuation has one of its own, which is not deleted as the oldest."""
    mixed_runs.make(tmp_path, save_total_limit=3).train()
    steps = [step for step, _ in checkpoints(tmp_path)]
    assert steps == [4, 6, 8]
    run = mixed_runs.make(tmp_path, save_total_limit=3, resume=tmp_path / "checkpoints" / "step-4")
    seen = []

    def save_and_look(**how: bool) -> Path:
        path = Loop._save(run, **how)
        seen.append([step for step, _ in checkpoints(tmp_path)])
        return path

    monkeypatch.setattr(run, "_save", save_and_look)
    run.train()
    assert seen == [[4, 6], [4, 6, 8]]
    assert_same_run(tmp_path, mixed_runs.whole())


def test_sigkill(mixed_runs: MixedRuns, tmp_path: Path) -> None:
    """A real kill of the real command, with decode workers, which end with it."""
    process = start("videor1.train", train_flags(mixed_runs.assets, tmp_path, **mixed_runs.options(data__workers=1)))
    wait_for_lines(process, tmp_path / "rollouts.jsonl", 5)
    process.kill()
    process.communicate()
    assert last_metrics(tmp_path)["step"] < 8
    assert_session_ends(process.pid)
    mixed_runs.assert_resumes(tmp_path)


@pytest.mark.parametrize(
    ("number", "module", "variant"), [(signal.SIGINT, "videor1.train", "full"), (signal.SIGTERM, "videor1.sft", "sft")]
)
def test_signals_save_and_exit_130(
    number: signal.Signals, module: str, variant: str, mixed_runs: MixedRuns, tmp_path: Path
) -> None:
    flags = sft_flags if variant == "sft" else train_flags
    options = mixed_runs.options(variant, data__workers=1, save_steps=0)
    process = start("held_training", [module, *flags(mixed_runs.assets, tmp_path, **options)])
    wait_for_lines(process, tmp_path / "metrics.jsonl", 1)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to the decode workers too
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, stderr
    ((step, checkpoint),) = checkpoints(tmp_path)
    assert step == (3 if variant == "sft" else 4), "the end of the batch in which the signal came"
    assert "Traceback" not in stderr
    command = f"python -m {module} --resume auto --output_dir {tmp_path}"
    assert stderr.splitlines()[-1] == f"interrupted: saved {checkpoint}; go on with: {command}"
    assert_session_ends(process.pid)
    mixed_runs.assert_resumes(tmp_path, variant)


def test_ctrl_c_during_the_last_step(mixed_runs: MixedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last evaluation is made up for once, however often the run is resumed after that."""
    run = mixed_runs.make(tmp_path)
    original = run.train_batch

    def batch() -> None:
        original()
        if run.step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run, "train_batch", batch)
    with pytest.raises(KeyboardInterrupt, match=r"step-8; go on with: python -m videor1\.train --resume auto"):
        run.train()
    for _ in range(2):
        mixed_runs.assert_resumes(tmp_path)


def assert_session_ends(session: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while session_members(session):
        assert time.monotonic() < deadline, f"still alive: {session_members(session)}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("full", {"lora__rank": 4}, "lora None"),
        ("full", {"freeze_vision": True}, "freeze_vision False"),
        ("full", {"bf16": True}, "bf16 False"),
        ("lora", {"lora__rank": 2}, "lora .*'rank': 4.*this one has .*'rank': 2"),
    ],
)
def test_resume_with_other_settings_is_refused(
    variant: str, change: dict[str, Any], message: str, mixed_runs: MixedRuns
) -> None:
    with pytest.raises(ConfigError, match=f"saved by a run with {message}"):
        mixed_runs.resume(mixed_runs.whole(variant), variant, **change)


def test_resume_with_another_model_is_refused(mixed_runs: MixedRuns) -> None:
    trained = checkpoints(mixed_runs.whole())[-1][1]
    with pytest.raises(ConfigError, match=r"saved by a run with model_name_or_path"):
        mixed_runs.resume(mixed_runs.whole(), model_name_or_path=trained)


def test_where_nothing_can_be_resumed(assets: Assets, mixed_runs: MixedRuns, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint folder at"):
        trainer(assets, tmp_path, resume=tmp_path / "step-7")
    with pytest.raises(ConfigError, match="no trainer state to resume from"):
        trainer(assets, tmp_path, resume=assets.model).train()
    with pytest.raises(ConfigError, match="holds a run already; go on with it by --resume auto"):
        mixed_runs.make(mixed_runs.whole())
    with pytest.raises(ConfigError, match="resume: auto needs output_dir"):
        trainer(assets, "null", resume="auto")  # type: ignore[arg-type]


def test_a_damaged_checkpoint_is_named(assets: Assets, tmp_path: Path) -> None:
    checkpoint = trainer(assets, tmp_path, max_steps=1, beta=0).train()
    file = checkpoint / "trainer" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="step-1: a damaged checkpoint"):
        trainer(assets, tmp_path, max_steps=2, beta=0, resume="auto").train()
