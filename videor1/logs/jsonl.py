"""Files of one JSON object a line: metrics.jsonl, rollouts.jsonl, skipped.jsonl, answers.jsonl.

Metric names are TRL's (``loss``, ``reward``, ``completions/mean_length``, ...) plus ``temporal/*`` and ``time/*``.
Everything measured with a clock, or decided by what a cache holds, is named ``time/...``: the rest of a resumed run
equals an uninterrupted run's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from videor1.atomic import write_all, write_atomic
from videor1.errors import DataError


class JsonlWriter:
    """Appends JSON objects, one a line. The lines of one call are one write, so that a kill leaves at most one partial
    last line; that line is removed when the file is opened again.
    """

    def __init__(self, path: str | Path, *, keep: bool = True, resume_step: int | None = None) -> None:
        """Open for appending.

        Args:
            keep: go on after the whole lines that are there; else begin anew.
            resume_step: drop the lines of later steps, which the resumed run writes again.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.count = 0  # lines in the file
        if self.path.exists():
            self._rewrite(resume_step, keep)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the writer)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append JSON objects as they are. ValueError for NaN and Inf. A lone surrogate is written as its escape, and
        read back as it was."""
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        write_all(self._file, "".join(lines).encode("utf-8", "backslashreplace"))
        self.count += len(lines)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Append ``row`` with ``step`` first and the other keys sorted; NaN and Inf become null.

        Tensors and arrays become numbers or lists.
        """
        self.append([{"step": int(step)} | {key: json_value(row[key]) for key in sorted(row) if key != "step"}])

    def truncate_after(self, step: int) -> None:
        """Drop the lines whose step is above ``step``."""
        self._file.close()
        self._rewrite(step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, last_step: int | None, keep: bool = True) -> None:
        """Replace the file by its whole lines up to ``last_step``, or by none; left alone where nothing changes."""
        old = self.path.read_bytes()
        lines = _lines(self.path, old) if keep else []
        kept = [line for line, row in lines if last_step is None or row.get("step", 0) <= last_step]
        new = b"".join(line + b"\n" for line in kept)
        if new != old:
            write_atomic(self.path, new, sync=True)
        self.count = len(kept)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A partial last line (the writer was killed) is left out.

    Raises DataError where any other line is not a JSON object.
    """
    path = Path(path)
    return [row for _, row in _lines(path, path.read_bytes())]


def _lines(path: Path, data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    rows: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in lines:
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if number == lines[-1][0]:
                break
            raise DataError(f"{path}:{number}: not a JSON object: {error}; repair or remove the line") from None
        rows.append((line, row))
    return rows


def json_value(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors, numpy arrays and scalars
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value
