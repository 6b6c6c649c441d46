"""Ranges of options, each declared once in the annotation of its field: ``Annotated[int, at_least(1)]``.

``check_values`` checks a config against them, and ``--help`` shows them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from videor1.errors import ConfigError

LARGEST = 2**53  # of any whole number: a float holds it exactly


@dataclass(frozen=True)
class Range:
    """A range of finite numbers, with bounds named as in pydantic, and its description.

    Whether an option may be null is decided by its type, not by its range.
    """

    words: str  # the description in --help and in error messages
    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf
    multiple_of: int | None = None
    most: float = math.inf  # the largest value that can be meant: memory is allocated by it, or it becomes a C integer

    def __contains__(self, value: float) -> bool:
        between = self.ge <= value <= self.le and self.gt < value < self.lt
        return between and (self.multiple_of is None or value % self.multiple_of == 0)


def at_least(low: int, words: str = "", *, most: float = math.inf) -> Range:
    """Return the range of numbers >= ``low``; ``words`` replaces its description, ``most`` is as in :class:`Range`."""
    return Range(words or (f"at least {low}" if low else "0 or more"), ge=low, most=most)


def above(low: int, words: str = "", *, most: float = math.inf) -> Range:
    """Return the range of numbers > ``low``; ``words`` replaces its description, ``most`` is as in :class:`Range`."""
    return Range(words or f"above {low}", gt=low, most=most)


@functools.cache
def field_ranges(config_class: type) -> dict[str, Range]:
    """Return the declared ranges of a config class's own and inherited fields by the field's name."""
    hints = get_type_hints(config_class, include_extras=True)
    metadata = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: note for name, notes in metadata.items() for note in notes if isinstance(note, Range)}


def check_values(section: Any, prefix: str = "") -> None:
    """Check that every number of a config and of its sections is finite and in its range.

    Raises:
        ConfigError: for the first that is not.
    """
    ranges = field_ranges(section.__class__)
    for field in fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            check_values(value, f"{name}.")
        if isinstance(value, float):  # YAML can write .inf and .nan, which have no meaning for any option
            expect(name, value, "a finite number", math.isfinite(value))
        if field.name in ranges and value is not None:
            allowed = ranges[field.name]
            expect(name, value, allowed.words, value in allowed)
            if value > min(allowed.most, LARGEST):
                raise ConfigError(f"{name}: expected at most {min(allowed.most, LARGEST):,}, got {_shown(value)}")
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{name}: expected at most {LARGEST:,}, got {_shown(value)}")


def _shown(value: float) -> str:
    """Return a number as text, in short where it has many digits."""
    return str(value) if abs(value) < 10**30 else f"a number of {math.floor(math.log10(abs(value))) + 1} digits"


def expect(name: str, value: object, expected: str, ok: bool) -> None:
    """Raise a ConfigError that states the option's name, what was expected and the value, unless ``ok``."""
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def is_text(name: str) -> bool:
    """Return whether a name can be written as UTF-8, and holds no null character."""
    return "\0" not in name and not any("\ud800" <= sign <= "\udfff" for sign in name)
