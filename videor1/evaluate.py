"""Evaluate a model on benchmarks or a data file, with frames in order and shuffled: ``python -m videor1.evaluate``."""

from __future__ import annotations

import sys

from videor1.config import EvaluateConfig
from videor1.config.cli import parse, run_main


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    config = parse(
        EvaluateConfig,
        argv,
        prog="python -m videor1.evaluate",
        description="Accuracy of a model, from frames in order and from shuffled frames: on benchmarks (--benchmark, "
        "read from --data.root) or on a data file (--dataset_name).",
    )
    # This is imported here, because decode workers import this file again and must start quickly.
    from videor1.evaluation.run import run

    return run(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
