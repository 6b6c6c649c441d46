"""Looks at a card that ``benchmarks.first`` takes: whether every kernel runs in training, what rollouts leave behind,
and where the time of a decode step goes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import Clock, ceilings, check_backend, l2_flush, plain_stopwatch, synchronize
from benchmarks.record import card_name, driver, versions
from benchmarks.rollout_inputs import Rollouts, requests, rollout_inputs
from videor1.atomic import write_atomic
from videor1.config import TrainConfig
from videor1.config.cli import parse
from videor1.demo.assets import Sizes, make_assets
from videor1.rollout import LocalEngine, SamplingOptions
from videor1.training.tgrpo import KERNELS, Trainer

STEPS = 3
ROLLOUTS = 3
LEFT_BEHIND = 0.01  # share of a rollout's KV cache that may stay allocated after it
MIB = 2**20

Found = dict[str, Any]


def smoke(device: torch.device, write: Callable[[Found], None]) -> None:
    """Versions and ceilings, the patch embedding as convolution and as product, and every kernel in training."""
    found: Found = {"card": card_name(device), "driver": driver(device), "torch": torch.__version__, **versions()}
    write(found)
    found["ceilings"] = ceilings(device).to_json()
    write(found)
    found["patch embedding"] = patch_embedding(device)
    write(found)
    found["kernels"] = train_through_kernels(device)
    write(found)


def patch_embedding(device: torch.device) -> Found:
    """Milliseconds for the patches of 16 frames, as the tower's convolution and as one product."""
    patches, width, dtype = (8 * 26 * 46, 1280, torch.bfloat16) if device.type == "cuda" else (64, 64, torch.float32)
    layer = torch.nn.Conv3d(3, width, (2, 14, 14), (2, 14, 14), bias=False, device=device, dtype=dtype)
    x = torch.randn(patches, 3, 2, 14, 14, device=device, dtype=dtype)
    calls: dict[str, Callable[[], Any]] = {
        "convolution": lambda: layer(x),
        "product": lambda: F.linear(x.flatten(1), layer.weight.flatten(1)),
    }
    watch, flush = plain_stopwatch(Clock(device)), l2_flush(device)
    with torch.no_grad():
        return {name: 1e3 * sorted(watch(call, flush, 5))[2] for name, call in calls.items()} | {"patches": patches}


def train_through_kernels(device: torch.device) -> dict[str, str]:
    """The backend that each kernel took in three T-GRPO steps of the demonstration's model.

    Raises:
        GateFailure: a kernel did not run, or its reference stood in for it on a card.
    """
    sizes = Sizes(4, 2, train_videos=3, train_images=1, dev_videos=2, dev_images=1, test_videos=1, test_images=0)
    on_card = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        assets = make_assets(Path(folder, "assets"), sizes=sizes, progress=False)
        options = {
            "model_name_or_path": assets.model,
            "dataset_name": assets.train,
            "output_dir": Path(folder, "run"),
            "device": device.type,
            "bf16": str(on_card).lower(),
            "kernels": "triton" if on_card else "auto",
            "max_steps": STEPS,
            "num_iterations": 2,  # ratios off 1
            "max_completion_length": 8,
            "num_generations": 4,
            "temporal.num_generations": 2,
            "data.workers": 0,
            "disable_tqdm": "true",
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        Trainer(parse(TrainConfig, flags, prog="first", description="")).train()
    return {op: check_backend(op, device) for op in KERNELS}


def memory(device: torch.device, write: Callable[[Found], None]) -> None:
    """Memory allocated after each of three equal rollouts, and their KV cache; fails where it grows."""
    engine, asked = _engine(device, new_tokens=32 if device.type == "cuda" else 3)
    found: Found = {"MiB after each rollout": []}
    for _ in range(ROLLOUTS):
        rollout = engine.generate(asked)
        found["KV cache, MiB"] = rollout.stats.kv_bytes / MIB
        synchronize(device)
        allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        found["MiB after each rollout"].append(allocated / MIB)
        write(found)
    first, *_, last = found["MiB after each rollout"]
    if last - first > LEFT_BEHIND * found["KV cache, MiB"]:
        raise SystemExit(f"memory: {last - first:.0f} MiB more after {ROLLOUTS} rollouts than after one")


def trace(device: torch.device, write: Callable[[Found], None]) -> None:
    """Which kernels a few decode steps launch, how often and for how long."""
    from torch.profiler import ProfilerActivity, profile

    new_tokens = 8 if device.type == "cuda" else 3
    engine, asked = _engine(device, new_tokens)
    engine.generate(asked)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        engine.generate(asked)
        synchronize(device)
    rows = sorted(profiled.key_averages(), key=lambda row: -_microseconds(row, device))
    shown = [
        {"name": row.key[:120], "calls": row.count, "microseconds": round(_microseconds(row, device), 1)}
        for row in rows[:40]
    ]
    write({"decode steps": new_tokens - 1, "sequences": sum(r.ordered.count for r in asked), "longest": shown})


def _microseconds(row: Any, device: torch.device) -> float:
    return float(row.self_device_time_total if device.type == "cuda" else row.self_cpu_time_total)


def _engine(device: torch.device, new_tokens: int) -> tuple[LocalEngine, Any]:
    on_card = device.type == "cuda"
    sizes = Rollouts("7b" if on_card else "tiny", 1, new_tokens, torch.bfloat16 if on_card else torch.float32)
    inputs = rollout_inputs(sizes, device)
    return LocalEngine(inputs.model, SamplingOptions(new_tokens)), requests(inputs)


LOOKS = {"smoke": smoke, "memory": memory, "trace": trace}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_looks", description=__doc__)
    parser.add_argument("look", choices=LOOKS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    LOOKS[options.look](device, lambda found: write_atomic(options.out, json.dumps(found, indent=1) + "\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
