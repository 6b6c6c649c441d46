"""Two processes on DeepSpeed's ZeRO against one: the same losses, answers and weights; resume; a killed rank."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from forks import RANKS, ForkServer
from patience import PATIENCE
from runs import Lab, metrics, train_flags, trainer
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model.manifest import MANIFEST
from videor1.training.checkpoint import checkpoints, find_damage
from videor1.training.distributed.ranks import Ranks, start_position

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)

pytestmark = pytest.mark.slow
STAGES = pytest.mark.parametrize("stage", [2, 3])
# Of what three steps write down, numbers of order 1: the rounding of log-probs up to 10 in the first step
# and the little that the others make of it.
TOLERANCE = 1e-4
COMPARED = ["loss", "grad_norm", "reward", "kl", "entropy", "temporal/p", "rewards/accuracy/std", "num_tokens"]
COMPARED += ["completions/mean_length", "data/draws", "pass/tokens"]
OPTIONS = {"max_steps": 3, "learning_rate": 3e-4, "save_steps": 2, "beta": 0.04, "eval_steps": 2, "eval_samples": 3}
OPTIONS |= {"per_device_train_batch_size": 2}


def zero(stage: int) -> dict[str, Any]:
    return {"distributed__engine": "deepspeed", "distributed__zero_stage": stage}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("ranks") / "log", RANKS)
    yield server
    server.close()


@pytest.fixture(scope="module")
def single(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, four prompts a step."""
    folder = tmp_path_factory.mktemp("single") / "run"
    trainer(assets, folder, gradient_accumulation_steps=2, data__eval_path=assets.dev, **OPTIONS).train()
    return folder


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return runs.weights(dict(checkpoints(run_dir))[step])


def assert_same_weights(one: Path, other: Path, assets: Assets, step: int) -> None:
    runs.assert_moved_alike(weights(one, step), weights(other, step), runs.weights(assets.model), step)


def assert_same_runs(one: Path, other: Path, assets: Assets, step: int) -> None:
    """Losses, rewards and answers of every step, and the last weights."""
    rows, others = metrics(one), metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, given in zip(rows, others, strict=True):
        for name in COMPARED:
            if row.get(name) is not None:
                assert given[name] == pytest.approx(row[name], rel=TOLERANCE, abs=TOLERANCE), (row["step"], name)
    answers = [
        {
            (line["step"], line["draw"]): line["completions"]
            for file in run.glob("**/rollouts.jsonl")
            for line in runs.run_lines(file.parent, file.name)
        }
        for run in (one, other)
    ]
    assert answers[0] == answers[1]
    assert_same_weights(one, other, assets, step)


@STAGES
def test_two_processes_train_as_one(single: Path, ranks: ForkServer, lab: Lab, stage: int) -> None:
    """Two prompts each. And they are resumed: by two processes, and by one."""
    run_dir, options = lab.folder / "run", OPTIONS | {"data__eval_path": lab.assets.dev}
    ranks.run_ranks(train_flags(lab.assets, run_dir, **options, **zero(stage)))
    assert_same_runs(single, run_dir, lab.assets, 3)
    assert metrics(single)[-1]["eval/ordered"] == metrics(run_dir)[-1]["eval/ordered"]
    assert metrics(run_dir)[-1]["eval/samples"] == 3
    last = dict(checkpoints(run_dir))[3]
    parts = {f"trainer/{path.name}" for path in (last / "trainer").glob("optimizer-*-of-00002.safetensors")}
    assert len(parts) == 2
    assert parts <= set(json.loads((last / MANIFEST).read_text())["files"])
    assert find_damage(last) is None
    assert not (run_dir / ".lock").exists()
    Qwen2_5_VLForConditionalGeneration.from_pretrained(last)

    shutil.rmtree(last)
    alone = Path(shutil.copytree(run_dir, lab.folder / "alone"))
    ranks.run_ranks(train_flags(lab.assets, run_dir, resume="auto", **options, **zero(stage)))
    assert_same_runs(single, run_dir, lab.assets, 3)
    trainer(lab.assets, alone, resume="auto", gradient_accumulation_steps=2, **options).train()
    assert_same_weights(single, alone, lab.assets, 3)


@STAGES
def test_ranks_stay_together_whatever_one_meets(ranks: ForkServer, lab: Lab, stage: int) -> None:
    """A video that is not there, groups with nothing to learn (left out of the rows), and no memory for a rollout."""
    samples = json.loads(lab.assets.train.read_text())
    bad = samples[0] | {"problem_id": "bad", "path": "./nowhere.mp4"}
    options = {
        "dataset_name": runs.write_data(lab.folder / "data.json", [bad, *samples]),
        "data__root": lab.assets.folder,
    }
    options |= {"max_steps": 4, "save_steps": 0, "beta": 0.0, "per_device_train_batch_size": 2}
    options |= {"reward__functions": "toy_rewards:sometimes"}
    flags = train_flags(lab.assets, lab.folder / "run", **options, **zero(stage))
    ranks.run_ranks(flags, "forks:out_of_memory")
    rows = lab.rows("run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["rollout/failed"] for row in rows] == [0, 2, 0, 0]
    assert rows[-1]["data/skipped/missing_file"] >= 1
    assert rows[-1]["data/skipped/rollout"] == 2
    assert sum(row["pass/groups_left_out"] for row in rows) > 0
    assert all(row["loss"] is not None and row["nonfinite_steps"] == 0 for row in rows)
    assert [row["loss"] for row in rows] == [row["loss"] for row in lab.rows("run/rank-1")]
    assert all(bool(tensor.isfinite().all()) for tensor in weights(lab.folder / "run", 4).values())


def test_sft_on_two(ranks: ForkServer, lab: Lab) -> None:
    """And the optimizer's state in the host's memory."""
    options = {"max_steps": 3, "save_steps": 0}
    lab.sft("one", per_device_train_batch_size=2, **options).train()
    options |= {"distributed__offload_optimizer": True} | zero(2)
    ranks.run_ranks(runs.sft_flags(lab.assets, lab.folder / "two", **options), "videor1.sft:main")
    losses = [[row["loss"] for row in lab.rows(name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert_same_weights(lab.folder / "one", lab.folder / "two", lab.assets, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"lora__rank": 4, "normalize": "ema_task", "temporal__apply": "reward"},
        {"freeze_vision": True, "gradient_checkpointing": True, "normalize": "batch"},
    ],
    ids=["lora", "frozen"],
)
def test_trained_with(options: dict[str, Any], ranks: ForkServer, lab: Lab) -> None:
    options = options | {"max_steps": 2, "save_steps": 0, "beta": 0.04, "learning_rate": 3e-4}
    lab.make("one", per_device_train_batch_size=2, **options).train()
    ranks.run_ranks(train_flags(lab.assets, lab.folder / "two", **options, **zero(3)))
    assert_same_runs(lab.folder / "one", lab.folder / "two", lab.assets, 2)
    states = [dict(checkpoints(lab.folder / name))[2] / "trainer" / "state.json" for name in ("one", "two")]
    moments = [json.loads(state.read_text()).get("reward_moments") for state in states]
    assert moments[0] == moments[1]  # to the bit
    assert bool(moments[0]) == (options.get("normalize") == "ema_task")


@pytest.mark.parametrize("decode_weights", ["auto", "model"])
def test_what_is_gathered_at_once_for_a_rollout(decode_weights: str, ranks: ForkServer, lab: Lab) -> None:
    """A layer at a time is copied into the decode weights, in whose place no other copy is gathered."""
    options = {"max_steps": 2, "save_steps": 0, "lora__rank": 4, "rollout__decode_weights": decode_weights} | zero(3)
    ranks.run_ranks([str(lab.folder), *train_flags(lab.assets, lab.folder, **options)], "forks:counted")
    for rank in (0, 1):
        found = json.loads((lab.folder / f"gathered-{rank}.json").read_text())
        if decode_weights == "model":
            assert (found["rollout"], found["copying"]) == (found["all"], 0)
        else:
            assert 0 < found["copying"] == max(found["layer"], found["embedding"]) < found["all"] / 2
            assert found["visual"] < found["rollout"] < found["visual"] + found["layer"]


@pytest.mark.parametrize(("family", "stage"), [("qwen3_vl", 2), ("qwen3_vl", 3), ("qwen3_5", 3)])
def test_other_families(
    family: str, stage: int, family_assets: Callable[[str], Assets], ranks: ForkServer, tmp_path: Path
) -> None:
    """A position table, the mergers of deepstack, and what linear attention reads of its modules are gathered too."""
    assets = family_assets(family)
    pixels = dict.fromkeys(["video__max_pixels", "video__min_pixels", "video__image_max_pixels"], 4096)
    options: dict[str, Any] = pixels | {"max_steps": 2, "save_steps": 0, "beta": 0.04, "learning_rate": 3e-4}
    trainer(assets, tmp_path / "one", per_device_train_batch_size=2, **options).train()
    ranks.run_ranks(train_flags(assets, tmp_path / "two", **options, **zero(stage)))
    assert_same_runs(tmp_path / "one", tmp_path / "two", assets, 2)
    last = dict(checkpoints(tmp_path / "two"))[2]
    _, report = AutoModelForImageTextToText.from_pretrained(last, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report


@STAGES
def test_bf16_goes_on_from_its_fp32_weights(ranks: ForkServer, lab: Lab, stage: int) -> None:
    options = {"bf16": True, "max_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant"} | zero(stage)
    whole, again = lab.folder / "whole", lab.folder / "again"
    ranks.run_ranks(train_flags(lab.assets, whole, **options))
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-2")
    ranks.run_ranks(train_flags(lab.assets, again, resume="auto", **options))
    assert metrics(whole) == metrics(again)
    mine, theirs = weights(whole, 2), weights(again, 2)
    assert runs.same_weights(mine, theirs)
    assert {tensor.dtype for tensor in mine.values()} == {torch.bfloat16}
    parts = (dict(checkpoints(whole))[2] / "trainer").glob("optimizer-*.safetensors")
    masters = [value for part in parts for name, value in load_file(part).items() if name.endswith("/master")]
    assert {value.dtype for value in masters} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters)


def test_a_killed_rank_ends_the_others_and_leaves_the_checkpoint_whole(ranks: ForkServer, lab: Lab) -> None:
    flags = train_flags(lab.assets, lab.folder, max_steps=500, save_steps=2, distributed__timeout=10.0, **zero(2))
    _, rank_1 = ranks.start("forks:only_train", flags, world=2)
    runs.wait_for_lines(ranks.process, lab.folder / "metrics.jsonl", 5)
    os.kill(rank_1, signal.SIGKILL)
    assert ranks.wait() == [1, -signal.SIGKILL]
    said = ranks.log.read_text()
    assert re.search("another process of this run is gone|rank 1 has not been heard of", said), said[-2000:]
    step, path = checkpoints(lab.folder)[-1]
    assert step % 2 == 0
    assert not list((lab.folder / "checkpoints").glob("step-*.*"))
    Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    assert len(list((path / "trainer").glob("optimizer-*.safetensors"))) == 2


@pytest.mark.full
def test_under_torchrun(lab: Lab) -> None:
    """In whose place the other tests fork ranks."""
    flags = train_flags(lab.assets, lab.folder, max_steps=1, **zero(2))
    command = ["--standalone", "--nproc_per_node=2", "-m", "videor1.train", *flags]
    launcher = runs.start("torch.distributed.run", command, DS_ACCELERATOR="cpu")
    assert "Saved" in launcher.communicate(timeout=PATIENCE)[0]
    assert launcher.returncode == 0
    assert len(list((lab.folder / "checkpoints" / "step-1" / "trainer").glob("optimizer-*.safetensors"))) == 2


def test_positions_on_another_number_of_ranks() -> None:
    assert start_position(5, (0, 1)) == 5
    assert [start_position([3, 2], (rank, 2)) for rank in (0, 1)] == [3, 2]
    assert start_position([3, 2], (0, 1)) == 5
    assert [start_position(5, (rank, 2)) for rank in (0, 1)] == [3, 2]
    assert [start_position([2, 2], (rank, 3)) for rank in (0, 1, 2)] == [2, 1, 1]
    assert start_position([{"draws": 1}, {"draws": 2}], (1, 2)) == {"draws": 2}


def test_what_one_raises_all_raise() -> None:
    class Two(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, OSError("disk") if value is None else value]

    with pytest.raises(OSError, match="disk"):
        Two().on_every_rank(lambda: None)
    assert Ranks().on_main(lambda: 3) == 3


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        ("2", {}, r"distributed.engine: none, but a launcher started 2 processes"),
        ("1", zero(2) | {"rollout__engine": "server"}, "server: not with"),
        ("1", zero(2), "torchrun"),
    ],
)
def test_a_launcher_and_an_engine_need_each_other(
    world: str, options: dict[str, Any], message: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())  # it takes seconds to import, and is not reached
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=message):
        lab.make(**options)
