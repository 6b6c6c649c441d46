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
}


@pytest.fixture(scope="module")
def mixed(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Options that name a data file with a bad sample and a bad entry, and an evaluation with a bad sample."""
    folder = tmp_path_factory.mktemp("mixed")
    train, sft = entries(assets.train), entries(assets.sft)
    bad = train[0] | {"path": str(assets.folder / "clips" / "gone.mp4")}
    files = {
        "train": write_data(folder / "train.json", [*train, bad, {"problem": "no more"}]),
        "sft": write_data(folder / "sft.json", [*sft, sft[0] | {"path": bad["path"]}]),
        "dev": write_data(folder / "dev.json", [*entries(assets.dev), bad]),
    }
    return files | {"root": assets.folder}


def options(mixed: dict[str, Path], split: str, **more: Any) -> dict[str, Any]:
    given = {"dataset_name": mixed[split], "data__eval_path": mixed["dev"], "data__root": mixed["root"]}
    return HARD | given | more


@pytest.fixture(scope="module")
def whole(assets: Assets, mixed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run folders of uninterrupted runs, made once."""
    made: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(f"whole-{variant}")
            if variant == "sft":
                sft_trainer(assets, made[variant], **sft_options(mixed)).train()
            else:
                trainer(assets, made[variant], **options(mixed, "train", **VARIANTS[variant])).train()
        return made[variant]

    return run


def sft_options(mixed: dict[str, Path]) -> dict[str, Any]:
    chosen = options(mixed, "sft", per_device_train_batch_size=2, max_length=400, lora__rank=4, lora__dropout=0.3)
    del chosen["num_iterations"]
    return chosen


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """The ``call``-th call of a function raises instead."""
    original, calls = getattr(owner, name), []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)


PLACES: dict[str, tuple[Any, str, int]] = {
    "first update": (Loop, "optimizer_step", 1),
    "between two updates of a rollout": (Loop, "optimizer_step", 6),
    "rollout": (LocalEngine, "generate", 5),
    "metrics line": (JsonlWriter, "write", 10),
    "evaluation": (Loop, "_evaluate", 1),
    "checkpoint not renamed": (videor1.training.checkpoint, "_sync", 3),
    "checkpoint renamed": (Loop, "_due", 6),
    "last checkpoint": (videor1.training.checkpoint, "save_model", 4),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_then_resumed(
    place: str,
    assets: Assets,
    mixed: dict[str, Path],
    whole: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, chosen = whole("full"), options(mixed, "train")
    with monkeypatch.context() as patch:
        kill_at(patch, *PLACES[place])
        with pytest.raises(Killed):
            trainer(assets, tmp_path, **chosen).train()
    trainer(assets, tmp_path, resume="auto", **chosen).train()
    assert_same_run(tmp_path, expected)


@pytest.mark.parametrize("variant", ["lora", "bf16"])
def test_killed_twice(
    variant: str,
    assets: Assets,
    mixed: dict[str, Path],
    whole: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, chosen = whole(variant), options(mixed, "train", **VARIANTS[variant])
    for resume, place in ((False, (Loop, "optimizer_step", 5)), (True, (LocalEngine, "generate", 2))):
        with monkeypatch.context() as patch:
            kill_at(patch, *place)
            with pytest.raises(Killed):
                trainer(assets, tmp_path, **chosen, **({"resume": "auto"} if resume else {})).train()
    trainer(assets, tmp_path, resume="auto", **chosen).train()
    assert_same_run(tmp_path, expected)


def test_the_runs_do_something(whole: Callable[[str], Path]) -> None:
    """What the comparisons compare: weights that move by dropout, KL, both branches, and skips."""
    for variant in VARIANTS:
        rows = [row for row in metrics(whole(variant)) if "loss" in row]
        assert [row["step"] for row in rows] == [3, 6, 8]
        assert all(row["grad_norm"] > 0 for row in rows)
        assert any(row["rollout/shuffled_asked"] > 0 for row in rows)
        assert rows[-1]["data/skipped/missing_file"] >= 1
        assert rows[-1]["data/skipped/missing_field"] == 1
    assert [row["step"] for row in metrics(whole("full")) if "eval/ordered" in row] == [4, 8]


def test_sft_killed_then_resumed(
    assets: Assets,
    mixed: dict[str, Path],
    whole: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, SFTTrainer, "optimizer_step", 6)
        with pytest.raises(Killed):
            sft_trainer(assets, tmp_path, **sft_options(mixed)).train()
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]
    sft_trainer(assets, tmp_path, resume="auto", **sft_options(mixed)).train()
    assert_same_run(tmp_path, whole("sft"))


def test_resume_of_a_finished_run_changes_nothing(
    assets: Assets, mixed: dict[str, Path], whole: Callable[[str], Path]
) -> None:
    run_dir = whole("full")
    before = {path: path.read_bytes() for path in run_dir.rglob("*.jsonl")}
    final = trainer(assets, run_dir, resume="auto", **options(mixed, "train")).train()
    assert final == run_dir / "checkpoints" / "step-8"
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*.jsonl")}


def test_back_to_an_earlier_checkpoint(
    assets: Assets,
    mixed: dict[str, Path],
    whole: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The later checkpoints go once the new continuation has one of its own, which is not deleted as the oldest."""
    chosen = options(mixed, "train") | {"save_total_limit": 3}
    trainer(assets, tmp_path, **chosen).train()
    steps = [step for step, _ in checkpoints(tmp_path)]
    assert steps == [4, 6, 8]
    run = trainer(assets, tmp_path, resume=tmp_path / "checkpoints" / "step-4", **chosen)
    seen = []

    def save_and_look(**how: bool) -> Path:
        path = Loop._save(run, **how)
        seen.append([step for step, _ in checkpoints(tmp_path)])
        return path

    monkeypatch.setattr(run, "_save", save_and_look)
    run.train()
    assert seen == [[4, 6], [4, 6, 8]]
    assert_same_run(tmp_path, whole("full"))


def test_sigkill(assets: Assets, mixed: dict[str, Path], whole: Callable[[str], Path], tmp_path: Path) -> None:
    """A real kill of the real command, with decode workers, which end with it."""
    chosen = options(mixed, "train", data__workers=1)
    process = start("videor1.train", train_flags(assets, tmp_path, **chosen))
    wait_for_lines(process, tmp_path / "rollouts.jsonl", 5)
    process.kill()
    process.communicate()
    assert last_metrics(tmp_path)["step"] < 8
    assert_session_ends(process.pid)
    trainer(assets, tmp_path, resume="auto", **chosen).train()
    assert_same_run(tmp_path, whole("full"))


@pytest.mark.parametrize(("number", "module"), [(signal.SIGINT, "videor1.train"), (signal.SIGTERM, "videor1.sft")])
def test_signals_save_and_exit_130(
    number: signal.Signals,
    module: str,
    assets: Assets,
    mixed: dict[str, Path],
    whole: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    train = module == "videor1.train"
    if train:
        flags = train_flags(assets, tmp_path, **options(mixed, "train", data__workers=1, save_steps=0))
    else:
        flags = sft_flags(assets, tmp_path, **sft_options(mixed) | {"data__workers": 1, "save_steps": 0})
    process = start(module, flags)
    wait_for_lines(process, tmp_path / "metrics.jsonl", 1)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to the decode workers too
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, stderr
    ((step, checkpoint),) = checkpoints(tmp_path)
    assert 3 <= step < 8
    assert "Traceback" not in stderr
    command = f"python -m {module} --resume auto --output_dir {tmp_path}"
    assert stderr.splitlines()[-1] == f"interrupted: saved {checkpoint}; go on with: {command}"
    assert_session_ends(process.pid)
    if train:
        trainer(assets, tmp_path, resume="auto", **options(mixed, "train")).train()
    else:
        sft_trainer(assets, tmp_path, resume="auto", **sft_options(mixed)).train()
    assert_same_run(tmp_path, whole("full" if train else "sft"))


def test_ctrl_c_during_the_last_step(
    assets: Assets,
    mixed: dict[str, Path],
    whole: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last evaluation is made up for once, however often the run is resumed after that."""
    run = trainer(assets, tmp_path, **options(mixed, "train"))
    original = run.train_batch

    def batch() -> None:
        original()
        if run.step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run, "train_batch", batch)
    with pytest.raises(KeyboardInterrupt, match=r"step-8; go on with: python -m videor1\.train --resume auto"):
        run.train()
    for _ in range(2):
        trainer(assets, tmp_path, resume="auto", **options(mixed, "train")).train()
        assert_same_run(tmp_path, whole("full"))


def assert_session_ends(session: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while session_members(session):
        assert time.monotonic() < deadline, f"still alive: {session_members(session)}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora__rank": 4}, "lora None"),
        ({"freeze_vision": True}, "freeze_vision False"),
        ({"bf16": True}, "bf16 False"),
    ],
)
def test_resume_with_other_settings_is_refused(
    change: dict[str, Any], message: str, assets: Assets, mixed: dict[str, Path], whole: Callable[[str], Path]
) -> None:
    run = trainer(assets, whole("full"), resume="auto", **options(mixed, "train", **change))
    with pytest.raises(ConfigError, match=f"saved by a run with {message}"):
        run.train()


def test_resume_with_another_adapter_is_refused(
    assets: Assets, mixed: dict[str, Path], whole: Callable[[str], Path]
) -> None:
    change = VARIANTS["lora"] | {"lora__rank": 2}
    with pytest.raises(ConfigError, match=r"saved by a run with lora .*'rank': 4.*this one has .*'rank': 2"):
        trainer(assets, whole("lora"), resume="auto", **options(mixed, "train", **change)).train()


def test_resume_with_another_model_is_refused(
    assets: Assets, mixed: dict[str, Path], whole: Callable[[str], Path]
) -> None:
    trained = checkpoints(whole("full"))[-1][1]
    change = options(mixed, "train", model_name_or_path=trained)
    with pytest.raises(ConfigError, match=r"saved by a run with model_name_or_path"):
        trainer(assets, whole("full"), resume="auto", **change).train()


def test_where_nothing_can_be_resumed(
    assets: Assets, mixed: dict[str, Path], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no checkpoint folder at"):
        trainer(assets, tmp_path, resume=tmp_path / "step-7")
    with pytest.raises(ConfigError, match="no trainer state to resume from"):
        trainer(assets, tmp_path, resume=assets.model).train()
    with pytest.raises(ConfigError, match="holds a run already; go on with it by --resume auto"):
        trainer(assets, whole("full"), **options(mixed, "train"))
    with pytest.raises(ConfigError, match="resume: auto needs output_dir"):
        trainer(assets, "null", resume="auto")  # type: ignore[arg-type]


def test_a_damaged_checkpoint_is_named(assets: Assets, tmp_path: Path) -> None:
    checkpoint = trainer(assets, tmp_path, max_steps=1, beta=0).train()
    file = checkpoint / "trainer" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="step-1: a damaged checkpoint"):
        trainer(assets, tmp_path, max_steps=2, beta=0, resume="auto").train()
