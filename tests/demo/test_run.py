"""The embedded default, shortened: the whole path from made clips to summary.json."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from runs import train_flags
from transformers import AutoModelForImageTextToText

from videor1 import train
from videor1.config import SFTConfig, TrainConfig
from videor1.config.cli import load_config, run_main
from videor1.config.fields import collect_options
from videor1.demo import demonstration_argv, run
from videor1.demo.assets import Assets, Sizes, make_assets
from videor1.demo.model import DEMO_MODELS
from videor1.errors import ConfigError
from videor1.logs.jsonl import read_jsonl
from videor1.model import load_model
from videor1.model.families import FAMILIES
from videor1.training.sft import SFTTrainer

SMALL = Sizes(8, 1, train_videos=4, train_images=1, dev_videos=2, dev_images=0, test_videos=4, test_images=0)
SHORT = ["--max_steps=1", "--num_generations=2", "--per_device_train_batch_size=2", "--data.workers=0"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with few samples and a cold start of two steps."""
    recipe = run.load_config(SFTConfig, "sft_demo")
    short = dataclasses.replace(recipe, max_steps=2, per_device_train_batch_size=4, eval_steps=1)
    monkeypatch.setattr(run, "load_config", lambda *_: short)
    monkeypatch.setattr(run, "make_assets", functools.partial(make_assets, sizes=SMALL))


@pytest.mark.usefixtures("small_demo")
def test_without_arguments_it_runs_the_whole_path_and_can_be_asked_again(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "run"
    options = ["--output_dir", str(folder), "--max_steps", "2", "--per_device_train_batch_size", "3"]
    options += ["--data.workers", "0", "--num_generations", "4"]
    assert train.main(options) == 0

    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"before", "after", "chance", "steps", "seconds"}
    assert summary["steps"] == 2
    assert 0.25 <= summary["chance"] <= 0.35
    for when in ("before", "after"):
        assert set(summary[when]) == {"ordered", "shuffled"}
        assert all(0 <= value <= 1 for value in summary[when].values())

    metrics = (folder / "metrics.jsonl").read_text()
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert {"temporal/p", "temporal/p_shuffled", "reward", "kl", "time/rollout"} <= set(rows[0])
    rollouts = read_jsonl(folder / "rollouts.jsonl")
    assert len(rollouts) == 6
    for row in rollouts:
        video = row["permutation"] is not None
        assert len(row["completions"]) == len(row["rewards"]) == len(row["advantages"]) == 4
        assert len(row["shuffled_accuracy"]) == 2
        known = [accuracy for accuracy in row["shuffled_accuracy"] if accuracy is not None]
        assert len(row["shuffled_completions"]) == len(known) <= (2 if video else 0)  # some did not matter
        if video:
            assert sorted(row["permutation"]) == list(range(8))
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "2 of 2 steps" in (folder / "report.html").read_text(encoding="utf-8")
    again = TrainConfig(model_name_or_path=str(folder / "checkpoints" / "step-2"), device="cpu")
    assert load_model(again).trainable()

    shown = capsys.readouterr().out
    report = f"Report: {folder / 'report.html'}"
    for words in ("frames in order", "frames shuffled", "2 T-GRPO steps", str(folder), "Next, your own data", report):
        assert words in shown

    os.remove(folder / "summary.json")
    assert train.main([*options[:2], "--resume", "auto"]) == 0  # its config.yaml holds the other options
    assert (folder / "metrics.jsonl").read_text() == metrics
    assert json.loads((folder / "summary.json").read_text()).keys() == summary.keys()
    assert run_main(train.main, options[:2]) == 2
    assert "holds a run already; go on with it by --resume auto" in capsys.readouterr().err


@pytest.mark.usefixtures("small_demo")
def test_a_demo_that_was_stopped_in_its_cold_start_goes_on_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stopped(self: SFTTrainer) -> None:
        raise KeyboardInterrupt("saved runs/x/sft")

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(SFTTrainer, "train_batch", stopped)
        assert run_main(train.main, ["--output_dir", str(folder), *SHORT, "--disable_tqdm", "true"]) == 130
    command = f"interrupted: go on with: python -m videor1.train --resume auto --output_dir {shlex.quote(str(folder))}"
    assert capsys.readouterr().err.splitlines()[-1] == command
    assert train.main(shlex.split(command)[7:]) == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert load_config(TrainConfig, folder / "config.yaml").num_generations == 2


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize(("demo", "name", "recipe"), [("qwen3_vl", "Qwen3-VL", "8b"), ("qwen3_5", "Qwen3.5", "9b")])
def test_other_families_demos(demo: str, name: str, recipe: str, tmp_path: Path, capsys: Capture) -> None:
    """Whose frames are larger and whose prompts hold their times, and of one open <think>; a resume keeps it."""
    folder = tmp_path / "run"
    assert train.main(["--demo", demo, "--output_dir", str(folder), *SHORT]) == 0
    shown = capsys.readouterr().out
    assert f"a tiny {name}" in shown
    assert f"--config {demo}_{recipe} --model_name_or_path MODEL" in shown
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 1
    assert set(summary["after"]) == {"ordered", "shuffled"}
    rows = read_jsonl(folder / "rollouts.jsonl")
    assert any("<0.2 seconds>" in json.dumps(row) for row in rows)
    assert {row["opened"] for row in rows} == {"<think>\n" if demo == "qwen3_5" else ""}
    config = load_config(TrainConfig, folder / "config.yaml")
    assert (config.demo, config.video.max_pixels) == (demo, 64 * 64)
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder / "checkpoints" / "step-1", output_loading_info=True
    )
    assert type(model).__name__ == FAMILIES[demo].model_class
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    os.remove(folder / "summary.json")
    assert train.main(["--output_dir", str(folder), "--resume", "auto"]) == 0
    assert f"a tiny {name}" in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text()).keys() == summary.keys()


def test_every_demo_model_is_an_option() -> None:
    choices = collect_options(TrainConfig)["demo"].choices
    assert choices == list(DEMO_MODELS)
    for family in choices:
        assert demonstration_argv(TrainConfig(demo=family), [])[:2] == ["--config", "demo"]


def test_a_resume_goes_on_with_the_run_that_is_there(assets: Assets, tmp_path: Path, capsys: Capture) -> None:
    """Not with the demonstration, which would write into it."""
    folder = tmp_path / "run"
    assert train.main(train_flags(assets, folder, max_steps=2, save_steps=1)) == 0
    whole = [path for path in folder.rglob("*") if path.is_file()]
    shutil.rmtree(folder / "checkpoints" / "step-2")
    command = ["--resume", "auto", "--output_dir", str(folder)]
    assert train.main(command) == 0
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(whole)
    assert read_jsonl(folder / "metrics.jsonl")[-1]["step"] == 2
    os.remove(folder / "config.yaml")
    assert run_main(train.main, command) == 2
    assert "holds a run that is not the demonstration's, and no config.yaml" in capsys.readouterr().err
    assert run_main(train.main, command[2:]) == 2
    assert not (folder / "demo").exists()
    assert not (folder / "config.yaml").exists()


def test_print_config_shows_the_recipe_that_would_run(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--print_config", "--max_steps", "7"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "max_steps: 7\n" in shown
    assert "max_completion_length: 20\n" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model_name_or_path m", r"dataset_name: give .* or neither"),
        ("--data.eval_path held_out.json", "makes its own data"),
        (
            "--demo qwen3_vl --model_name_or_path m --dataset_name d.json",
            r"demo: qwen3_vl makes its own model and data",
        ),
        ("--demo qwen2_5_vl --dataset_name d.json", r"demo: qwen2_5_vl makes its own model and data; .*--demo null"),
        ("--model_name_or_path m --dataset_name d.json --eval_steps 5", r"eval_steps: needs data\.eval_path"),
    ],
)
def test_half_a_command_is_refused(words: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train.main([*words.split(), "--output_dir", str(tmp_path / "run")])
