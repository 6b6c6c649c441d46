"""``pytest benchmarks``: one test for each thing that is measured by itself, and the tables at the end. ``-m`` chooses
parts, ``-k`` and ids choose cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cases import Case, Contender
from benchmarks.measure import Clock
from benchmarks.options import add_options, given_sizes
from benchmarks.report import table
from benchmarks.run import PARTS, Run, module_cases, part_cases, part_of, sizes_of, units

CLOCK = pytest.StashKey[Clock]()
RUNS = pytest.StashKey[dict[str, Run]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("videor1_kernels benchmarks")
    group.addoption("--slow", action="store_true", help="also what takes minutes on a CPU, or hours in all: growth")
    add_options(group.addoption)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            'pytest benchmarks: expected the plugin pytest-benchmark: pip install -e ".[bench]" (in the clone), '
            "or measure without it: python -m benchmarks.run kernels"
        )
    config.option.benchmark_quiet = True  # its tables hold no rates, memory or peers that did not run: -v shows them
    config.stash[CLOCK], config.stash[RUNS] = Clock(config.option.device), {}
    for part, names in PARTS.items():
        config.addinivalue_line("markers", f"{part}: benchmarks of {', '.join(names)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that does not take a given size measures nothing; a size that is given asks for slow cases too."""
    if "pair" not in metafunc.fixturenames:
        return
    options, sizes = metafunc.config.option, given_sizes(metafunc.config.option)
    known = sizes.keys() <= sizes_of(metafunc.module)
    cases = module_cases(metafunc.module, options.device, sizes) if known else []
    chosen = units([case for case in cases if options.slow or sizes or not case.slow], options.only)
    metafunc.parametrize("pair", chosen, ids=[_id(*pair) for pair in chosen])


def _id(case: Case, contender: Contender) -> str:
    return f"{case.title}, {case.described}" + ("" if case.against else f": {contender.name}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(getattr(pytest.mark, part_of(item.module.__name__)))  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.benchmark(timer=config.stash[CLOCK]))
        item.add_marker(pytest.mark.timeout(0))
    items.sort(key=_position)


def _position(item: pytest.Item) -> tuple[int, int, int]:
    """Part by part; within each stage by stage, module by module."""
    module = item.module.__name__  # type: ignore[attr-defined]
    part, pair = part_of(module), item.callspec.params["pair"]  # type: ignore[attr-defined]
    stage = pair[1].stage if isinstance(pair, tuple) else 0  # no pair: nothing of the module is measured
    return list(PARTS).index(part), stage, PARTS[part].index(module.rpartition("bench_")[2])


@pytest.fixture
def run_case(pair: tuple[Case, Contender], request: pytest.FixtureRequest) -> Callable[[], None]:
    """Gate, then time and memory: of one implementation, timed by pytest-benchmark, or of all by turns."""
    case, contender = pair
    options, runs = request.config.option, request.config.stash[RUNS]
    part = part_of(request.module.__name__)
    if part not in runs:
        runs[part] = Run(part, part_cases(part, options.device, given_sizes(options)), options)

    def run() -> None:
        if case.against:
            rows = runs[part].measure(case, contender)
        else:
            benchmark = request.getfixturevalue("benchmark")
            benchmark.group = case.name
            rows = runs[part].measure(case, contender, stopwatch)
            benchmark.skipped = rows[0].seconds is None
            benchmark.extra_info.update(rows[0].to_json())
        wrong = [f"{row.implementation}: {row.reason}" for row in rows if row.status == "failed"]
        if wrong:
            pytest.fail("\n".join(wrong), pytrace=False)
        if all(row.status == "not run" for row in rows):
            pytest.skip(f"not run: {rows[0].reason}")

    def stopwatch(target, setup, rounds):
        benchmark = request.getfixturevalue("benchmark")
        benchmark.pedantic(target, setup=setup, rounds=rounds)
        return list(benchmark.stats.stats.data)

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for run in config.stash[RUNS].values():
        terminalreporter.write_line(f"\n{table(run.record.to_json())}")
        if config.option.record is not None:
            terminalreporter.write_line(f"\nrecorded: {run.record.path}")
