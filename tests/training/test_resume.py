"""A run that was interrupted anywhere and resumed equals one that was not, bit for bit."""

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from forks import TRAINERS, ForkServer
from patience import PATIENCE
from runs import Lab, metrics, train_flags, trainer
from spies import spy

import videor1.sft
import videor1.train
import videor1.training.checkpoint
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.logs.jsonl import JsonlWriter
from videor1.rollout import LocalEngine
from videor1.training.checkpoint import checkpoints
from videor1.training.loop import Loop
from videor1.training.sft import SFTTrainer
from videor1.training.tgrpo import Trainer

# Everything at once: mixed media, a bad sample, two prompts a step, two updates a rollout, a schedule, averaged lines.
HARD = {"gradient_accumulation_steps": 2, "num_iterations": 2, "warmup_steps": 2, "lr_scheduler_type": "cosine"}
HARD |= {"logging_steps": 3, "eval_steps": 4, "save_steps": 2, "max_steps": 8, "save_total_limit": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora__rank": 4, "lora__dropout": 0.3, "lora__alpha": 8, "gradient_checkpointing": True},
    "bf16": {
        "bf16": True,
        "freeze_vision": True,
        "beta": 0,
        "temporal__shuffle_unit": "temporal_patch",
        "normalize": "ema_task",
    },
    "sft": {"per_device_train_batch_size": 2, "max_length": 400, "lora__rank": 4, "lora__dropout": 0.3},
}


class MixedRuns:
    """Runs of the variants on files with a bad sample and a bad entry, and an evaluation with a bad sample; and the
    uninterrupted ones that they must equal, each made once."""

    def __init__(self, assets: Assets, make_folder: Callable[[str], Path]) -> None:
        self.assets, self._make_folder, self._whole = assets, make_folder, dict[str, Path]()
        folder = make_folder("mixed")
        train, sft = runs.entries(assets.train), runs.entries(assets.sft)
        bad = train[0] | {"path": str(assets.folder / "clips" / "gone.mp4")}
        self._data = {
            "train": runs.write_data(folder / "train.json", [*train, bad, {"problem": "no more"}]),
            "sft": runs.write_data(folder / "sft.json", [*sft, sft[0] | {"path": bad["path"]}]),
        }
        self._dev = runs.write_data(folder / "dev.json", [*runs.entries(assets.dev), bad])

    def options(self, variant: str = "full", **more: Any) -> dict[str, Any]:
        split = "sft" if variant == "sft" else "train"
        given = {"dataset_name": self._data[split], "data__eval_path": self._dev, "data__root": self.assets.folder}
        chosen = HARD | given | VARIANTS[variant] | more
        if variant == "sft":
            del chosen["num_iterations"]
        return chosen

    def make(self, folder: Path, variant: str = "full", **more: Any) -> Trainer | SFTTrainer:
        maker = runs.sft_trainer if variant == "sft" else trainer
        return maker(self.assets, folder, **self.options(variant, **more))

    def whole(self, variant: str = "full") -> Path:
        """The folder of the uninterrupted run."""
        if variant not in self._whole:
            self._whole[variant] = self._make_folder(f"whole-{variant}")
            self.make(self._whole[variant], variant).train()
        return self._whole[variant]

    def resume_whole(self, variant: str = "full", **more: Any) -> Path:
        return self.make(self.whole(variant), variant, resume="auto", **more).train()

    def assert_resumes(self, folder: Path, variant: str = "full") -> None:
        """To the run that was not interrupted."""
        self.make(folder, variant, resume="auto").train()
        runs.assert_same_run(folder, self.whole(variant))


@pytest.fixture(scope="module")
def mixed_runs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> MixedRuns:
    return MixedRuns(assets, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("commands") / "log", TRAINERS)
    yield server
    server.close()


Place = tuple[Any, str, int]  # owner, name and number of the call that raises instead
PLACES: dict[str, Place] = {
    "first update": (Loop, "optimizer_step", 1),
    "between two updates of a rollout": (Loop, "optimizer_step", 6),
    "metrics line": (JsonlWriter, "write", 10),
    "evaluation": (Loop, "_evaluate", 1),
    "checkpoint not renamed": (videor1.training.checkpoint, "_sync", 3),
    "checkpoint renamed": (Loop, "_due", 6),
    "last checkpoint": (videor1.training.checkpoint, "save_model", 4),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_then_resumed(place: str, mixed_runs: MixedRuns, tmp_path: Path) -> None:
    runs.kill(mixed_runs.make(tmp_path), *PLACES[place])
    mixed_runs.assert_resumes(tmp_path)


@pytest.mark.parametrize("variant", ["lora", "bf16"])
def test_killed_twice(variant: str, mixed_runs: MixedRuns, tmp_path: Path) -> None:
    runs.kill(mixed_runs.make(tmp_path, variant), Loop, "optimizer_step", 5)
    runs.kill(mixed_runs.make(tmp_path, variant, resume="auto"), LocalEngine, "generate", 2)
    mixed_runs.assert_resumes(tmp_path, variant)


def test_sft_killed_then_resumed(mixed_runs: MixedRuns, tmp_path: Path) -> None:
    runs.kill(mixed_runs.make(tmp_path, "sft"), SFTTrainer, "optimizer_step", 6)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]
    mixed_runs.assert_resumes(tmp_path, "sft")


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


def test_resume_of_a_finished_run_changes_nothing(mixed_runs: MixedRuns) -> None:
    run_dir = mixed_runs.whole()
    before = {path: path.read_bytes() for path in run_dir.rglob("*.jsonl")}
    assert mixed_runs.resume_whole() == run_dir / "checkpoints" / "step-8"
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*.jsonl")}


def test_back_to_an_earlier_checkpoint(mixed_runs: MixedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later checkpoints go once the new continuation has one of its own, which is not deleted as the oldest."""
    mixed_runs.make(tmp_path, save_total_limit=3).train()
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6, 8]
    run = mixed_runs.make(tmp_path, save_total_limit=3, resume=tmp_path / "checkpoints" / "step-4")
    seen = spy(monkeypatch, run, "_save", lambda *_, **__: [step for step, _ in checkpoints(tmp_path)])
    run.train()
    assert seen == [[4, 6], [4, 6, 8]]
    runs.assert_same_run(tmp_path, mixed_runs.whole())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "variant"), [(signal.SIGKILL, "full"), (signal.SIGINT, "full"), (signal.SIGTERM, "sft")]
)
def test_signals(
    number: signal.Signals,
    variant: str,
    mixed_runs: MixedRuns,
    commands: ForkServer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of the real command with decode workers, which end with it. While it runs, its folder belongs to it alone;
    afterwards a resume goes on at once. Signals that can be handled save and end with 130."""
    command = videor1.sft if variant == "sft" else videor1.train
    flags = runs.sft_flags if variant == "sft" else train_flags
    killed = number is signal.SIGKILL
    options = mixed_runs.options(variant, data__workers=1, save_steps=2 if killed else 0)
    given = flags(mixed_runs.assets, tmp_path, **options)
    (process,) = commands.start("forks:held", [command.__name__, *given])
    runs.wait_for_lines(commands.process, tmp_path / "metrics.jsonl", 1)
    for more in (["--resume=auto"], []):
        assert run_main(command.main, [*given, *more]) == 2
        message = capfd.readouterr().err.strip().splitlines()[-1]
        assert f"is in use by process {process} on " in message
        assert f"({command.__name__}, since " in message
    # A terminal sends Ctrl-C to the decode workers too.
    (os.killpg if number is signal.SIGINT else os.kill)(process, number)
    assert commands.wait() == [-number if killed else 130]
    if not killed:
        said = commands.log.read_text()
        ((step, checkpoint),) = checkpoints(tmp_path)
        assert step == (3 if variant == "sft" else 4), "the end of the batch in which the signal came"
        assert "Traceback" not in said
        shown = f"python -m {command.__name__} --resume auto --output_dir {shlex.quote(str(tmp_path))}"
        assert said.splitlines()[-1] == f"interrupted: saved {checkpoint}; go on with: {shown}"
    deadline = time.monotonic() + PATIENCE
    while runs.session_members(process):
        assert time.monotonic() < deadline, f"still alive: {runs.session_members(process)}"
        time.sleep(0.05)
    mixed_runs.assert_resumes(tmp_path, variant)


def test_ctrl_c_during_the_last_step(mixed_runs: MixedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last evaluation is made up for once, however often the run is resumed after that."""
    run = mixed_runs.make(tmp_path)
    runs.ctrl_c(monkeypatch, run, 6)
    with pytest.raises(KeyboardInterrupt, match=r"step-8; go on with: python -m videor1\.train --resume auto"):
        run.train()
    for _ in range(2):
        mixed_runs.assert_resumes(tmp_path)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("full", {"lora__rank": 4}, "lora None"),
        ("full", {"freeze_vision": True}, "freeze_vision False"),
        ("full", {"bf16": True}, "bf16 False"),
        ("lora", {"lora__rank": 2}, "lora .*'rank': 4.*this one has .*'rank': 2"),
        ("full", {"model_name_or_path": "trained"}, "model_name_or_path"),
    ],
)
def test_resume_with_other_settings_is_refused(
    variant: str, change: dict[str, Any], message: str, mixed_runs: MixedRuns
) -> None:
    if "model_name_or_path" in change:
        change = {"model_name_or_path": checkpoints(mixed_runs.whole())[-1][1]}
    with pytest.raises(ConfigError, match=f"saved by a run with {message}"):
        mixed_runs.resume_whole(variant, **change)


def test_where_nothing_can_be_resumed(lab: Lab, mixed_runs: MixedRuns) -> None:
    with pytest.raises(ConfigError, match="no checkpoint folder at"):
        lab.make(resume=lab.folder / "step-7")
    with pytest.raises(ConfigError, match="no trainer state to resume from"):
        lab.make(resume=lab.assets.model).train()
    with pytest.raises(ConfigError, match="holds a run already; go on with it by --resume auto"):
        mixed_runs.make(mixed_runs.whole())
    with pytest.raises(ConfigError, match="resume: auto needs output_dir"):
        trainer(lab.assets, "null", resume="auto")  # type: ignore[arg-type]
