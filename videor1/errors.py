"""Errors that a user can correct. The commands show them as one message without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """Raised for an option, or a combination of options, that cannot work."""


class DataError(ValueError):
    """Raised for a data file that cannot be used at all (a single bad sample is a ``types.SampleError``)."""


class TrainingStopped(RuntimeError):
    """Raised where training cannot continue: too many non-finite steps in a row, or no usable sample left."""


def install(extra: str) -> str:
    """Return the command that installs an optional extra.

    No package index has this project, so the command installs it from a clone.
    """
    return f'pip install -e ".[{extra}]" (in the clone)'


def did_you_mean(name: str, known: Iterable[str], *, least: float = 0.5, show: Callable[[str], str] = repr) -> str:
    """Return a hint such as ``; did you mean 'margin'?`` for a misspelled name.

    The comparison ignores case and also considers only the last dotted part of a name, so that ``rule`` finds
    ``temporal.rule``.

    Args:
        name: the name that was given.
        known: the names that could have been given.
        least: how similar a known name must be to be suggested: 1 is equal, 0 suggests whatever is closest.
        show: formats a suggested name.

    Returns:
        The hint with up to three of the most similar names, or "" where none is similar enough.
    """

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def similarity(other: str) -> float:
        other = other.casefold()
        return max(ratio(given, other), 0.99 * ratio(given.split(".")[-1], other.split(".")[-1]))

    given = name.strip().casefold()[:100]  # a value from a data file may be long, and the ratio takes quadratic time
    scores = {other: similarity(other) for other in known}
    highest = max(scores.values(), default=0.0)
    closest = [show(other) for other, score in scores.items() if score == highest and score >= least]
    return f"; did you mean {' or '.join(closest[:3])}?" if closest else ""
