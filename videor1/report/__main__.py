"""Write the report of one or several runs as an HTML page: ``python -m videor1.report RUN [RUN ...]``."""

from __future__ import annotations

import argparse
import sys

from videor1.config.cli import run_main
from videor1.report import write_report


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m videor1.report",
        description="Write one HTML page about a run, finished or in progress, or about several to compare them: "
        "charts of its metrics, and rollouts to look through, with frames, completions, rewards and log-probs. "
        "The page needs no network.",
        epilog="Example: python -m videor1.report runs/one runs/other --out compared.html",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder (the output_dir of a training run)")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page to write; default: RUN/report.html, of several runs report.html in the current folder",
    )
    parser.add_argument(
        "--rollouts",
        type=int,
        default=40,
        metavar="N",
        help="prompts to show with their completions, spread evenly over the steps of all runs; 0: none (default: 40)",
    )
    options = parser.parse_args(argv)
    print(write_report(options.runs, options.out, rollouts=options.rollouts))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
