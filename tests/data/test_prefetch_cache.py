"""Each video is decoded once over epochs and runs, and anew when its file changes; a failing disk costs no sample."""

import collections
import errno
import functools
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from media import numbered_frames, write_video
from patience import PATIENCE
from prefetchers import alive, run_script, sample, wait_until

import videor1.data
import videor1.data.cache
from videor1.config import VideoConfig
from videor1.data.cache import DiskCache
from videor1.data.prefetch import Prefetcher
from videor1.types import Media, SampleError
from videor1.video.media import load_media, media_key
from videor1.video.version import file_key


def files(tmp_path, count=4):
    """Small videos, each with patches of its own."""
    return [write_video(tmp_path / f"{i}.mp4", numbered_frames(8 + 4 * i, 56, 56)) for i in range(count)]


@dataclass(frozen=True)
class Decode:
    """A video to be decoded; each decode leaves a line in the file beside it."""

    path: Path
    how: str = ""


def decode(item):
    """Runs in a worker."""
    if item.how == "hang in the write":
        videor1.data.cache._write_file = hang_in_the_write
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


def hang_in_the_write(path, data):
    path.write_bytes(data[: len(data) // 2])
    time.sleep(1000)


def decode_key(item):
    return file_key("video", item.path)


SMALL = VideoConfig(max_frames=4, max_pixels=56 * 56)


def decodes(path):
    """How often it was decoded."""
    log = Path(f"{path}.log")
    return len(log.read_text().split()) if log.exists() else 0


def decoder(tmp_path=None, *, workers=1, cache_bytes=0, depth=4, timeout=PATIENCE, limit=2**20):
    """A prefetcher of ``decode`` with a disk cache in ``tmp_path``, and the list of what it reports."""
    disk = DiskCache(tmp_path / "cache", limit, "") if tmp_path else None
    ahead = Prefetcher(
        decode, workers=workers, depth=depth, timeout=timeout, cache_bytes=cache_bytes, key=decode_key, disk=disk
    )
    reports = []
    ahead.on_report = reports.append
    return ahead, reports


def one(ahead, path, how=""):
    ((_, result),) = ahead.iterate([Decode(path, how)])
    return result


def left_in(folder):
    return sorted(path.suffix for path in folder.iterdir() if path.name != ".usage")


@pytest.mark.parametrize("kept", ["memory", "disk", "both"])
@pytest.mark.parametrize("workers", [0, 1])
def test_each_video_is_decoded_once_over_epochs_that_repeat_it(tmp_path, workers, kept):
    paths = files(tmp_path)
    ahead, reports = decoder(
        tmp_path if kept != "memory" else None, workers=workers, cache_bytes=0 if kept == "disk" else 2**20
    )
    with ahead:
        for _ in range(3):
            order = [paths[i] for i in (0, 1, 0, 2, 3, 0, 1)]  # several questions about one video
            out = list(ahead.iterate(map(Decode, order)))
            assert [item.path for item, _ in out] == order
            assert all(torch.equal(r.patches, load_media(sample(i.path), SMALL).patches) for i, r in out)
        stats = ahead.stats
    assert [decodes(path) for path in paths] == [1] * 4
    assert stats.loaded == 4
    assert stats.loaded + stats.cache_hits + stats.disk_hits == 21
    assert (stats.disk_hits == 0) == (kept != "disk")
    assert not reports
    if kept != "memory":
        assert left_in(tmp_path / "cache") == [".safetensors"] * 4


def test_another_run_finds_the_disk_cache_and_the_worker_reads_it(tmp_path):
    path = files(tmp_path, 1)[0]
    ahead, _ = decoder(tmp_path)
    with ahead:
        first = one(ahead, path)
    ahead, _ = decoder(tmp_path, cache_bytes=2**20)
    with ahead:
        again = one(ahead, path)
        assert again.grid_thw == first.grid_thw
        assert again.second_per_grid == first.second_per_grid
        assert torch.equal(again.patches, first.patches)
        assert one(ahead, path) is again  # from memory now
        assert (ahead.stats.loaded, ahead.stats.disk_hits, ahead.stats.cache_hits) == (0, 1, 1)
    assert decodes(path) == 1


@pytest.mark.parametrize("kept", ["memory", "disk", "both"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_while_cached_is_decoded_anew_and_told_once(tmp_path, workers, kept):
    path, other = files(tmp_path, 2)
    ahead, reports = decoder(
        tmp_path if kept != "memory" else None, workers=workers, cache_bytes=0 if kept == "disk" else 2**20
    )
    with ahead:
        before = one(ahead, path)
        write_video(path, numbered_frames(40, 56, 56))
        after = [one(ahead, path) for _ in range(3)]
        unchanged = one(ahead, other)
        assert ahead.stats.changed_files == 1
    expected = load_media(sample(path), SMALL).patches
    assert not torch.equal(before.patches, expected)
    assert all(torch.equal(result.patches, expected) for result in after)
    assert torch.equal(unchanged.patches, load_media(sample(other), SMALL).patches)
    assert decodes(path) == 2
    assert reports == [f"changed while it was cached or decoded: {path}; decoded anew"]


@pytest.mark.parametrize("how", ["replaced", "replaced and torn"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_replaced_under_the_decoder_is_decoded_once_more(tmp_path, workers, how):
    path, new = files(tmp_path, 2)
    expected = load_media(sample(new), SMALL)
    new.rename(path.with_suffix(".new"))
    ahead, reports = decoder(tmp_path, workers=workers, cache_bytes=2**20)
    with ahead:
        result = one(ahead, path, how)
        assert torch.equal(result.patches, expected.patches)
        assert one(ahead, path) is result  # kept under the version that it was made from
        assert (ahead.stats.loaded, ahead.stats.cache_hits, ahead.stats.changed_files) == (1, 1, 1)
        assert not ahead.stats.errors
    assert decodes(path) == 2
    assert reports == [f"changed while it was cached or decoded: {path}; decoded anew"]
    ahead, _ = decoder(tmp_path, workers=workers)
    with ahead:
        assert torch.equal(one(ahead, path).patches, expected.patches)
        assert ahead.stats.disk_hits == 1


def test_a_file_that_is_written_all_the_time_is_an_error(tmp_path):
    path = files(tmp_path, 1)[0]
    ahead, _ = decoder(tmp_path, cache_bytes=2**20)
    with ahead:
        result = one(ahead, path, "written all the time")
        assert isinstance(result, SampleError)
        assert (result.kind, result.path) == ("changed", str(path))
        assert isinstance(one(ahead, path), Media)
        assert ahead.stats.loaded == 1
    assert decodes(path) == 3


def test_a_file_that_vanishes_while_cached_is_an_error(tmp_path):
    path = files(tmp_path, 1)[0]
    ahead, reports = decoder(tmp_path, cache_bytes=2**20)
    with ahead:
        one(ahead, path)
        kept = path.rename(tmp_path / "away")
        gone = one(ahead, path)
        assert isinstance(gone, SampleError)
        assert (gone.kind, gone.path) == ("missing_file", str(path))
        kept.rename(path)
        assert isinstance(one(ahead, path), Media)
        assert (ahead.stats.changed_files, ahead.stats.disk_hits, reports) == (0, 1, [])


def test_a_damaged_file_of_the_disk_cache_is_told_and_made_again(tmp_path):
    path = files(tmp_path, 1)[0]
    ahead, reports = decoder(tmp_path)
    with ahead:
        first = one(ahead, path)
        (stored,) = (tmp_path / "cache").glob("*.safetensors")
        stored.write_bytes(stored.read_bytes()[:-9])
        assert torch.equal(one(ahead, path).patches, first.patches)
        assert one(ahead, path).grid_thw == first.grid_thw
        assert (ahead.stats.cache_damaged, ahead.stats.cache_errors, ahead.stats.disk_hits) == (1, 0, 1)
    assert decodes(path) == 2
    assert len(reports) == 1
    assert str(stored) in reports[0]


def test_a_full_disk_is_told_once_and_memory_serves_on(tmp_path, monkeypatch):
    paths = files(tmp_path)
    tries = []

    def full(path, data):
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("videor1.data.cache._write_file", full)
    monkeypatch.setattr("videor1.data.prefetch._PAUSE_SECONDS", 0.0)
    ahead, reports = decoder(tmp_path, workers=0, cache_bytes=2**20)
    with ahead:
        for _ in range(2):
            assert all(isinstance(r, Media) for _, r in ahead.iterate(map(Decode, paths)))
        assert (ahead.stats.cache_errors, ahead.stats.loaded, ahead.stats.cache_hits) == (4, 4, 4)
    assert len(tries) == 4
    failed = f"write failed: {tmp_path / 'cache'}: No space left on device"
    assert reports == [f"disk cache: {failed}; training goes on without"]
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr("videor1.data.prefetch._PAUSE_SECONDS", 1000.0)
    ahead, reports = decoder(tmp_path, workers=0)
    with ahead:
        list(ahead.iterate(map(Decode, paths)))
        assert (ahead.stats.cache_errors, ahead.stats.loaded, len(tries)) == (1, 4, 5)  # not tried at every video
        monkeypatch.undo()
        ahead._no_write_until = 0.0  # the pause is over
        list(ahead.iterate(map(Decode, paths)))
    assert left_in(tmp_path / "cache") == [".safetensors"] * 4


def test_a_disk_that_takes_no_more_bytes_in_the_workers(tmp_path):
    """The kernel ends each write in the middle, in real worker processes."""
    paths = files(tmp_path)
    body = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_prefetch_cache import *

        if __name__ == "__main__":
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
            folder = Path({str(tmp_path)!r})
            ahead, reports = decoder(folder, workers=2, cache_bytes=2**20)
            paths = [folder / f"{{i}}.mp4" for i in range(4)]
            for _ in range(2):
                out = [r for _, r in ahead.iterate(map(Decode, paths))]
                assert all(isinstance(r, Media) for r in out), out
            ahead.close()
            assert 1 <= ahead.stats.cache_errors <= 4, ahead.stats
            assert (ahead.stats.loaded, ahead.stats.cache_hits) == (4, 4), ahead.stats
            (report,) = reports
            assert "File too large" in report, report
        """
    script = run_script(tmp_path, body)
    _, err = script.communicate(timeout=PATIENCE)
    assert script.returncode == 0, err
    assert [decodes(path) for path in paths] == [1] * 4
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("end", ["killed", "timeout", "closed"])
def test_a_worker_that_ends_in_a_write_leaves_nothing_behind(tmp_path, end):
    paths = files(tmp_path)
    ahead, _ = decoder(tmp_path, workers=1, timeout=2.0 if end == "timeout" else PATIENCE)
    stuck = threading.Thread(target=kill_when_logged, args=(paths[1], tmp_path / "cache"))
    with ahead:
        list(ahead.iterate([Decode(paths[0])]))
        if end == "killed":
            stuck.start()
        items = [Decode(paths[1], "hang in the write"), Decode(paths[2]), Decode(paths[3])]
        stream = ahead.iterate(items)
        if end == "closed":
            ahead._fill(collections.deque(), iter(items))
            wait_until(lambda: temporaries(tmp_path))
        else:
            out = list(stream)
            assert [item for item, _ in out] == items
            kinds = [r.kind for _, r in out]  # of the error or of the media
            assert kinds == ["worker_died" if end == "killed" else "timeout", "video", "video"]
            assert ahead.stats.worker_deaths == (2 if end == "killed" else 1)
            assert temporaries(tmp_path)  # nobody could remove it
    if end == "killed":
        stuck.join()
    assert not temporaries(tmp_path)
    pids = [int(line) for path in paths if decodes(path) for line in Path(f"{path}.log").read_text().split()]
    wait_until(lambda: not any(map(alive, pids)))
    whole = [".safetensors"] * (1 if end == "closed" else 3)
    assert left_in(tmp_path / "cache") == whole


def temporaries(tmp_path):
    return list((tmp_path / "cache").glob(".*.tmp"))


def kill_when_logged(path, folder):
    """SIGKILL from outside to each worker that decodes a file, once it writes to the cache; one is forgiven."""
    for number in (1, 2):
        wait_until(lambda number=number: len(list(folder.glob(".*.tmp"))) == number)
        os.kill(int(Path(f"{path}.log").read_text().split()[-1]), signal.SIGKILL)


def test_the_same_results_in_the_same_order_with_any_number_of_workers(tmp_path):
    paths = [*files(tmp_path), tmp_path / "missing.mp4"]
    order = [paths[i] for i in (0, 4, 1, 0, 2, 3, 3, 4, 1, 0, 2)]
    runs = []
    for number, (workers, depth, memory) in enumerate([(0, 1, 0), (1, 4, 2**20), (3, 8, 0), (2, 3, 2**15)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        ahead, _ = decoder(folder, workers=workers, depth=depth, cache_bytes=memory, limit=2**16)
        with ahead:
            runs.append([(item.path, result) for item, result in ahead.iterate(map(Decode, order))])
        assert sum(path.stat().st_size for path in (folder / "cache").glob("*.safetensors")) <= 2**16
    for run in runs:
        assert [path for path, _ in run] == order
        for (_, result), (_, expected) in zip(run, runs[0], strict=True):
            if isinstance(expected, SampleError):
                assert (result.kind, str(result)) == (expected.kind, str(expected))
            else:
                assert torch.equal(result.patches, expected.patches)


def test_reports_are_log_warnings_unless_asked_for(tmp_path, caplog):
    path = files(tmp_path, 1)[0]
    load = functools.partial(load_media, video=SMALL)
    with Prefetcher(load, workers=0, depth=1, timeout=9, cache_bytes=2**20, key=media_key) as ahead:
        list(ahead.iterate([sample(path)]))
        os.utime(path, (1, 1))
        list(ahead.iterate([sample(path)]))
        assert ahead.stats.loaded == 2
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "videor1.data.prefetch")
    assert str(path) in record.getMessage()
