"""What the tests of the benchmarks measure instead of the real cases: made-up ones, against made-up ceilings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cases import Case, Contender, Work
from benchmarks.measure import Ceilings
from benchmarks.oracle import Expected
from benchmarks.run import make_parser

CPU = torch.device("cpu")
CEILINGS = Ceilings(2.0, "[1, 1] x [1, 1]", "float32", 100.0, 1)


def cpu_options(*words: str) -> argparse.Namespace:
    """Of a run on the CPU."""
    return make_parser("run", None).parse_args(["--device", "cpu", *words])


def made_up_case(
    contenders: Sequence[Contender], work: Work, inputs: Any, kind: Callable[..., Any] = Case, **more: Any
):
    """Its contenders' ``out`` must be that of the contender "naive"."""
    return kind(
        op="made up",
        title="made up",
        size={"P": 1},
        dtype=torch.float32,
        inputs=lambda device: inputs,
        expected=lambda outputs: [Expected("out", "out", outputs["out"].double(), bound=1e-6)],
        work=lambda _: work,
        contenders=contenders,
        against="naive",
        **more,
    )
