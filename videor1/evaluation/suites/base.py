"""The records of a benchmark, and the reader that turns rows of its files into questions.

Rows that become no question are counted.
"""

from __future__ import annotations

import importlib
import os
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from videor1.data.parsing import Unparsed, parse_entry
from videor1.data.samples import EntryChecker
from videor1.errors import ConfigError, DataError, install
from videor1.types import ProblemType, Sample, SampleError

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".gif")


@dataclass(frozen=True)
class Question:
    """A question of a benchmark."""

    sample: Sample  # sample.index is the row's position in the benchmark, including bad rows and rows left out
    categories: Mapping[str, str]  # axis -> category, e.g. {"duration": "short"}; every question has every axis
    score: Callable[[str], float]  # completion -> [0, 1]


@dataclass(frozen=True)
class Overall:
    """How a benchmark's authors average over its questions."""

    text: str  # the definition in words, printed beside the figure
    axis: str | None = None  # None: the mean over all questions; else the mean over this axis' groups of categories
    groups: Mapping[str, str] = field(default_factory=dict)  # category -> group; default: each category is a group


@dataclass(frozen=True)
class Loaded:
    """A benchmark that was read from its files."""

    name: str
    questions: list[Question]
    overall: Overall
    errors: list[SampleError] = field(default_factory=list)  # one for each row that cannot be used
    left_out: Counter[str] = field(default_factory=Counter)  # number of rows that are left out, by reason
    missing: int = 0  # number of questions whose video is missing


@dataclass(frozen=True)
class Suite:
    """A benchmark, with where to get its files and how to read them."""

    name: str
    repository: str  # its dataset repository on Hugging Face
    layout: str  # the expected files in its folder, one path per line
    unpack: str  # the command that unpacks the files, run inside the folder; "" if there is nothing to unpack
    overall: Overall
    read: Callable[[Reader], None]  # reads all rows with the reader
    needs: str = ""  # further instructions, e.g. what has to be downloaded elsewhere

    @property
    def card(self) -> str:
        """The address of the dataset's page."""
        return f"https://huggingface.co/datasets/{self.repository}"

    def load(self, root: str | Path) -> Loaded:
        """Read the benchmark from ``root/<name>`` (or ``root/<the repository's name>``).

        Raises:
            DataError: its files are missing (the message says how to get them), or hold no usable question.
        """
        names = (self.name, self.repository.partition("/")[2])
        folder = next((Path(root) / n for n in names if (Path(root) / n).is_dir()), Path(root) / self.name)
        if not folder.is_dir():
            found = sorted(os.listdir(root)) if os.path.isdir(root) else "no such folder"
            raise DataError(self._advice(folder, f"data.root: {root} has no folder {self.name} (found: {found})"))
        reader = Reader(folder)
        try:
            self.read(reader)
        except MissingFileError as error:
            found = sorted(os.listdir(folder))
            raise DataError(self._advice(folder, f"{folder}: no {error} (found: {_some(found)})")) from None
        if not reader.questions:
            kinds = dict(Counter(error.kind for error in reader.errors))
            first = "".join(f"\n  {error}" for error in reader.errors[:3])
            raise DataError(
                f"{folder}: none of its rows can be asked ({kinds}; left out: {dict(reader.left_out)}){first}"
            )
        missing = [q.sample.path for q in reader.questions if q.sample.path and not q.sample.path.exists()]
        if len(missing) == len(reader.questions):
            raise DataError(self._advice(folder, f"{folder}: none of its videos is there, e.g. {missing[0]}"))
        return Loaded(self.name, reader.questions, self.overall, reader.errors, reader.left_out, len(missing))

    def _advice(self, folder: Path, problem: str) -> str:
        layout = "".join(f"\n  {folder / line}" for line in self.layout.splitlines())
        unpack = f"\n  (cd {folder} && {self.unpack})" if self.unpack else ""
        needs = f"\n{self.needs}" if self.needs else ""
        return (
            f"{problem}\n{self.name} is the dataset {self.card}; get it with\n"
            f"  hf download {self.repository} --repo-type dataset --local-dir {folder}{unpack}\n"
            f"and then there are{layout}{needs}"
        )


class MissingFileError(Exception):
    """A data file is missing. The message is its name."""


class BadRowError(Exception):
    """A row cannot be used. The arguments are the kind of the SampleError and its message."""


class LeftOutError(Exception):
    """A row is left out on purpose. The message is the reason."""


@dataclass(frozen=True)
class Draft:
    """A question made from a row. It is then checked like an entry of a data file."""

    problem_id: Any
    problem: Any
    answer: Any  # the right answer; the letter, for a multiple choice
    path: str  # relative to the benchmark's folder
    categories: Mapping[str, str]
    score: Callable[[str], float]  # completion -> [0, 1]
    problem_type: ProblemType = "multiple choice"
    options: Sequence[str] = ()
    start: float | None = None  # seconds; the part of the video that the question is about
    end: float | None = None
    frames_per_second: float | None = None  # of a video that is a folder of images


class Reader:
    """Collects the questions of a benchmark from its files.

    Args:
        folder: the benchmark's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.questions: list[Question] = []
        self.errors: list[SampleError] = []
        self.left_out: Counter[str] = Counter()
        self._index = 0
        self._videos: dict[str, list[str]] | None = None

    def files(self, *patterns: str) -> list[Path]:
        """Return the files that match the first pattern with any match.

        Raises:
            MissingFileError: no file matches any of the patterns.
        """
        for pattern in patterns:
            if found := sorted(self.folder.glob(pattern)):
                return found
        raise MissingFileError(" or ".join(patterns))

    def read(self, file: Path, fields: Sequence[str], make: Callable[[dict[str, Any]], Draft]) -> None:
        """Add the questions of a .json, .jsonl or .parquet file.

        Args:
            file: the file.
            fields: the fields that every row must have.
            make: makes a question from a row, or raises a BadRowError or LeftOutError.
        """
        check = EntryChecker(file, self.folder, require_process=False)  # A benchmark scores by its own rules.
        for where, row in _rows(file):
            index = self._index
            self._index += 1
            try:
                self.questions.append(self._question(check, index, where, row, fields, make))
            except SampleError as error:
                self.errors.append(error)
            except LeftOutError as reason:
                self.left_out[str(reason)] += 1

    def video(self, *parts: str) -> str:
        """Return the relative path of the video whose path ends in ``parts``, wherever in the folder it was unpacked.

        The last part may lack its extension. If there is no such video, the path that it would have is returned.
        """
        if self._videos is None:
            self._videos = _find_videos(self.folder)
        parent, name = "/".join(parts[:-1]), parts[-1]
        ends = [name] if name.lower().endswith(VIDEOS) else [name + suffix for suffix in VIDEOS]
        for end in ends:
            for path in self._videos.get(end.casefold(), []):
                if f"/{path}".casefold().endswith(f"/{parent}/{end}".casefold() if parent else f"/{end}".casefold()):
                    return path
        return "/".join([*parts[:-1], ends[0]])

    def _question(
        self,
        check: EntryChecker,
        index: int,
        where: str,
        row: Any,
        fields: Sequence[str],
        make: Callable[[dict[str, Any]], Draft],
    ) -> Question:
        def bad(kind: str, message: str) -> SampleError:
            return SampleError(kind, f"{where}: {message}", check.data_file)

        if isinstance(row, Unparsed):
            raise bad("bad_json", f"does not parse as JSON: {row.reason}")
        if not isinstance(row, dict):
            raise bad("wrong_type", f"expected an object, got {type(row).__name__}")
        if lacking := [name for name in fields if name not in row]:
            raise bad("missing_field", f"missing field {', '.join(map(repr, lacking))}; found {sorted(row)}")
        try:
            draft = make(row)
        except BadRowError as error:
            raise bad(*error.args) from None
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise bad("wrong_type", f"not as this benchmark's rows are: {type(error).__name__}: {error}") from None
        for axis, category in draft.categories.items():
            if not isinstance(category, str) or not _encodable(category):
                raise bad("bad_text", f"{axis}: expected text, got {category!r:.80}")
        entry = {
            "problem": draft.problem,
            "data_type": "video",
            "problem_type": draft.problem_type,
            "options": list(draft.options),
            "solution": f"<answer>{draft.answer}</answer>",
            "path": draft.path,
        }
        sample = check(index, where, entry, problem_id=str(draft.problem_id))
        if not (draft.start or 0) >= 0 or not (draft.end is None or draft.end > (draft.start or 0)):
            raise bad("window", f"expected 0 <= start < end (seconds), got {draft.start} and {draft.end}")
        sample = replace(sample, start=draft.start, end=draft.end, frames_per_second=draft.frames_per_second)
        return Question(sample, draft.categories, draft.score)


def lettered(options: Sequence[str]) -> list[str]:
    """Return options as "A. red", "B. blue", ...; options that already begin with their letters are kept.

    Raises:
        BadRowError: there are more than 26 options.
    """
    marks = tuple(".):")
    if all(o.startswith(tuple(letter + m for m in marks)) for letter, o in zip(string.ascii_uppercase, options)):  # noqa: B905
        return list(options)
    if len(options) > len(string.ascii_uppercase):
        raise BadRowError("options", f"expected at most 26 options, got {len(options)}")
    return [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]  # noqa: B905


def option_text(options: Sequence[str], letter: str) -> str:
    """Return the text of the option with a letter, without the letter itself.

    Raises:
        BadRowError: no option has the letter.
    """
    for option in options:
        if option.startswith(letter) and len(letter) == 1:
            return option[2:].strip()
    raise BadRowError("options", f"expected the answer to be the letter of an option, got {letter!r} for {options}")


def plain_options(value: Any) -> list[str]:
    """Return the options of a row.

    Raises:
        BadRowError: they are not a list of strings, or there are none.
    """
    if not isinstance(value, list) or not value or not all(isinstance(option, str) for option in value):
        raise BadRowError("options", f"expected a list of texts, got {value!r}")
    return value


def _encodable(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            message = f"benchmark: {file.name} needs pyarrow: {error}; {install('stream')}"
            raise ConfigError(message) from error
        try:
            table = parquet.read_table(file)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError.
            raise DataError(f"{file}: cannot be read as Parquet: {error}") from error
        yield from ((f"row {i}", _arrow_row(table, i)) for i in range(table.num_rows))
        return
    try:
        data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if file.suffix == ".jsonl":
        yield from ((f"line {n}", parse_entry(line)) for n, line in enumerate(data.split(b"\n"), 1) if line.strip())
        return
    whole = parse_entry(data)
    if not isinstance(whole, list):
        got = whole.reason if isinstance(whole, Unparsed) else type(whole).__name__
        raise DataError(f"{file}: expected a JSON list of objects, got {got}")
    yield from ((f"entry {i}", row) for i, row in enumerate(whole))


def _arrow_row(table: Any, number: int) -> Any:
    try:
        return table.slice(number, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:  # Arrow does not check that text is UTF-8, or that a date exists.
        return Unparsed(str(error))


def _find_videos(folder: Path) -> dict[str, list[str]]:
    """Find every video below a folder, and return the relative paths by case-folded file name."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for top, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(VIDEOS):
                path = os.path.relpath(os.path.join(top, name), folder).replace(os.sep, "/")
                found.setdefault(name.casefold(), []).append(path)
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f", and {len(names) - 12} more" if len(names) > 12 else "") if names else "nothing"
