"""Rollouts measured by turns: gates and memory first, then time, of which the part behind the prefill is told apart."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Contender, Measurement, Step
from benchmarks.measure import Clock, _outcome_in, _summarise, ceilings, measure_in_turns

DECODE_SECONDS, DECODE_STEPS = "decode_seconds", "decode_steps"  # outputs that every call gives besides its results


@dataclass(frozen=True, eq=False)
class RolloutCase(Case):
    """Its contenders' calls give DECODE_SECONDS and DECODE_STEPS, scalars; ``Work.bytes`` are those that one decode
    step has to read, 0 where that bounds nothing."""


@dataclass
class RolloutMeasurement(Measurement):
    """``tokens`` are the sampled ones; ``gbps`` and ``percent`` (of the copy's) are of ``bytes`` over a decode step."""

    decode_steps: int = 0
    decode_seconds: float | None = None  # median; from the end of the last prefill on, without the steps before it


def measure_rollout(case: RolloutCase, device: torch.device, clock: Clock, rounds: int) -> list[Measurement]:
    """One call of each contender by turns, gated and with its memory watched, then ``rounds`` by turns for the time.

    Watching costs nothing on a GPU, where the first calls are the timed ones; on a CPU it slows calls of many small
    operations by a fifth to a third, and not all contenders alike.
    """
    inputs, calls = case.inputs(device), dict[str, _Calls]()
    contenders = [dataclasses.replace(c, build=_remembering(c, clock, calls)) for c in case.contenders]
    watched = dataclasses.replace(case, inputs=lambda _: inputs, contenders=contenders)
    on_cpu = device.type == "cpu"
    measured = measure_in_turns(watched, device, clock, 1 if on_cpu else rounds)
    rows = [RolloutMeasurement(**row.to_json()) for row in measured]
    if on_cpu:
        for call in calls.values():
            call.forget()
        for _ in range(rounds):
            for row, contender in zip(rows, case.contenders, strict=True):
                if row.status == "measured":
                    with _outcome_in(row, contender, device):
                        calls[row.implementation]()
    for row in rows:
        if row.status == "measured":
            _fill(row, calls[row.implementation], device)
        else:
            row.seconds = row.cpu_seconds = row.peak_mib = row.percent = row.gbps = None
    return list(rows)


@dataclass
class _Calls:
    """A step that notes the time of each of its calls."""

    step: Step
    clock: Clock
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    steps: int = 0

    def __call__(self) -> Mapping[str, Tensor]:
        start, busy = self.clock(), time.process_time()
        outputs = self.step()
        self.seconds.append(self.clock() - start)
        self.processor.append(time.process_time() - busy)
        self.decode.append(float(outputs[DECODE_SECONDS]))
        self.steps = int(outputs[DECODE_STEPS])
        return outputs

    def forget(self) -> None:
        for times in (self.seconds, self.processor, self.decode):
            times.clear()


def _remembering(contender: Contender, clock: Clock, calls: dict[str, _Calls]) -> Callable[[Any], Step]:
    def build(inputs: Any) -> Step:
        calls[contender.name] = _Calls(contender.build(inputs), clock)
        return calls[contender.name]

    return build


def _fill(row: RolloutMeasurement, calls: _Calls, device: torch.device) -> None:
    _summarise(row, calls.seconds)
    row.cpu_seconds = statistics.median(calls.processor) if device.type == "cpu" else None
    row.decode_steps, row.decode_seconds = calls.steps, statistics.median(calls.decode)
    row.gbps = row.percent = None
    if row.bytes:
        row.gbps = row.bytes * row.decode_steps / row.decode_seconds / 1e9
        row.percent = 100 * row.gbps / ceilings(device).copy_gbps
