"""Writing files completely or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol


class Unbuffered(Protocol):
    """A file opened with ``buffering=0``."""

    def write(self, data: bytes | memoryview, /) -> int: ...


def write_atomic(path: str | Path, content: str | bytes, *, sync: bool = False) -> None:
    """Replace the file at ``path`` so that a reader sees the old or the new content, even if this process is killed.

    The content is written to ``.<name>.tmp`` in the same folder, which is then renamed to ``path``. If that fails, the
    temporary file is removed.

    Args:
        path: the file to create or replace.
        content: the new content; text is written as UTF-8.
        sync: flush the content to disk before the rename, so that a power cut leaves the old or the new content too.
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
    """Write all of ``data`` to an unbuffered file, in one system call where the disk has room.

    A single write to a nearly full disk may write only a part, so the rest is written again.
    """
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[file.write(remaining) :]
