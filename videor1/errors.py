"""Errors that are the user's to mend: shown as one message, without a traceback, by the commands."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """An option, or a combination of options, that cannot work."""


class DataError(ValueError):
    """A data file that cannot be used at all (a single bad sample is a ``types.SampleError``)."""


class TrainingStopped(RuntimeError):
    """Training cannot go on: too many non-finite steps in a row, or no usable sample left."""


def install(extra: str) -> str:
    """The command that adds an optional extra. No package index has this project: it is installed from a clone."""
    return f'pip install -e ".[{extra}]" (in the clone)'


def did_you_mean(name: str, known: Iterable[str], *, least: float = 0.5, show: Callable[[str], str] = repr) -> str:
    """``; did you mean 'margin'?``: the known names most like ``name``, or nothing where none is alike.

    Case does not count, and a name is alike by its last part too: ``rule`` finds ``temporal.rule``.

    Args:
        name: what was given.
        known: what could have been given.
        least: how alike a name must be to be suggested: 1 is equal, 0 suggests whatever is nearest.
        show: how a name is written.
    """

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def alike(other: str) -> float:
        other = other.casefold()
        return max(ratio(given, other), 0.99 * ratio(given.split(".")[-1], other.split(".")[-1]))

    given = name.strip().casefold()[:100]  # what stands in a data file may be long, and the ratio takes its square
    scores = {other: alike(other) for other in known}
    most = max(scores.values(), default=0.0)
    nearest = [show(other) for other, score in scores.items() if score == most and score >= least]
    return f"; did you mean {' or '.join(nearest[:3])}?" if nearest else ""
