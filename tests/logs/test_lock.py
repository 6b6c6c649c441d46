"""One process at a time writes into a run's folder; a second one is told who does, and a killed one leaves it free."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

from videor1.errors import ConfigError
from videor1.logs import lock
from videor1.logs.lock import LOCK, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from videor1.logs.lock import FolderLock
with FolderLock(Path(sys.argv[1]), "videor1.train"):
    print("held", flush=True)
    time.sleep(1000)
"""
HERE = socket.gethostname()
DeadAfter = Callable[[float], None]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def take(folder: Path) -> None:
    with FolderLock(folder, "videor1.sft"):
        pass


@pytest.fixture
def dead_after(monkeypatch: pytest.MonkeyPatch) -> DeadAfter:
    """How long another machine may give no sign of life."""
    return functools.partial(monkeypatch.setattr, lock, "DEAD_SECONDS")


@contextlib.contextmanager
def without_flock() -> Iterator[None]:
    """As on a file system without such locks, where the file alone says who holds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "_flock", lambda _: None)
        yield


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_process_is_told_who_holds_it_until_the_holder_is_killed(
    number: signal.Signals, holder: subprocess.Popen[str], tmp_path: Path, dead_after: DeadAfter
) -> None:
    expected = rf"is in use by process {holder.pid} on {HERE} \(videor1.train, since 20"
    for name in (tmp_path, tmp_path / ".." / tmp_path.name):
        with pytest.raises(ConfigError, match=expected):
            take(name)
    with without_flock(), pytest.raises(ConfigError, match=expected):
        take(tmp_path)
    holder.send_signal(signal.SIGSTOP)  # it still holds it
    with pytest.raises(ConfigError, match=expected):
        take(tmp_path)
    holder.send_signal(signal.SIGCONT)
    assert holder.poll() is None
    holder.send_signal(number)
    holder.wait(PATIENCE)
    assert (tmp_path / LOCK).exists()
    dead_after(120.0)
    began = time.monotonic()
    with without_flock() if number == signal.SIGKILL else contextlib.nullcontext():
        take(tmp_path)
    assert time.monotonic() - began < 100  # it is free at once
    assert not (tmp_path / LOCK).exists()


def test_removing_the_file_while_it_is_held_locks_out_nobody_for_ever(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "videor1.train"):
        (tmp_path / LOCK).unlink()
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_objects_of_one_process_share_it(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, "videor1.train"), FolderLock(tmp_path, "videor1.train")
    first.acquire()
    first.acquire()
    second.acquire()
    first.release()
    first.release()
    assert (tmp_path / LOCK).exists()
    second.release()
    assert not (tmp_path / LOCK).exists()
    first.acquire()
    del first
    assert not (tmp_path / LOCK).exists()


def test_another_process_does_not_share_it(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "videor1.train"):
        ended = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True, check=False)
        assert f"is in use by process {os.getpid()} on" in ended.stderr


def write(folder: Path, **values: Any) -> Path:
    """The file that a holder has left."""
    record = {"pid": 4, "host": "elsewhere", "created": 1.0, "command": "videor1.train", "since": "2026"} | values
    (folder / LOCK).write_text(json.dumps(record))
    return folder / LOCK


def test_another_process_with_the_number_of_the_dead_one(tmp_path: Path) -> None:
    write(tmp_path, pid=os.getpid(), host=HERE)
    with without_flock():
        take(tmp_path)


def test_dead_holders_on_another_machine(tmp_path: Path, dead_after: DeadAfter) -> None:
    # An hour ago; now.
    for ended, dead_seconds, least, most in ((-3600, 120.0, 0.0, 100.0), (3600, 0.7, 0.6, PATIENCE)):
        dead_after(dead_seconds)
        os.utime(write(tmp_path), (time.time() + ended,) * 2)
        began = time.monotonic()
        take(tmp_path)
        assert least <= time.monotonic() - began < most


@pytest.mark.parametrize("skew", [0.0, 3600.0, -5.0])
def test_a_living_holder_on_another_machine(tmp_path: Path, dead_after: DeadAfter, skew: float) -> None:
    """Its clock may be wrong: what counts is that the time of its file changes."""
    dead_after(PATIENCE)
    file, ended = write(tmp_path), threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(file, (time.time() + skew,) * 2)

    beats = threading.Thread(target=beat)
    os.utime(file, (time.time() + skew,) * 2)
    beats.start()
    try:
        with pytest.raises(ConfigError, match="in use by process 4 on elsewhere"):
            take(tmp_path)
    finally:
        ended.set()
        beats.join()


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with FolderLock(tmp_path, "videor1.train"):
        os.utime(tmp_path / LOCK, (1.0, 1.0))
        deadline = time.monotonic() + PATIENCE
        while (tmp_path / LOCK).stat().st_mtime == 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"host": 3}', '{"pid": "x", "host": null}', "\0" * 100])
def test_whatever_the_file_says_it_is_no_crash(text: str, tmp_path: Path, dead_after: DeadAfter) -> None:
    dead_after(0.1)
    (tmp_path / LOCK).write_text(text)
    take(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / LOCK).symlink_to(other)  # it is not followed
    with pytest.raises(ConfigError, match="cannot be written to"):
        take(tmp_path)
    assert other.read_text() == "mine"

    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock.os, "open", denied)
    with pytest.raises(ConfigError, match=r"cannot be written to: .*Permission denied"):
        take(tmp_path)
