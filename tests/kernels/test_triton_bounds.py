"""No kernel reads or writes outside its tensors: a process in which that is fatal runs all of them to the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

HERE = Path(__file__).parent


@pytest.mark.slow
def test_no_access_outside_the_tensors() -> None:
    # A process of its own, without a GPU: Triton's interpreter is chosen when triton is first imported.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(HERE / "triton_guarded.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 38, done.stdout
