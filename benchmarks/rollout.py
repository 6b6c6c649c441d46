"""Rollouts, our engine beside transformers' ``generate``: ``python -m benchmarks.rollout``, the part of that name of
``benchmarks.run``. With ``--skipping``: what a training batch saves by leaving out shuffled completions, and that its
advantages stay the same; ends with 1 if they do not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import rollout_skipping
from benchmarks.record import failures
from benchmarks.run import make_parser, run_options
from videor1.config.cli import run_main


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("rollout", __doc__, "rollout")
    rollout_skipping.add_options(parser)
    options = parser.parse_args(arguments)
    if options.skipping:
        return run_main(lambda _: rollout_skipping.run(options, parser))
    return 1 if failures(run_options(options, parser).rows) else 0


if __name__ == "__main__":
    sys.exit(main())
