"""A file is written whole or not at all, and nothing is left beside it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from videor1.atomic import write_all, write_atomic


@pytest.mark.grid(content=["é\n", "é\n".encode()], sync=[False, True])
def test_a_new_file_takes_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, sync: bool
) -> None:
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), real(file)))
    path = tmp_path / "a.json"
    write_atomic(path, content, sync=sync)
    assert path.read_bytes() == b"\xc3\xa9\n"
    reader = open(path, "rb")  # noqa: SIM115
    write_atomic(str(path), b"", sync=sync)
    assert reader.read() == b"\xc3\xa9\n"  # of the old file, whole
    reader.close()
    assert path.read_bytes() == b""
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert synced == ([3, 0] if sync else [])


def test_its_permissions_are_a_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomic(tmp_path / "a", "text")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.grid(
    error=[OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], at=["fsync", "replace"]
)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, at, fail)
    with pytest.raises(type(error)):
        write_atomic(path, "new", sync=True)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "a", "\ud800")
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "a", "text")
    assert not list(tmp_path.iterdir())


def test_a_write_that_takes_a_part_is_gone_on_with() -> None:
    taken: list[bytes] = []

    def write(data: memoryview) -> int:
        taken.append(bytes(data[:3]))
        return len(taken[-1])

    write_all(SimpleNamespace(write=write), b"abcdefgh")
    write_all(SimpleNamespace(write=write), b"")
    assert taken == [b"abc", b"def", b"gh"]
