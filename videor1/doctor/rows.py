"""The records of the doctor's report (findings, sections and problems), and their text."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

# "broken": training needs it. "warning": training runs, but slower or unsupported. "absent": optional, not installed.
Status = Literal["ok", "info", "absent", "warning", "broken"]
MARKS: dict[Status, str] = {"ok": "ok", "info": "", "absent": "-", "warning": "!", "broken": "!!"}
WIDTH = 110  # width of the text in columns


@dataclass(frozen=True)
class Finding:
    """The result of one check, which is a row of the report."""

    name: str
    value: str
    status: Status = "info"
    fix: str = ""  # how to install or repair it


@dataclass(frozen=True)
class Section:
    """The rows under one heading."""

    title: str
    rows: tuple[Finding, ...]


@dataclass(frozen=True)
class Problem:
    """A finding that is a warning or broken."""

    section: str
    name: str
    what: str  # the value of the finding
    fix: str
    needed: bool  # whether training cannot run, or is not supported, without it


def problems(sections: Sequence[Section]) -> list[Problem]:
    """Return every finding that is broken or a warning; what training needs comes first."""
    found = [
        Problem(section.title, row.name, row.value, row.fix, row.status == "broken")
        for section in sections
        for row in section.rows
        if row.status in ("warning", "broken")
    ]
    return sorted(found, key=lambda problem: not problem.needed)


def redact_home(sections: Sequence[Section]) -> list[Section]:
    """Return the sections with the path of the home folder replaced by ``~``."""
    home = os.path.expanduser("~")  # as it is where nobody knows the home folder
    if len(home) < 2:
        return list(sections)

    def redact(text: str) -> str:
        return text.replace(f"{home}/", "~/")

    return [
        Section(s.title, tuple(replace(row, value=redact(row.value), fix=redact(row.fix)) for row in s.rows))
        for s in sections
    ]


def text(sections: Sequence[Section]) -> str:
    """Return the report as aligned plain text."""
    width = max((len(row.name) for section in sections for row in section.rows), default=0)
    lines: list[str] = []
    for section in sections:
        lines += [section.title, *(_row(row, width) for row in section.rows), ""]
    found = problems(sections)
    lines.append(_verdict(found))
    for problem in found:
        mark = MARKS["broken" if problem.needed else "warning"]
        lines += [_wrapped(f"{mark:>4}  ", f"{problem.name}: {problem.what}")]
        lines += [_wrapped("      -> ", problem.fix)] if problem.fix else []
    return "\n".join(lines)


def _row(row: Finding, width: int) -> str:
    value = f"{row.value}: {row.fix}" if row.status == "absent" and row.fix else row.value
    return _wrapped(f"{MARKS[row.status]:>4}  {row.name:<{width}}  ", value)


def _verdict(found: Sequence[Problem]) -> str:
    needed = sum(problem.needed for problem in found)
    if needed:
        return f"Training cannot run as it should: {needed} of what it needs {'is' if needed == 1 else 'are'} broken."
    return "Training can run. To look at:" if found else "Training can run."


def _wrapped(head: str, value: str) -> str:
    return textwrap.fill(
        value,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
