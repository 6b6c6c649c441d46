"""Each video is decoded once over epochs and runs, and anew when its file changes; a failing disk costs no sample."""

import collections
import errno
import functools
import os
import resource
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from media import numbered_frames, write_video
from patience import PATIENCE
from prefetchers import results, sample, wait_for_end, wait_until

import videor1.data.cache
from videor1.config import VideoConfig
from videor1.data.cache import DiskCache
from videor1.data.prefetch import Prefetcher
from videor1.types import Media, SampleError
from videor1.video.media import load_media, media_key
from videor1.video.version import Key, file_key

SMALL = VideoConfig(max_frames=4, max_pixels=56 * 56)


@dataclass(frozen=True)
class Decode:
    """A video to be decoded; each decode leaves a line in the file beside it."""

    path: Path
    how: str = ""


def decode(item: Decode) -> Media | None:
    """Runs in a worker."""
    if item.how == "hang in the write":
        videor1.data.cache._write_file = hang_in_the_write
    if item.how == "no room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
    with open(f"{item.path}.log", "a") as log:
        log.write(f"{os.getpid()}\n")
    media = load_media(sample(item.path), SMALL)
    if item.how.startswith("replaced") and item.path.with_suffix(".new").exists():
        item.path.with_suffix(".new").replace(item.path)
        if item.how == "replaced and torn":
            raise SampleError("decode", "half of it is of another video")
    if item.how == "written all the time":
        item.path.write_bytes(item.path.read_bytes() + b"0")
    return media


def hang_in_the_write(path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])
    time.sleep(1000)


def decode_key(item: Decode) -> Key:
    return file_key("video", item.path)


def pids(path: Path) -> list[int]:
    """The processes that decoded a video, one each time."""
    log = Path(f"{path}.log")
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def assert_same(result: Any, expected: Any) -> None:
    assert isinstance(result, Media)
    assert torch.equal(result.patches, expected.patches)
    assert (result.grid_thw, result.second_per_grid) == (expected.grid_thw, expected.second_per_grid)


def assert_decoded(result: Any, path: Path) -> None:
    assert_same(result, load_media(sample(path), SMALL))


class Decoder(Prefetcher[Decode, Any]):
    """A prefetcher of ``decode`` that keeps what it reports; ``kept`` tells which caches it has."""

    def __init__(self, folder: Path, kept: str = "disk", *, limit: int = 2**20, **options: Any) -> None:
        disk = None if kept == "memory" else DiskCache(folder / "cache", limit, "")
        memory = {"cache_bytes": 0 if kept == "disk" else limit}
        options = {"workers": 1, "depth": 4, "timeout": PATIENCE} | options
        super().__init__(decode, key=decode_key, disk=disk, **memory, **options)
        self.reports: list[str] = []
        self.on_report = self.reports.append

    def one(self, path: Path, how: str = "") -> Any:
        ((_, result),) = self.iterate([Decode(path, how)])
        return result

    def all(self, paths: Sequence[Path], how: str = "") -> list[Any]:
        out = list(self.iterate([Decode(path, how) for path in paths]))
        assert [item.path for item, _ in out] == list(paths)
        return [result for _, result in out]


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    """Small videos, each with patches of its own."""
    return [write_video(tmp_path / f"{i}.mp4", numbered_frames(8 + 4 * i, 56, 56)) for i in range(4)]


def left_in(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "cache").iterdir() if path.name != ".usage")


KEPT = {"kept": ["memory", "disk", "both"], "workers": [0, 1]}


@pytest.mark.grid(**KEPT)
def test_each_video_is_decoded_once_over_epochs_that_repeat_it(
    kept: str, workers: int, videos: list[Path], tmp_path: Path
) -> None:
    with Decoder(tmp_path, kept, workers=workers) as ahead:
        for _ in range(3):
            order = [videos[i] for i in (0, 1, 0, 2, 3, 0, 1)]  # several questions about one video
            for path, result in zip(order, ahead.all(order), strict=True):
                assert_decoded(result, path)
        stats = ahead.stats
    assert [len(pids(path)) for path in videos] == [1] * 4
    assert stats.loaded == 4
    assert stats.loaded + stats.cache_hits + stats.disk_hits == 21
    assert (stats.disk_hits == 0) == (kept != "disk")
    assert not ahead.reports
    if kept != "memory":
        assert left_in(tmp_path) == [".safetensors"] * 4


def test_another_run_finds_the_disk_cache_and_what_is_damaged_is_told_and_made_again(
    videos: list[Path], tmp_path: Path
) -> None:
    with Decoder(tmp_path) as ahead:
        first = ahead.one(videos[0])
        (stored,) = (tmp_path / "cache").glob("*.safetensors")
        stored.write_bytes(stored.read_bytes()[:-9])
        for _ in range(2):
            assert_same(ahead.one(videos[0]), first)
        assert (ahead.stats.cache_damaged, ahead.stats.cache_errors, ahead.stats.disk_hits) == (1, 0, 1)
    assert len(pids(videos[0])) == 2
    (report,) = ahead.reports
    assert str(stored) in report
    with Decoder(tmp_path, "both") as ahead:
        again = ahead.one(videos[0])  # by a worker
        assert_same(again, first)
        assert ahead.one(videos[0]) is again  # from memory now
        assert (ahead.stats.loaded, ahead.stats.disk_hits, ahead.stats.cache_hits) == (0, 1, 1)
    assert len(pids(videos[0])) == 2


@pytest.mark.grid(**KEPT)
def test_a_file_that_changes_while_cached_is_decoded_anew_and_told_once(
    kept: str, workers: int, videos: list[Path], tmp_path: Path
) -> None:
    path, other = videos[:2]
    with Decoder(tmp_path, kept, workers=workers) as ahead:
        before = ahead.one(path)
        write_video(path, numbered_frames(40, 56, 56))
        after = [ahead.one(path) for _ in range(3)]
        unchanged = ahead.one(other)
        assert ahead.stats.changed_files == 1
    for result in after:
        assert_decoded(result, path)
        assert not torch.equal(before.patches, result.patches)
    assert_decoded(unchanged, other)
    assert len(pids(path)) == 2
    assert ahead.reports == [f"changed while it was cached or decoded: {path}; decoded anew"]


@pytest.mark.grid(how=["replaced", "replaced and torn"], workers=[0, 1])
def test_a_file_that_is_replaced_under_the_decoder_is_decoded_once_more(
    how: str, workers: int, videos: list[Path], tmp_path: Path
) -> None:
    path, new = videos[:2]
    new.rename(path.with_suffix(".new"))
    with Decoder(tmp_path, "both", workers=workers) as ahead:
        result = ahead.one(path, how)
        assert_decoded(result, path)
        assert ahead.one(path) is result  # kept under the version that it was made from
        assert (ahead.stats.loaded, ahead.stats.cache_hits, ahead.stats.changed_files) == (1, 1, 1)
        assert not ahead.stats.errors
    assert not path.with_suffix(".new").exists()
    assert len(pids(path)) == 2
    assert ahead.reports == [f"changed while it was cached or decoded: {path}; decoded anew"]
    with Decoder(tmp_path, workers=workers) as ahead:
        assert_same(ahead.one(path), result)
        assert ahead.stats.disk_hits == 1


def test_files_that_are_written_all_the_time_or_vanish_are_errors(videos: list[Path], tmp_path: Path) -> None:
    path, other = videos[:2]
    with Decoder(tmp_path, "both") as ahead:
        changed = ahead.one(path, "written all the time")
        assert isinstance(ahead.one(path), Media)
        assert ahead.stats.loaded == 1
        assert len(pids(path)) == 3
        ahead.one(other)
        kept = other.rename(tmp_path / "away")
        gone = ahead.one(other)
        kept.rename(other)
        assert isinstance(ahead.one(other), Media)
        assert (ahead.stats.changed_files, ahead.stats.disk_hits, ahead.reports) == (0, 1, [])
    assert [type(error) for error in (changed, gone)] == [SampleError] * 2
    assert (changed.kind, changed.path) == ("changed", str(path))
    assert (gone.kind, gone.path) == ("missing_file", str(other))


def test_a_full_disk_is_told_once_and_memory_serves_on(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def full(path: Path, data: bytes) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("videor1.data.cache._write_file", full)
    monkeypatch.setattr("videor1.data.prefetch._PAUSE_SECONDS", 0.0)
    with Decoder(tmp_path, "both", workers=0) as ahead:
        for _ in range(2):
            assert all(isinstance(result, Media) for result in ahead.all(videos))
        assert (ahead.stats.cache_errors, ahead.stats.loaded, ahead.stats.cache_hits) == (4, 4, 4)
    assert len(tries) == 4
    failed = f"write failed: {tmp_path / 'cache'}: No space left on device"
    assert ahead.reports == [f"disk cache: {failed}; training goes on without"]
    assert left_in(tmp_path) == []
    monkeypatch.setattr("videor1.data.prefetch._PAUSE_SECONDS", 1000.0)
    with Decoder(tmp_path, workers=0) as ahead:
        ahead.all(videos)
        assert (ahead.stats.cache_errors, ahead.stats.loaded, len(tries)) == (1, 4, 5)  # not tried at every video
        monkeypatch.undo()
        ahead._no_write_until = 0.0  # the pause is over
        ahead.all(videos)
    assert left_in(tmp_path) == [".safetensors"] * 4


def test_a_disk_that_takes_no_more_bytes_in_the_workers(videos: list[Path], tmp_path: Path) -> None:
    """The kernel ends each write in the middle."""
    with Decoder(tmp_path, "both", workers=2) as ahead:
        for _ in range(2):
            assert all(isinstance(result, Media) for result in ahead.all(videos, "no room"))
        assert 1 <= ahead.stats.cache_errors <= 4
        assert (ahead.stats.loaded, ahead.stats.cache_hits) == (4, 4)
    (report,) = ahead.reports
    assert "File too large" in report
    assert [len(pids(path)) for path in videos] == [1] * 4
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("end", ["killed", "timeout", "closed"])
def test_a_worker_that_ends_in_a_write_leaves_nothing_behind(end: str, videos: list[Path], tmp_path: Path) -> None:
    def temporaries() -> list[Path]:
        return list((tmp_path / "cache").glob(".*.tmp"))

    def kill_when_writing() -> None:
        """SIGKILL from outside to each worker that decodes the second video; one is forgiven."""
        for number in (1, 2):
            wait_until(lambda number=number: len(temporaries()) == number)
            os.kill(pids(videos[1])[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_when_writing)
    with Decoder(tmp_path, timeout=2.0 if end == "timeout" else PATIENCE) as ahead:
        ahead.one(videos[0])
        items = [Decode(videos[1], "hang in the write"), Decode(videos[2]), Decode(videos[3])]
        if end == "closed":
            ahead._fill(collections.deque(), iter(items))
            wait_until(temporaries)
        else:
            if end == "killed":
                killer.start()
            assert results(ahead, items) == ["worker_died" if end == "killed" else "timeout", "video", "video"]
            assert ahead.stats.worker_deaths == (2 if end == "killed" else 1)
            assert temporaries()  # nobody could remove it
    if end == "killed":
        killer.join()
    assert not temporaries()
    wait_for_end([pid for path in videos for pid in pids(path)])
    assert left_in(tmp_path) == [".safetensors"] * (1 if end == "closed" else 3)


def test_reports_are_log_warnings_unless_asked_for(videos: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    load = functools.partial(load_media, video=SMALL)
    with Prefetcher(load, workers=0, depth=1, timeout=9, cache_bytes=2**20, key=media_key) as ahead:
        list(ahead.iterate([sample(videos[0])]))
        os.utime(videos[0], (1, 1))
        list(ahead.iterate([sample(videos[0])]))
        assert ahead.stats.loaded == 2
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "videor1.data.prefetch")
    assert str(videos[0]) in record.getMessage()
