"""Compare a memory plan with a measurement: ``python -m videor1.plan --check [options of videor1.train]``."""

from __future__ import annotations

import argparse
import sys

from videor1.config.cli import run_main
from videor1.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m videor1.plan",
        usage="%(prog)s --check [options of videor1.train]",
        description="Compare a memory plan with what the same passes take on this machine, with random weights. The "
        "plan alone, for any card, is printed by python -m videor1.train --plan.",
        epilog="python -m videor1.train --help lists the options of videor1.train.",
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="run the passes and print both, phase by phase")
    given, options = parser.parse_known_args(argv)
    if not given.check:
        raise ConfigError("expected --check (plan beside measured); python -m videor1.train --plan prints a plan alone")
    from videor1.plan.check import check_command

    return check_command(options)


if __name__ == "__main__":
    sys.exit(run_main(main))
