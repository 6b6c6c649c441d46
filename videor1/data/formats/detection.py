"""Which format a row has, and the reader of ``data.format``."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from videor1.answer import extract_answer
from videor1.data.formats import easyr1, onethinker, swift, trl, verl, video_r1
from videor1.data.formats.parts import Entry, Row, as_problem_type, read_messages
from videor1.errors import ConfigError, did_you_mean
from videor1.types import ProblemType, SampleError

_PUBLISHED = {"data_type", "problem_type"}


@dataclass(frozen=True)
class Format:
    """A format of rows."""

    name: str  # as data.format has it
    read: Callable[[Row, str | None], Entry]  # an entry of a row, or SampleError
    fields: tuple[str, ...]  # what it reads of a row
    fits: Callable[[Collection[str]], bool]  # whether a row with these fields, none of them empty, may be of it


FORMATS = {
    one.name: one
    for one in (
        Format(
            "video-r1",
            video_r1.read,
            video_r1.FIELDS,
            lambda names: (
                ({"solution", *_PUBLISHED} <= set(names) and not {"problem", "messages"}.isdisjoint(names))
                # A conversation that SFT learns as it stands needs neither.
                or ({"messages", "data_type"} <= set(names) and {"solution", "problem_type"}.isdisjoint(names))
            ),
        ),
        Format(
            "easyr1",
            easyr1.read,
            easyr1.FIELDS,
            lambda names: {"problem", "answer"} <= set(names) and not set(names) >= _PUBLISHED,
        ),
        Format("verl", verl.read, verl.FIELDS, lambda names: {"prompt", "reward_model"} <= set(names)),
        Format("swift", swift.read, swift.FIELDS, lambda names: "messages" in names and "path" not in names),
        Format(
            "trl",
            trl.read,
            trl.FIELDS,
            lambda names: (
                "prompt" in names
                and ("reward_model" not in names or not {*trl.ANSWERS, "completion"}.isdisjoint(names))
            ),
        ),
        Format(
            "onethinker",
            onethinker.read,
            onethinker.FIELDS,
            lambda names: {"problem", "answer", *_PUBLISHED} <= set(names),
        ),
    )
}
OWN = "video-r1"
AUTO = "auto"


def candidates(names: Collection[str]) -> list[str]:
    """Return the formats that a row with these fields may be of; the trainer's own where it is like none.

    Only its own rows have ``media``.
    """
    if "media" in names or {"answer", "prompt", "messages"}.isdisjoint(names):
        return [OWN]
    return [one.name for one in FORMATS.values() if one.fits(names)] or [OWN]


def detect(row: Row, problem_type: str | None = None) -> tuple[str, Entry]:
    """Return the one format that a row fits, and its entry.

    A row of whose fields several formats may be made is of the one that can read it. Where several can and all give the
    same entry, it is of the first.

    Raises:
        SampleError: ``ambiguous`` where several formats read the row, each differently; else as the one format's
            ``read``.
    """
    found = candidates(field_names(row))
    if len(found) == 1:
        return found[0], FORMATS[found[0]].read(row, problem_type)
    fitting: dict[str, Entry] = {}
    for name in found:
        try:
            entry = FORMATS[name].read(row, problem_type)
        except SampleError as error:
            if error.kind == "ambiguous":
                raise
            continue
        if name != OWN or _names_its_media(row):
            fitting[name] = entry
    if fitting and all(_told(entry) == _told(next(iter(fitting.values()))) for entry in fitting.values()):
        return next(iter(fitting.items()))
    which = list(fitting) or found
    can = "read it, each differently" if fitting else "may be meant, and none can read it"
    raise SampleError("ambiguous", f"{', '.join(which)} {can}; data.format says which it is")


def field_names(row: Row) -> set[str]:
    """Return the names of a row's fields that hold something."""
    return {str(name) for name, value in row.items() if value is not None}


def _names_its_media(row: Row) -> bool:
    return row["data_type"] == "text" or row.get("path") is not None or row.get("media") is not None


def _told(entry: Entry) -> Any:
    """Return what an entry says, alike for different ways to say it."""
    turns: Any = entry.get("messages") or [{"role": "user", "content": entry.get("problem")}]
    with contextlib.suppress(SampleError):
        turns = read_messages("messages", turns)[0]
    if entry.get("system") is not None and isinstance(turns, list):
        turns = [{"role": "system", "content": entry["system"]}, *turns]
    kind, solution = entry.get("problem_type"), entry.get("solution")
    answer = extract_answer(solution) if isinstance(solution, str) else solution
    options = entry.get("options") if kind == "multiple choice" else None
    return (
        turns,
        entry.get("chat_template_kwargs"),
        entry.get("data_type"),
        entry.get("path"),
        entry.get("media"),
        kind,
        options,
        answer,
    )


class RowReader:
    """Makes entries of rows, in the format that ``data.format`` names.

    Args:
        format: the option ``data.format``.
        problem_type: the option ``data.problem_type``.

    Attributes:
        took: with ``auto``, the number of rows so far by their format (or "ambiguous").

    Raises:
        ConfigError: there is no such format, or no such kind of question.
    """

    def __init__(self, format: str = AUTO, problem_type: str | None = None) -> None:
        if format != AUTO and format not in FORMATS:
            known = [AUTO, *FORMATS]
            raise ConfigError(f"data.format: expected one of {known}, got {format!r}{did_you_mean(format, known)}")
        if problem_type is not None:
            kinds = list(get_args(ProblemType))
            if (problem_type := as_problem_type(given := problem_type)) not in kinds:
                hint = did_you_mean(given, kinds)
                raise ConfigError(f"data.problem_type: expected one of {kinds}, got {given!r}{hint}")
        self.format, self.problem_type = format, problem_type
        self.took: Counter[str] = Counter()

    def __call__(self, where: str, row: Any, data_file: str | Path) -> Any:
        """Return the entry of a row; what is not an object is returned as it is, for the check of the entries.

        Args:
            where: where the row is, in words, for error messages.
            row: the parsed row.
            data_file: the file, for error messages.

        Raises:
            SampleError: the row cannot be read.
        """
        if not isinstance(row, dict):
            return row
        try:
            if self.format != AUTO:
                return FORMATS[self.format].read(row, self.problem_type)
            try:
                name, entry = detect(row, self.problem_type)
            except SampleError as error:
                found = candidates(field_names(row))
                self.took["ambiguous" if error.kind == "ambiguous" or len(found) > 1 else found[0]] += 1
                raise
        except RecursionError:
            raise SampleError("wrong_type", f"{where}: nested too deeply", data_file) from None
        except SampleError as error:
            raise SampleError(error.kind, f"{where}: {error.message}", data_file) from None
        self.took[name] += 1
        return entry

    def note(self) -> str:
        """Return what ``auto`` took, in words; "" for a format that was named, or without rows."""
        counted = ", ".join(f"{name} ({count} row{'s' * (count != 1)})" for name, count in self.took.most_common())
        return f"data.format auto: {counted}" if counted else ""

    def first_note(self, head: Iterable[Collection[str]]) -> str:
        """Return what ``auto`` takes the first rows for, in words, of the names of their fields; "" as ``note``."""
        found = dict.fromkeys(" or ".join(candidates(names)) for names in head) if self.format == AUTO else ()
        return f"data.format auto: {', '.join(found)} (the first rows; each row decides)" if found else ""

    def columns(self, names: Iterable[str]) -> list[str]:
        """Return which columns of a table to read: those of every format that its rows may have."""
        have = list(names)
        may_be = candidates(have) if self.format == AUTO else [self.format]
        wanted = [field for one in (OWN, *may_be) for field in FORMATS[one].fields]
        return [name for name in dict.fromkeys(wanted) if name in have]

    def identity(self, head: Iterable[Collection[str]]) -> tuple[Any, ...]:
        """Return what the entries of a data set depend on beside its rows, () for the trainer's own format.

        Args:
            head: the names of the fields of some of its rows.
        """
        found = {one for names in head for one in candidates(names)} if self.format == AUTO else {self.format}
        return (sorted(found), self.problem_type) if found - {OWN} else ()
