"""The lock of a run's folder: one process at a time writes into it.

The lock is flock's on the file ``.lock`` in the folder, so that it ends with the process that holds it, however that
ends. The file says who holds it. Some shared file systems keep flock's locks to one machine, or have none: the holder
also changes the time of its file every few seconds, and a process on another machine waits for that sign of life.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from videor1.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no fcntl: there the file's contents alone say whether a process holds the lock.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
BEAT_SECONDS = 5.0  # between two signs of life
DEAD_SECONDS = 3 * BEAT_SECONDS  # without a sign of life, after which a holder on another machine counts as ended

_guard = threading.Lock()
_held: dict[str, _File] = {}  # by the resolved folder: what this process holds


class FolderLock:
    """A lock of a run's folder, which all objects of one process share.

    Args:
        folder: the run's folder, which is made where it does not exist.
        command: the name of the command, for the message to others.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self._folder, self._command = folder, command
        self._key: str | None = None  # while it is held

    def acquire(self) -> None:
        """Take the lock, unless this object holds it.

        Raises:
            ConfigError: another process holds it, or the folder cannot be made or written to.
        """
        if self._key is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir: {self._folder} cannot be made: {error}") from error
        key = os.path.realpath(self._folder)
        with _guard:
            held = _held.get(key)
            if held is None or held.pid != os.getpid():  # A forked process has a copy of its parent's locks.
                held = _held[key] = _File(_open(self._folder, self._command), self._folder / LOCK)
            held.users += 1
        self._key = key

    def release(self) -> None:
        """Give the lock back; it is free once every object of this process has done so."""
        if self._key is None:
            return
        with _guard:
            held = _held[self._key]
            held.users -= 1
            if not held.users:
                del _held[self._key]
                held.close()
        self._key = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        with suppress(Exception):
            self.release()


class _File:
    """The open lock file of this process, with its signs of life."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.users, self.pid = 0, os.getpid()
        self._descriptor, self._path = descriptor, path
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="videor1-lock", daemon=True)
        self._beats.start()

    def close(self) -> None:
        """Remove the file and end the lock."""
        self._ended.set()
        self._beats.join()
        if self.pid == os.getpid():
            with suppress(OSError):
                if _is_same(self._descriptor, self._path):
                    self._path.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._descriptor)


def _open(folder: Path, command: str) -> int:
    """Open and lock the lock file of a folder, and write into it who holds it."""
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise ConfigError(f"output_dir: {folder} cannot be written to: {error}") from error
        try:
            exclusive = _flock(descriptor)
            if exclusive is False:
                raise ConfigError(_message(folder, _holder(descriptor, patience=1.0)))
            if not _is_same(descriptor, path):  # The last holder has removed the file in between.
                os.close(descriptor)
                continue
            holder = _holder(descriptor)
            if holder and _is_alive(holder, descriptor, folder, certain=exclusive is True):
                raise ConfigError(_message(folder, holder))
            me = psutil.Process()
            record = {"pid": me.pid, "host": socket.gethostname(), "created": me.create_time()}
            record |= {"command": command, "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, (json.dumps(record) + "\n").encode(), 0)
            except OSError:  # The disk is full: the lock holds all the same, unless the file alone says so.
                if not exclusive:
                    raise
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(f"output_dir: {folder} cannot be written to: {error}") from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _flock(descriptor: int) -> bool | None:
    """Return whether flock has given this process the lock; None where the file system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int, patience: float = 0.0) -> dict[str, Any]:
    """Return what the lock file says about its holder; {} if it says nothing.

    Args:
        descriptor: the open file.
        patience: seconds to wait for a holder that has just taken the lock to write its name.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            found = json.loads(os.pread(descriptor, 4096, 0))
        except ValueError:
            found = None
        if isinstance(found, dict) or time.monotonic() >= deadline:
            return found if isinstance(found, dict) else {}
        time.sleep(0.05)


def _is_alive(holder: dict[str, Any], descriptor: int, folder: Path, *, certain: bool) -> bool:
    """Return whether the process that a lock file names still runs.

    Args:
        holder: what the file says.
        descriptor: the open file.
        folder: the run's folder.
        certain: whether flock has given the lock to this process, so that no process of this machine can hold it.
    """
    if holder.get("host") == socket.gethostname():
        if certain:
            return False
        with suppress(psutil.Error, TypeError, ValueError):
            process = psutil.Process(int(holder["pid"]))
            return abs(process.create_time() - float(holder["created"])) < 2.0
        return False
    last = os.fstat(descriptor).st_mtime
    deadline = time.monotonic() + DEAD_SECONDS - min(max(0.0, _now(folder) - last), DEAD_SECONDS)
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if os.fstat(descriptor).st_mtime != last:
            return True
    return False


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, which may be another machine's."""
    probe = folder / f"{LOCK}.{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _message(folder: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if holder:
        what = f"{holder.get('command')}, since {holder.get('since')}"
        who = f"process {holder.get('pid')} on {holder.get('host')} ({what})"
    return (
        f"output_dir: {folder} is in use by {who}: two runs would delete each other's files; wait for it, stop it, or "
        "name another folder"
    )
