"""Whole T-GRPO steps, from video files to updated weights, ours beside the algorithm as the reference code computes it:
``python -m benchmarks.step``. With ``--part training``: the training pass alone, on a packed row and on repeated rows.
Both are parts of ``benchmarks.run``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.record import failures
from benchmarks.run import make_parser, run_options


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("step", __doc__, "step", "training")
    return 1 if failures(run_options(parser.parse_args(arguments), parser).rows) else 0


if __name__ == "__main__":
    sys.exit(main())
