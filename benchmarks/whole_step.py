"""Whole T-GRPO steps measured in turns: each way checked, then timed in its steady state, then its memory watched."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import psutil
import torch

from benchmarks.cases import Case, Contender, Measurement, blank_row
from benchmarks.measure import MIB, Clock, _free, _name_backend, _outcome_in
from benchmarks.phases import Phases
from benchmarks.whole_inputs import Setting, WholeInputs, whole_inputs


class Runner(Protocol):
    """A way to make steps."""

    inputs: WholeInputs

    def __call__(self) -> None:
        """One optimizer step."""

    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class StepCase(Case):
    """Its contenders' ``build`` takes files and phases and makes a runner, which is asked after its first step."""

    setting: Setting = field(default_factory=Setting)
    check: Callable[[Runner], dict[str, float]] = lambda _: {}  # errors by name; GateFailure where one is too large
    floor: Callable[[Runner], dict[str, float]] = lambda _: {}  # least seconds of each phase; empty: it cannot tell
    steps: int = 1  # that are timed together
    memory: bool = True  # whether it is watched
    cold: frozenset[str] = frozenset()  # contenders whose first step is timed already: nothing in them has to get going


@dataclass
class StepMeasurement(Measurement):
    """``seconds`` are of one optimizer step. Memory: ``peak_mib`` is beyond ``held_mib``."""

    prompts_per_hour: float | None = None
    held_mib: float | None = None  # weights, the reference model's too, and optimizer states
    phases: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds, peak_mib, floor_seconds by phase


def measure_steps(case: StepCase, device: torch.device, clock: Clock, rounds: int) -> list[Measurement]:
    """``rounds`` times by turns: a runner is opened, makes a step that is not timed and is checked, makes the timed
    steps, and in the first round one more (on a GPU: the same) whose memory is watched."""
    rows = {c.name: StepMeasurement(**blank_row(case, c, "measured").to_json()) for c in case.contenders}
    taken: dict[str, list[_Taken]] = {c.name: [] for c in case.contenders}
    floor: dict[str, float] = {}
    with whole_inputs(case.setting, device) as inputs:
        for number in range(rounds):
            for contender in case.contenders:
                row = rows[contender.name]
                if row.status != "measured":
                    continue
                if (reason := contender.missing(device)) is not None:
                    row.status, row.reason = "not run", reason
                    continue
                with _outcome_in(row, contender, device):
                    taken[contender.name].append(_round(case, contender, row, inputs, floor, first=number == 0))
                _free(device)
    for contender in case.contenders:
        row = rows[contender.name]
        if row.status == "measured":
            _fill(row, taken[contender.name], floor, case.setting)
    return list(rows.values())


class _Taken(NamedTuple):
    """What one step took."""

    phases: dict[str, float]  # seconds
    processor: float  # seconds of this process and of its decode workers

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def _round(
    case: StepCase,
    contender: Contender,
    row: StepMeasurement,
    inputs: WholeInputs,
    floor: dict[str, float],
    *,
    first: bool,
) -> _Taken:
    device, phases = inputs.device, Phases(inputs.device)
    # Every round writes a run folder of its own.
    config = dataclasses.replace(inputs.config, output_dir=tempfile.mkdtemp(dir=inputs.folder))
    runner: Runner = contender.build(dataclasses.replace(inputs, config=config), phases)
    on_card = device.type == "cuda"
    try:
        cold = contender.name in case.cold
        if not cold:
            runner()
        if first and not cold:
            _inspect(case, contender, row, runner, floor)
        with phases.watched(memory=first and on_card and case.memory):
            busy = _processor_seconds()
            for _ in range(case.steps):
                runner()
            busy = _processor_seconds() - busy
        taken = _Taken({name: total / case.steps for name, total in phases.seconds.items()}, busy / case.steps)
        peaks = phases.peaks
        if first and cold:
            _inspect(case, contender, row, runner, floor)
        if first and case.memory:
            row.held_mib = _held(runner) / MIB
            if not on_card:
                with phases.watched(memory=True):
                    runner()
                peaks = phases.peaks
            row.phases = {name: {"peak_mib": peak / MIB} for name, peak in peaks.items()}
            row.peak_mib = max(peaks.values()) / MIB
        return taken
    finally:
        runner.close()


def _inspect(
    case: StepCase, contender: Contender, row: StepMeasurement, runner: Runner, floor: dict[str, float]
) -> None:
    row.errors = case.check(runner)
    _name_backend(row, case, contender, runner.inputs.device)
    floor |= {} if floor else case.floor(runner)


def _processor_seconds() -> float:
    """User and system time of this process and of those it has started."""
    process = psutil.Process()
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def _fill(row: StepMeasurement, taken: list[_Taken], floor: Mapping[str, float], setting: Setting) -> None:
    """Fill in the figures of the rounds. The phases are those of the round with the median time."""
    totals = [one.seconds for one in taken]
    row.seconds, row.rounds, row.timing = statistics.median_low(totals), len(taken), "wall"
    row.cpu_seconds = statistics.median(one.processor for one in taken)
    row.spread = (max(totals) - min(totals)) / row.seconds
    row.prompts_per_hour = 3600 * setting.prompts / row.seconds
    for name, seconds in taken[totals.index(row.seconds)].phases.items():
        row.phases.setdefault(name, {})["seconds"] = seconds
    for name, seconds in floor.items():
        row.phases.setdefault(name, {})["floor_seconds"] = seconds
    row.percent = 100 * sum(floor.values()) / row.seconds if floor else None


def _held(runner: Any) -> int:
    """Bytes of the weights, of a reference model that is not the same weights, and of the optimizer's states."""
    frozen = getattr(runner, "frozen", None)
    models = [runner.model.hf, *([frozen.hf] if frozen is not None else [])]
    tensors = [p for model in models for p in model.parameters()]
    tensors += [v for state in runner.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
