"""Parsing an entry of a data file, and what becomes of the nulls of a table's rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unparsed:
    """An entry that is not valid JSON, with the reason."""

    reason: str


def parse_entry(data: bytes) -> Any:
    """Parse JSON from UTF-8 bytes, and return its value, or Unparsed if it is not valid."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unparsed(f"not UTF-8 text at byte {error.start}")
    except RecursionError:
        return Unparsed("nested too deeply")
    except ValueError as error:  # a JSONDecodeError, or an integer with too many digits
        return Unparsed(str(error))


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects: in Arrow, all objects of a column have the same fields."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value
