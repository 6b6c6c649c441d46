"""Values of a data file as error messages show them: the beginning, for they may be long or nested deeply."""

from __future__ import annotations

import reprlib
from typing import Any


def json_type(value: Any) -> str:
    """Return the type of a value in JSON's words, and the value in short."""
    words = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return f"{words.get(type(value), 'a number')} ({shown(value)})"


class _Brief(reprlib.Repr):
    """The beginning of a value from the file, which may be long or nested deeply."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring, self.maxlong = 3, 16, 16, 60, 60


_BRIEF = _Brief()


def names(entry: dict[str, Any]) -> str:
    """Return the names of an entry's fields, in short."""
    return _BRIEF.repr(sorted(entry))


def shown(value: Any, limit: int = 60) -> str:
    """Return a value in at most ``limit`` characters."""
    text = repr(value[: limit + 1]) if isinstance(value, str) else _BRIEF.repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
