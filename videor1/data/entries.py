"""Checking the parts of an entry that list several media, or hold a conversation in place of one question.

The functions raise what ``fail(kind, message)`` makes; a path is resolved and held to ``data.root`` by
``locate(field, path)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from videor1.data.shown import json_type, shown
from videor1.errors import did_you_mean
from videor1.placeholders import MediaKind, placeholders
from videor1.types import MediaItem, Message, OfflineAnswer, SampleError

Fail = Callable[[str, str], SampleError]
Locate = Callable[[str, str], Path]

_KINDS = get_args(MediaKind)
_OF_A_VIDEO = ("frames", "timestamps", "frames_per_second", "start", "end", "fps", "max_frames")
_FIELDS = ("path", "kind", "max_pixels", *_OF_A_VIDEO)
_MOST = {"fps": 1e6, "frames_per_second": 1e6, "max_frames": 2**20, "max_pixels": 2**32}  # as the options of video


def read_media(value: Any, root: Path, locate: Locate, fail: Fail) -> tuple[MediaItem, ...]:
    """Return the media of an entry's field ``media``.

    Raises:
        SampleError: ``wrong_type``, ``missing_field``, or ``media`` for an empty list, an unknown field, a kind that
            is none, or values that contradict each other; and as ``locate``.
    """
    if not isinstance(value, list):
        raise fail("wrong_type", f"media: expected a list of objects, got {json_type(value)}")
    if not value:
        raise fail("media", "media: expected at least one video or image, got an empty list")
    return tuple(_item(f"media[{number}]", one, root, locate, fail) for number, one in enumerate(value))


def _item(name: str, value: Any, root: Path, locate: Locate, fail: Fail) -> MediaItem:
    if not isinstance(value, dict):
        raise fail("wrong_type", f"{name}: expected an object, got {json_type(value)}")
    given = {field: one for field, one in value.items() if one is not None}
    if unknown := next((field for field in given if field not in _FIELDS), None):
        hint = did_you_mean(str(unknown), _FIELDS)
        raise fail("media", f"{name}: unknown field {shown(unknown)}{hint}; known are {list(_FIELDS)}")
    kind = given.get("kind", "video" if "frames" in given else None)
    if kind is None:
        raise fail("missing_field", f"{name}: missing field 'kind', one of {list(_KINDS)}")
    if not isinstance(kind, str) or kind not in _KINDS:
        hint = did_you_mean(kind, _KINDS) if isinstance(kind, str) else ""
        raise fail("media", f"{name}.kind: expected one of {list(_KINDS)}, got {shown(kind)}{hint}")
    if kind == "image" and (of_a_video := [field for field in _OF_A_VIDEO if field in given]):
        raise fail("media", f"{name}: {', '.join(of_a_video)}: only a video has these, and this is an image")
    if ("path" in given) == ("frames" in given):
        got = "both" if "path" in given else "neither"
        raise fail("media", f"{name}: expected path or frames, got {got}")
    frames = _frames(f"{name}.frames", given["frames"], locate, fail) if "frames" in given else ()
    path = locate(f"{name}.path", _text(f"{name}.path", given["path"], fail)) if "path" in given else None
    times = _timestamps(f"{name}.timestamps", given["timestamps"], fail) if "timestamps" in given else ()
    if times and "frames_per_second" in given:
        raise fail("media", f"{name}: expected timestamps or frames_per_second, got both")
    if frames and not times and "frames_per_second" not in given:
        raise fail("media", f"{name}: frames need timestamps (seconds of each) or frames_per_second")
    if frames and times and len(times) != len(frames):
        raise fail("media", f"{name}.timestamps: expected one for each of {len(frames)} frames, got {len(times)}")
    start, end = (
        _number(f"{name}.{field}", given[field], fail) if field in given else None for field in ("start", "end")
    )
    if (start or 0) < 0 or (end is not None and end <= (start or 0)):
        raise fail("media", f"{name}: expected 0 <= start < end (seconds), got start {start} and end {end}")
    bounded = {field: _bounded(f"{name}.{field}", given[field], field, fail) for field in _MOST if field in given}
    return MediaItem(kind, path, root, frames, times, start=start, end=end, **bounded)  # type: ignore[arg-type]


def _frames(name: str, value: Any, locate: Locate, fail: Fail) -> tuple[Path, ...]:
    if not isinstance(value, list):
        raise fail("wrong_type", f"{name}: expected a list of paths, got {json_type(value)}")
    if len(value) < 2:
        raise fail("media", f"{name}: a video needs at least 2 frames, got {len(value)}")
    named = ((f"{name}[{number}]", one) for number, one in enumerate(value))
    return tuple(locate(field, _text(field, one, fail)) for field, one in named)


def _timestamps(name: str, value: Any, fail: Fail) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise fail("wrong_type", f"{name}: expected a list of seconds, got {json_type(value)}")
    times = tuple(_number(f"{name}[{number}]", one, fail) for number, one in enumerate(value))
    ascending = all(one < following for one, following in itertools.pairwise(times))
    if len(times) < 2 or times[0] < 0 or not ascending:
        raise fail("media", f"{name}: expected two or more seconds from 0 on, ascending, got {shown(value)}")
    return times


def _bounded(name: str, value: Any, field: str, fail: Fail) -> float:
    """Return a number above 0 and as large as the option of that name may be; whole where that is."""
    number = _number(name, value, fail)
    whole = field in ("max_frames", "max_pixels")
    least = 2 if field == "max_frames" else 1 if whole else 0
    expected = f"{'a whole number' if whole else 'a number'} of {least} or more" if whole else "a number above 0"
    even = field != "max_frames" or number % 2 == 0
    if (whole and number != int(number)) or not even or not (number > 0 and number >= least) or number > _MOST[field]:
        expected += ", even" if field == "max_frames" else ""
        raise fail("media", f"{name}: expected {expected}, at most {_MOST[field]:g}, got {shown(value)}")
    return int(number) if whole else number


def _number(name: str, value: Any, fail: Fail) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail("wrong_type", f"{name}: expected a number, got {json_type(value)}")
    if abs(value) > 2**53 or not math.isfinite(value):  # in this order: no float holds a whole number of 400 digits
        raise fail("media", f"{name}: expected a finite number, got {shown(value)}")
    return float(value)


def _text(name: str, value: Any, fail: Fail) -> str:
    if not isinstance(value, str):
        raise fail("wrong_type", f"{name}: expected a string, got {json_type(value)}")
    if not value.strip():
        raise fail("empty_field", f"{name}: expected text, got {shown(value)}")
    return value


def read_messages(
    value: Any, encodable: Callable[[str, str], str], fail: Fail, *, answered: bool = False
) -> tuple[str | None, tuple[Message, ...]]:
    """Return the system prompt and the further turns of an entry's field ``messages``.

    A turn's content is a text with placeholders, or a list of parts ``{"type": "text", "text": ...}``,
    ``{"type": "video"}`` and ``{"type": "image"}``, which becomes such a text.

    Args:
        answered: whether the assistant's turn may end it, as the answer that SFT learns; else the user's does.

    Raises:
        SampleError: ``wrong_type``, ``missing_field``, ``empty_field``; ``messages`` for a role that is none, a system
            turn that is not the first, or a conversation that does not end with the user; and as ``encodable``.
    """
    if not isinstance(value, list):
        raise fail("wrong_type", f"messages: expected a list of objects, got {json_type(value)}")
    roles = ("system", "user", "assistant")
    system, turns = None, []
    for number, one in enumerate(value):
        name = f"messages[{number}]"
        if not isinstance(one, dict):
            raise fail("wrong_type", f"{name}: expected an object, got {json_type(one)}")
        for field in ("role", "content"):
            if one.get(field) is None:
                raise fail("missing_field", f"{name}: missing field {field!r}")
        role, content = one["role"], one["content"]
        if not isinstance(role, str) or role not in roles:
            hint = did_you_mean(role, roles) if isinstance(role, str) else ""
            raise fail("messages", f"{name}.role: expected one of {list(roles)}, got {shown(role)}{hint}")
        text = encodable(f"{name}.content", _content(f"{name}.content", content, fail))
        if role != "system":
            turns.append(Message(role, text))  # type: ignore[arg-type]
        elif number:
            raise fail("messages", f"{name}: a system turn is the first, got it behind {number} others")
        else:
            system = text
    if not any(turn.role == "user" for turn in turns):
        raise fail("messages", f"messages: expected a turn of the user, got {len(turns)} turns and none of the user's")
    if turns[-1].role != "user" and not answered:
        only = "only SFT learns such an answer; leave it out here, and put the true answer in solution"
        raise fail("messages", f"messages: expected the user's turn at the end, got the assistant's: {only}")
    return system, tuple(turns)


def _content(name: str, value: Any, fail: Fail) -> str:
    """Return the content of a turn as a text with placeholders."""
    if not isinstance(value, list):
        return _text(name, value, fail)
    texts = []
    for number, part in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(part, dict):
            raise fail("wrong_type", f"{where}: expected an object, got {json_type(part)}")
        kind = part.get("type")
        if kind not in ("text", *_KINDS):
            raise fail("messages", f"{where}.type: expected one of {['text', *_KINDS]}, got {shown(kind)}")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise fail("wrong_type", f"{where}.text: expected a string, got {json_type(part.get('text'))}")
        texts.append(part["text"] if kind == "text" else f"<{kind}>")
    return _text(name, "".join(texts), fail)


def read_completions(value: Any, encodable: Callable[[str, str], str], fail: Fail) -> tuple[OfflineAnswer, ...]:
    """Return an entry's ``completions``: objects with ``text`` and, if the data say it, ``source``.

    Raises:
        SampleError: ``wrong_type``, or ``completions`` for an empty text or an unknown field.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise fail("wrong_type", f"completions: expected a list of objects, got {json_type(value)}")
    found = []
    for number, one in enumerate(value):
        name = f"completions[{number}]"
        if not isinstance(one, dict):
            raise fail("wrong_type", f"{name}: expected an object with text and source, got {json_type(one)}")
        if unknown := next((field for field in one if field not in ("text", "source")), None):
            raise fail("completions", f"{name}: unknown field {shown(unknown)}; known are ['text', 'source']")
        text, source = one.get("text"), one.get("source")
        if not isinstance(text, str) or not isinstance(source, str | None):
            wrong = ("source", source) if isinstance(text, str) else ("text", text)
            raise fail("wrong_type", f"{name}.{wrong[0]}: expected a string, got {json_type(wrong[1])}")
        if not text.strip():
            raise fail("completions", f"{name}.text: expected an answer, got {shown(text)}")
        found.append(OfflineAnswer(encodable(f"{name}.text", text), encodable(f"{name}.source", source or "")))
    return tuple(found)


def read_template_arguments(value: Any, fail: Fail) -> Mapping[str, Any]:
    """Return an entry's ``chat_template_kwargs``. Raises SampleError ``wrong_type`` for what is no object."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise fail("wrong_type", f"chat_template_kwargs: expected an object, got {json_type(value)}")
    return value


def check_placeholders(texts: Sequence[str], kinds: Sequence[MediaKind], fail: Fail) -> None:
    """Check that texts have no placeholder, or one for each medium, of its kind and in its order.

    Raises:
        SampleError: ``placeholders``.
    """
    found = [kind for text in texts for kind in placeholders(text)]
    if found and found != list(kinds):
        told = (
            f"placeholders: expected one for each of the media, {_listed(kinds)}, or none at all, got {_listed(found)}"
        )
        raise fail("placeholders", told)


def check_media_of_users(system: str | None, turns: Sequence[Message], fail: Fail) -> None:
    """Check that only the user's turns have placeholders: SFT learns what the assistant writes, which is text.

    Raises:
        SampleError: ``placeholders``.
    """
    others = [("system", system or ""), *((turn.role, turn.content) for turn in turns if turn.role != "user")]
    for role, text in others:
        if found := placeholders(text):
            told = f"expected placeholders in the user's turns only, got <{found[0]}> in the {role}'s"
            raise fail("placeholders", f"placeholders: {told}")


def _listed(kinds: Sequence[str]) -> str:
    shown = " ".join(f"<{kind}>" for kind in kinds[:8]) + " ..." * (len(kinds) > 8)
    return f"{len(kinds)} ({shown})" if kinds else "0"
