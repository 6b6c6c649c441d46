"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol


class Unbuffered(Protocol):
    """A file opened with ``buffering=0``."""

    def write(self, data: bytes | memoryview, /) -> int: ...


def write_atomic(path: str | Path, content: str | bytes, *, sync: bool = False) -> None:
    """Put a new file in the place of ``path``: whoever reads it, also after a kill, sees the old content or the new.

    It is written to ``.<name>.tmp`` beside it and renamed; where that fails, nothing is left of it.

    Args:
        content: text is written as UTF-8.
        sync: on disk before the rename, so that a power cut leaves one of the two as well.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_all(file: Unbuffered, data: bytes) -> None:
    """Write all of ``data``, in one system call where there is room: a write to a nearly full disk may take a part."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
