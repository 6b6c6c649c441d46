"""``pytest benchmarks``: one test per case and implementation, timed by pytest-benchmark; the table at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.cases import Case, Contender, Measurement, pairs
from benchmarks.measure import Clock, ceilings, measure
from benchmarks.record import RESULTS, Record
from benchmarks.report import table
from benchmarks.run import PARTS, default_device, in_turns, part_of, part_pairs

DEVICE = default_device()
CLOCK = Clock(DEVICE)
RECORDS = pytest.StashKey[dict[str, Record]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("videor1_kernels benchmarks")
    group.addoption(
        "--record", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="write a JSON file per part"
    )
    group.addoption("--slow", action="store_true", help="also the cases that take minutes on a CPU")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            'pytest benchmarks: expected the plugin pytest-benchmark: pip install -e ".[bench]" (in the clone), '
            "or measure without it: python -m benchmarks.run kernels"
        )
    config.option.benchmark_quiet = True  # its tables hold no rates, memory or peers that did not run: -v shows them
    config.stash[RECORDS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"pair", "case"} & set(metafunc.fixturenames):
        return
    slow = metafunc.config.getoption("slow")
    cases = [case for case in metafunc.module.cases(DEVICE) if slow or not case.slow]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])
    else:
        chosen = pairs(cases)
        names = [f"{case.title}, {case.described}: {contender.name}" for case, contender in chosen]
        metafunc.parametrize("pair", chosen, ids=names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        item.add_marker(pytest.mark.timeout(0))
    items.sort(key=_position)


def _position(item: pytest.Item) -> tuple[int, int, int]:
    """Stage by stage, each in the order of the part; parts in their order."""
    pair = getattr(item, "callspec", None) and item.callspec.params.get("pair")  # type: ignore[attr-defined]
    name = item.module.__name__.rpartition("bench_")[2]  # type: ignore[attr-defined]
    part = part_of(name)
    return list(PARTS).index(part), pair[1].stage if pair else 0, PARTS[part].index(name)


@pytest.fixture
def run_pair(pair: tuple[Case, Contender], benchmark, request: pytest.FixtureRequest) -> Callable[[], None]:
    """Gate, then time and memory; the row goes into the table."""

    def stopwatch(target, setup, rounds):
        benchmark.pedantic(target, setup=setup, rounds=rounds)
        return list(benchmark.stats.stats.data)

    def run() -> None:
        case, contender = pair
        benchmark.group = case.name
        row = measure(case, contender, DEVICE, stopwatch, CLOCK)
        benchmark.skipped = row.seconds is None
        benchmark.extra_info.update(row.to_json())
        _record(request, [row])
        _judge(row)

    return run


@pytest.fixture
def run_case(case: Case, request: pytest.FixtureRequest) -> Callable[[], None]:
    """All contenders of a case by turns; each call is checked, timed, and its memory watched."""

    def run() -> None:
        rows = in_turns(case, DEVICE, CLOCK)
        _record(request, rows)
        for row in rows:
            if row.status == "failed":
                _judge(row)

    return run


def _record(request: pytest.FixtureRequest, rows: Sequence[Measurement]) -> None:
    part = part_of(request.module.__name__)
    records = request.config.stash[RECORDS]
    if part not in records:
        records[part] = Record(part, DEVICE, ceilings(DEVICE), len(part_pairs(part, DEVICE)))
    records[part].rows += rows


def _judge(row: Measurement) -> None:
    if row.status == "failed":
        pytest.fail(row.reason or "", pytrace=False)
    if row.status == "not run":
        pytest.skip(f"not run: {row.reason}")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for record in config.stash[RECORDS].values():
        terminalreporter.write_line("")
        terminalreporter.write_line(table(record.to_json()))
        folder = config.getoption("record")
        if folder is not None:
            terminalreporter.write_line(f"\nrecorded: {record.save(folder).name}")
