"""What the rows of several trainers have in common: conversations, answers, the kind of question, its options."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from videor1.answer import extract_answer, follows_format
from videor1.data.formats.media import Item, media_of, placed, read_item
from videor1.data.parsing import without_nulls
from videor1.data.shown import json_type, names, shown
from videor1.placeholders import placeholders
from videor1.types import ProblemType, SampleError

Row = Mapping[str, Any]
Entry = dict[str, Any]
Turns = list[dict[str, str]]  # {"role": ..., "content": a text with placeholders}
Inline = list[tuple[str, Item | None]]  # as formats.media.placed takes it

# Fields that a row may have in any format: those that become an entry's as they are, and what make_entry reads.
OF_AN_ENTRY = ("system", "chat_template_kwargs", "completions")
OF_A_ROW: tuple[str, ...] = ("image", "images", "video", "videos", "data_type", "problem_type", "options")
OF_A_ROW += ("problem_id", "id", "data_source", *OF_AN_ENTRY)

# Names of kinds in EasyVideoR1 (examples/unified_rl/reward_function/unified.py), as _plain has them.
_OTHER_NAMES = {
    "mathematics": "math",
    "number": "numerical",
    "binary classification": "boolean",
    "video qa": "open ended",
    "video description": "open ended",
}
_ROLES = ("system", "user", "assistant")
_TRACE = re.compile(r"</think>(?=\s*<answer>)")
_LABELLED = re.compile(r"\s*\(?([A-Z])[.):]\s*\S")
_HEADING = re.compile(r"\s*(?:options|choices)\s*:?\s*", re.IGNORECASE)


def needed(row: Row, field: str) -> Any:
    """Return a field of a row. Raises SampleError ``missing_field``."""
    if row.get(field) is None:
        raise SampleError("missing_field", f"missing field {field!r}; found {names(_named(row))}")
    return row[field]


def _named(row: Row) -> dict[str, Any]:
    return {str(name): value for name, value in row.items() if value is not None}


def text_of(name: str, value: Any) -> str:
    """Return a value that has to be text. Raises SampleError ``wrong_type`` or ``empty_field``."""
    if not isinstance(value, str):
        raise SampleError("wrong_type", f"{name}: expected a string, got {json_type(value)}")
    if not value.strip():
        raise SampleError("empty_field", f"{name}: expected text, got {shown(value)}")
    return value


def object_of(name: str, value: Any) -> Row:
    """Return a value that has to be an object. Raises SampleError ``wrong_type``."""
    if not isinstance(value, dict):
        raise SampleError("wrong_type", f"{name}: expected an object, got {json_type(value)}")
    return value


def read_answer(name: str, value: Any) -> Entry:
    """Return an answer as the field ``solution``, and what stands before it as ``process``.

    A bare answer is put between ``<answer>`` and ``</answer>``; a number, true, false or an object (a box, an interval)
    is written as JSON first. ``<think>...</think> <answer>...</answer>`` is divided: the first part is the process; and
    so is one without the latter tags.

    Raises:
        SampleError: ``wrong_type``, ``empty_field``, ``solution`` for a thought that does not end before an answer.
    """
    if isinstance(value, dict | int | float):
        try:
            value = json.dumps(without_nulls(value), ensure_ascii=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise SampleError("wrong_type", f"{name}: cannot be written as JSON: {error}") from None
    answer = text_of(name, value).strip()
    if follows_format(answer) and (cut := _TRACE.search(answer)):
        return {"solution": answer[cut.end() :].strip(), "process": answer[: cut.end()]}
    tagged = "<answer>" in answer or "</answer>" in answer
    if not tagged and ("<think>" in answer or "</think>" in answer):
        thought, end, given = answer.partition("</think>")
        if not (thought.startswith("<think>") and end and given.strip()) or "think>" in given:
            told = "expected an answer, or <think>...</think> and an answer"
            raise SampleError("solution", f"{name}: {told}, got {shown(answer)}")
        return {"solution": f"<answer>{given.strip()}</answer>", "process": thought + end}
    return {"solution": answer if tagged else f"<answer>{answer}</answer>"}


def same_answer(one: Entry, other: Entry) -> bool:
    """Return whether two results of :func:`read_answer` give the same answer."""
    return extract_answer(one["solution"]) == extract_answer(other["solution"])


def answer_of(row: Row, fields: Sequence[str], trace: str | None) -> Entry:
    """Return the answer that a row's fields, and the assistant's turn at the end of its conversation, give.

    Args:
        row: the row.
        fields: the fields that may hold the answer.
        trace: the text of the assistant's last turn, if there is one. Where a field holds the answer too, only a
            ``<think>...</think>`` is taken of a turn.

    Raises:
        SampleError: ``missing_field``; ``ambiguous`` where two of them give different answers; as :func:`read_answer`.
    """
    given = {field: read_answer(field, row[field]) for field in fields if row.get(field) is not None}
    turn = None if trace is None else read_answer("the assistant's last turn", trace)
    if turn is not None and (not given or "process" in turn):
        given["the assistant's last turn"] = turn
    if not given:
        needed(row, fields[0])
    first, *others = given.values()
    if not all(same_answer(first, other) for other in others):
        told = ", ".join(f"{name} {shown(extract_answer(one['solution']))}" for name, one in given.items())
        raise SampleError("ambiguous", f"expected one answer, got {told}")
    return first | next(({"process": one["process"]} for one in given.values() if "process" in one), {})


def kind_of_question(told: Mapping[str, Any], hints: Mapping[str, Any], default: str | None) -> str:
    """Return a row's ``problem_type``.

    Args:
        told: the fields that say it, by name.
        hints: fields that hold other things as a rule, and say it where their value is the name of a kind.
        default: the option ``data.problem_type``.

    Raises:
        SampleError: ``problem_type`` where nothing says it; ``ambiguous`` where two fields say different kinds.
    """
    found = {name: as_problem_type(text_of(name, value)) for name, value in told.items() if value is not None}
    if not found:
        known = set(get_args(ProblemType))
        read = {name: as_problem_type(value) for name, value in hints.items() if isinstance(value, str)}
        found = {name: kind for name, kind in read.items() if kind in known}
    if len(set(found.values())) > 1:
        raise SampleError("ambiguous", f"expected one problem_type, got {shown(found)}")
    kind = next(iter(found.values()), default)
    if kind is None:
        raise SampleError(
            "problem_type", f"no field says the kind of question ({', '.join(told)}); data.problem_type says it for all"
        )
    return kind


def as_problem_type(value: str) -> str:
    """Return the known kind of question that a text names, in any case, with blanks, _ or -; else the text itself."""
    plain = _plain(value)
    return next((kind for kind in get_args(ProblemType) if _plain(kind) == _OTHER_NAMES.get(plain, plain)), value)


def _plain(kind: str) -> str:
    return re.sub(r"[\s_-]+", " ", kind.strip()).casefold()


def read_messages(name: str, value: Any) -> tuple[Turns, Inline, str | None]:
    """Return the turns of a conversation, their placeholders in order, and the assistant's turn at the end, if any.

    A content is a text with placeholders, or a list of parts: ``{"type": "text", "text": ...}``, ``{"type": "video"}``,
    or with the medium itself ``{"type": "video", "video": path, "fps": 1}``; likewise for images.

    Raises:
        SampleError: ``wrong_type``, ``missing_field``, ``empty_field``, ``messages`` for roles, fields and an order of
            turns that cannot be read, and as ``formats.media.read_item``.
    """
    if not isinstance(value, list):
        raise SampleError("wrong_type", f"{name}: expected a list of messages, got {json_type(value)}")
    turns: Turns = []
    inline: Inline = []
    trace = None
    for number, one in enumerate(value):
        where = f"{name}[{number}]"
        message = without_nulls(object_of(where, one))
        role = message.get("role")
        if role not in _ROLES or (role == "system" and number):
            told = f"expected one of {list(_ROLES)}, system only at the beginning"
            raise SampleError("messages", f"{where}.role: {told}, got {shown(role)}")
        if more := sorted(str(field) for field in message if field not in ("role", "content")):
            raise SampleError("messages", f"{where}: cannot take account of {', '.join(more)}")
        if role == "system" and message.get("content") == "":
            continue  # as no system prompt
        text, found = _content(f"{where}.content", needed(message, "content"))
        if number == len(value) - 1 and role == "assistant" and turns:
            if found:
                raise SampleError("placeholders", f"{where}: an answer cannot hold media")
            trace = text
        else:
            turns.append({"role": role, "content": text})
            inline += found
    if not turns or turns[-1]["role"] != "user":
        raise SampleError("messages", f"{name}: expected a turn of the user at the end, or before the answer")
    return turns, inline, trace


def _content(name: str, value: Any) -> tuple[str, Inline]:
    """Return the content of a turn as a text with placeholders, and its placeholders."""
    if not isinstance(value, list):
        text = text_of(name, value)
        return text, [(kind, None) for kind in placeholders(text)]
    texts: list[str] = []
    inline: Inline = []
    for number, one in enumerate(value):
        where = f"{name}[{number}]"
        part = object_of(where, one)
        kind = part.get("type")
        if kind == "text":
            said = part.get("text")
            texts.append(said if isinstance(said, str) else text_of(f"{where}.text", said))
            inline += [(found, None) for found in placeholders(texts[-1])]
        elif kind in ("video", "image"):
            texts.append(f"<{kind}>")
            inline.append((kind, read_item(kind, where, part) if len(part) > 1 else None))
        else:
            raise SampleError("messages", f"{where}.type: expected text, video or image, got {shown(kind)}")
    return text_of(name, "".join(texts)), inline


def make_entry(
    row: Row, turns: Turns, inline: Inline, answer: Entry, problem_type: str | None, options: Any = None
) -> Entry:
    """Return the entry of a row from its parts.

    One medium without settings that stands before the text becomes ``data_type`` and ``path``; other media become
    ``media``. A system turn becomes ``system``, one turn of the user ``problem``, a longer conversation ``messages``.
    Without a kind of question it is one that SFT learns as it stands, with the assistant's turn at its end.

    Raises:
        SampleError: ``options`` for a multiple choice without options; ``data_type`` where the field of that name says
            another kind than the media; ``ambiguous`` where the conversation and the field ``system`` give different
            system prompts; as ``formats.media``.
    """
    entry = _of_an_entry(row)
    if turns[0]["role"] == "system":
        if entry.setdefault("system", turns[0]["content"]) != turns[0]["content"]:
            told = f"{shown(row['system'])} and in a turn {shown(turns[0]['content'])}"
            raise SampleError("ambiguous", f"expected one system prompt, got in the field {told}")
        turns = turns[1:]
    elif "system" in entry:
        inline = [*_places(entry["system"]), *inline]
    if problem_type == "multiple choice":
        if options:
            inline = [*inline, *_places(*options)] if isinstance(options, list) else inline
            entry["options"] = options
        else:
            entry["options"] = _take_options(turns[-1])
    media = placed(inline, media_of(row, "video"), media_of(row, "image"))
    kinds = {item["kind"] for item in media}
    entry["data_type"] = data_type = "video" if "video" in kinds else "image" if kinds else "text"
    if row.get("data_type") not in (None, data_type):
        raise SampleError("data_type", f"data_type: the media make it {data_type}, got {shown(row['data_type'])}")
    if len(media) == 1 and media[0].keys() == {"path", "kind"} and _leads(inline, turns[0], data_type):
        entry["path"] = media[0]["path"]
    elif media:
        entry["media"] = media
    entry |= {"messages": turns} if len(turns) > 1 else {"problem": turns[0]["content"]}
    entry |= answer if problem_type is None else {"problem_type": problem_type} | answer
    number = row.get("id") if row.get("problem_id") is None else row["problem_id"]
    further = {"problem_id": number, "data_source": row.get("data_source")}
    return entry | {field: value for field, value in further.items() if value is not None}


def _of_an_entry(row: Row) -> Entry:
    """Return the fields that a row may have in any format; an empty system prompt is none."""
    return {field: row[field] for field in OF_AN_ENTRY if row.get(field) not in (None, "")}


def _places(*texts: Any) -> Inline:
    return [(kind, None) for text in texts if isinstance(text, str) for kind in placeholders(text)]


def _leads(inline: Inline, first: dict[str, str], kind: str) -> bool:
    """Return whether a prompt's one medium stands before its text, and take its placeholder out of the first turn."""
    if not inline:
        return True
    placeholder, text = f"<{kind}>", first["content"].lstrip()
    rest = text.removeprefix(placeholder).lstrip()
    if first["role"] != "user" or not text.startswith(placeholder) or not rest:
        return False
    first["content"] = rest
    return True


def _take_options(turn: dict[str, str]) -> list[str]:
    """Take the options that a question ends with, lines ``A. ...``, ``B. ...``, out of it, and return them."""
    lines = turn["content"].rstrip().split("\n")
    found: list[str] = []
    while lines and (not lines[-1].strip() or _LABELLED.match(lines[-1])):
        line = lines.pop().strip()
        found[:0] = [line] if line else []
        if line and _label(line) == "A":
            break
    labels = [_label(line) for line in found]
    if len(found) < 2 or labels != [chr(ord("A") + place) for place in range(len(found))]:
        raise SampleError(
            "options",
            "a multiple choice needs a list of options, or lines A. ..., B. ... at the end of the question, got "
            f"{shown(turn['content'][-60:])}",
        )
    while lines and not lines[-1].strip():
        lines.pop()
    if lines and _HEADING.fullmatch(lines[-1]):
        lines.pop()
    turn["content"] = "\n".join(lines).rstrip()
    return found


def _label(line: str) -> str:
    match = _LABELLED.match(line)
    return match[1] if match else ""
