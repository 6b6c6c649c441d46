"""The position rule travels: from a run to its checkpoints, to whoever asks or goes on with them, and out of runs that
are older than the option."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluations import answers, run
from runs import assert_same_run, last_metrics, sft_trainer, train_flags, trainer
from tiny import make_lm
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from videor1.config import ModelConfig, RolloutConfig, TrainConfig
from videor1.config.cli import parse
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import load_model
from videor1.model.manifest import MANIFEST
from videor1.model.positions import POSITIONS_KEY, trained_rule
from videor1.plan.setup import TEXT_TOKENS, Target, build_policy, build_reference, largest_grid, make_work, shape_of
from videor1.rollout import make_engine
from videor1.training.checkpoint import checkpoints
from videor1.training.tgrpo import Trainer

OLD = {"max_steps": 2, "save_steps": 1, "save_total_limit": 3}


def rule_of(model: Path, **options: Any) -> str:
    config = TrainConfig(model_name_or_path=str(model), device="cpu", model=ModelConfig(**options))
    return load_model(config).position_rule


def option_of(run_dir: Path) -> str:
    return yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["positions"]


def make_older(run_dir: Path) -> Path:
    """A run folder as versions without the option left it, which wrote no manifest either."""
    file = run_dir / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    tree.get("model", {}).pop("positions", None)
    file.write_text(yaml.safe_dump(tree))
    for _, checkpoint in checkpoints(run_dir):
        config = json.loads((checkpoint / "config.json").read_text())
        config.pop(POSITIONS_KEY, None)
        (checkpoint / "config.json").write_text(json.dumps(config))
        (checkpoint / MANIFEST).unlink(missing_ok=True)
    return run_dir


@pytest.fixture(scope="module")
def transformers_run(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps under the rule ``transformers``, with a checkpoint of each; read only."""
    folder = tmp_path_factory.mktemp("transformers-run") / "run"
    trainer(assets, folder, model__positions="transformers", **OLD).train()
    return folder


def test_the_default_is_the_papers_and_is_written_down(assets: Assets, tmp_path: Path) -> None:
    checkpoint = sft_trainer(assets, tmp_path / "sft", max_steps=1).train()
    assert option_of(tmp_path / "sft") == "paper"
    assert json.loads((checkpoint / "config.json").read_text())[POSITIONS_KEY] == "paper"
    assert rule_of(assets.model) == rule_of(checkpoint) == "paper"
    # Training on from it keeps it, and so does whoever loads and saves it with transformers.
    trainer(assets, tmp_path / "rl", model_name_or_path=checkpoint, max_steps=1).train()
    assert option_of(tmp_path / "rl") == "paper"
    Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    assert getattr(AutoConfig.from_pretrained(tmp_path / "again"), POSITIONS_KEY) == "paper"


def test_a_checkpoint_is_asked_under_its_own_rule(transformers_run: Path, assets: Assets, tmp_path: Path) -> None:
    checkpoint = checkpoints(transformers_run)[-1][1]
    assert option_of(transformers_run) == "transformers"
    assert rule_of(checkpoint) == "transformers"
    assert rule_of(checkpoint, positions="paper") == "paper"
    continued = trainer(assets, tmp_path / "on", model_name_or_path=checkpoint, max_steps=1)
    assert continued.model.position_rule == continued.config.model.positions == "transformers"
    # A resumed run is refused another rule, and the rule makes a difference to that run.
    folder = Path(shutil.copytree(transformers_run, tmp_path / "run"))
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"model\.positions: .*step-2 was trained under 'transformers'.*'paper'"):
        trainer(assets, folder, model__positions="paper", resume="auto", **OLD)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    trainer(assets, tmp_path / "paper", **OLD).train()
    assert last_metrics(transformers_run)["loss"] != last_metrics(tmp_path / "paper")["loss"]
    with pytest.raises(ConfigError, match="videor1_positions 'newest', expected one of paper, transformers"):
        trained_rule(tmp_path, "newest")
    assert trained_rule("Qwen/Qwen2.5-VL-7B-Instruct", None) is None


@pytest.mark.parametrize("how", ["bare", "whole"])
def test_an_older_run_goes_on_under_its_own_rule(
    transformers_run: Path, assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """The rule makes a difference in this run, and the resumed one equals the one that was never stopped."""
    folder = make_older(Path(shutil.copytree(transformers_run, tmp_path / "run")))
    checkpoint = folder / "checkpoints" / "step-2"
    assert rule_of(checkpoint) == "transformers", "known by what lies around it"
    assert rule_of(checkpoint.rename(tmp_path / "model")) == "transformers", "and by what it holds"
    flags = train_flags(assets, folder, **OLD) if how == "whole" else ["--output_dir", str(folder)]
    resumed = Trainer(parse(TrainConfig, [*flags, "--resume", "auto"], prog="", description=""))
    assert resumed.model.position_rule == "transformers"
    resumed.train()
    assert_same_run(folder, transformers_run)
    assert option_of(folder) == "transformers"
    shown = "".join(capsys.readouterr())
    assert "resumed from" in shown
    assert "changed since" not in shown


def test_an_evaluation_says_its_rule_and_an_older_keeps_its_own(assets: Assets, tmp_path: Path, capsys: Any) -> None:
    options = {"dataset_name": assets.dev, "video__max_frames": 8}
    folder = tmp_path / "run"
    assert run(assets, folder, **options) == 0
    assert json.loads((folder / "results.json").read_text())["settings"]["model.positions"] == "paper"
    assert run(assets, tmp_path / "other", model__positions="transformers", **options) == 0
    settings = json.loads((tmp_path / "other" / "results.json").read_text())["settings"]
    assert settings["model.positions"] == "transformers"
    expected = answers(tmp_path / "other")
    assert answers(folder) != expected  # what follows would not show otherwise

    older = make_older(tmp_path / "other")
    file = older / "answers.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:1]))
    assert run(assets, older, resume="auto", model__positions="paper", **options) == 2
    assert "model.positions: transformers -> paper" in capsys.readouterr().err
    assert run(assets, older, resume="auto", **options) == 0
    assert answers(older) == expected


def test_asking_otherwise(transformers_run: Path, assets: Assets, tmp_path: Path, oracle: Any, capsys: Any) -> None:
    folder = Path(shutil.copytree(transformers_run, tmp_path / "run"))
    options = {"model_name_or_path": folder / "checkpoints" / "step-2", "dataset_name": assets.dev, "eval_samples": 1}
    for name, given, told in (("own", {}, False), ("other", {"model__positions": "paper"}, True)):
        make_older(folder)
        assert run(assets, tmp_path / name, **options, **given) == 0
        assert ("--model.positions transformers" in capsys.readouterr().err) == told


@pytest.mark.parametrize(("rule", "largest"), [("paper", 12600), ("transformers", 0)])
def test_a_plan_and_a_server(rule: Any, largest: int, tmp_path: Path, recwarn: Any) -> None:
    """Answers begin past the largest position of 16 frames of two hours, or past the frames' sides; a server that
    numbers otherwise is warned of."""
    make_engine(TrainConfig(rollout=RolloutConfig(engine="server")), make_lm(position_rule=rule), tmp_path)
    told = [str(warning.message) for warning in recwarn if "model.positions" in str(warning.message)]
    assert bool(told) == (rule == "transformers")
    config = parse(TrainConfig, ["--model.positions", rule, "--device", "cpu"], prog="", description="")
    shape, target = shape_of(None), Target.of(config)
    policy, reference = (build(shape, config, target, "meta") for build in (build_policy, build_reference))
    assert reference is not None
    assert policy.position_rule == reference.position_rule == rule
    prompt = make_work(config, policy, lambda *size: torch.zeros(*size, dtype=torch.uint8, device="meta")).prompts[0]
    sides = max(largest_grid(config)[1:]) // 2
    assert policy.positions(prompt)[1] == TEXT_TOKENS + max(largest + 1, sides)
