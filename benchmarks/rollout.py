"""Rollouts, our engine beside transformers' ``generate``: ``python -m benchmarks.rollout``. Prints the table last; ends
with 1 if a result is wrong or ours failed. With ``--skipping``: what a training batch saves by leaving out shuffled
answers, and that its advantages stay the same; ends with 1 if they do not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import bench_rollout, rollout_skipping
from benchmarks.record import RESULTS, failures
from benchmarks.report import table
from benchmarks.rollout_inputs import MODELS, Rollouts
from benchmarks.rollout_skipping import whole_number
from benchmarks.run import default_device, run_part
from videor1.config.cli import run_main


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=MODELS,
        help="models, with random weights (default: 7b and 3b on a card, else tiny)",
    )
    parser.add_argument("--prompts", nargs="+", type=whole_number, help="default: 1 and 16 on a card, else 1 and 4")
    parser.add_argument("--completion", type=whole_number, help="tokens of each answer (default: 256 or 64)")
    parser.add_argument("--rounds", type=whole_number, help="timed calls of each (default: by the length)")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="cuda where there is one")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help="write the JSON file (default folder: benchmarks/results)",
    )
    rollout_skipping.add_options(parser)
    options = parser.parse_args(arguments)
    if options.skipping:
        return run_main(lambda _: rollout_skipping.run(options, parser))
    on_card = options.device.type == "cuda"
    cases = [
        bench_rollout.rollout(
            Rollouts(model, prompts, options.completion or (256 if on_card else 64), _dtype(model, options.device))
        )
        for prompts in options.prompts or ((1, 16) if on_card else (1, 4))
        for model in options.shape or (("7b", "3b") if on_card else ("tiny",))
    ]
    everything = [(case, contender) for case in cases for contender in case.contenders]
    record = run_part("rollout", options.device, out=options.record, rounds=options.rounds, everything=everything)
    print()
    print(table(record.to_json()))
    return 1 if failures(record.rows) else 0


def _dtype(model: str, device: torch.device) -> torch.dtype:
    return torch.float32 if model == "tiny" and device.type == "cpu" else torch.bfloat16


if __name__ == "__main__":
    sys.exit(main())
