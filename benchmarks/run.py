"""Measure without pytest: ``python -m benchmarks.run kernels``. Prints the table last; ends with 1 if a result is wrong
or ours failed.

``pytest benchmarks`` makes the same :class:`Run` of the same cases with the same options. A machine with a card needs
neither pytest nor its plugin for them: the stopwatch is then :func:`~benchmarks.measure.plain_stopwatch`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from benchmarks.cases import Case, Contender, Measurement, blank_row, pairs
from benchmarks.measure import Clock, Stopwatch, ceilings, measure, measure_in_turns, plain_stopwatch
from benchmarks.options import add_options, given_sizes
from benchmarks.record import Record, failures
from benchmarks.report import table

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
        "add_rms_norm",
        "rotary_append",
        "silu_mul",
        "output_gates",
        "prefix_gated_delta",
        "gated_delta_step",
    ),
    "video": ("frames_to_patches", "decode"),
    "step": ("step",),
    "training": ("training",),
    "rollout": ("rollout",),
    "growth": ("growth",),
}
ONE_THREAD = ("step", "growth")  # on a CPU, unless the options name another number
ROUNDS = {"cuda": (5, 1), "cpu": (3, 1)}  # of what is measured in turns: timed, and before these
SLOW_ROUNDS = (1, 1)  # a first call also pays for memory that the machine has not given out before


def part_of(module: str) -> str:
    """The part that ``benchmarks.bench_<name>`` belongs to."""
    name = module.rpartition("bench_")[2]
    return next(part for part, names in PARTS.items() if name in names)


def part_modules(part: str) -> list[ModuleType]:
    return [importlib.import_module(f"benchmarks.bench_{name}") for name in PARTS[part]]


def part_cases(part: str, device: torch.device, sizes: Mapping[str, Any] | None = None) -> list[Case]:
    """All that a part measures on this device, in order, with the sizes that it takes of those given."""
    return [case for module in part_modules(part) for case in module_cases(module, device, sizes or {})]


def module_cases(module: ModuleType, device: torch.device, sizes: Mapping[str, Any]) -> list[Case]:
    return module.cases(device, **{name: sizes[name] for name in sizes.keys() & sizes_of(module)})


def sizes_of(module: ModuleType) -> set[str]:
    """The options that its cases take besides the device."""
    return set(inspect.signature(module.cases).parameters) - {"device"}


def units(cases: Sequence[Case], only: str = "") -> list[tuple[Case, Contender]]:
    """What is measured at once, in order: each implementation by itself; of a case that is measured in turns the first
    that ``only`` finds, which stands for all."""
    found: dict[tuple[Case, str | None], tuple[Case, Contender]] = {}
    for case, contender in pairs(cases):
        if re.search(only, f"{case.name}: {contender.name}"):
            found.setdefault((case, None if case.against else contender.name), (case, contender))
    return list(found.values())


class Run:
    """A part while it is measured: a record that grows, and is written after every measurement, so that a run that is
    cut off leaves what it had. After ``seconds`` the remaining implementations of others are left out, and their rows
    say so. ``part`` has the ``cases``, by whose rows a record is complete."""

    def __init__(self, part: str, cases: Sequence[Case], options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        on_cpu = self.device.type == "cpu"
        self._threads = (options.threads or (1 if part in ONE_THREAD else None)) if on_cpu else None
        self._start = time.monotonic()
        self.clock = Clock(self.device)
        with _threads(self._threads):
            self.record = Record(part, self.device, ceilings(self.device), len(pairs(cases)), options.tests)

    @property
    def passed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._start

    def measure(self, case: Case, contender: Contender, stopwatch: Stopwatch | None = None) -> list[Measurement]:
        """The row of one implementation, or the rows of all of a case that is measured in turns."""
        if self.passed >= self.options.seconds and (case.against or contender.stage):
            rows = left_out(case, case.contenders if case.against else [contender], self.options.seconds)
        else:
            with _threads(self._threads):
                if case.against:
                    rows = in_turns(case, self.device, self.clock, self.options.rounds)
                else:
                    watch = stopwatch or plain_stopwatch(self.clock)
                    rows = [measure(case, contender, self.device, watch, self.clock)]
        self.record.rows += rows
        if self.options.record is not None:
            self.record.save(self.options.record)
        return rows


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch computes with ``count`` threads inside; None: with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turns(case: Case, device: torch.device, clock: Clock, rounds: int | None = None) -> list[Measurement]:
    """Measure a case by turns, ``rounds`` times, or as often as it says, or as its device and its length suggest."""
    if case.turns is not None:
        return case.turns(case, device, clock, rounds or case.rounds)
    usual, warm_up = SLOW_ROUNDS if case.slow and device.type == "cpu" else ROUNDS[device.type]
    return measure_in_turns(case, device, clock, rounds or usual, warm_up=warm_up)


def left_out(case: Case, contenders: Sequence[Contender], seconds: float) -> list[Measurement]:
    rows = [blank_row(case, contender, "not run") for contender in contenders]
    for row in rows:
        row.reason = f"left out after {seconds:.0f} s of this run"
    return rows


def outcome(row: Measurement) -> str:
    return f"{row.status}: {row.reason}" if row.seconds is None else f"{row.seconds * 1e3:.3f} ms"


def run_cases(part: str, cases: Sequence[Case], options: argparse.Namespace) -> Record:
    """Measure cases one after the other; a line for each row, and the table last."""
    run = Run(part, cases, options)
    for case, contender in units(cases, options.only):
        for row in run.measure(case, contender):
            print(f"{run.passed:6.1f} s  {case.name}: {row.implementation}: {outcome(row)}", flush=True)
    print(f"\n{table(run.record.to_json())}")
    return run.record


def make_parser(command: str, description: str | None, *parts: str) -> argparse.ArgumentParser:
    """Of ``python -m benchmarks.<command>``, which measures one of ``parts``: the first, or that of ``--part``."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{command}", description=description)
    if len(parts) > 1:
        parser.add_argument("--part", choices=parts, default=parts[0])
    else:
        parser.set_defaults(part=parts[0] if parts else None)
    add_options(parser.add_argument)
    return parser


def run_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Record:
    """Measure the part and the sizes that a command line names."""
    sizes = given_sizes(options)
    taken = set().union(*map(sizes_of, part_modules(options.part)))
    for name in sizes:
        if name not in taken:
            known = ", ".join(f"--{other}" for other in sorted(taken)) or "none of the sizes"
            parser.error(f"--{name}: no option of {options.part}, which takes {known}")
    try:
        cases = part_cases(options.part, options.device, sizes)
    except ValueError as error:
        parser.error(f"--{error}")
    return run_cases(options.part, cases, options)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("run", __doc__)
    parser.add_argument("part", choices=sorted(PARTS))
    return 1 if failures(run_options(parser.parse_args(arguments), parser).rows) else 0


if __name__ == "__main__":
    sys.exit(main())
