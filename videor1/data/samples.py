"""Read data files in the Video-R1 JSON format and check them entry by entry.

Data that is too large to be held in memory is read by ``stream.py``, with the same checks.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from videor1.answer import extract_answer
from videor1.config import RewardConfig
from videor1.data.entries import (
    check_media_of_users,
    check_placeholders,
    read_completions,
    read_media,
    read_messages,
    read_template_arguments,
)
from videor1.data.files import LocalFile
from videor1.data.formats import RowReader
from videor1.data.parsing import Unparsed, parse_entry
from videor1.data.shards import ParquetShard
from videor1.data.shown import json_type, names, shown
from videor1.errors import DataError, did_you_mean
from videor1.rewards.solutions import lenient_can_reward, why_unearnable
from videor1.types import DataType, MediaItem, Message, ProblemType, Sample, SampleError

MAX_FOLDERS = 65536  # most folders whose resolved paths are cached
DEFAULT_REWARD = RewardConfig()


@dataclass(frozen=True)
class Dataset:
    """The usable samples of a data file, and an error for each entry that cannot be used."""

    samples: list[Sample]
    errors: list[SampleError]
    path: Path  # the data file
    root: Path  # the folder that media paths are relative to
    needs_lenient: int = 0  # number of errors for a solution that only ``reward.lenient`` can reward
    format_note: str = ""  # what ``data.format auto`` took the entries for, in words

    def __len__(self) -> int:
        return len(self.samples)

    def count(self) -> int:
        """Return the number of samples in an epoch."""
        return len(self.samples)

    def error_counts(self) -> dict[str, int]:
        """Return the number of bad entries by ``SampleError.kind``, the most frequent kind first."""
        return dict(Counter(error.kind for error in self.errors).most_common())

    def digest(self) -> str:
        """Return a hash of the usable samples in their order, by which a resumed run detects changed data."""
        return samples_digest(self.samples, self.root)

    def reward_note(self) -> str:
        """Return a sentence about the entries that the strict reward cannot reward; "" if there are none."""
        unearnable = self.error_counts().get("solution", 0)
        if not self.needs_lenient:
            return ""
        return (
            f"{self.path}: {unearnable} entries are left out for their solution; {self.needs_lenient} of them earn "
            "nothing from the reference's reward and would from reward.lenient true"
        )


def samples_digest(samples: Iterable[Sample], root: str | Path) -> str:
    """Return a hash of everything that a data file says about samples, in their order, and their number.

    Media paths enter relative to ``root``, so that data may be moved. The media files themselves are not read.
    """
    base = os.path.join(os.path.realpath(root), "")
    digest, count = hashlib.blake2b(digest_size=8), 0
    for s in samples:
        count += 1
        path = None if s.path is None else str(s.path).removeprefix(base)
        told: tuple[Any, ...] = (
            s.index,
            s.problem_id,
            s.problem,
            s.data_type,
            s.problem_type,
            s.solution,
            path,
            s.options,
        )
        told += (s.data_source, s.process, s.start, s.end, s.frames_per_second)
        if s.media or s.messages or s.system is not None or s.chat_template_kwargs:
            told += (tuple(_told(item, base) for item in s.media), s.messages, s.system, s.chat_template_kwargs)
        if s.completions:
            told += s.completions
        told += () if s.instructed else (s.instructed,)
        digest.update(repr(told).encode("utf-8", "backslashreplace"))
    return f"{digest.hexdigest()} of {count} samples"


def _told(item: MediaItem, base: str) -> tuple[Any, ...]:
    """Return what a data file says about a medium, its paths relative to the folder ``base``."""
    paths = tuple(str(path).removeprefix(base) for path in (item.path, *item.frames) if path is not None)
    shown_as = (item.timestamps, item.frames_per_second, item.start, item.end)
    return (item.kind, paths, *shown_as, item.fps, item.max_frames, item.max_pixels)


def load_samples(
    path: str | Path,
    *,
    root: str | Path | None = None,
    require_process: bool = False,
    reward: RewardConfig | None = DEFAULT_REWARD,
    format: str = "auto",
    problem_type: str | None = None,
) -> Dataset:
    """Read a data file: a JSON list, or JSONL (one object a line; blank lines are ignored), or Parquet.

    The extension decides (``.jsonl`` and ``.ndjson`` are JSONL), unless the content is clearly of the other format. The
    encoding is UTF-8, with or without a byte order mark.

    Fields of an entry in the Video-R1 format (``format``: in another trainer's, see ``videor1/data/formats``)::

        problem        str, the question
        data_type      "video", "image", or "text" (an extension of the format: no path)
        problem_type   "multiple choice", "numerical", "OCR", "free-form" or "regression"
        options        list of str, for multiple choice
        solution       str that holds <answer>...</answer>
        path           str, relative to root (default: the data file's folder); must stay under it, symlinks resolved
        process        str, "<think>...</think>"; needed with require_process, unless messages end with the assistant
        problem_id     int or str, optional (default: the entry's position, from 0)
        data_source    str, optional
        media          list of videos and images, in place of data_type and path (``entries.read_media``)
        messages       list of turns, in place of problem (``entries.read_messages``)
        system         str, optional: a system prompt in place of the run's
        chat_template_kwargs   object, optional: arguments of the chat template, beside the run's
        completions    list of {text, source}, optional: answers that take slots of the group (T-GRPO)

    With ``media``, the placeholders <video> and <image> in problem, options or messages say where each stands; without
    any, all stand before the first text of the user. Other fields are ignored. Whether a media file exists is checked
    only when it is decoded.

    An entry that cannot be used becomes a ``SampleError`` in ``Dataset.errors``; its kind is one of ``bad_json``,
    ``wrong_type``, ``missing_field``, ``empty_field``, ``bad_text`` (text that UTF-8 cannot hold, such as half of a
    surrogate pair), ``data_type``, ``problem_type``, ``options``, ``solution`` (no answer, or one for which no
    completion can earn a reward), ``process``, ``bad_path``, ``outside_root``, ``media``, ``messages``,
    ``placeholders``; the readers of other formats have ``ambiguous`` and ``embedded`` too.

    Args:
        path: the data file.
        root: the folder that media paths are relative to; default: the data file's folder.
        require_process: whether every entry needs a ``process``, or ``messages`` that end with the assistant's turn,
            which is the answer in place of process and solution (then problem_type is optional too).
        reward: how completions will be scored, by which every solution is checked; None: a multiple choice needs the
            letter of an option, and any other answer passes.
        format: the option ``data.format``.
        problem_type: the option ``data.problem_type``.

    Raises:
        ConfigError: there is no such format or problem type.
        DataError: no entry can be used, because there is no such file, it cannot be read, it is empty, not JSON or not
            a list, or all of its entries are bad.
    """
    path = Path(path)
    base = Path(os.path.realpath(path.parent if root is None else root))
    if not base.is_dir():
        raise DataError(f"data.root: expected a folder, got {str(root or path.parent)!r}")
    check, read = EntryChecker(path, base, require_process, reward), RowReader(format, problem_type)
    samples: list[Sample] = []
    errors: list[SampleError] = []
    for index, (where, entry) in enumerate(_entries(path, read)):
        try:
            if isinstance(entry, SampleError):
                raise entry
            samples.append(check(index, where, read(where, entry, path)))
        except SampleError as error:
            errors.append(error)
    dataset = Dataset(samples, errors, path, base, check.needs_lenient, read.note())
    if not samples and not errors:
        raise DataError(f"{path}: holds no samples; expected a JSON list of objects, or one JSON object a line")
    if not samples:
        counts = ", ".join(f"{kind} {count}" for kind, count in dataset.error_counts().items())
        first = "\n".join(f"  {error.message} [{error.kind}]" for error in errors[:3])
        raise DataError(f"{path}: none of its {len(errors)} samples can be used ({counts}). The first:\n{first}")
    return dataset


def _entries(path: Path, read: RowReader) -> Iterator[tuple[str, Any]]:
    """Yield (``"line 3"``, ``"entry 2"`` or ``"row 2"``, the parsed value, Unparsed or SampleError) for each entry."""
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path, read)
            return
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the data file: {error.strerror}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise DataError(f"{path}: the data file is empty")

    whole: Any = Unparsed("")
    lines_expected = path.suffix.lower() in (".jsonl", ".ndjson")
    if not lines_expected or data.lstrip().startswith(b"["):
        whole = parse_entry(data)
        if isinstance(whole, list):
            for index, value in enumerate(whole):
                yield f"entry {index}", value
            return
    if not lines_expected:
        if not isinstance(whole, Unparsed):
            raise DataError(
                f"{path}: expected a JSON list of objects at the top level, got {json_type(whole)}; "
                "a file with one object a line is named .jsonl"
            )
        if not isinstance(parse_entry(data.lstrip().split(b"\n", 1)[0]), dict):
            raise DataError(f"{path}: does not parse as JSON: {whole.reason}")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", parse_entry(line)


def _parquet_rows(path: Path, read: RowReader) -> Iterator[tuple[str, Any]]:
    shard = ParquetShard(LocalFile(str(path), path.stat().st_size), read.columns)
    for block in range(shard.blocks):
        rows = shard.read(block)
        for row in range(len(rows)):
            if (found := rows.entry(row)) is not None:
                yield found[1:]


class EntryChecker:
    """Turns a parsed entry into a Sample, or raises a SampleError.

    Args:
        data_file: the data file that errors name.
        root: the folder that media paths are relative to and may not leave, with its symlinks resolved.
        require_process: as ``load_samples``.
        reward: how completions will be scored; None: as ``load_samples``.

    Attributes:
        needs_lenient: number of solutions so far that ``reward`` cannot reward and ``reward.lenient`` could.
    """

    def __init__(
        self, data_file: Path | str, root: Path, require_process: bool, reward: RewardConfig | None = None
    ) -> None:
        self.data_file = data_file
        self.root = root
        self.require_process = require_process
        self.reward = reward
        self.needs_lenient = 0
        self._inside = os.path.join(root, "")  # what every path begins with; comparing text is 10 times as fast
        self._folders: dict[str, str] = {}  # folder -> the same folder with its symlinks resolved

    def __call__(self, index: int, where: str, entry: Any, *, problem_id: int | str | None = None) -> Sample:
        """Check an entry and return its Sample.

        Args:
            index: the sample's index.
            where: where the entry is, in words, for error messages.
            entry: the parsed entry, or Unparsed.
            problem_id: the id of an entry that has no ``problem_id``; default: the index.

        Raises:
            SampleError: the entry cannot be used.
        """

        def fail(kind: str, message: str) -> SampleError:
            return SampleError(kind, f"{where}: {message}", self.data_file)

        if isinstance(entry, Unparsed):
            raise fail("bad_json", f"does not parse as JSON: {entry.reason}")
        if not isinstance(entry, dict):
            raise fail("wrong_type", f"expected a JSON object, got {json_type(entry)}")

        def text(field: str) -> str:
            if field not in entry:
                raise fail("missing_field", f"missing field {field!r}; found {names(entry)}")
            value = optional_text(field, none=False)
            if not value.strip():
                raise fail("empty_field", f"{field}: expected text, got {shown(value)}")
            return value

        def optional_text(field: str, *, none: bool = True) -> str:
            value = entry.get(field)
            if value is None and none:
                return ""
            if not isinstance(value, str):
                raise fail("wrong_type", f"{field}: expected a string, got {json_type(value)}")
            return encodable(field, value)

        def encodable(field: str, value: str) -> str:
            if not value.isascii() and field != "path":  # A path has an error of its own.
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    problem = f"{error.reason} at character {error.start}"
                    raise fail("bad_text", f"{field}: {problem}, got {shown(value)}") from None
            return value

        def choice(field: str, valid: tuple[str, ...]) -> Any:
            value = text(field)
            if value not in valid:
                hint = did_you_mean(value, valid)
                raise fail(field, f"{field}: expected one of {list(valid)}, got {shown(value)}{hint}")
            return value

        system: str | None = text("system") if entry.get("system") is not None else None
        messages: tuple[Message, ...] = ()
        if entry.get("messages") is None:
            problem = text("problem")
        else:
            if entry.get("problem") is not None:
                raise fail("messages", "expected problem or messages, got both")
            of_messages, messages = read_messages(entry["messages"], encodable, fail, answered=self.require_process)
            if system is not None and of_messages is not None:
                raise fail("messages", "expected a system turn in messages or the field system, got both")
            system = of_messages or system
            problem = next(message.content for message in reversed(messages) if message.role == "user")
        answered = bool(messages) and messages[-1].role == "assistant"
        if answered and optional_text("process").strip():
            raise fail(
                "messages", "expected the answer as the last turn of messages or as process and solution, got both"
            )
        # A conversation with its answer is learned as it stands, unless the entry says what kind of question it is.
        instructed = not answered or entry.get("problem_type") is not None
        listed = entry.get("media") is not None and not (entry["media"] == [] and entry.get("data_type") == "text")
        data_type: Any = None
        if not listed or entry.get("data_type") is not None:
            data_type = choice("data_type", get_args(DataType))
        problem_type: Any = choice("problem_type", get_args(ProblemType)) if instructed else "free-form"

        if entry.get("problem_id") is not None:
            problem_id = entry["problem_id"]
        elif problem_id is None:
            problem_id = index
        if isinstance(problem_id, bool) or not isinstance(problem_id, int | str):
            raise fail("wrong_type", f"problem_id: expected an integer or a string, got {json_type(problem_id)}")
        problem_id = encodable("problem_id", str(problem_id))

        options: Any = ()
        if problem_type == "multiple choice":
            if "options" not in entry:
                raise fail("missing_field", f"missing field 'options' of a multiple choice; found {names(entry)}")
            options = entry["options"]
            if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
                raise fail("wrong_type", f"options: expected a list of strings, got {json_type(options)}")
            if not options or not all(option.strip() for option in options):
                raise fail("options", f"options: expected at least one, none of them empty, got {shown(options)}")
            for option in options:
                encodable("options", option)

        solution = optional_text("solution") if answered else text("solution")
        answer = extract_answer(solution)
        if not answer and solution.strip():
            # No completion could match such a solution, or (multiple choice) a completion without an answer would.
            raise fail("solution", f"solution: expected text that holds <answer>...</answer>, got {shown(solution)}")
        reason = why_unearnable(answer, problem_type, options, reward=self.reward) if answer else ""
        if reason:
            self.needs_lenient += self.reward is not None and lenient_can_reward(answer, problem_type, self.reward)
            raise fail("solution", f"solution: {reason}")

        process = optional_text("process")
        if self.require_process and not answered:
            process = text("process")
            stripped = process.strip()
            if not (stripped.startswith("<think>") and stripped.endswith("</think>")):
                raise fail("process", f"process: expected <think>...</think>, got {shown(process)}")

        def locate(field: str, relative: str) -> Path:
            try:
                found = self._resolve(relative)
            except (OSError, ValueError, RuntimeError) as error:
                raise fail("bad_path", f"{field}: {shown(relative)} cannot be a file's path: {error}") from error
            if not f"{found}{os.sep}".startswith(self._inside):
                inside = f"outside data.root ({self.root})"
                raise fail("outside_root", f"{field}: {shown(relative)} leads to {found}, {inside}")
            return found

        path: Path | None = None
        media: tuple[MediaItem, ...] = ()
        if listed:
            if entry.get("path") is not None:
                raise fail("media", "expected path or media, got both")
            media = read_media(entry["media"], self.root, locate, fail)
            found_type = "video" if any(item.kind == "video" for item in media) else "image"
            if data_type not in (None, found_type):
                raise fail("data_type", f"data_type: the media make it {found_type!r}, got {data_type!r}")
            data_type, path = found_type, media[0].named
        elif data_type != "text":
            path = locate("path", text("path"))
        if messages or entry.get("media") is not None:  # In entries with neither these texts never had a meaning.
            turns = [message.content for message in messages] or [problem]
            kinds = [item.kind for item in media] if data_type == "text" or media else [data_type]
            check_placeholders([system or "", *turns, *options], kinds, fail)
            if self.require_process:
                check_media_of_users(system, messages, fail)

        return Sample(
            index=index,
            problem_id=problem_id,
            problem=problem,
            data_type=data_type,
            problem_type=problem_type,
            solution=solution,
            path=path,
            root=None if path is None else self.root,
            options=tuple(options),
            data_source=optional_text("data_source"),
            process=process,
            media=media,
            messages=messages,
            system=system,
            chat_template_kwargs=read_template_arguments(entry.get("chat_template_kwargs"), fail),
            completions=read_completions(entry.get("completions"), encodable, fail),
            instructed=instructed,
        )

    def _resolve(self, relative: str) -> Path:
        """Return the absolute path with symlinks resolved.

        Each folder is resolved only once, so this costs one ``lstat`` per sample.
        """
        if b"\0" in relative.encode():  # This raises ValueError for a text that UTF-8 cannot hold.
            raise ValueError("it holds a null byte")
        folder, name = os.path.split(os.path.join(self.root, relative))
        if name in ("", ".", ".."):
            folder, name = os.path.join(folder, name), ""
        if folder not in self._folders:
            if len(self._folders) >= MAX_FOLDERS:
                self._folders.clear()
            self._folders[folder] = os.path.realpath(folder)
        full = os.path.join(self._folders[folder], name) if name else self._folders[folder]
        return Path(os.path.realpath(full) if os.path.islink(full) else full)
