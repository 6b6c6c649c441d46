"""The scores of a judge on disk, so that a resumed run gives the same rewards without asking again.

A folder of JSON lines, ``{"key": digest of a request, "score": number}``. Every process appends to a file of its own,
whose name no other has, and reads those of all others when it opens the folder: so ranks and runs may share one. A line
is written at once; what a killed process has left of its last line is not read.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

from videor1.atomic import Unbuffered, write_all
from videor1.errors import ConfigError

_KEY = re.compile(r"[0-9a-f]{64}")
_LONGEST = 256  # bytes of a line; one of this module has about 100


class JudgeCache:
    """Scores by the digest of the request that they answer.

    Where two files hold different scores of one request, that of the file whose name comes first counts.

    Args:
        folder: it is made with the first score that is added.

    Attributes:
        failure: why scores cannot be written any more; None while they can. They are still known to this process.

    Raises:
        ConfigError: the folder is something else, or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._scores: dict[bytes, float] = {}
        self._file: Unbuffered | None = None
        self.failure: str | None = None
        if self._folder.exists() and not self._folder.is_dir():
            raise ConfigError(f"reward.judge.cache_dir: expected a folder, got {self._folder}, which is a file")
        try:
            for path in sorted(self._folder.glob("*.jsonl")):
                self._read(path)
        except OSError as error:
            raise ConfigError(f"reward.judge.cache_dir: {self._folder} cannot be read: {error}") from None

    def get(self, key: str) -> float | None:
        """Return the score of a request; None: there is none."""
        return self._scores.get(bytes.fromhex(key))

    def add(self, key: str, score: float) -> None:
        """Keep a score, in memory and on disk."""
        if self._scores.setdefault(bytes.fromhex(key), score) != score or self.failure is not None:
            return
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                path = self._folder / f"{uuid.uuid4().hex}.jsonl"
                self._file = os.fdopen(
                    os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666), "wb", 0
                )
            write_all(self._file, (json.dumps({"key": key, "score": score}) + "\n").encode())
        except OSError as error:
            self.failure = f"the judge's scores cannot be written to {self._folder}: {error.strerror or error}"

    def close(self) -> None:
        """Close this process's file; a later score opens another."""
        file, self._file = self._file, None
        if file is not None:
            file.close()  # type: ignore[attr-defined]

    def _read(self, path: Path) -> None:
        with open(path, "rb") as file:
            while line := file.readline(_LONGEST):
                entry = _entry(line) if line.endswith(b"\n") else None
                if entry is not None:
                    self._scores.setdefault(*entry)


def _entry(line: bytes) -> tuple[bytes, float] | None:
    """Return (digest, score) of a line; None if it is not one of this module's."""
    try:
        row: Any = json.loads(line)
        key, score = row["key"], row["score"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not (isinstance(key, str) and _KEY.fullmatch(key)) or isinstance(score, bool):
        return None
    return (bytes.fromhex(key), float(score)) if isinstance(score, int | float) and 0 <= score <= 1 else None
