"""Training on a stream: interrupted and resumed as any other run, SFT too; and what needs max_steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import Lab, assert_same_run, entries, kill, run_lines, sft_trainer, trainer, write_data

import videor1.data.shards
import videor1.data.stream
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.training.checkpoint import checkpoints
from videor1.training.loop import Loop

OPTIONS = {"data__root": "/", "max_steps": 9, "save_steps": 2, "warmup_steps": 1}


@pytest.fixture
def shards(assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A few rows in each of several blocks, a bad one among them, for T-GRPO and for SFT."""
    monkeypatch.setattr(videor1.data.shards, "BLOCK_BYTES", 900)
    monkeypatch.setattr(videor1.data.stream, "MAX_WINDOW_BLOCKS", 2)
    folders = {"train": tmp_path / "shards", "sft": tmp_path / "cot"}
    for name, source in (("train", assets.train), ("sft", assets.sft)):
        found = entries(source) * 2
        found[2] = found[2] | {"solution": "none"}
        folders[name].mkdir()
        for i, part in enumerate((found[:3], found[3:])):
            (folders[name] / f"{i}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folders


@pytest.mark.parametrize("command", ["train", "sft"])
def test_killed_then_resumed(command: str, lab: Lab, shards: dict[str, Path]) -> None:
    def make(folder: str, **more: Any) -> Any:
        maker = trainer if command == "train" else sft_trainer
        return maker(lab.assets, lab.folder / folder, dataset_name=shards[command], **OPTIONS, **more)

    make("whole").train()
    kill(make("cut"), Loop, "optimizer_step", 4)
    kill(make("cut", resume="auto"), Loop, "optimizer_step", 4)
    make("cut", resume="auto").train()
    assert_same_run(lab.folder / "cut", lab.folder / "whole")
    rows = lab.rows("whole")
    assert rows[-1]["epoch"] > 0  # how many windows there are depends on the length of the temporary folder's name
    assert rows[-1]["data/draws"] == 9 + rows[-1]["data/skipped"]
    assert rows[-1]["data/skipped/solution"] >= 1
    (skip, *_) = run_lines(lab.folder / "whole", "skipped.jsonl")
    assert (skip["kind"], skip["path"]) == ("solution", str(shards[command] / "0.jsonl"))
    assert "byte " in skip["message"]
    state = json.loads((checkpoints(lab.folder / "cut")[-1][1] / "trainer" / "state.json").read_text())
    assert state["position"].keys() == {"draws", "epoch", "window", "row", "data"}


def test_a_checkpoint_goes_with_its_data(lab: Lab, shards: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """And large row groups are told on the screen."""
    options = OPTIONS | {"dataset_name": shards["train"], "max_steps": 1}
    run = lab.make("run", **options)
    assert isinstance(run.dataset, videor1.data.stream.RowStream)
    run.dataset.large_blocks = "too large"
    run.train()
    assert "too large" in capfd.readouterr().err
    options |= {"max_steps": 2, "resume": "auto"}
    with open(shards["train"] / "0.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match="is not what the checkpoint's run read"):
        lab.make("run", **options).train()
    held = write_data(lab.folder / "list.json", entries(lab.assets.train))
    with pytest.raises(ConfigError, match="of a run that read its data as a stream"):
        lab.make("run", **options | {"dataset_name": held}).train()


def test_steps_follow_from_the_epochs_where_rows_are_counted(
    lab: Lab, shards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 4}
    run = lab.make("run", dataset_name=shards["train"], **options)
    run.train()
    assert run.total_steps == run.step == 3  # 8 rows
    monkeypatch.setattr(videor1.data.stream, "COUNT_BYTES", 100)
    needed = r"max_steps: needed, since num_train_epochs counts rows, and those of .*shards"
    with pytest.raises(ConfigError, match=needed):
        lab.make("other", dataset_name=shards["train"], **options)
