"""One process at a time writes into a run's folder; a second one is told who does, and a killed one leaves it free."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
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
held = FolderLock(Path(sys.argv[1]), "videor1.train")
held.acquire()
print("held", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path: Path):
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


def test_a_second_process_is_told_who_holds_it(holder: subprocess.Popen, tmp_path: Path) -> None:
    expected = rf"is in use by process {holder.pid} on {socket.gethostname()} \(videor1.train, since 20"
    with pytest.raises(ConfigError, match=expected):
        take(tmp_path)
    with pytest.raises(ConfigError, match=expected):  # also by another name of the folder
        take(tmp_path / ".." / tmp_path.name)
    assert holder.poll() is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holders_lock_is_free_at_once(
    number: signal.Signals, holder: subprocess.Popen, tmp_path: Path
) -> None:
    holder.send_signal(number)
    holder.wait(PATIENCE)
    assert (tmp_path / LOCK).exists()
    began = time.monotonic()
    take(tmp_path)
    assert time.monotonic() - began < 5
    assert not (tmp_path / LOCK).exists()


def test_a_stopped_holder_still_holds_it(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match=f"process {holder.pid}"):
        take(tmp_path)
    holder.send_signal(signal.SIGCONT)


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


def test_a_forked_child_does_not_share_it(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "videor1.train"):
        code = f"from videor1.logs.lock import *; FolderLock(Path({str(tmp_path)!r}), 'x').acquire()"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"is in use by process {os.getpid()} on" in ended.stderr


def write(folder: Path, **values: Any) -> Path:
    """The file that a holder has left."""
    record = {"pid": 4, "host": "elsewhere", "created": 1.0, "command": "videor1.train", "since": "2026"} | values
    (folder / LOCK).write_text(json.dumps(record))
    return folder / LOCK


def test_a_dead_holder_on_another_machine(tmp_path: Path) -> None:
    file = write(tmp_path)
    os.utime(file, (time.time() - 3600,) * 2)
    began = time.monotonic()
    take(tmp_path)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("skew", [0.0, 3600.0, -5.0])
def test_a_living_holder_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    """Its clock may be wrong: what counts is that the time of its file changes."""
    monkeypatch.setattr(lock, "DEAD_SECONDS", 10.0)
    file, ended = write(tmp_path), threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
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


def test_a_holder_on_another_machine_that_has_just_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1.0)
    write(tmp_path)
    began = time.monotonic()
    take(tmp_path)
    assert 0.5 < time.monotonic() - began < 10


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with FolderLock(tmp_path, "videor1.train"):
        file = tmp_path / LOCK
        os.utime(file, (1.0, 1.0))
        deadline = time.monotonic() + PATIENCE
        while file.stat().st_mtime == 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"host": 3}', '{"pid": "x", "host": null}', "\0" * 100])
def test_whatever_the_file_says_it_is_no_crash(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.5)
    (tmp_path / LOCK).write_text(text)
    take(tmp_path)


class TestWithoutFlock:
    """On a file system without such locks the file alone says who holds it."""

    @pytest.fixture(autouse=True)
    def _no_flock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lock, "_flock", lambda _: None)

    def test_a_living_process(self, holder: subprocess.Popen, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"process {holder.pid}"):
            take(tmp_path)

    def test_a_dead_process(self, holder: subprocess.Popen, tmp_path: Path) -> None:
        holder.kill()
        holder.wait()
        take(tmp_path)

    def test_another_process_with_the_number_of_the_dead_one(self, tmp_path: Path) -> None:
        write(tmp_path, pid=os.getpid(), host=socket.gethostname(), created=1.0)
        take(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / LOCK).symlink_to(other)
    with pytest.raises(ConfigError, match="cannot be written to"):
        take(tmp_path)
    assert other.read_text() == "mine"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock.os, "open", denied)
    with pytest.raises(ConfigError, match=r"cannot be written to: .*Permission denied"):
        take(tmp_path)
