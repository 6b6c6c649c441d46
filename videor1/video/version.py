"""Keys that identify the version of a file, and of the code, that a cached result was made from."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

# Version of the computation of patches from media and of the layout of cache files. Raise it when either changes.
FORMAT = 2


class Key(NamedTuple):
    """Identifies what a cached result was made from.

    A result replaces one of the same name and another version; results of another format are not found.
    """

    name: Hashable
    version: Hashable = None  # for a file: (size in bytes, mtime in ns, inode); None where there is no file
    format: int = FORMAT


def file_key(kind: str, path: str | Path, root: Path | None = None) -> Key:
    """Return the key of a file as it is now: ((kind, resolved path), (size, mtime_ns, inode), FORMAT).

    The key of a path that leads out of ``root``, a folder with its symlinks resolved, has no version.
    """
    resolved = str(path)
    try:
        resolved = os.path.realpath(path)
        if root is not None and not Path(resolved).is_relative_to(root):
            return Key((kind, resolved))
        found = os.stat(resolved)
    except (OSError, ValueError):  # reading the file will raise the error that explains this
        return Key((kind, resolved))
    return Key((kind, resolved), (found.st_size, found.st_mtime_ns, found.st_ino))
