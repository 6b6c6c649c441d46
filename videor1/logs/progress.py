"""A progress bar for a run, and tables of its results as text."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from tqdm import tqdm


class Progress:
    """A progress bar on a terminal, or plain lines of text where the output is not a terminal but e.g. a log file.

    Args:
        total: number of steps of the whole run.
        initial: number of steps done before this start, where the run is resumed.
        description: text in front of the bar.
        unit: name of a step.
        disabled: show no progress.
        silent: suppress messages (``write``).
        stream: where to write; default: stderr.
        every: seconds after which the next update prints a plain line; each tenth of the run also prints one.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        description: str = "",
        unit: str = "step",
        disabled: bool = False,
        silent: bool = False,
        stream: TextIO | None = None,
        every: float = 30.0,
    ) -> None:
        self._silent = silent
        self._total, self._initial, self._done = total, initial, initial
        self._description, self._unit, self._every = description, unit, every
        self._stream = sys.stderr if stream is None else stream
        self._start = self._last_line = time.monotonic()
        self._plain = not disabled and not self._stream.isatty()
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description or None,
            file=self._stream,
            disable=disabled or self._plain,
            dynamic_ncols=True,
            unit=unit,
        )

    def update(self, values: Mapping[str, float | None], steps: int = 1) -> None:
        """Advance by ``steps`` and show ``values`` by label, e.g. ``{"loss": 0.1, "p~": None}``.

        None, NaN and Inf are shown as —.
        """
        before, self._done = self._done, self._done + steps
        shown = ", ".join(f"{label}={_short(value)}" for label, value in values.items())
        if self._plain:
            tenth = 10 * self._done // max(1, self._total) > 10 * before // max(1, self._total)
            if tenth or self._done >= self._total or time.monotonic() - self._last_line >= self._every:
                self._line(shown)
        else:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(steps)

    def write(self, message: str) -> None:
        """Print a line of text without breaking the bar, also where the bar is disabled."""
        if not self._silent:
            tqdm.write(message, file=self._stream)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, shown: str) -> None:
        """Print the progress and the values as a plain line."""
        self._last_line = time.monotonic()
        line = tqdm.format_meter(
            self._done,
            self._total,
            self._last_line - self._start,
            initial=self._initial,
            unit=self._unit,
            prefix=self._description and f"{self._description}: ",
            postfix=shown,
            bar_format="{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        print(line, file=self._stream, flush=True)


def _short(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def summary_table(rows: Sequence[Sequence[object]]) -> str:
    """Return rows as plain text in columns; the first row is the header, and the first column is left-aligned.

    Floats are shown with three decimals, None and NaN as —.
    """

    def text(value: object) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "—"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for first, *rest in cells:
        columns = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(columns).rstrip())
    return "\n".join(lines)
