"""Time, peak memory and ceilings. The same code serves ``pytest benchmarks`` and the plain runner."""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Contender, Measurement, Step, Work, blank_row
from benchmarks.oracle import Expected, GateFailure, check
from videor1_kernels import last_backend
from videor1_kernels.testing import PeakMemory

GRAPH_BELOW = 100e-6  # seconds; a launch from Python costs about a tenth of this
GRAPH_CALLS = 20
BUDGET = {"cuda": 1.0, "cpu": 0.4}  # seconds of timed calls per row
MIB = 2**20

# (what to time, what to run before each round, rounds) -> seconds of each round
Stopwatch = Callable[[Callable[[], None], Callable[[], None], int], Sequence[float]]


class Clock:
    """Seconds, read when the device has finished what it was given. A target that times itself (a CUDA graph of many
    calls) says with :meth:`count` what the round took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last = 0.0
        self._counted: float | None = None

    def __call__(self) -> float:
        synchronize(self.device)
        self._last, self._counted = (time.perf_counter() if self._counted is None else self._counted), None
        return self._last

    def count(self, seconds: float) -> None:
        """The next reading is ``seconds`` after the last."""
        self._counted = self._last + seconds


def plain_stopwatch(clock: Clock) -> Stopwatch:
    """A stopwatch without pytest-benchmark."""

    def run(target: Callable[[], None], setup: Callable[[], None], rounds: int) -> list[float]:
        seconds = []
        for _ in range(rounds):
            setup()
            start = clock()
            target()
            seconds.append(clock() - start)
        return seconds

    return run


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches, measured in the same process as the rows."""

    gemm_tflops: float  # a product of the head's shape through torch.mm
    gemm_shape: str
    gemm_dtype: str
    copy_gbps: float  # a copy within the device, bytes read plus bytes written
    copy_mib: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ceilings(device: torch.device) -> Ceilings:
    """Measure them, once per process, device and number of torch's threads, on random data."""
    return _ceilings(device, torch.get_num_threads())


@functools.cache
def _ceilings(device: torch.device, threads: int) -> Ceilings:
    on_gpu = device.type == "cuda"
    n, h, v, dtype = (8192, 3584, 152064, torch.bfloat16) if on_gpu else (1024, 512, 8192, torch.float32)
    mib = 4096 if on_gpu else 256
    return Ceilings(
        gemm_tflops=2 * n * h * v / _product_seconds(n, h, v, dtype, device) / 1e12,
        gemm_shape=f"[{n}, {h}] x [{h}, {v}]",
        gemm_dtype=str(dtype).removeprefix("torch."),
        copy_gbps=2 * mib * MIB / _copy_seconds(mib * MIB, device) / 1e9,
        copy_mib=mib,
    )


def _product_seconds(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> float:
    left = torch.randn(n, h, device=device, dtype=dtype)
    right = torch.randn(v, h, device=device, dtype=dtype)
    product = torch.empty(n, v, device=device, dtype=dtype)
    return _ceiling_seconds(lambda: torch.mm(left, right.T, out=product), device)


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.empty(size // 4, device=device).uniform_()
    target = torch.empty_like(source)
    return _ceiling_seconds(lambda: target.copy_(source), device)


@functools.lru_cache(maxsize=1)
def prepare(case: Case, device: torch.device) -> tuple[Any, Sequence[Expected], Work]:
    """A case's inputs, what fp64 says of them, and the work: kept until the next case is prepared."""
    inputs = case.inputs(device)
    return inputs, case.expected(inputs), case.work(inputs)


def measure(case: Case, contender: Contender, device: torch.device, stopwatch: Stopwatch, clock: Clock) -> Measurement:
    """Gate first, then time and memory. Never raises for what another implementation cannot do, nor for a wrong result:
    the row's status and reason say it."""
    row = blank_row(case, contender, "measured")
    reason = contender.missing(device)
    if reason is not None:
        row.status, row.reason = "not run", reason
        return row
    with _outcome_in(row, contender, device):
        inputs, expected, work = prepare(case, device)
        _describe(row, contender.work(inputs) if contender.work else work)
        step = contender.build(inputs)
        row.errors = check(step(), expected, case.dtype, ours=contender.ours)
        _name_backend(row, case, contender, device)
        _time(row, step, contender.graph, device, stopwatch, clock)
        row.peak_mib = peak_bytes(step, device) / MIB
    step = inputs = None  # type: ignore[assignment]
    torch.compiler.reset()  # past a few shapes of one function the compiler would run it uncompiled
    _free(device)
    if row.status == "measured":
        _rate(row, ceilings(device))
    return row


def measure_in_turns(
    case: Case, device: torch.device, clock: Clock, rounds: int, *, warm_up: int = 0
) -> list[Measurement]:
    """Every contender of a case that names one to compare with: by turns, so that what else the machine does falls on
    all alike; each call is checked, timed, and its memory watched. ``warm_up`` rounds come first, untimed."""
    inputs = case.inputs(device)
    first = next(c for c in case.contenders if c.name == case.against)
    order = [first, *(c for c in case.contenders if c is not first)]
    rows = {c.name: blank_row(case, c, "measured") for c in order}
    seconds: dict[str, list[float]] = {c.name: [] for c in order}
    processor: dict[str, list[float]] = {c.name: [] for c in order}
    steps: dict[str, Step] = {}
    expected: Sequence[Expected] | None = None
    for number in range(warm_up + rounds):
        for contender in order:
            row = rows[contender.name]
            if row.status != "measured":
                continue
            with _outcome_in(row, contender, device):
                if contender.name not in steps:
                    _describe(row, (contender.work or case.work)(inputs))
                    steps[contender.name] = contender.build(inputs)
                with PeakMemory(device) as memory:
                    start, busy = clock(), time.process_time()
                    outputs = steps[contender.name]()
                    taken, busy = clock() - start, time.process_time() - busy
                row.peak_mib = max(row.peak_mib or 0.0, (memory.bytes - _returned(outputs)) / MIB)
                if expected is None:
                    if contender is not first:
                        raise GateFailure(f"{case.against} gave no results to compare with")
                    expected = case.expected(outputs)
                row.errors = check(outputs, expected, case.dtype, ours=contender.ours)
                _name_backend(row, case, contender, device)
                if number >= warm_up:
                    seconds[contender.name].append(taken)
                    processor[contender.name].append(busy)
            if row.status != "measured":
                steps.pop(contender.name, None)
                _free(device)
    for name, row in rows.items():
        if row.status == "measured":
            row.timing = "wall"
            _summarise(row, seconds[name])
            row.cpu_seconds = statistics.median(processor[name]) if device.type == "cpu" else None
            _rate(row, ceilings(device))
        else:
            row.peak_mib = None
    return [rows[c.name] for c in case.contenders]


@contextlib.contextmanager
def _outcome_in(row: Measurement, contender: Contender, device: torch.device) -> Iterator[None]:
    """What goes wrong inside ends up in the row: never an exception for what another implementation cannot do."""
    try:
        yield
    except GateFailure as wrong:
        row.status, row.reason = "failed", str(wrong)
    except torch.OutOfMemoryError:
        row.status, row.reason = "failed" if contender.ours else "not run", "does not fit in the device's memory"
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")[:200]
        row.status, row.reason = "failed" if contender.ours else "not run", f"{type(error).__name__}: {first}"


def _describe(row: Measurement, work: Work) -> None:
    row.count, row.flops, row.bytes, row.ceiling = work.count, work.flops, work.bytes, work.ceiling
    row.tokens = work.tokens


def _name_backend(row: Measurement, case: Case, contender: Contender, device: torch.device) -> None:
    if contender.ours:
        row.backend = " + ".join(dict.fromkeys(check_backend(op, device) for op in case.ops))
    row.does = contender.does if isinstance(contender.does, str) else contender.does.get(row.backend or "", "")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_backend(op: str, device: torch.device) -> str:
    """The backend that the last call of ``op`` took; on a GPU the reference is not what is to be measured."""
    backend = last_backend(op)
    if backend is None:
        raise GateFailure(f"{op}: expected a call of it, but none was made in this process")
    if device.type == "cuda" and backend == "reference":
        raise GateFailure(f"{op}: the reference ran on {device}, expected a kernel; backends({op!r}, 'cuda') says why")
    return backend


def _time(row: Measurement, step: Step, graph: bool, device: torch.device, stopwatch: Stopwatch, clock: Clock) -> None:
    def target() -> None:
        step()

    flush = l2_flush(device)
    estimate = min(plain_stopwatch(clock)(target, flush, 2))
    row.timing = "wall"
    if graph and device.type == "cuda":
        replay, per_call = capture(step, flush, clock)
        if per_call < GRAPH_BELOW:
            target, estimate, row.timing = replay, per_call * GRAPH_CALLS, "graph"
            flush = _nothing
    rounds = max(3 if estimate > 0.3 else 7, min(50, int(BUDGET[device.type] / estimate)))
    _summarise(row, stopwatch(target, flush, rounds))


def _summarise(row: Measurement, samples: Sequence[float]) -> None:
    seconds = sorted(samples)
    row.rounds = len(seconds)
    row.seconds = statistics.median(seconds)
    row.spread = (seconds[round(0.9 * (len(seconds) - 1))] - seconds[round(0.1 * (len(seconds) - 1))]) / row.seconds


def _rate(row: Measurement, ceiling: Ceilings) -> None:
    assert row.seconds is not None
    row.tflops = row.flops / row.seconds / 1e12 if row.flops else None
    row.gbps = row.bytes / row.seconds / 1e9
    row.percent = 100 * (row.tflops / ceiling.gemm_tflops if row.tflops else row.gbps / ceiling.copy_gbps)


def capture(step: Step, flush: Callable[[], None], clock: Clock) -> tuple[Callable[[], None], float]:
    """A target that counts the seconds of one call inside a CUDA graph, and a first reading of them. One graph holds
    calls each behind a flush, the other the flushes alone: the difference is the calls, cache cold."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with_calls, flushes = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(with_calls):
        for _ in range(GRAPH_CALLS):
            flush()
            step()
    with torch.cuda.graph(flushes):
        for _ in range(GRAPH_CALLS):
            flush()

    def replay() -> float:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        with_calls.replay()
        marks[1].record()
        flushes.replay()
        marks[2].record()
        marks[2].synchronize()
        return (marks[0].elapsed_time(marks[1]) - marks[1].elapsed_time(marks[2])) / 1e3 / GRAPH_CALLS

    for _ in range(3):
        replay()
    return lambda: clock.count(replay()), statistics.median(replay() for _ in range(5))


def l2_flush(device: torch.device) -> Callable[[], None]:
    """Overwrite the second-level cache, so that a call finds nothing of the one before."""
    if device.type != "cuda":
        return _nothing
    size = max(64 * MIB, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    buffer = torch.empty(size, dtype=torch.int8, device=device)
    return lambda: _discard(buffer.zero_())


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory a call holds at once, beyond what was there before it and the outputs it returns."""
    with PeakMemory(device) as memory:
        outputs = step()
    return memory.bytes - _returned(outputs)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _returned(outputs: Mapping[str, Tensor]) -> int:
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in outputs.values()}
    return sum(storages.values())


def _ceiling_seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    for _ in range(3):
        call()
    seconds = plain_stopwatch(Clock(device))(lambda: _discard(call()), l2_flush(device), 11)
    # Other processes share a CPU and only ever slow it; a card's clocks fall under load, in the rows as here.
    return statistics.median(seconds) if device.type == "cuda" else min(seconds)


def _discard(value: object) -> None:
    pass


def _nothing() -> None:
    pass
