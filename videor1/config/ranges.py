"""The range of an option, stated once beside its type: ``Annotated[int, at_least(1)]``. ``check_values`` holds a config
to it, and ``--help`` shows it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from videor1.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Finite numbers between bounds, which have pydantic's names, and what ``--help`` and an error call them.

    An option's type says whether it may be null; a range has nothing to do with that.
    """

    words: str
    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf
    multiple_of: int | None = None

    def __contains__(self, value: float) -> bool:
        between = self.ge <= value <= self.le and self.gt < value < self.lt
        return between and (self.multiple_of is None or value % self.multiple_of == 0)


def at_least(low: int, words: str = "") -> Range:
    return Range(words or (f"at least {low}" if low else "0 or more"), ge=low)


def above(low: int, words: str = "") -> Range:
    return Range(words or f"above {low}", gt=low)


@functools.cache
def field_ranges(config_class: type) -> dict[str, Range]:
    """The stated ranges of a config class's own and inherited fields, by the field's name."""
    hints = get_type_hints(config_class, include_extras=True)
    stated = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: note for name, notes in stated.items() for note in notes if isinstance(note, Range)}


def check_values(section: Any, prefix: str = "") -> None:
    """Every number of a config and of its sections is finite and in its range. Raises ConfigError."""
    ranges = field_ranges(section.__class__)
    for field in fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            check_values(value, f"{name}.")
        if isinstance(value, float):  # YAML can write .inf and .nan, which no option means anything by
            expect(name, value, "a finite number", math.isfinite(value))
        if field.name in ranges and value is not None:
            expect(name, value, ranges[field.name].words, value in ranges[field.name])


def expect(name: str, value: object, expected: str, ok: bool) -> None:
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")
