"""How the cost of a T-GRPO step grows: ``python -m benchmarks.growth``, the part of that name of ``benchmarks.run``.
The table holds the fitted exponents; ``--plot`` draws the curves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.growth_curves import draw
from benchmarks.record import failures
from benchmarks.run import make_parser, run_options


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("growth", __doc__, "growth")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves")
    options = parser.parse_args(arguments)
    record = run_options(options, parser)
    if options.plot:
        draw(record.to_json(), options.plot)
    return 1 if failures(record.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
