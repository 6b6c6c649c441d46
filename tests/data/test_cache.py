"""What is kept and for which version of a file; a budget, damage, full disks, and several processes in one folder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from safetensors import safe_open
from safetensors.torch import save_file

from videor1.config import CommonConfig, DataConfig, VideoConfig
from videor1.data import cache
from videor1.data.cache import ABSENT, CacheRead, DiskCache, MemoryCache, disk_cache
from videor1.errors import ConfigError
from videor1.types import Media
from videor1.video.version import FORMAT, Key, file_key

MIB = 2**20
GRID = (2, 4, 6)


def media(seed: int = 0, grid: tuple[int, int, int] = GRID, second_per_grid: float = 1 / 3) -> Media:
    generator = torch.Generator().manual_seed(seed)
    T, h, w = grid
    patches = torch.randint(0, 256, (T * h * w, 1176), dtype=torch.uint8, generator=generator)
    return Media("video", patches, grid, second_per_grid, 0.5)


def key(number: int = 0, version: int = 0) -> Key:
    return Key(("video", f"/data/{number}.mp4"), (100, version, 7))


def assert_same(found: Media | None, expected: Media) -> None:
    assert found is not None
    assert torch.equal(found.patches, expected.patches)
    assert (found.kind, found.grid_thw, found.second_per_grid) == (
        expected.kind,
        expected.grid_thw,
        expected.second_per_grid,
    )


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def temporaries(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.tmp"))


SIZE = 57_000  # bytes of one entry, a little above: 48 * 1176 and a header


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", MIB, "settings")


def test_a_files_key_is_its_path_and_its_version(tmp_path: Path) -> None:
    path, link = tmp_path / "a.mp4", tmp_path / "link.mp4"
    path.write_bytes(b"one")
    link.symlink_to(path)
    os.utime(path, ns=(1, 1_000_000_001))
    first, status = file_key("video", path), path.stat()
    assert first == file_key("video", link)
    assert first == (("video", str(path.resolve())), (3, 1_000_000_001, status.st_ino), FORMAT)
    assert first.name != file_key("image", path).name
    os.utime(path, ns=(1, 1_000_000_002))
    touched = file_key("video", path)
    path.write_bytes(b"three")
    os.utime(path, ns=(1, 1_000_000_001))
    longer = file_key("video", path)
    other = tmp_path / "b.mp4"
    other.write_bytes(b"one")
    os.utime(other, ns=(1, 1_000_000_001))
    other.replace(path)
    replaced = file_key("video", path)
    assert len({first, touched, longer, replaced}) == 4
    assert {k.name for k in (touched, longer, replaced)} == {first.name}
    path.unlink()
    assert file_key("video", path) == Key(first.name, None)
    assert file_key("video", "a\0b").version is None


def test_memory_hands_out_one_version_only() -> None:
    memory = MemoryCache(1000)
    old, new = media(1, (1, 2, 2)), torch.zeros(10)
    assert memory.get(key()) is ABSENT
    memory.put(key(), new)
    assert memory.get(key()) is new
    assert memory.get(key(version=1)) is ABSENT
    assert memory.holds_other(key(version=1))
    assert not memory.holds_other(key())
    assert not memory.holds_other(key(5))
    memory.put(key(version=1), new)
    assert memory.get(key()) is ABSENT
    assert memory.used == 40
    memory.put(key(version=2), old)  # 4,704 bytes: not kept, but what it replaces is outdated
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
    assert memory.get(key(1)) is not ABSENT
    nothing = MemoryCache(0)
    nothing.put(key(), 5)
    assert nothing.get(key()) is ABSENT


def test_what_was_written_is_read_back(disk: DiskCache, tmp_path: Path) -> None:
    assert disk.read(key()) == CacheRead()
    assert not (tmp_path / "cache").exists()  # made when there is something to keep
    expected = media(second_per_grid=0.1 + 0.2)
    assert disk.write(key(), expected) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = disk.read(key())
        assert found.media is not None
        found.media.patches[0, 0] = 0  # writable
    assert_same(disk.read(key()).media, expected)
    assert 0 < found.media.seconds < PATIENCE
    image = Media("image", media(1, (1, 2, 2)).patches, (1, 2, 2), 0.0, 0.1)
    assert disk.write(key(1), image) is None
    assert_same(disk.read(key(1)).media, image)
    # Another copy of the same folder and settings, as another process would make it.
    assert_same(DiskCache(tmp_path / "cache", MIB, "settings").read(key()).media, expected)


def test_the_files_are_plain_safetensors(disk: DiskCache, tmp_path: Path) -> None:
    expected = media()
    disk.write(key(), expected)
    (path,) = entries(tmp_path / "cache")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["videor1"])
        assert torch.equal(file.get_tensor("patches"), expected.patches)
    assert about["name"] == ["video", "/data/0.mp4"]
    assert about["version"] == [100, 0, 7]
    assert (about["grid_thw"], about["second_per_grid"], about["kind"]) == (list(GRID), 1 / 3, "video")


def test_a_name_of_any_bytes(disk: DiskCache) -> None:
    strange = Key(("video", os.fsdecode(b"/data/\xff\xfe'\"\n.mp4")), (1, 2, 3))
    disk.write(strange, media())
    assert_same(disk.read(strange).media, media())


def test_another_version_is_outdated_and_goes(disk: DiskCache, tmp_path: Path) -> None:
    disk.write(key(), media(0))
    assert disk.read(key(version=1)) == CacheRead(changed=True)
    assert not entries(tmp_path / "cache")
    disk.write(key(version=1), media(1))
    disk.write(key(version=2), media(2))
    assert len(entries(tmp_path / "cache")) == 1
    assert_same(disk.read(key(version=2)).media, media(2))


def test_other_settings_kinds_and_formats_find_nothing(tmp_path: Path) -> None:
    folder = str(tmp_path)
    base = disk_cache(folder, 1, VideoConfig())
    assert base is not None
    assert disk_cache(None, 1, VideoConfig()) is None
    base.write(key(), media())
    defaults = VideoConfig()
    others = {
        "max_frames": 8,
        "fps": 1.0,
        "max_pixels": 784,
        "min_pixels": 784,
        "image_max_pixels": 784,
        "image_min_pixels": 784,
        "backend": "pyav",
    }
    assert vars(defaults).keys() >= others.keys()
    for name, value in others.items():
        other = disk_cache(folder, 1, VideoConfig(**{name: value}))  # type: ignore[arg-type]
        assert other is not None
        assert other.read(key()) == CacheRead(), name
    assert base.read(Key(("image", "/data/0.mp4"), (100, 0, 7))) == CacheRead()
    assert FORMAT > 1, "patches of the first format may be mirrored, out of order or of another stream"
    base.write(key()._replace(format=1), media(3))
    base.write(key(), media())
    assert_same(base.read(key()).media, media())
    later = key()._replace(format=FORMAT + 1)
    assert base.read(later) == CacheRead()
    base.write(later, media(1))
    assert_same(base.read(later).media, media(1))
    same = disk_cache(folder, 1, VideoConfig())
    assert same is not None
    assert_same(same.read(key()).media, media())


def flip(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0x10
    return bytes(changed)


DAMAGE = {
    "empty": lambda data: b"",
    "header cut": lambda data: data[:100],
    "one byte short": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "one byte long": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "first block zero": lambda data: bytes(4096) + data[4096:],
    "a bit of the last patch": lambda data: flip(data, -1),
    "a bit of the first patch": lambda data: flip(data, len(data) - 48 * 1176),
    "a bit of the header": lambda data: flip(data, 12),
    "text": lambda data: b"not a file of tensors" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_goes(damage: str, disk: DiskCache, tmp_path: Path) -> None:
    disk.write(key(), media())
    (path,) = entries(tmp_path / "cache")
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    found = disk.read(key())
    assert (found.media, found.changed) == (None, False)
    assert found.failure is not None
    assert found.failure.kind == "damaged"
    assert str(path) in found.failure.message
    assert not path.exists()
    assert disk.read(key()) == CacheRead()
    assert disk.write(key(), media()) is None
    assert_same(disk.read(key()).media, media())


@pytest.mark.parametrize("what", ["foreign", "other media", "grid", "dtype", "kind", "seconds"])
def test_a_whole_file_that_says_something_else_is_damaged(what: str, disk: DiskCache, tmp_path: Path) -> None:
    disk.write(key(), media())
    (path,) = entries(tmp_path / "cache")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["videor1"])
    patches = media().patches
    about |= {
        "other media": {"name": ["video", "/data/9.mp4"]},
        "grid": {"grid_thw": [1, 4, 6]},
        "kind": {"kind": "sound"},
        "seconds": {"second_per_grid": float("nan")},
    }.get(what, {})
    metadata = {} if what == "foreign" else {"videor1": json.dumps(about)}
    save_file({"patches": patches.view(torch.int8) if what == "dtype" else patches}, path, metadata)
    failure = disk.read(key()).failure
    assert failure is not None
    assert failure.kind == "damaged"


@pytest.mark.parametrize(
    "change",
    [
        {"second_per_grid": 0.75},
        {"second_per_grid": 0},
        {"kind": "image"},
        {"grid_thw": [1, 4, 4]},
        {"grid_thw": [4, 4, 1]},
        {"version": [0]},
        {"more": 1},
        {"crc32": 0},
        {"crc32": None},
    ],
    ids=repr,
)
def test_no_part_of_what_a_file_says_of_its_patches_can_change(
    change: dict[str, Any], disk: DiskCache, tmp_path: Path
) -> None:
    """Each value alone could be right."""
    disk.write(key(), media())
    (path,) = entries(tmp_path / "cache")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["videor1"])
    assert about | change != about
    save_file({"patches": media().patches}, path, {"videor1": json.dumps(about | change)})
    failure = disk.read(key()).failure
    assert failure is not None
    assert failure.kind == "damaged"
    assert not path.exists()


def test_the_budget_holds_and_the_least_recently_used_go(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, int(4.5 * SIZE), "")
    for number in range(4):
        disk.write(key(number), media(number))
        os.utime(disk._path(key(number)), ns=(number, 10**9 * number))
    assert len(entries(tmp_path)) == 4
    assert disk.read(key(0)).media is not None  # used now, so 1 and 2 are the oldest
    disk.write(key(4), media(4))
    assert held(disk) == [0, 2, 3, 4]  # read in turn: 0 is the oldest now
    for number in range(5, 12):
        assert disk.write(key(number), media(number)) is None
        assert sum(path.stat().st_size for path in entries(tmp_path)) <= 4.5 * SIZE
        assert disk.read(key(number)).media is not None
    assert not temporaries(tmp_path)


def held(disk: DiskCache, count: int = 12) -> list[int]:
    return [number for number in range(count) if disk.read(key(number)).media is not None]


def test_replacing_a_file_costs_no_other(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, int(2.5 * SIZE), "")
    for version in range(10):
        for number in range(2):
            disk.write(key(number, version), media(version))
    for number in range(2):
        assert_same(disk.read(key(number, 9)).media, media(9))


def test_a_replacement_that_is_larger_pushes_out_others_and_is_counted_once(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, int(3.5 * SIZE), "")
    for number in range(3):
        disk.write(key(number), media())
        os.utime(disk._path(key(number)), ns=(number, 10**9 * number))
    disk.write(key(0, version=1), media(1, (4, 4, 6)))  # the oldest itself, twice as large
    assert int((tmp_path / ".usage").read_text()) == sum(map(cache._size, entries(tmp_path)))
    assert disk.read(key(0, version=1)).media is not None
    assert held(disk, 3)[-1:] == [2]
    assert sum(map(cache._size, entries(tmp_path))) <= 3.5 * SIZE


def test_larger_than_the_budget_is_not_kept(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "cache", SIZE, "")
    disk.write(key(0), media())
    assert disk.write(key(1), media(1, (4, 4, 6))) is None
    assert held(disk) == [0]


def test_a_smaller_budget_and_files_of_an_unknown_number_are_counted(tmp_path: Path) -> None:
    big = DiskCache(tmp_path, 100 * SIZE, "")
    for number in range(8):
        big.write(key(number), media())
    (tmp_path / ".usage").write_text("what?")
    DiskCache(tmp_path, 3 * SIZE, "").write(key(9), media())
    assert len(entries(tmp_path)) <= 3
    entries(tmp_path)[0].unlink()  # by someone else
    small = DiskCache(tmp_path, 3 * SIZE, "")
    for number in range(3):
        small.write(key(number), media())
    assert held(small, 3) == [0, 1, 2]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    names = ["model.safetensors", "notes.txt", f"{'0' * 64}.txt", ".hidden.tmp", "0123.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(3 * SIZE))
        os.utime(tmp_path / name, (1, 1))
    disk = DiskCache(tmp_path, int(1.5 * SIZE), "")
    for number in range(4):
        disk.write(key(number), media())
    disk.clean()
    assert held(disk) == [3]
    assert all((tmp_path / name).stat().st_size == 3 * SIZE for name in names)


def test_half_written_files_of_killed_processes_go(disk: DiskCache, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    disk.clean()  # no folder yet
    disk.write(key(), media())
    stem = entries(folder)[0].stem
    ours = folder / f".{stem}.{disk._owner}.123.tmp"
    young, old = folder / f".{stem}.{'a' * 12}.1.tmp", folder / f".{stem}.{'b' * 12}.2.tmp"
    for path in (ours, young, old):
        path.write_bytes(b"half")
    os.utime(old, (1, time.time() - 4000))
    disk.clean()
    assert temporaries(folder) == [young]  # another process is at work on it
    os.utime(young, (1, time.time() - 4000))
    (folder / ".usage").unlink()
    disk.write(key(1), media())
    assert not temporaries(folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("place", ["_write_file", "os.replace", "os.open"])
def test_a_write_that_fails_leaves_nothing_and_raises_nothing(
    place: str, code: int, disk: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.write(key(0), media())
    real = cache._write_file

    def fail(*args: object, **_: object) -> None:
        if place == "_write_file":
            real(args[0], args[1][:1000])  # type: ignore[arg-type, index]
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(cache if place == "_write_file" else os, place.removeprefix("os."), fail)
        failure = disk.write(key(1), media())
    assert failure is not None
    assert (failure.kind, failure.code) == ("write", code)
    assert failure.message == f"{tmp_path / 'cache'}: {os.strerror(code)}"
    assert not temporaries(tmp_path / "cache")
    assert held(disk) == [0]
    assert disk.write(key(1), media()) is None
    assert held(disk) == [0, 1]


def test_a_write_beyond_the_largest_file_of_the_process(tmp_path: Path) -> None:
    """From the kernel, in a process of its own: the second write of an entry ends in the middle."""
    script = textwrap.dedent(f"""
        import errno, resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_cache import SIZE, key, media
        from videor1.data.cache import DiskCache

        disk = DiskCache(sys.argv[1], 100 * SIZE, "")
        assert disk.write(key(0), media(0)) is None
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        failure = disk.write(key(1), media(1))
        assert (failure.kind, failure.code) == ("write", errno.EFBIG), failure
        assert disk.read(key(0)).media is not None
        assert disk.read(key(1)).media is None
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert disk.write(key(1), media(1)) is None
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert not temporaries(tmp_path)
    assert len(entries(tmp_path)) == 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_a_read_that_fails_is_told(disk: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write(key(), media())

    def fail(_: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        found = disk.read(key())
    assert found.media is None
    assert found.failure is not None
    assert (found.failure.kind, found.failure.code) == ("read", errno.EIO)
    assert len(entries(tmp_path / "cache")) == 1  # not damaged, as far as one knows


def test_a_folder_that_may_only_be_read_serves(disk: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write(key(), media())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("utime", "open", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert_same(disk.read(key()).media, media())
    assert disk.read(key()).failure is None


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    disk = DiskCache(tmp_path / "file" / "cache", MIB, "")
    failure = disk.write(key(), media())
    assert failure is not None
    assert (failure.kind, failure.code) == ("write", errno.ENOTDIR)
    read = disk.read(key()).failure
    assert read is not None
    assert (read.kind, read.code) == ("read", errno.ENOTDIR)
    disk.clean()
    with pytest.raises(ConfigError, match=r"data\.cache_dir: expected a folder, got .*file, which is a file"):
        DiskCache(tmp_path / "file", MIB, "")


def test_a_lock_that_is_never_given_back(disk: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write(key(0), media())
    monkeypatch.setattr(DiskCache, "lock_seconds", 0.2)
    with disk._locked_usage():
        failure = DiskCache(disk._folder, MIB, "settings").write(key(1), media())
        assert failure is not None
        assert failure.kind == "write"
        assert "another process held the lock for 0.2 s" in failure.message
        assert_same(disk.read(key(0)).media, media())  # reading needs no lock
    assert disk.write(key(1), media()) is None


def keep_busy(folder: Path, seed: int, rounds: int) -> None:
    """Write and read a few keys over and over, some in two versions; runs in a process of its own."""
    disk = DiskCache(folder, int(5.5 * SIZE), "")
    disk.lock_seconds = 60.0  # a busy machine may leave the holder of the lock without a turn for long
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        number, version = torch.randint(0, 8, (2,), generator=generator).tolist()
        found = disk.read(key(number, version // 4))
        assert found.failure is None, found.failure
        if found.media is None:
            failure = disk.write(key(number, version // 4), media(10 * number + version // 4))
            assert failure is None, failure
        else:
            assert_same(found.media, media(10 * number + version // 4))


def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=keep_busy, args=(tmp_path, seed, 150)) for seed in range(3)]
    for process in processes:
        process.start()
    disk, most = DiskCache(tmp_path, MIB, ""), 0
    disk.lock_seconds = 60.0
    while any(process.is_alive() for process in processes):
        with disk._locked_usage():  # nobody adds a file meanwhile
            most = max(most, sum(map(cache._size, entries(tmp_path))))
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not temporaries(tmp_path)
    assert 2 * SIZE < most <= 5.5 * SIZE


def test_options() -> None:
    assert DataConfig().cache_dir is None
    with pytest.raises(ConfigError, match=r"data\.cache_dir_mb: expected at least 1, got 0"):
        CommonConfig(data=DataConfig(cache_dir_mb=0))
