"""Whole T-GRPO steps, from video files to updated weights, ours beside the algorithm as the reference code computes it:
``python -m benchmarks.step``. Prints the table last; ends with 1 if a result is wrong or ours failed. With ``--part
training``: the training pass alone, on a packed row and on repeated rows."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import bench_step, bench_training
from benchmarks.cases import Case
from benchmarks.record import RESULTS, failures
from benchmarks.report import table
from benchmarks.rollout_skipping import whole_number
from benchmarks.run import default_device, run_part
from benchmarks.step_inputs import SHAPES, Group
from benchmarks.whole_inputs import MODELS

CHECKPOINTING = {"on": True, "off": False, "shape": None}


def step(options: argparse.Namespace) -> list[Case]:
    """Every named model and number of prompts; without names, the settings that are recorded."""
    given = {
        "frames": options.frames,
        "generations": options.generations,
        "completion": options.completion,
        "lora": options.lora,
        "checkpointing": CHECKPOINTING[options.checkpointing],
        "media": options.media,
    }
    wanted = {name: value for name, value in given.items() if value is not None}
    base = bench_step.settings(options.device)
    if options.shape or options.prompts or wanted:
        shapes = options.shape or [base[-1].model]
        counts = options.prompts or [base[-1].prompts]
        base = [bench_step.setting_of(shape, n, options.device) for shape in shapes for n in counts]
    return [bench_step.step(dataclasses.replace(setting, **wanted), steps=options.steps) for setting in base]


def training(options: argparse.Namespace) -> list[Case]:
    group = Group(options.prompt, options.generations or 8, options.completion or 768)
    try:
        group.grid  # noqa: B018
    except ValueError as error:
        raise SystemExit(f"--{error}") from error
    checkpointing = CHECKPOINTING[options.checkpointing]
    shapes = options.shape or (["3b", "7b"] if options.device.type == "cuda" else ["cpu"])
    return [bench_training.training(SHAPES[name], group, checkpointing=checkpointing) for name in shapes]


PARTS: dict[str, Callable[[argparse.Namespace], list[Case]]] = {"step": step, "training": training}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--part", choices=sorted(PARTS), default="step")
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=sorted({*MODELS, *SHAPES}),
        help="models, with random weights (default: 7b, of training 3b too, on a card; else tiny, of training cpu)",
    )
    parser.add_argument(
        "--generations",
        type=whole_number,
        help="answers from ordered frames; half as many from shuffled ones (default: 8)",
    )
    parser.add_argument("--completion", type=whole_number, help="tokens of each answer (default: 768; tiny: 64, 128)")
    parser.add_argument(
        "--checkpointing",
        choices=CHECKPOINTING,
        default="shape",
        help="gradient checkpointing; shape: on for 3b and 7b",
    )
    parser.add_argument("--rounds", type=whole_number, help="times that each way is measured (default: by its length)")
    parser.add_argument(
        "--threads",
        type=whole_number,
        help="of torch, on a CPU (default: 1 for steps, which are then "
        "not slowed by what else the machine does; all for training)",
    )
    parser.add_argument("--device", type=torch.device, default=default_device(), help="cuda where there is one")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help="write the JSON file (default folder: benchmarks/results)",
    )
    whole = parser.add_argument_group("whole steps")
    whole.add_argument(
        "--prompts", nargs="+", type=whole_number, help="of an optimizer step (default: 1 and 4 on a card)"
    )
    whole.add_argument("--frames", type=whole_number, help="of a video (default: 16)")
    whole.add_argument("--media", choices=("video", "image"), help="image: plain GRPO, beside TRL too")
    whole.add_argument("--lora", type=int, help="rank of the adapters; 0: all is trained (default: 64 for 7b)")
    whole.add_argument("--steps", type=whole_number, default=1, help="that are timed together")
    packed = parser.add_argument_group("training pass")
    packed.add_argument("--prompt", type=int, default=1224, help="tokens, 200 of them text")
    options = parser.parse_args(arguments)
    known = MODELS if options.part == "step" else SHAPES
    for name in options.shape or []:
        if name not in known:
            parser.error(f"--shape: --part {options.part} takes {', '.join(known)}, got {name}")
    if options.device.type == "cpu" and (options.threads or options.part == "step"):
        torch.set_num_threads(options.threads or 1)
    everything = [(case, contender) for case in PARTS[options.part](options) for contender in case.contenders]
    record = run_part(options.part, options.device, out=options.record, rounds=options.rounds, everything=everything)
    print()
    print(table(record.to_json()))
    return 1 if failures(record.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
