"""Opening a media file once, so that every reader reads the very file that was checked."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from videor1.types import SampleError

_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_OPEN_FILES = "/proc/self/fd"  # where Linux names the open files of a process


class MediaFile:
    """A regular file of at least one byte, held open until ``close``.

    A path may lead elsewhere a moment after it was checked. Therefore the file is opened first, what was opened is
    checked, and readers get ``name``, which stands for the open file whatever happens to the path. Where the system has
    no /proc, ``name`` is only the path (``is_lasting`` is False), and ``reader`` must be read instead where possible.

    Args:
        path: the file, as the user names it; it is the path of every error.
        kind: the kind of the error for what is no file that can be read.
        root: a folder, with its symlinks resolved, that the file must lie in; None: anywhere.

    Raises:
        SampleError: ``missing_file`` where nothing exists at the path; ``outside_root`` where it leads out of ``root``;
            otherwise ``kind``.
    """

    def __init__(self, path: str | Path, kind: str, root: Path | None = None) -> None:
        self._fd = -1
        self.path = Path(path)
        try:
            self._open(kind, root)
        except BaseException:
            self.close()  # an exception keeps its frames, and what they refer to, for a while
            raise

    def reader(self) -> BinaryIO:
        """Return a new reader of the open file, at its beginning."""
        file = os.fdopen(os.dup(self._fd), "rb")
        file.seek(0)
        return file

    def close(self) -> None:
        """Close the file. A second call has no effect."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _open(self, kind: str, root: Path | None) -> None:
        """Open the file and check what was opened."""
        try:
            self._fd = os.open(self.path, _FLAGS)
            found = os.fstat(self._fd)
        except OSError as error:
            if error.errno in _MISSING:
                raise SampleError("missing_file", "no such file", self.path) from error
            raise SampleError(kind, f"cannot be opened: {error.strerror}", self.path) from error
        except ValueError as error:  # a null byte in the name
            raise SampleError("missing_file", f"no such file: {error}", self.path) from error
        if not stat.S_ISREG(found.st_mode):
            raise SampleError(kind, "not a regular file", self.path)
        linked = f"{_OPEN_FILES}/{self._fd}"
        self.is_lasting = os.path.exists(linked)
        self.name = linked if self.is_lasting else str(self.path.absolute())
        if root is not None:
            self._check_root(found, root, os.readlink(linked) if self.is_lasting else None)
        if found.st_size == 0:
            raise SampleError(kind, "the file is empty", self.path)

    def _check_root(self, found: os.stat_result, root: Path, opened: str | None) -> None:
        """Raise ``outside_root`` unless the open file lies in ``root``.

        Args:
            found: the open file.
            root: the folder.
            opened: the path of the open file as the system tells it. None: unknown; then the file that the path leads
                to now must lie in ``root`` and be the one that was opened.
        """
        real = Path(os.path.realpath(self.path) if opened is None else opened)
        if not real.is_relative_to(root):
            message = f"leads to {real}, outside data.root ({root})"
            raise SampleError("outside_root", message, self.path)
        if opened is None and not _is_file(real, found):
            raise SampleError("outside_root", "was replaced while it was opened", self.path)


def _is_file(path: Path, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(found, path.stat())
    except OSError:
        return False


def media_file(source: str | Path | MediaFile, kind: str) -> MediaFile:
    """Return an opened file as it is, or open the file of a path."""
    return source if isinstance(source, MediaFile) else MediaFile(source, kind)
