"""Short training runs for tests, in this process and as commands, and what they leave behind."""

import contextlib
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE, THREADS
from safetensors.torch import load_file
from spies import wrap
from tiny import GRADIENT_ROUNDING

from videor1.config import SFTConfig, TrainConfig
from videor1.config.cli import parse
from videor1.demo.assets import Assets
from videor1.logs.jsonl import read_jsonl
from videor1.model.manifest import MANIFEST
from videor1.training.checkpoint import checkpoints
from videor1.training.sft import SFTTrainer
from videor1.training.tgrpo import Trainer

TESTS = Path(__file__).parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
}
TINY = {"data.workers": 0, "max_completion_length": 8, "learning_rate": 1e-3, "disable_tqdm": True, "device": "cpu"}
TINY |= dict.fromkeys(("video.max_pixels", "video.min_pixels", "video.image_max_pixels"), 3136)
TINY_TRAIN = TINY | {"num_generations": 2, "temporal.num_generations": 1, "reward.functions": "toy_rewards:uneven"}


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond this many bytes: what a quota or a full disk does, from the kernel."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Killed(BaseException):
    """Ends a run in this process at a chosen place, past every ``except Exception``."""


def kill_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """The ``call``-th call of a function raises Killed instead."""
    calls = itertools.count(1)

    def counting(original: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    wrap(patch, owner, name, counting)


def kill(run: Trainer | SFTTrainer, owner: Any, name: str, call: int) -> None:
    """Train until the ``call``-th call of a function, where the run ends."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            run.train()


def ctrl_c(patch: pytest.MonkeyPatch, run: Trainer | SFTTrainer, step: int, times: int = 1) -> None:
    """Ctrl-C, as often, in the batch before which ``step`` steps are done."""

    def batch(original: Any) -> None:
        for _ in range(times * (run.step == step)):
            os.kill(os.getpid(), signal.SIGINT)
        original()

    wrap(patch, run, "train_batch", batch)


def train_flags(assets: Assets, output_dir: Path, **options: Any) -> list[str]:
    """The command line of a tiny T-GRPO run; a double underscore stands for a dot."""
    options = {"model_name_or_path": assets.model, "dataset_name": assets.train} | options
    return _flags(TINY_TRAIN, output_dir=output_dir, **options)


def sft_flags(assets: Assets, output_dir: Path, **options: Any) -> list[str]:
    """The command line of a tiny SFT run."""
    options = {"model_name_or_path": assets.model, "dataset_name": assets.sft} | options
    return _flags(TINY, output_dir=output_dir, **options)


def _flags(tiny: dict[str, Any], **options: Any) -> list[str]:
    given = tiny | {name.replace("__", "."): value for name, value in options.items()}
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]


def trainer(assets: Assets, output_dir: Path, **options: Any) -> Trainer:
    return Trainer(parse(TrainConfig, train_flags(assets, output_dir, **options), prog="train", description=""))


def sft_trainer(assets: Assets, output_dir: Path, **options: Any) -> SFTTrainer:
    return SFTTrainer(parse(SFTConfig, sft_flags(assets, output_dir, **options), prog="sft", description=""))


class Lab:
    """A folder, and tiny runs in it by their names; without a name, in the folder itself."""

    def __init__(self, assets: Assets, folder: Path) -> None:
        self.assets, self.folder = assets, folder

    def make(self, name: str = "", **options: Any) -> Trainer:
        return trainer(self.assets, self.folder / name, **options)

    def sft(self, name: str = "", **options: Any) -> SFTTrainer:
        return sft_trainer(self.assets, self.folder / name, **options)

    def rows(self, name: str = "") -> list[dict[str, Any]]:
        return metrics(self.folder / name)


def start(module: str, flags: list[str], **variables: str) -> subprocess.Popen[str]:
    """``python -m module flags`` in a session of its own, with the tests' number of threads."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        env=os.environ | ENVIRONMENT | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int, timeout: float = PATIENCE) -> None:
    """Until a run in progress has written ``count`` lines."""
    deadline = time.monotonic() + timeout
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} has no {count} lines after {timeout} s"
        time.sleep(0.005)


def session_members(session: int) -> list[int]:
    """Live processes of a session (zombies do not count)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            found += [int(folder.name)] if int(of) == session and state != "Z" else []
    return found


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    rows = read_jsonl(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def run_lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return read_jsonl(run_dir / name)


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """The last line about a training step."""
    return [row for row in metrics(run_dir) if "loss" in row][-1]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_moved_alike(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor], steps: int
) -> None:
    """Two runs' weights after the same few steps of AdamW from ``start``, up to rounding.

    Adam divides by the gradient's own size: where that is within its rounding of 0, rounding decides the sign of the
    entry's step. So all entries together are compared. Gradients are about normal, so a share of GRADIENT_ROUNDING of
    them is that near to 0 in a step; each of these goes twice the length of a step wrong."""
    assert one.keys() == other.keys() == start.keys()
    apart, moved = (
        math.sqrt(sum(float((one[name] - given[name]).double().square().sum()) for name in start))
        for given in (other, start)
    )
    assert moved > 1e-3
    assert apart <= math.sqrt(4 * steps * GRADIENT_ROUNDING) * moved


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Bit for bit: metrics, rollouts, skips, and every file of the last checkpoint."""
    assert metrics(run_dir) == metrics(expected)
    for name in ("rollouts.jsonl", "skipped.jsonl"):
        if (expected / name).exists():
            assert (run_dir / name).read_bytes() == (expected / name).read_bytes(), name
    (step, ours), (expected_step, theirs) = checkpoints(run_dir)[-1], checkpoints(expected)[-1]
    assert step == expected_step
    found, wanted = _contents(ours), _contents(theirs)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def _contents(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's files, without what a clock measured."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    found: dict[str, Any] = {str(path.relative_to(checkpoint)): path.read_bytes() for path in files}
    state = json.loads(found["trainer/state.json"])
    for row in state["pending_metrics"]:
        for key in [key for key in row if key.startswith("time/")]:
            del row[key]
    found["trainer/state.json"] = json.dumps(state, sort_keys=True)  # as text: NaN equals NaN
    found[MANIFEST] = json.loads(found[MANIFEST])["files"] | {"trainer/state.json": None}  # which is of the clock too
    return found


def write_data(path: Path, entries: list[Any]) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a demo data file with absolute media paths."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return [entry | {"path": str(path.parent / entry["path"])} for entry in found]
