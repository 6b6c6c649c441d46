"""What this machine can run: ``python -m videor1.doctor``.

Versions beside the supported ranges, GPU, compilers, decoders, the backend of each kernel, optional packages and what
adds them, memory and disks; then each operation once against its reference and each codec once. Problems stand last,
each with what mends it. Exit code 0: training can run; 1: something that it needs is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from videor1.doctor import machine, packages, selfcheck, tools
from videor1.doctor.rows import Finding, Section, problems, text, without_home

SELF_CHECK = "Self-check"
SECTIONS: dict[str, Callable[[], list[Finding]]] = {
    "Versions": packages.versions,
    "GPU": machine.gpus,
    "Compilers": tools.compilers,
    "Decoders": tools.decoders,
    "Kernels": tools.kernels,
    "Optional packages": packages.extras,
    "Machine": machine.machine,
    "Environment": packages.environment,
    SELF_CHECK: selfcheck.self_check,
}


def examine() -> list[Section]:
    """Every section. One that cannot be looked at says so in a row of its own."""
    sections = []
    with _kernels_silent():
        for title, look in SECTIONS.items():
            _show_progress(f"{title} ...")
            sections.append(Section(title, tuple(_rows(title, look))))
    _show_progress("")
    return without_home(sections)


def _rows(title: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return look()
    except Exception as error:  # a missing torch or PyAV, say: the other sections are worth reading then
        status = "broken" if title == SELF_CHECK else "warning"
        what = f"cannot be looked at: {type(error).__name__}: {error}"
        fix = f"pip install {error.name}" if isinstance(error, ModuleNotFoundError) else "report this"
        return [Finding(title.lower(), what, status, fix)]  # type: ignore[arg-type]


def _show_progress(line: str) -> None:
    """What is being looked at; the first run compiles for some seconds. (tqdm may be what is missing.)"""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


@contextmanager
def _kernels_silent() -> Iterator[None]:
    """What the kernels would log stands in the report."""
    log = logging.getLogger("videor1_kernels")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def as_json(sections: Sequence[Section]) -> str:
    """The report as JSON: {"ready": bool, "sections": {title: [row]}, "problems": [problem]}."""
    found = problems(sections)
    report = {
        "ready": not any(problem.needed for problem in found),
        "sections": {section.title: [dataclasses.asdict(row) for row in section.rows] for section in sections},
        "problems": [dataclasses.asdict(problem) for problem in found],
    }
    return json.dumps(report, indent=2, ensure_ascii=False)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m videor1.doctor",
        description="What this machine can run, what is missing and how to get it. "
        "Exit code 0: training can run; 1: something that it needs is broken.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(argv)
    sections = examine()
    print(as_json(sections) if options.json else text(sections))
    return 1 if any(problem.needed for problem in problems(sections)) else 0


if __name__ == "__main__":
    sys.exit(main())
