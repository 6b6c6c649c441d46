"""Which version of a file something was made from, and by which version of the code."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

FORMAT = 1  # of how patches are made from media, and of the cache's files: raise it with a change of either


class Key(NamedTuple):
    """What a result was made from. Results under one name replace each other when the version changes; those of
    another format are not found."""

    name: Hashable
    version: Hashable = None  # of a file: (size in bytes, mtime in ns, inode); None where there is no file
    format: int = FORMAT


def file_key(kind: str, path: str | Path) -> Key:
    """The key of a file as it is now: ((kind, resolved path), (size, mtime_ns, inode), FORMAT)."""
    resolved = str(path)
    try:
        resolved = os.path.realpath(path)
        found = os.stat(resolved)
    except (OSError, ValueError):  # whoever reads it will say what is wrong
        return Key((kind, resolved))
    return Key((kind, resolved), (found.st_size, found.st_mtime_ns, found.st_ino))
