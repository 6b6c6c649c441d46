"""A whole step, ours beside the naive one: ``python -m benchmarks.step --part training --shape cpu``. Prints the table
last; ends with 1 if a result is wrong or ours failed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import bench_step
from benchmarks.cases import Case
from benchmarks.record import RESULTS, failures
from benchmarks.report import table
from benchmarks.run import default_device, run_part
from benchmarks.step_inputs import SHAPES, Group

CHECKPOINTING = {"on": True, "off": False, "shape": None}


def training(options: argparse.Namespace) -> list[Case]:
    group = Group(options.prompt, options.generations, options.completion)
    try:
        group.grid  # noqa: B018
    except ValueError as error:
        raise SystemExit(f"--{error}") from error
    checkpointing = CHECKPOINTING[options.checkpointing]
    return [bench_step.training(SHAPES[name], group, checkpointing=checkpointing) for name in options.shape]


PARTS: dict[str, Callable[[argparse.Namespace], list[Case]]] = {"training": training}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--part", choices=sorted(PARTS), default="training")
    parser.add_argument("--shape", nargs="+", choices=SHAPES,
                        help="model sizes, with random weights (default: 3b and 7b on a card, else cpu)")  # fmt: skip
    parser.add_argument("--prompt", type=int, default=1224, help="tokens, 200 of them text")
    parser.add_argument("--completion", type=int, default=768, help="tokens of each completion")
    parser.add_argument("--generations", type=int, default=8, help="completions of the prompt")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="shape",
                        help="gradient checkpointing; shape: on for 3b and 7b, off for cpu")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="timed calls of each (default: 5 on a card, 1 on a CPU)")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="cuda where there is one")
    parser.add_argument("--record", nargs="?", type=Path, const=RESULTS, metavar="FOLDER",
                        help="write the JSON file (default folder: benchmarks/results)")  # fmt: skip
    options = parser.parse_args(arguments)
    options.shape = options.shape or (["3b", "7b"] if options.device.type == "cuda" else ["cpu"])
    everything = [(case, contender) for case in PARTS[options.part](options) for contender in case.contenders]
    record = run_part("step", options.device, out=options.record, rounds=options.rounds, everything=everything)
    print()
    print(table(record.to_json()))
    return 1 if failures(record.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
