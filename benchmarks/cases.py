"""What is measured: cases, and the implementations that stand side by side in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.oracle import Expected

Step = Callable[[], Mapping[str, Tensor]]  # one call of what is timed -> its outputs by name
OURS = "videor1_kernels"
OUR_STEP, REFERENCE_STEP = f"{OURS}: videor1", "as the reference code"  # of whole steps


def _everywhere(device: torch.device) -> str | None:
    return None


def _nothing(_: Any) -> Any:
    return None


@dataclass(frozen=True)
class Contender:
    """One implementation."""

    name: str
    build: Callable[..., Any]  # from the case's inputs to a Step, or to what the case says; imports what it needs
    missing: Callable[[torch.device], str | None] = _everywhere  # why it cannot run on this device; None: it can
    # The matrix products it computes, where that differs from what the table counts; by backend for ours.
    does: str | Mapping[str, str] = ""
    graph: bool = False  # it never waits for the device, so a CUDA graph can hold it
    work: Callable[[Any], Work] | None = None  # what it does, where the table is to show that and not the least

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    @property
    def stage(self) -> int:
        """0: ours and plain torch, before any implementation whose kernels could break the process's device; 1: other
        libraries; 2: what is compiled first, which takes longest."""
        if self.name.startswith("torch.compile"):
            return 2
        return 0 if self.ours or self.name.startswith("torch") else 1


@dataclass(frozen=True)
class Work:
    """The least a call must do, whatever the implementation: the rates in the table divide this by the time."""

    flops: float  # of matrix products; 0: the case is bound by memory
    bytes: float  # each input read once, each output written once
    count: str  # the flops in the table's words, e.g. 6NHV
    tokens: int | None = None  # of a step: positions that go through the language model

    @property
    def ceiling(self) -> str:
        return "gemm" if self.flops else "copy"


@dataclass(frozen=True, eq=False)
class Case:
    """One line of comparison."""

    op: str
    title: str
    size: Mapping[str, Any]
    dtype: torch.dtype
    contenders: Sequence[Contender]
    inputs: Callable[[torch.device], Any] = _nothing
    expected: Callable[[Any], Sequence[Expected]] = _nothing
    work: Callable[[Any], Work] = _nothing
    uses: Sequence[str] = ()  # operations that ours calls besides ``op``, or all of them where ``against`` is given
    slow: bool = False  # minutes on a CPU: left out of ``pytest benchmarks`` unless asked for
    # Name of the contender whose results the others must have: all are measured in turns, and ``expected`` takes its
    # outputs in place of the inputs.
    against: str | None = None
    # What measures them, where ``measure_in_turns`` does not: (case, device, clock, rounds) -> rows.
    turns: Callable[..., list[Measurement]] | None = None
    rounds: int = 3  # of ``turns``, unless the options say how many

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations of the package that ours calls."""
        return tuple(self.uses) if self.against else (*self.uses, self.op)

    @property
    def name(self) -> str:
        return f"{self.op}, {self.title}, {self.described}"

    @property
    def described(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.size.items())


@dataclass
class Measurement:
    """One measurement, as the JSON file holds it."""

    op: str
    title: str
    size: Mapping[str, Any]
    dtype: str
    implementation: str
    status: str  # measured, not run (another's implementation, with the reason), or failed (ours, or a wrong result)
    reason: str | None = None
    backend: str | None = None  # of ours: which one ran
    does: str = ""
    count: str = ""
    tokens: int | None = None
    flops: float = 0.0
    bytes: float = 0.0
    ceiling: str = ""
    seconds: float | None = None  # median
    # Of what is measured in turns on a CPU: processor time of all threads, user and system. Other processes change it
    # far less than ``seconds``.
    cpu_seconds: float | None = None
    spread: float | None = None  # (90th - 10th percentile) / median
    rounds: int = 0
    timing: str = ""  # wall: a clock that waits for the device; graph: replays of a CUDA graph
    tflops: float | None = None
    gbps: float | None = None
    percent: float | None = None  # of the ceiling measured in the same run
    peak_mib: float | None = None  # beyond inputs and outputs
    errors: Mapping[str, float] = field(default_factory=dict)  # against fp64

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def blank_row(case: Case, contender: Contender, status: str) -> Measurement:
    """A row without figures."""
    dtype = str(case.dtype).removeprefix("torch.")
    return Measurement(case.op, case.title, dict(case.size), dtype, contender.name, status)


def pairs(cases: Sequence[Case]) -> list[tuple[Case, Contender]]:
    """Every (case, implementation), stage by stage."""
    everything = [(case, contender) for case in cases for contender in case.contenders]
    return sorted(everything, key=lambda pair: pair[1].stage)
