"""What the tests of the benchmarks measure instead of the real cases: made-up ones, against made-up ceilings."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.cases import Case, Contender, Measurement, Step, Work
from benchmarks.measure import Ceilings, Clock, measure, plain_stopwatch
from benchmarks.oracle import Expected
from benchmarks.run import make_parser

CPU = torch.device("cpu")
CEILINGS = Ceilings(2.0, "[1, 1] x [1, 1]", "float32", 100.0, 1)
WORK = Work(2e6, 1e3, "2NHV", 7)


class FakeTime:
    """Stands in for the module ``time``; its clock moves when something sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def cpu_options(*words: str) -> argparse.Namespace:
    return make_parser("run", None).parse_args(["--device", "cpu", *words])


def row_of(case: Case, contender: Contender) -> Measurement:
    clock = Clock(CPU)
    return measure(case, contender, CPU, plain_stopwatch(clock), clock)


def giving(name: str, *results: Any, log: list[str] | None = None) -> Contender:
    """Calls that give or raise these, the last again and again, and note themselves."""

    def build(_: Any) -> Step:
        calls = itertools.chain(results, itertools.repeat(results[-1]))

        def call() -> Mapping[str, torch.Tensor]:
            if log is not None:
                log.append(name)
            if isinstance(result := next(calls), Exception):
                raise result
            return result if isinstance(result, dict) else {"out": torch.full((4,), result)}

        return call

    return Contender(name, build)


def made_up_case(*contenders: Contender, work: Work = WORK, kind: Any = Case, **more: Any) -> Any:
    """``out`` must be 1; in turns that of the contender "naive"."""
    return kind(
        op="made up",
        title="made up",
        size={"P": 1},
        dtype=torch.float32,
        inputs=lambda device: {"out": torch.ones(4)},
        expected=lambda right: [Expected("out", "out", right["out"].double(), bound=1e-6)],
        work=lambda _: work,
        contenders=contenders,
        against="naive",
        **more,
    )
