"""Read metrics.jsonl line by line into series of numbers, which can be smoothed and thinned for a chart."""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from videor1.errors import DataError

SMOOTH_ABOVE = 20  # A series with at most so many points is shown without smoothing.


@dataclass(frozen=True)
class Series:
    """The finite values of one metric."""

    steps: NDArray[np.int64]  # [N], strictly increasing
    values: NDArray[np.float64]  # [N]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def smooths(self) -> bool:
        """Whether a chart shows a moving average."""
        return len(self) > SMOOTH_ABOVE

    @property
    def span(self) -> int:
        """The approximate number of points that the moving average covers."""
        return max(10, len(self) // 20) if self.smooths else 1

    def smoothed(self, decay: float | None = None) -> Series:
        """Return the exponential moving average, corrected for the bias of its start.

        A series with few points is returned as it is.

        Args:
            decay: weight of the past in each step of the average; default: that of the span, 1 - 2 / (span + 1).
        """
        if not self.smooths:
            return self
        keep = 1 - 2 / (self.span + 1) if decay is None else decay
        sums = np.array(list(itertools.accumulate(self.values.tolist(), lambda total, value: keep * total + value)))
        weights = (1 - keep ** np.arange(1, len(self) + 1)) / (1 - keep)
        return Series(self.steps, sums / weights)

    def thinned(self, most: int) -> Series:
        """Return at most ``most`` points: the lowest and the highest of each of several equal stretches."""
        if len(self) <= most:
            return self
        edges = np.linspace(0, len(self), max(1, most // 2) + 1).astype(int)
        kept: set[int] = set()
        for start, end in itertools.pairwise(edges.tolist()):
            part = self.values[start:end]
            kept |= {start + int(part.argmin()), start + int(part.argmax())}
        return self.at(sorted(kept))

    def spread(self, most: int) -> Series:
        """Return at most ``most`` evenly spread points, which include the first and the last."""
        if len(self) <= most:
            return self
        return self.at(np.linspace(0, len(self) - 1, most).round().astype(int).tolist())

    def at(self, indices: list[int]) -> Series:
        """Return the points with these indices."""
        return Series(self.steps[indices], self.values[indices])


@dataclass(frozen=True)
class Metrics:
    """The content of a metrics.jsonl. Indexing by a name returns its series, which may be empty."""

    series: dict[str, Series] = field(default_factory=dict)
    lines: int = 0  # number of lines that were read
    step: int = 0  # the last step with a loss
    last: dict[str, Any] = field(default_factory=dict)  # the last line with a loss
    unfinished: bool = False  # whether the file ends inside a line (it is being written, or its writer was killed)

    def __getitem__(self, name: str) -> Series:
        return self.series.get(name, EMPTY)


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))


def read_metrics(path: Path, names: Collection[str]) -> Metrics:
    """Read the series in ``names`` from a metrics.jsonl. Only these are held in memory.

    Values that are null, NaN or infinite are left out. An incomplete last line sets ``unfinished``.

    Raises:
        DataError: a complete line is not a JSON object with an integer ``step``.
    """
    points: dict[str, tuple[array[int], array[float]]] = {}
    lines, step, last, unfinished = 0, 0, {}, False
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _parse(line)
            if row is None and not line.endswith(b"\n"):
                unfinished = True
                break
            if row is None:
                raise DataError(f"{path}:{number}: expected a JSON object with a whole number step, got {line[:80]!r}")
            lines += 1
            if "loss" in row:
                step, last = row["step"], row
            for name in names:
                value = row.get(name)
                if isinstance(value, int | float) and math.isfinite(value):
                    steps, values = points.setdefault(name, (array("q"), array("d")))
                    steps.append(row["step"])
                    values.append(value)
    series = {name: _series(np.array(steps), np.array(values)) for name, (steps, values) in points.items()}
    return Metrics(series, lines, step, last, unfinished)


def _series(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Series:
    """Return a series sorted by step. If a step has several values, the last is kept."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    latest = np.append(steps[1:] != steps[:-1], True)
    return Series(steps[latest], values[latest])


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) else None


def combine(one: Series, other: Series) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return (steps, values of ``one``, values of ``other``) at the steps where both are known."""
    steps, mine, theirs = np.intersect1d(one.steps, other.steps, assume_unique=True, return_indices=True)
    return steps, one.values[mine], other.values[theirs]
