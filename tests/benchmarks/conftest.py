"""No test is about the ceilings, which take seconds to measure, or about how exact a time is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from made_up import CEILINGS

from benchmarks import bench_step, measure, rollout_turns, run


@pytest.fixture(scope="module", autouse=True)
def _collected_once() -> Iterator[None]:
    """The garbage is collected before every measurement: of what is there already, once."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench_step, measure, rollout_turns, run):
        monkeypatch.setattr(module, "ceilings", lambda device: CEILINGS)
    monkeypatch.setitem(measure.BUDGET, "cpu", 0.001)


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not watched, by a profiler that is started for each call."""
    monkeypatch.setattr(measure, "PeakMemory", lambda device: nullcontext(SimpleNamespace(bytes=0)))
