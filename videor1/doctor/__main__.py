"""Report what this machine can run: ``python -m videor1.doctor``.

The report shows the installed versions beside the supported ranges, the GPU, the compilers and decoders, the backend of
each kernel, the optional packages and how to install them, memory and disks. A self-check runs each operation once
against its reference and decodes one clip of each codec. The problems come last, each with its remedy. The exit code is
0 if training can run, and 1 if something that it needs is broken.
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
from videor1.doctor.rows import Finding, Section, problems, redact_home, text

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
    """Make every section. A section whose examination fails holds one row that says so."""
    sections = []
    with _kernels_silent():
        for title, find in SECTIONS.items():
            _show_progress(f"{title} ...")
            sections.append(Section(title, tuple(_rows(title, find))))
    _show_progress("")
    return redact_home(sections)


def _rows(title: str, find: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return find()
    except Exception as error:  # For example torch or PyAV is missing; the other sections are still worth reading.
        status = "broken" if title == SELF_CHECK else "warning"
        what = f"cannot be looked at: {type(error).__name__}: {error}"
        fix = f"pip install {error.name}" if isinstance(error, ModuleNotFoundError) else "report this"
        return [Finding(title.lower(), what, status, fix)]  # type: ignore[arg-type]


def _show_progress(line: str) -> None:
    """Show on a terminal which section is being examined, since the first run compiles for some seconds.

    This does not use tqdm, which may be missing on the machine that is examined.
    """
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


@contextmanager
def _kernels_silent() -> Iterator[None]:
    """Silence the warnings of the kernels, because the report contains the same information."""
    log = logging.getLogger("videor1_kernels")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def as_json(sections: Sequence[Section]) -> str:
    """Return the report as JSON: ``{"ready": bool, "sections": {title: [row]}, "problems": [problem]}``."""
    found = problems(sections)
    report = {
        "ready": not any(problem.needed for problem in found),
        "sections": {section.title: [dataclasses.asdict(row) for row in section.rows] for section in sections},
        "problems": [dataclasses.asdict(problem) for problem in found],
    }
    return json.dumps(report, indent=2, ensure_ascii=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
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
