"""Files of one JSON object per line: metrics.jsonl, rollouts.jsonl, skipped.jsonl, answers.jsonl.

Metric names are TRL's (``loss``, ``reward``, ``completions/mean_length``, ...) plus ``temporal/*`` and ``time/*``.
Every metric that is measured with a clock, or that depends on the contents of a cache, is named ``time/...``. All other
metrics of a resumed run equal those of an uninterrupted run.
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
    """Appends JSON objects to a file, one per line.

    All lines of one call are written at once, so that a killed process leaves at most one partial last line. That line
    is removed when the file is opened again.
    """

    def __init__(self, path: str | Path, *, keep: bool = True, resume_step: int | None = None) -> None:
        """Open the file for appending.

        Args:
            path: the file; missing folders are made.
            keep: append after the complete lines that the file already has; False: remove them.
            resume_step: remove the lines of later steps, which the resumed run writes again.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.count = 0  # lines in the file
        if self.path.exists():
            self._rewrite(resume_step, keep)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the writer)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append JSON objects as they are.

        A lone surrogate is written as its escape sequence, from which the same string is read back.

        Raises:
            ValueError: an object holds NaN or Inf.
        """
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        write_all(self._file, "".join(lines).encode("utf-8", "backslashreplace"))
        self.count += len(lines)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Append ``row`` as a line with ``step`` first and the other keys sorted.

        Tensors and arrays become numbers or lists; NaN and Inf become null.
        """
        self.append([{"step": int(step)} | {key: json_value(row[key]) for key in sorted(row) if key != "step"}])

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, last_step: int | None, keep: bool = True) -> None:
        """Keep only the complete lines up to ``last_step``, or none where ``keep`` is False.

        The file is only written where its content changes.
        """
        old = self.path.read_bytes()
        lines = _lines(self.path, old) if keep else []
        kept = [line for line, row in lines if last_step is None or row.get("step", 0) <= last_step]
        new = b"".join(line + b"\n" for line in kept)
        if new != old:
            write_atomic(self.path, new, sync=True)
        self.count = len(kept)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file, without a partial last line, which a killed writer leaves.

    Raises:
        DataError: any other line is not a JSON object.
    """
    path = Path(path)
    return [row for _, row in _lines(path, path.read_bytes())]


def _lines(path: Path, data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Return (line, its object) of each complete line. Raises DataError as ``read_jsonl`` does."""
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
    """Return a value in JSON types: tensors and arrays as numbers or lists, NaN and Inf as None, paths as text."""
    if hasattr(value, "tolist"):  # tensors, numpy arrays and scalars
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value
