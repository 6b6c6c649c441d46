"""The ceilings take seconds to measure, and no test is about them."""

from __future__ import annotations

import pytest
from made_up import CEILINGS

from benchmarks import bench_step, measure, rollout_turns, run


@pytest.fixture(autouse=True)
def _made_up_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench_step, measure, rollout_turns, run):
        monkeypatch.setattr(module, "ceilings", lambda device: CEILINGS)
