"""What is kept and for which version of a file; a budget, damage, full disks, and several processes in one folder."""

import errno
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from safetensors import safe_open
from safetensors.torch import load, save

from videor1.config import VideoConfig
from videor1.data import cache
from videor1.data.cache import ABSENT, CacheRead, DiskCache, MemoryCache, disk_cache
from videor1.data.workers import WorkerPool
from videor1.errors import ConfigError
from videor1.types import Media
from videor1.video.version import FORMAT, Key, file_key

MIB = 2**20
GRID = (2, 4, 6)
SIZE = 57_000  # bytes of one entry, a little above: 48 * 1176 and a header


def media(seed: int = 0, grid: tuple[int, int, int] = GRID, second_per_grid: float = 1 / 3) -> Media:
    T, h, w = grid
    patches = torch.randint(0, 256, (T * h * w, 1176), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Media("video", patches, grid, second_per_grid, 0.5)


def key(number: int = 0, version: int = 0) -> Key:
    return Key(("video", f"/data/{number}.mp4"), (100, version, 7))


def assert_holds(disk: DiskCache, key: Key, expected: Media) -> None:
    found: Any = disk.read(key).media
    assert torch.equal(found.patches, expected.patches)
    for field in ("kind", "grid_thw", "second_per_grid"):
        assert getattr(found, field) == getattr(expected, field)


def held(disk: DiskCache, count: int = 12) -> list[int]:
    return [number for number in range(count) if disk.read(key(number)).media is not None]


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def total(folder: Path) -> int:
    return sum(map(cache._size, entries(folder)))


def temporaries(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.tmp"))


def fill(folder: Path, entries: float, count: int) -> DiskCache:
    """A cache with room for so many entries, in which so many were written, one a second in 1970."""
    disk = DiskCache(folder, int(entries * SIZE), "")
    for number in range(count):
        assert disk.write(key(number), media(number)) is None
        os.utime(disk._path(key(number)), ns=(number, 10**9 * number))
    return disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def disk(folder: Path) -> DiskCache:
    return DiskCache(folder, MIB, "settings")


def test_a_files_key_is_its_path_and_its_version(tmp_path: Path) -> None:
    path, link, other = tmp_path / "a.mp4", tmp_path / "link.mp4", tmp_path / "b.mp4"

    def written(file: Path, content: bytes, time: int) -> Key:
        file.write_bytes(content)
        os.utime(file, ns=(1, time))
        return file_key("video", file)

    first, status = written(path, b"one", 1_000_000_001), path.stat()
    link.symlink_to(path)
    assert first == file_key("video", link)
    assert first == (("video", str(path.resolve())), (3, 1_000_000_001, status.st_ino), FORMAT)
    assert first.name != file_key("image", path).name
    touched, longer = written(path, b"one", 1_000_000_002), written(path, b"three", 1_000_000_001)
    written(other, b"one", 1_000_000_001)
    other.replace(path)
    replaced = file_key("video", path)
    assert len({first, touched, longer, replaced}) == 4
    assert {k.name for k in (touched, longer, replaced)} == {first.name}
    path.unlink()
    assert file_key("video", path) == Key(first.name, None)
    assert file_key("video", "a\0b").version is None


def test_memory_hands_out_one_version_only() -> None:
    memory = MemoryCache(1000)
    new = torch.zeros(10)
    assert memory.get(key()) is ABSENT
    memory.put(key(), new)
    assert memory.get(key()) is new
    assert memory.get(key(version=1)) is ABSENT
    assert [memory.holds_other(k) for k in (key(version=1), key(), key(5))] == [True, False, False]
    memory.put(key(version=1), new)
    assert memory.get(key()) is ABSENT
    assert memory.used == 40
    memory.put(key(version=2), media(1, (1, 2, 2)))  # 4,704 bytes: not kept, but what it replaces is outdated
    assert memory.get(key(version=1)) is ABSENT
    assert memory.used == 0
    memory.drop("unknown")


def test_memory_is_bounded_by_the_bytes_of_the_tensors() -> None:
    memory = MemoryCache(100)
    for number in range(3):
        memory.put(key(number), (torch.zeros(10), [torch.zeros(2)]))  # 48 bytes
    assert memory.used == 96
    assert memory.get(key(0)) is ABSENT
    memory.get(key(1))
    memory.put(key(3), torch.zeros(10))
    assert memory.get(key(2)) is ABSENT
    memory.put(key(4), torch.zeros(26))  # too large to keep: it must not push the others out
    assert [memory.get(key(number)) is ABSENT for number in (1, 3, 4)] == [False, False, True]
    nothing = MemoryCache(0)
    nothing.put(key(), 5)
    assert nothing.get(key()) is ABSENT


def test_what_was_written_is_read_back(disk: DiskCache, folder: Path) -> None:
    assert disk.read(key()) == CacheRead()
    assert not folder.exists()  # made when there is something to keep
    expected = media(second_per_grid=0.1 + 0.2)
    assert disk.write(key(), expected) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found: Any = disk.read(key()).media
        found.patches[0, 0] = 0  # writable
    assert 0 < found.seconds < PATIENCE
    image = Media("image", media(1, (1, 2, 2)).patches, (1, 2, 2), 0.0, 0.1)
    strange = Key(("video", os.fsdecode(b"/data/\xff\xfe'\"\n.mp4")), (1, 2, 3))
    assert disk.write(key(1), image) is None
    assert disk.write(strange, media(2)) is None
    # Another copy of the same folder and settings, as another process would make it.
    for same in (disk, DiskCache(folder, MIB, "settings")):
        assert_holds(same, key(), expected)
        assert_holds(same, key(1), image)
        assert_holds(same, strange, media(2))


def test_the_files_are_plain_safetensors(disk: DiskCache, folder: Path) -> None:
    disk.write(key(), media())
    (path,) = entries(folder)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["videor1"])
        assert torch.equal(file.get_tensor("patches"), media().patches)
    expected = {"name": ["video", "/data/0.mp4"], "version": [100, 0, 7], "kind": "video", "second_per_grid": 1 / 3}
    assert about | expected | {"grid_thw": list(GRID)} == about


def test_another_version_is_outdated_and_goes(disk: DiskCache, folder: Path) -> None:
    disk.write(key(), media(0))
    assert disk.read(key(version=1)) == CacheRead(changed=True)
    assert not entries(folder)
    disk.write(key(version=1), media(1))
    disk.write(key(version=2), media(2))
    assert len(entries(folder)) == 1
    assert_holds(disk, key(version=2), media(2))


def test_other_settings_kinds_and_formats_find_nothing(folder: Path) -> None:
    def cache_of(**video: Any) -> Any:
        return disk_cache(str(folder), 1, VideoConfig(**video))

    base = cache_of()
    assert disk_cache(None, 1, VideoConfig()) is None
    base.write(key(), media())
    others: dict[str, Any] = {"max_frames": 8, "fps": 1.0, "backend": "pyav"}
    others |= dict.fromkeys(("max_pixels", "min_pixels", "image_max_pixels", "image_min_pixels"), 784)
    for name, value in others.items():
        assert cache_of(**{name: value}).read(key()) == CacheRead(), name
    assert base.read(Key(("image", "/data/0.mp4"), (100, 0, 7))) == CacheRead()
    assert FORMAT > 1, "patches of the first format may be mirrored, out of order or of another stream"
    base.write(key()._replace(format=1), media(3))
    later = key()._replace(format=FORMAT + 1)
    assert base.read(later) == CacheRead()
    base.write(later, media(1))
    assert_holds(base, later, media(1))
    assert_holds(cache_of(), key(), media())


def flip(place: int) -> Callable[[bytes], bytes]:
    """A bit of a byte, counted from the end, is wrong."""
    return lambda data: data[:-place] + bytes([data[-place] ^ 0x10]) + data[len(data) - place + 1 :]


def saying(dtype: torch.dtype = torch.uint8, **changes: Any) -> Callable[[bytes], bytes]:
    """A whole file that says something else of its patches; each value alone could be right."""

    def written(data: bytes) -> bytes:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["videor1"])
        return save({"patches": load(data)["patches"].view(dtype)}, {"videor1": json.dumps(about | changes)})

    return written


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "header cut": lambda data: data[:100],
    "one byte short": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "one byte long": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "first block zero": lambda data: bytes(4096) + data[4096:],
    "a bit of the last patch": flip(1),
    "a bit of the first patch": flip(48 * 1176),
    "a bit of the header": lambda data: flip(len(data) - 12)(data),
    "text": lambda data: b"not a file of tensors" * 100,
    "foreign": lambda data: save(load(data), {}),
    "other media": saying(name=["video", "/data/9.mp4"]),
    "grid": saying(grid_thw=[1, 4, 6]),
    "grid of other areas": saying(grid_thw=[4, 4, 3]),
    "grid turned": saying(grid_thw=[4, 4, 1]),
    "dtype": saying(torch.int8),
    "kind": saying(kind="sound"),
    "other kind": saying(kind="image"),
    "seconds": saying(second_per_grid=float("nan")),
    "other seconds": saying(second_per_grid=0.75),
    "no seconds": saying(second_per_grid=0),
    "version": saying(version=[0]),
    "more": saying(more=1),
    "checksum": saying(crc32=0),
    "no checksum": saying(crc32=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_goes(damage: str, disk: DiskCache, folder: Path) -> None:
    disk.write(key(), media())
    (path,) = entries(folder)
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    assert path.read_bytes() != whole
    found = disk.read(key())
    failure: Any = found.failure
    assert found == CacheRead(failure=failure)
    assert failure.kind == "damaged"
    assert str(path) in failure.message
    assert not path.exists()
    assert disk.read(key()) == CacheRead()
    assert disk.write(key(), media()) is None
    assert_holds(disk, key(), media())


def test_the_budget_holds_and_the_least_recently_used_go(folder: Path) -> None:
    disk = fill(folder, 4.5, 4)
    assert len(entries(folder)) == 4
    assert disk.read(key(0)).media is not None  # used now, so 1 and 2 are the oldest
    disk.write(key(4), media(4))
    assert held(disk) == [0, 2, 3, 4]  # read in turn: 0 is the oldest now
    for number in range(5, 12):
        assert disk.write(key(number), media(number)) is None
        assert total(folder) <= 4.5 * SIZE
        assert disk.read(key(number)).media is not None
    assert not temporaries(folder)


def test_a_replacement_pushes_out_others_only_where_it_is_larger_and_is_counted_once(folder: Path) -> None:
    disk = fill(folder, 3.5, 3)
    for version in range(2, 12):
        for number in range(3):
            disk.write(key(number, version), media(version))
    for number in range(3):
        assert_holds(disk, key(number, 11), media(11))
    disk = fill(folder, 3.5, 3)
    disk.write(key(0, version=1), media(1, (4, 4, 6)))  # the oldest itself, twice as large
    assert int((folder / ".usage").read_text()) == total(folder)
    assert disk.read(key(0, version=1)).media is not None
    assert held(disk, 3)[-1:] == [2]
    assert total(folder) <= 3.5 * SIZE


def test_larger_than_the_budget_is_not_kept(folder: Path) -> None:
    disk = fill(folder, 1, 1)
    assert disk.write(key(1), media(1, (4, 4, 6))) is None
    assert held(disk) == [0]


def test_a_smaller_budget_and_files_of_an_unknown_number_are_counted(folder: Path) -> None:
    fill(folder, 100, 8)
    (folder / ".usage").write_text("what?")
    DiskCache(folder, 3 * SIZE, "").write(key(9), media())
    assert len(entries(folder)) <= 3
    entries(folder)[0].unlink()  # by someone else
    small = DiskCache(folder, 3 * SIZE, "")
    for number in range(3):
        small.write(key(number), media())
    assert held(small, 3) == [0, 1, 2]


def test_files_of_others_are_left_alone(folder: Path) -> None:
    folder.mkdir()
    names = ["model.safetensors", "notes.txt", f"{'0' * 64}.txt", ".hidden.tmp", "0123.safetensors"]
    for name in names:
        (folder / name).write_bytes(bytes(3 * SIZE))
        os.utime(folder / name, (1, 1))
    disk = fill(folder, 1.5, 4)
    disk.clean()
    assert held(disk) == [3]
    assert all((folder / name).stat().st_size == 3 * SIZE for name in names)


def test_half_written_files_of_killed_processes_go(disk: DiskCache, folder: Path) -> None:
    disk.clean()  # no folder yet
    disk.write(key(), media())
    stem = entries(folder)[0].stem
    ours, young, old = (folder / f".{stem}.{owner}.1.tmp" for owner in (disk._owner, "a" * 12, "b" * 12))
    for path in (ours, young, old):
        path.write_bytes(b"half")
    os.utime(old, (1, time.time() - 4000))
    disk.clean()
    assert temporaries(folder) == [young]  # another process is at work on it
    os.utime(young, (1, time.time() - 4000))
    (folder / ".usage").unlink()
    disk.write(key(1), media())
    assert not temporaries(folder)


@pytest.mark.grid(
    place=["_write_file", "os.replace", "os.open"], code=[errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES]
)
def test_a_write_that_fails_leaves_nothing_and_raises_nothing(
    place: str, code: int, disk: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.write(key(0), media())
    real = cache._write_file

    def fail(*args: Any, **_: object) -> None:
        if place == "_write_file":
            real(args[0], args[1][:1000])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(cache if place == "_write_file" else os, place.removeprefix("os."), fail)
        failure = disk.write(key(1), media())
    assert failure == cache.CacheFailure("write", f"{folder}: {os.strerror(code)}", code)
    assert not temporaries(folder)
    assert held(disk) == [0]
    assert disk.write(key(1), media()) is None
    assert held(disk) == [0, 1]


def test_a_read_that_fails_is_told(disk: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write(key(), media())

    def fail(_: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        found = disk.read(key())
    assert found == CacheRead(failure=cache.CacheFailure("read", f"{folder}: Input/output error", errno.EIO))
    assert len(entries(folder)) == 1  # not damaged, as far as one knows


def test_a_folder_that_may_only_be_read_serves(disk: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write(key(), media())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("utime", "open", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert_holds(disk, key(), media())
    assert disk.read(key()).failure is None


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    disk = DiskCache(tmp_path / "file" / "cache", MIB, "")
    failures: list[Any] = [disk.write(key(), media()), disk.read(key()).failure]
    assert [(failure.kind, failure.code) for failure in failures] == [("write", errno.ENOTDIR), ("read", errno.ENOTDIR)]
    disk.clean()
    with pytest.raises(ConfigError, match=r"data\.cache_dir: expected a folder, got .*file, which is a file"):
        DiskCache(tmp_path / "file", MIB, "")


def test_a_lock_that_is_never_given_back(disk: DiskCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write(key(0), media())
    monkeypatch.setattr(DiskCache, "lock_seconds", 0.2)
    with disk._locked_usage():
        failure: Any = DiskCache(folder, MIB, "settings").write(key(1), media())
        assert failure.kind == "write"
        assert "another process held the lock for 0.2 s" in failure.message
        assert_holds(disk, key(0), media())  # reading needs no lock
    assert disk.write(key(1), media()) is None


def keep_busy(folder_and_seed: tuple[Path, int]) -> None:
    """Write and read a few keys over and over, some in two versions; runs in a process of its own."""
    disk = DiskCache(folder_and_seed[0], int(5.5 * SIZE), "")
    disk.lock_seconds = 60.0  # a busy machine may leave the holder of the lock without a turn for long
    generator = torch.Generator().manual_seed(folder_and_seed[1])
    for _ in range(100):
        number, version = torch.randint(0, 8, (2,), generator=generator).tolist()
        this, made = key(number, version // 4), media(10 * number + version // 4)
        found = disk.read(this)
        assert found.failure is None, found.failure
        if found.media is None:
            failure = disk.write(this, made)
            assert failure is None, failure
        else:
            assert torch.equal(found.media.patches, made.patches)


def test_processes_share_a_folder(folder: Path) -> None:
    folder.mkdir()
    disk, pool, most = DiskCache(folder, MIB, ""), WorkerPool(3, PATIENCE), 0
    disk.lock_seconds = 60.0
    try:
        tasks = [pool.submit(keep_busy, (folder, seed)) for seed in range(3)]
        while not all(task.future is not None and task.future.done() for task in tasks):
            with disk._locked_usage():  # nobody adds a file meanwhile
                most = max(most, total(folder))
            time.sleep(0.01)
        assert [pool.result(task).error for task in tasks] == [None] * 3
    finally:
        pool.stop()
    assert not temporaries(folder)
    assert 2 * SIZE < most <= 5.5 * SIZE
