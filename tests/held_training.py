"""A training command that waits for a signal once its first metrics line is written; its module's name comes first."""

import importlib
import sys
import time

from patience import PATIENCE

from videor1.config.cli import run_main
from videor1.training.loop import Loop


def _stopping_when_told(self: Loop) -> bool:
    deadline = time.monotonic() + PATIENCE
    while self.step >= self.config.logging_steps and not self._stop and time.monotonic() < deadline:
        time.sleep(0.01)
    return _stopping(self)


if __name__ == "__main__":  # decode workers import this file again
    _stopping, Loop._stopping = Loop._stopping, _stopping_when_told  # type: ignore[method-assign]
    sys.exit(run_main(importlib.import_module(sys.argv.pop(1)).main))
