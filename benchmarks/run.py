"""Measure without pytest: ``python -m benchmarks.run kernels``. Prints the table last; ends with 1 if ours failed."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import Case, Contender, Measurement, blank_row, pairs
from benchmarks.measure import Clock, ceilings, measure, measure_in_turns, plain_stopwatch
from benchmarks.record import RESULTS, Record, failures
from benchmarks.report import table
from benchmarks.rollout_turns import RolloutCase, measure_rollout
from benchmarks.whole_step import StepCase, measure_steps

PARTS = {
    "kernels": (
        "linear_logprob",
        "linear_grpo_loss",
        "selective_log_softmax",
        "grpo_loss",
        "group_advantage",
        "prefix_attention",
        "prefix_decode_attention",
        "sample_tokens",
    ),
    "video": ("frames_to_patches", "decode"),
    "step": ("step",),
    "training": ("training",),
    "rollout": ("rollout",),
}
ROUNDS = {"cuda": (5, 1), "cpu": (3, 1)}  # of what is measured in turns: timed, and before these
SLOW_ROUNDS = (1, 1)  # a first call also pays for memory that the machine has not given out before


def default_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def part_of(module: str) -> str:
    """The part that ``benchmarks.bench_<name>`` belongs to."""
    name = module.rpartition("bench_")[2]
    return next(part for part, names in PARTS.items() if name in names)


def part_pairs(part: str, device: torch.device) -> list[tuple[Case, Contender]]:
    """Everything that a part measures on this device, in order."""
    modules = [importlib.import_module(f"benchmarks.bench_{name}") for name in PARTS[part]]
    return pairs([case for module in modules for case in module.cases(device)])


def run_part(
    part: str,
    device: torch.device,
    *,
    only: str = "",
    seconds: float = float("inf"),
    tests: str = "not run",
    out: Path | None = None,
    rounds: int | None = None,
    everything: Sequence[tuple[Case, Contender]] | None = None,
) -> Record:
    """Measure a part; after ``seconds`` the remaining implementations of others are left out, and the rows say so.
    Writes the file after every row, so that a run that is cut off leaves what it had. ``everything`` replaces the
    part's own cases."""
    start = time.monotonic()
    if everything is None:
        everything = part_pairs(part, device)
    record = Record(part, device, ceilings(device), len(everything), tests)
    clock = Clock(device)
    done: set[Case] = set()
    for case, contender in everything:
        if case in done or not re.search(only, f"{case.name}: {contender.name}"):
            continue
        late = time.monotonic() - start >= seconds
        if case.against:
            done.add(case)
            rows = left_out(case, case.contenders, seconds) if late else in_turns(case, device, clock, rounds)
        elif late and contender.stage:
            rows = left_out(case, [contender], seconds)
        else:
            rows = [measure(case, contender, device, plain_stopwatch(clock), clock)]
        for row in rows:
            passed = time.monotonic() - start
            print(f"{passed:6.1f} s  {case.name}: {row.implementation}: {outcome(row)}", flush=True)
        record.rows += rows
        if out is not None:
            record.save(out)
    return record


def in_turns(case: Case, device: torch.device, clock: Clock, rounds: int | None = None) -> list[Measurement]:
    """Measure a case by turns, ``rounds`` times, or as often as its device and its length suggest."""
    if isinstance(case, RolloutCase):
        return measure_rollout(case, device, clock, rounds or case.rounds)
    if isinstance(case, StepCase):
        return measure_steps(case, device, clock, rounds or case.rounds)
    usual, warm_up = SLOW_ROUNDS if case.slow and device.type == "cpu" else ROUNDS[device.type]
    return measure_in_turns(case, device, clock, rounds or usual, warm_up=warm_up)


def left_out(case: Case, contenders: Sequence[Contender], seconds: float) -> list[Measurement]:
    rows = [blank_row(case, contender, "not run") for contender in contenders]
    for row in rows:
        row.reason = f"left out after {seconds:.0f} s of this run"
    return rows


def outcome(row: Measurement) -> str:
    return f"{row.status}: {row.reason}" if row.seconds is None else f"{row.seconds * 1e3:.3f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--device", type=torch.device, default=default_device(), help="cuda where there is one")
    parser.add_argument("--only", default="", metavar="REGEX", help="what to measure, by 'case: implementation'")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="leave out others' rest after this long")
    parser.add_argument(
        "--tests",
        default="not run",
        choices=["passed", "failed", "not run"],
        help="how the kernels' tests ended on this machine",
    )
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help="write the JSON file (default folder: benchmarks/results)",
    )
    options = parser.parse_args(arguments)
    record = run_part(
        options.part,
        options.device,
        only=options.only,
        seconds=options.seconds,
        tests=options.tests,
        out=options.record,
    )
    print()
    print(table(record.to_json()))
    return 1 if failures(record.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
