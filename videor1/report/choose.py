"""Choose a few lines of a rollouts.jsonl evenly over the run.

A large file is read at a few byte offsets and never as a whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

SCAN = 64 * 2**20  # A file up to this size is read line by line, and a larger one only at some offsets.
LOOK = 2 * 2**20  # bytes to search at an offset for a line that holds tokens
LONGEST = 16 * 2**20  # most bytes of a line that can be shown
_TOKENS = b'"tokens": [['


@dataclass
class Chosen:
    """The chosen lines of a file, in their order."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0  # chosen lines that are not a JSON object
    too_long: int = 0  # lines that were read and exceed LONGEST


def choose_lines(path: Path, count: int) -> Chosen:
    """Choose at most ``count`` rows of a file.

    The file is divided into ``count`` stretches of equal size (of equally many lines, if the file is small). The first
    line with tokens of each stretch is chosen, or its first line if none has tokens. An incomplete last line is left
    out.
    """
    chosen = Chosen()
    if count < 1 or not path.exists():
        return chosen
    size = path.stat().st_size
    with open(path, "rb") as file:
        starts = _by_lines(file, count, chosen) if size <= SCAN else _by_bytes(file, size, count, chosen)
        for start in starts:
            file.seek(start)
            try:
                row = json.loads(file.readline(LONGEST))
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
            except ValueError:
                chosen.unreadable += 1
            else:
                chosen.rows.append(row)
    return chosen


def _by_lines(file: BinaryIO, count: int, chosen: Chosen) -> list[int]:
    lines = _complete_lines(file, 0, SCAN + 1, chosen)
    bins: dict[int, list[tuple[int, bool]]] = {}
    for i, line in enumerate(lines):
        bins.setdefault(i * count // max(count, len(lines)), []).append(line)
    return [_pick(lines) for lines in bins.values()]


def _by_bytes(file: BinaryIO, size: int, count: int, chosen: Chosen) -> list[int]:
    starts: list[int] = []
    for i in range(count):
        begin = i * size // count
        if begin:  # The stretch begins with the next line, unless a line begins exactly at its offset.
            file.seek(begin - 1)
            begin = begin - 1 + len(file.readline(LONGEST))
        lines = _complete_lines(file, begin, min(LOOK, size // count), chosen)
        if lines and _pick(lines) not in starts:
            starts.append(_pick(lines))
    return starts


def _complete_lines(file: BinaryIO, start: int, span: int, chosen: Chosen) -> list[tuple[int, bool]]:
    """Return (offset, whether it has tokens) of each complete line that begins in the ``span`` bytes from ``start``.

    If no line begins there, the next line is returned, if there is one.
    """
    lines: list[tuple[int, bool]] = []
    file.seek(start)
    at = start
    while at < start + span or not lines:
        line = file.readline(LONGEST)
        if not line.endswith(b"\n"):
            if len(line) < LONGEST:
                break
            chosen.too_long += 1
            break
        if line.strip():
            lines.append((at, _TOKENS in line))
        at += len(line)
    return lines


def _pick(lines: list[tuple[int, bool]]) -> int:
    return next((start for start, tokens in lines if tokens), lines[0][0])
