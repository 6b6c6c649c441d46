"""A few lines of a rollouts.jsonl, evenly over the run, whatever its size: by byte offsets, never the whole file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

SCAN = 64 * 2**20  # a file up to this size is read line by line, a larger one only in places
LOOK = 2 * 2**20  # bytes to look through at a place for a line that holds tokens
LONGEST = 16 * 2**20  # of a line
_TOKENS = b'"tokens": [['


@dataclass
class Chosen:
    """Lines of one file, in their order."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0  # lines that were chosen, but are no JSON object
    too_long: int = 0  # lines that were met, but are above LONGEST


def choose_lines(path: Path, count: int) -> Chosen:
    """At most ``count`` rows: the file is cut into that many stretches of equal size (of equally many lines, in a small
    file), and of each the first line with tokens is taken, else the first. A last line without its end is left out."""
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
    lines = _whole_lines(file, 0, SCAN + 1, chosen)
    bins: dict[int, list[tuple[int, bool]]] = {}
    for i, line in enumerate(lines):
        bins.setdefault(i * count // max(count, len(lines)), []).append(line)
    return [_pick(lines) for lines in bins.values()]


def _by_bytes(file: BinaryIO, size: int, count: int, chosen: Chosen) -> list[int]:
    starts: list[int] = []
    for i in range(count):
        begin = i * size // count
        if begin:  # from the next line on, unless one begins right here
            file.seek(begin - 1)
            begin = begin - 1 + len(file.readline(LONGEST))
        lines = _whole_lines(file, begin, min(LOOK, size // count), chosen)
        if lines and _pick(lines) not in starts:
            starts.append(_pick(lines))
    return starts


def _whole_lines(file: BinaryIO, start: int, span: int, chosen: Chosen) -> list[tuple[int, bool]]:
    """(offset, whether it has tokens) of the lines that begin in the ``span`` bytes after ``start``; at least one."""
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
