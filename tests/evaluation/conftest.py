"""Fixtures of the evaluation's tests."""

from pathlib import Path

import pytest
from evaluations import Evaluate

from videor1.demo.assets import Assets


@pytest.fixture
def evaluate(assets: Assets, benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    return Evaluate(assets, benchmarks, tmp_path, capsys)
