"""The forward kernel in Gluon: compiled, as nothing here can run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_groups_take_tiles_in_turns(tmp_path: Path) -> None:
    """Each has products of its own that overlap, and statistics around them, while the other goes on; none spills."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gluon_forward"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    products = [loop for loop in found["loops"] if loop["matrix"]]
    around = [loop for loop in found["loops"] if loop["slow"] > 64]  # an exponential for each of a thread's 128 logits
    assert len(products) == len(around) == 2
    for loop in products:
        assert loop["matrix"] == 8
        assert loop["drains"] == 0
    if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9):  # older ones spill in the statistics
        assert found["spills"] == 0
