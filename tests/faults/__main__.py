"""Faults put into the code on purpose, one at a time, each of which a test must notice.

From the repository's root, in an environment with ``pip install -e ".[test]"``:

    python -m tests.faults                        # all of them: about an hour on two cores
    python -m tests.faults kernels --jobs 2       # those of tests/faults/kernels.toml
    python -m tests.faults training:"stale cache" # one
    python -m tests.faults kernels --tree ../old  # in another checkout, for what its tests notice

A fault is an entry of a TOML file: ``name``; ``file``, the source; ``old``, text that stands in it once; ``new``, what
takes its place; ``tests``, what is run to notice it. Tests run in a copy of the tree, which the fault is written into.
Ends with 1 where a fault survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
TIMEOUT = 1200  # seconds for the tests of one fault: what hangs is noticed too


@dataclass(frozen=True)
class Fault:
    """One change that makes the code wrong, and the tests that must notice it."""

    area: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.area}: {self.name}"


def load_faults(folder: Path = FOLDER) -> list[Fault]:
    return [
        Fault(path.stem, entry["name"], entry["file"], entry["old"], entry["new"], tuple(entry["tests"]))
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
    ]


def put_in(fault: Fault, tree: Path) -> None:
    """Write the fault into ``tree``.

    Raises:
        ValueError: the text that it changes does not stand there once.
    """
    file = tree / fault.file
    text = file.read_text(encoding="utf-8")
    if (found := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.title}: expected its old text once in {fault.file}, found it {found} times")
    file.chmod(0o644)  # of a read-only checkout
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def run(fault: Fault, tree: Path) -> str:
    """Return killed, hung, survived, or what kept the tests from running."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work, "tree")
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".git", "*.egg-info", "__pycache__", ".*_cache"))
        try:
            put_in(fault, copy)
        except ValueError as error:
            return str(error)
        tests = [test for test in fault.tests if (copy / test.partition("::")[0]).exists()]
        if not tests:
            return f"none of its tests is there: {', '.join(fault.tests)}"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, timeout=TIMEOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except subprocess.TimeoutExpired:
            return "hung"
        if done.returncode in (0, 1):
            return ("survived", "killed")[done.returncode]
        return f"pytest ended with {done.returncode}: {done.stdout.decode(errors='replace')[-2000:]}"


def chosen(faults: Sequence[Fault], names: Sequence[str]) -> list[Fault]:
    """Those of an area, or of ``area:name``; all without names."""
    wanted = [tuple(name.partition(":")[::2]) for name in names]
    return [f for f in faults if not wanted or any(f.area == a and n in ("", f.name) for a, n in wanted)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="AREA[:NAME]", help="default: all")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose tests run (default: this one)")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    options = parser.parse_args(argv)
    faults = chosen(load_faults(), options.names)
    if not faults:
        parser.error(f"no fault is named {' '.join(options.names)}")
    counts: Counter[tuple[str, str]] = Counter()
    survivors = []

    def report(fault: Fault) -> tuple[Fault, str, float]:
        began = time.monotonic()
        return fault, run(fault, options.tree.resolve()), time.monotonic() - began

    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, outcome, seconds in pool.map(report, faults):
            print(f"{outcome:10} {seconds:6.0f} s  {fault.title}", flush=True)
            counts[fault.file, "killed" if outcome in ("killed", "hung") else "survived"] += 1
            if outcome not in ("killed", "hung"):
                survivors.append(fault)
    for file in sorted({file for file, _ in counts}):
        killed, survived = counts[file, "killed"], counts[file, "survived"]
        print(f"| `{file}` | {killed} of {killed + survived} |")
    print(f"killed {len(faults) - len(survivors)} of {len(faults)}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
