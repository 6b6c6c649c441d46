"""Two processes on DeepSpeed's ZeRO against one: the same losses, answers and weights; resume; a killed rank."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE, THREADS
from runs import TESTS, assert_moved_alike, metrics, run_lines, sft_flags, train_flags, trainer, wait_for_lines
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model.manifest import MANIFEST
from videor1.training.checkpoint import checkpoints, find_damage
from videor1.training.distributed import make_ranks
from videor1.training.distributed.ranks import Ranks, start_position

pytest.importorskip("deepspeed")
ZERO = {"distributed__engine": "deepspeed"}
# Of what three steps write down, numbers of order 1: the rounding of log-probs up to 10 in the first step
# and the little that the others make of it.
TOLERANCE = 1e-4


def launch(flags: list[str], *, ranks: int = 2, module: str = "videor1.train", extra: tuple[str, ...] = ()) -> Any:
    """torchrun on this machine; its processes share a session."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    place = extra or ("--standalone", "--nproc_per_node", str(ranks))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *place, "-m", module, *flags],
        env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: Any, timeout: float = PATIENCE) -> str:
    try:
        said = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said[-3000:]
    return said


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(dict(checkpoints(run_dir))[step] / "model.safetensors")


def assert_same_runs(one: Path, other: Path, start: Path, step: int) -> None:
    """Losses, rewards and answers of every step, and the last weights of runs that started from the model ``start``."""
    rows, others = metrics(one), metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, given in zip(rows, others, strict=True):
        for name in NAMES:
            if name in row and row[name] is not None:
                assert given[name] == pytest.approx(row[name], rel=TOLERANCE, abs=TOLERANCE), (row["step"], name)
    answers = [
        {
            (line["step"], line["draw"]): line["completions"]
            for folder in sorted(run.glob("**/rollouts.jsonl"))
            for line in run_lines(folder.parent, "rollouts.jsonl")
        }
        for run in (one, other)
    ]
    assert answers[0] == answers[1]
    assert_moved_alike(weights(one, step), weights(other, step), load_file(start / "model.safetensors"), step)


NAMES = (
    "loss",
    "grad_norm",
    "reward",
    "kl",
    "entropy",
    "temporal/p",
    "completions/mean_length",
    "num_tokens",
    "data/draws",
    "pass/tokens",
    "rewards/accuracy/std",
)
OPTIONS = {"max_steps": 3, "learning_rate": 3e-4, "save_steps": 2, "beta": 0.04, "eval_steps": 2, "eval_samples": 3}


@pytest.fixture(scope="module")
def single(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, four prompts a step."""
    folder = tmp_path_factory.mktemp("single") / "run"
    options = OPTIONS | {"data__eval_path": assets.dev}
    trainer(assets, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options).train()
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def double(request: Any, assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, two prompts each."""
    folder = tmp_path_factory.mktemp("double") / "run"
    options = OPTIONS | ZERO | {"data__eval_path": assets.dev, "distributed__zero_stage": request.param}
    finished(launch(train_flags(assets, folder, per_device_train_batch_size=2, **options)))
    return folder


def test_two_processes_train_as_one(single: Path, double: Path, assets: Assets) -> None:
    assert_same_runs(single, double, assets.model, 3)
    assert metrics(single)[-1]["eval/ordered"] == metrics(double)[-1]["eval/ordered"]
    assert metrics(double)[-1]["eval/samples"] == 3
    last = dict(checkpoints(double))[3]
    parts = {f"trainer/{path.name}" for path in (last / "trainer").glob("optimizer-*-of-00002.safetensors")}
    assert len(parts) == 2
    assert parts <= set(json.loads((last / MANIFEST).read_text())["files"])
    assert find_damage(last) is None
    assert not (double / ".lock").exists()
    Qwen2_5_VLForConditionalGeneration.from_pretrained(dict(checkpoints(double))[3])


@pytest.mark.parametrize("ranks", [2, 1])
def test_resumed_on_two_and_on_one(single: Path, double: Path, assets: Assets, tmp_path: Path, ranks: int) -> None:
    folder = tmp_path / "run"
    shutil.copytree(double, folder)
    shutil.rmtree(folder / "checkpoints" / "step-3")
    options = OPTIONS | {"data__eval_path": assets.dev, "resume": "auto"}
    if ranks == 2:
        stage = 3 if "double1" in str(double.parent) else 2
        options |= ZERO | {"distributed__zero_stage": stage}
        finished(launch(train_flags(assets, folder, per_device_train_batch_size=2, **options)))
    else:
        batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer(assets, folder, **batches, **options).train()
        for name in ("rollouts.jsonl", "metrics.jsonl"):
            (folder / "rank-1" / name).unlink()  # of step 3 before it was taken back
        assert_moved_alike(weights(single, 3), weights(folder, 3), load_file(assets.model / "model.safetensors"), 3)
        return
    assert_same_runs(single, folder, assets.model, 3)


def test_a_killed_rank_ends_the_others_and_leaves_the_checkpoint_whole(assets: Assets, tmp_path: Path) -> None:
    """Each rank under a launcher of its own, as on two machines: no launcher of the same machine ends the other."""
    folder, port = tmp_path / "run", free_port()
    flags = train_flags(assets, folder, max_steps=500, save_steps=2, distributed__timeout=10.0, **ZERO)
    machines = [
        launch(
            flags,
            extra=(
                "--nnodes",
                "2",
                "--node_rank",
                str(node),
                "--nproc_per_node",
                "1",
                "--max_restarts",
                "0",
                "--master_addr",
                "127.0.0.1",
                "--master_port",
                str(port),
            ),
        )
        for node in (0, 1)
    ]
    wait_for_lines(machines[0], folder / "metrics.jsonl", 5)
    (rank_0,), (rank_1,) = (children(machine.pid) for machine in machines)
    for process in (machines[1].pid, rank_1):
        os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    while rank_0 in children(machines[0].pid):
        assert time.monotonic() - began < PATIENCE, "rank 0 waits for the dead"
        time.sleep(0.1)
    os.kill(machines[0].pid, signal.SIGKILL)  # the launcher, which waits minutes for that of the dead machine
    said = machines[0].communicate(timeout=PATIENCE)[0]
    assert re.search("another process of this run is gone|rank 1 has not been heard of", said), said[-2000:]
    step, path = checkpoints(folder)[-1]
    assert step % 2 == 0
    assert not list((folder / "checkpoints").glob("step-*.*"))
    Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    assert len(list((path / "trainer").glob("optimizer-*.safetensors"))) == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_stay_together_whatever_one_meets(assets: Assets, tmp_path: Path, stage: int) -> None:
    """A video that is not there, groups with nothing to learn (left out of the rows), and no memory for a rollout."""
    samples = json.loads(Path(assets.train).read_text())
    bad = samples[0] | {"problem_id": "bad", "path": "./nowhere.mp4"}
    data = Path(assets.train).parent / f"with-bad-{stage}.json"
    data.write_text(json.dumps([bad, *samples]))
    flags = train_flags(
        assets,
        tmp_path,
        dataset_name=data,
        max_steps=4,
        save_steps=0,
        beta=0.0,
        distributed__zero_stage=stage,
        reward__functions="toy_rewards:sometimes",
        per_device_train_batch_size=2,
        **ZERO,
    )
    finished(launch(flags, module="out_of_memory"))
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["rollout/failed"] for row in rows] == [0, 2, 0, 0]
    assert rows[-1]["data/skipped/missing_file"] >= 1
    assert rows[-1]["data/skipped/rollout"] == 2
    assert sum(row["pass/groups_left_out"] for row in rows) > 0
    assert all(row["loss"] is not None and row["nonfinite_steps"] == 0 for row in rows)
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(tmp_path / "rank-1")]
    assert all(bool(tensor.isfinite().all()) for tensor in weights(tmp_path, 4).values())


def children(process: int) -> list[int]:
    """Living ones."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found += [int(entry.name)] if int(fields[1]) == process and fields[0] != "Z" else []
    return found


def test_sft_on_two(assets: Assets, tmp_path: Path) -> None:
    from runs import sft_trainer

    options = {"max_steps": 3, "save_steps": 0}
    sft_trainer(assets, tmp_path / "one", per_device_train_batch_size=2, **options).train()
    flags = sft_flags(assets, tmp_path / "two", **options, **ZERO)
    finished(launch(flags, module="videor1.sft"))
    losses = [[row["loss"] for row in metrics(tmp_path / run)] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    mine, theirs = (weights(tmp_path / run, 3) for run in ("one", "two"))
    assert_moved_alike(mine, theirs, load_file(assets.model / "model.safetensors"), 3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(
    "options",
    [
        {"lora__rank": 4, "distributed__zero_stage": 3},
        {"freeze_vision": True, "gradient_checkpointing": True, "distributed__zero_stage": 3},
        {"distributed__offload_optimizer": True, "distributed__zero_stage": 2},
    ],
)
def test_trained_with(options: dict[str, Any], assets: Assets, tmp_path: Path) -> None:
    options = options | {"max_steps": 2, "save_steps": 0, "beta": 0.04, "learning_rate": 3e-4}
    trainer(assets, tmp_path / "one", per_device_train_batch_size=2, **options).train()
    flags = train_flags(assets, tmp_path / "two", **options, **ZERO)
    finished(launch(flags))
    assert_same_runs(tmp_path / "one", tmp_path / "two", assets.model, 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_goes_on_from_its_fp32_weights(assets: Assets, tmp_path: Path, stage: int) -> None:
    options = ZERO | {"bf16": True, "save_steps": 2, "distributed__zero_stage": stage, "lr_scheduler_type": "constant"}
    finished(launch(train_flags(assets, tmp_path / "whole", max_steps=3, **options)))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-3")
    finished(launch(train_flags(assets, tmp_path / "again", max_steps=3, resume="auto", **options)))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "again")
    mine, theirs = weights(tmp_path / "whole", 3), weights(tmp_path / "again", 3)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {tensor.dtype for tensor in mine.values()} == {torch.bfloat16}
    masters = {}
    for part in (dict(checkpoints(tmp_path / "whole"))[3] / "trainer").glob("optimizer-*.safetensors"):
        masters |= {name: value for name, value in load_file(part).items() if name.endswith("/master")}
    assert {value.dtype for value in masters.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())


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


def test_a_launcher_without_an_engine(monkeypatch: pytest.MonkeyPatch, assets: Assets, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"distributed.engine: none, but a launcher started 2 processes"):
        trainer(assets, tmp_path)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="server: not with"):
        trainer(assets, tmp_path, rollout__engine="server", **ZERO)
    with pytest.raises(ConfigError, match="torchrun"):
        trainer(assets, tmp_path, **ZERO)
    assert make_ranks is not None
