"""Where the suite's time goes: seconds and tests by file, and what collection takes.

From the repository's root, in an environment with ``pip install -e ".[test]"``:

    python -m tests.times > docs/develop/testing/times.md      # runs the README's command
    python -m tests.times --xml report.xml                     # of a run with --junitxml=report.xml
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.matrix import ROOT, machine

COMMAND = ("-n", "2", "--dist", "loadfile")


def collection() -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def read_times(report: Path) -> dict[str, tuple[int, float]]:
    """Return the number of tests and their seconds, fixtures included, by file of a JUnit report."""
    counts, seconds = defaultdict[str, int](int), defaultdict[str, float](float)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        file = next(f for f in _files(case.get("classname", "")) if (ROOT / f).exists())
        counts[file] += 1
        seconds[file] += float(case.get("time", 0))
    return {file: (counts[file], seconds[file]) for file in counts}


def _files(name: str) -> list[str]:
    """Return the files that a dotted name may stand for, which ends with a class where the test is in one."""
    return [f"{name.replace('.', '/')}.py", f"{name.rpartition('.')[0].replace('.', '/')}.py"]


def page(times: Mapping[str, tuple[int, float]], whole: float, wall: float | None) -> str:
    tests, seconds = (sum(row[i] for row in times.values()) for i in (0, 1))
    ran = "" if wall is None else f" `pytest {' '.join(COMMAND)}` took {wall:.0f} s."
    lines = [
        "# Times of the tests",
        "",
        "Made by `python -m tests.times`; how to run and choose tests is on the [page before](../testing.md).",
        "",
        f"{machine()}. {tests:,} tests, {seconds:.0f} s in all processes.{ran} Collecting them takes {whole:.1f} s in "
        f"each process, imports included; the tests of a file alone wait only for their own.",
        "",
        "| file | tests | seconds |",
        "|---|---:|---:|",
    ]
    for file, (count, taken) in sorted(times.items(), key=lambda row: -row[1][1]):
        lines.append(f"| `{file}` | {count:,} | {taken:.1f} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.times", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--xml", type=Path, help="a JUnit report; without it the suite runs")
    parser.add_argument("arguments", nargs="*", metavar="-- PYTEST ARGS", help="tests and options of pytest")
    options = parser.parse_args(argv)
    whole = collection()
    with tempfile.TemporaryDirectory() as work:
        report, wall, status = options.xml, None, 0
        if report is None:
            report = Path(work, "report.xml")
            command = [sys.executable, "-m", "pytest", *COMMAND, f"--junitxml={report}", *options.arguments]
            began = time.perf_counter()
            status = subprocess.run(command, cwd=ROOT, env=os.environ, stdout=sys.stderr).returncode
            wall = time.perf_counter() - began
        print(page(read_times(report), whole, wall), end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
