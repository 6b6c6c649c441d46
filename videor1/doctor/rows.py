"""What the doctor says: rows under headings, and the text made of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

# broken: training needs it; warning: training runs, but slower or not supported; absent: optional and not there.
Status = Literal["ok", "info", "absent", "warning", "broken"]
MARKS: dict[Status, str] = {"ok": "ok", "info": "", "absent": "-", "warning": "!", "broken": "!!"}
WIDTH = 110  # columns of the text


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, as a row shows it."""

    name: str
    value: str
    status: Status = "info"
    fix: str = ""  # how to get or mend it


@dataclass(frozen=True)
class Section:
    """Rows under one heading."""

    title: str
    rows: tuple[Finding, ...]


@dataclass(frozen=True)
class Problem:
    """A row that is not as it should be."""

    section: str
    name: str
    what: str
    fix: str
    needed: bool  # training cannot run, or is not supported, without it


def problems(sections: Sequence[Section]) -> list[Problem]:
    """Every warning and whatever is broken, what training needs first."""
    found = [
        Problem(section.title, row.name, row.value, row.fix, row.status == "broken")
        for section in sections
        for row in section.rows
        if row.status in ("warning", "broken")
    ]
    return sorted(found, key=lambda problem: not problem.needed)


def without_home(sections: Sequence[Section]) -> list[Section]:
    """The same with the home folder written as ``~``."""
    home = str(Path.home())
    if len(home) < 2:
        return list(sections)

    def short(text: str) -> str:
        return text.replace(f"{home}/", "~/")

    return [
        Section(s.title, tuple(replace(row, value=short(row.value), fix=short(row.fix)) for row in s.rows))
        for s in sections
    ]


def text(sections: Sequence[Section]) -> str:
    """The report as aligned plain text."""
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
        value, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
