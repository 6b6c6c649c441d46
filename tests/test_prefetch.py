"""Decoding ahead: order, bounds, cache, and workers that crash, hang, die idle, or lose their parent."""

import collections
import errno
import functools
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from media import numbered_frames, real_video, write_video
from PIL import Image

import videor1.cache
from videor1.cache import DiskCache, Key, file_key
from videor1.config import VideoConfig
from videor1.errors import ConfigError
from videor1.patches import media_from_clip
from videor1.prefetch import Prefetcher, load_media, media_key
from videor1.types import Media, Sample, SampleError
from videor1.video import read_frames
from videor1.workers import WorkerPool


@dataclass(frozen=True)
class Work:
    """What a worker is to do."""

    name: str
    number: int = 0
    path: str = "/data/clip.mp4"


def work(item):
    """Runs in a worker."""
    if item.name == "hang":
        time.sleep(1000)
    if item.name == "hang in native code":
        collections.deque(itertools.repeat(0), maxlen=0)  # an endless loop in C: Python never sees SIGTERM
    if item.name == "exit":
        os._exit(7)
    if item.name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item.name == "raise":
        raise KeyError("something")
    if item.name == "sys.exit":
        sys.exit(3)
    if item.name == "bad":
        raise SampleError("missing_file", "no such file", item.path)
    if item.name == "option":
        raise ConfigError("video.backend: no")
    if item.name == "slow":
        time.sleep(0.3)
    if item.name == "pid":
        return os.getpid(), signal.getsignal(signal.SIGINT), torch.get_num_threads()
    if item.name == "write":
        with open(item.path, "a") as file:
            file.write(f"{item.number}\n")
    if item.name == "tensor":
        return torch.full((item.number,), 7, dtype=torch.uint8), torch.ones(3, dtype=torch.bfloat16)
    return item.number * item.number


def prefetcher(workers=1, depth=4, timeout=30.0, cache_bytes=0, key=Key):
    return Prefetcher(work, workers=workers, depth=depth, timeout=timeout, cache_bytes=cache_bytes, key=key)


def run_script(tmp_path, body, **kwargs):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(script)], text=True, env=environment, **pipes, **kwargs)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_order_and_failures_in_their_place():
    items = [
        Work("slow", 1),
        Work("square", 2),
        Work("raise"),
        Work("exit"),
        Work("square", 3),
        Work("hang"),
        Work("sys.exit"),
        Work("kill"),
        Work("bad"),
        Work("square", 4),
    ]
    with prefetcher(workers=2, depth=5, timeout=1.5) as ahead:
        out = list(ahead.iterate(items))
        stats = ahead.stats
    assert [item for item, _ in out] == items
    kinds = [r.kind if isinstance(r, SampleError) else r for _, r in out]
    died = "worker_died"
    assert kinds == [1, 4, "decode", died, 9, "timeout", "decode", died, "missing_file", 16]
    assert all(r.path == "/data/clip.mp4" for _, r in out if isinstance(r, SampleError))
    assert "KeyError: 'something'" in out[2][1].message
    assert "exit code 7" in out[3][1].message
    assert "longer than 1.5 s" in out[5][1].message
    assert stats.errors == {"decode": 2, "worker_died": 2, "timeout": 1, "missing_file": 1}
    assert stats.loaded == 4
    assert stats.load_seconds >= 0.3 + 1.5
    assert 1.0 < stats.waited_seconds < 60
    assert stats.restarts == 0


def test_a_hang_in_native_code_is_killed():
    with prefetcher(timeout=1.0) as ahead:
        list(ahead.iterate([Work("square", 1)]))  # the worker is up
        started = time.monotonic()
        (_, first), (_, second) = ahead.iterate([Work("hang in native code"), Work("square", 5)])
        assert isinstance(first, SampleError)
        assert first.kind == "timeout"
        assert second == 25
        assert time.monotonic() - started < 20


def test_inline_without_workers():
    drawn = []

    def source():
        for i in range(4):
            drawn.append(i)
            yield Work("square" if i != 2 else "raise", i)

    with prefetcher(workers=0, depth=2) as ahead:
        out = []
        for item, result in ahead.iterate(source()):
            out.append(result.kind if isinstance(result, SampleError) else result)
            assert len(drawn) <= item.number + 1 + 2
    assert out == [0, 1, "decode", 9]
    with prefetcher(workers=0) as ahead, pytest.raises(ConfigError):
        list(ahead.iterate([Work("option")]))


def test_an_option_that_cannot_work_is_raised_not_counted_as_a_bad_sample():
    with prefetcher() as ahead, pytest.raises(ConfigError, match=r"video\.backend: no"):
        list(ahead.iterate([Work("option")]))


def test_depth_bounds_what_is_drawn_from_an_endless_source(tmp_path):
    log = tmp_path / "log"
    drawn = []

    def source():
        for i in itertools.count():
            drawn.append(i)
            yield Work("write", i, str(log))

    with prefetcher(depth=3) as ahead:
        stream = ahead.iterate(source())
        for consumed in range(1, 6):
            next(stream)
            assert len(drawn) == consumed + 3
        wait_until(lambda: len(log.read_text().split()) == 8)  # the rest is made ready while nobody waits
        time.sleep(0.3)
        assert len(log.read_text().split()) == len(drawn) == 8
        stream.close()
        assert next(ahead.iterate([Work("square", 3)]))[1] == 9


def test_cache_hands_out_what_was_loaded(tmp_path):
    log = tmp_path / "log"
    items = [Work("write", i % 3, str(log)) for i in range(12)]
    with prefetcher(workers=2, cache_bytes=1000) as ahead:
        assert [r for _, r in ahead.iterate(items)] == [i % 3 * (i % 3) for i in range(12)]
        assert sorted(log.read_text().split()) == ["0", "1", "2"]
        assert (ahead.stats.loaded, ahead.stats.cache_hits) == (3, 9)
        list(ahead.iterate(items))
        assert len(log.read_text().split()) == 3


def test_equal_items_on_their_way_are_loaded_once_even_without_a_cache(tmp_path):
    log = tmp_path / "log"
    item = Work("write", 5, str(log))
    with prefetcher(depth=4) as ahead:
        assert [r for _, r in ahead.iterate([item] * 4)] == [25] * 4
    assert log.read_text().split() == ["5"]


@pytest.mark.parametrize("workers", [0, 1])
def test_cache_is_bounded_and_drops_the_least_recently_used(workers):
    def loads(ahead, numbers):
        before = ahead.stats.loaded
        for _, (tensor, _) in ahead.iterate([Work("tensor", n) for n in numbers]):
            assert tensor.eq(7).all()
        return ahead.stats.loaded - before

    with prefetcher(workers=workers, depth=1, cache_bytes=700) as ahead:  # each result: its number + 6 bytes
        assert loads(ahead, [300, 301]) == 2
        assert loads(ahead, [300]) == 0  # now 301 is the oldest
        assert loads(ahead, [302]) == 1
        assert loads(ahead, [300]) == 0
        assert loads(ahead, [301]) == 1
        assert loads(ahead, [5000]) == 1  # too large to keep: it must not push the others out
        assert loads(ahead, [300, 301]) == 0
        assert loads(ahead, [5000]) == 1


def test_errors_are_not_cached(tmp_path):
    with prefetcher(cache_bytes=1000) as ahead:
        for _ in range(2):
            ((_, result),) = ahead.iterate([Work("bad")])
            assert result.kind == "missing_file"
        assert ahead.stats.errors == {"missing_file": 2}


def test_tensors_cross_as_plain_bytes():
    with prefetcher(depth=64) as ahead:
        out = list(ahead.iterate([Work("tensor", n) for n in range(200)]))
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for n, (_, (tensor, bf16)) in enumerate(out):
        assert tensor.dtype == torch.uint8
        assert tensor.shape == (n,)
        assert not tensor.is_shared()
        assert torch.equal(bf16, torch.ones(3, dtype=torch.bfloat16))
        tensor.fill_(1)  # writable
    assert descriptors < 150


def test_workers_ignore_ctrl_c_and_use_one_thread():
    with prefetcher() as ahead:
        ((_, (pid, handler, threads)),) = ahead.iterate([Work("pid")])
        assert pid != os.getpid()
        assert handler == signal.SIG_IGN
        assert threads == 1


def test_making_it_does_not_wait_for_workers():
    started = time.monotonic()
    ahead = prefetcher(workers=2)
    assert time.monotonic() - started < 0.5
    ahead.close()
    ahead.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(ahead.iterate([Work("square")]))


def test_close_kills_what_runs():
    ahead = prefetcher(workers=2, depth=3)
    pids = {next(ahead.iterate([Work("pid", n)]))[1][0] for n in range(8)}
    stream = ahead.iterate([Work("square", 1), Work("hang", 1), Work("hang", 2), Work("hang", 3)])
    next(stream)
    started = time.monotonic()
    ahead.close()
    assert time.monotonic() - started < 10
    wait_until(lambda: not any(map(alive, pids)))
    stream.close()


def test_a_worker_killed_while_idle_costs_nothing():
    with prefetcher(depth=2) as ahead:
        ((_, (pid, _, _)),) = ahead.iterate([Work("pid")])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        time.sleep(0.3)  # let the pool notice
        assert [r for _, r in ahead.iterate([Work("square", n) for n in range(5)])] == [0, 1, 4, 9, 16]
        assert not ahead.stats.errors


def test_a_worker_stopped_dead_while_it_holds_the_pipe_is_replaced(monkeypatch):
    # SIGSTOP of an idle worker stands for one that was killed inside the pool's locks: no reply ever comes.
    monkeypatch.setattr(WorkerPool, "stall_seconds", 1.0)
    with prefetcher(timeout=1.0) as ahead:
        ((_, (pid, _, _)),) = ahead.iterate([Work("pid")])
        os.kill(pid, signal.SIGSTOP)
        assert [r for _, r in ahead.iterate([Work("square", n) for n in range(3)])] == [0, 1, 4]
        assert ahead.stats.restarts == 1


def die_at_start():
    os._exit(1)


def test_workers_that_cannot_start_are_an_error_not_a_hang(monkeypatch):
    # As with a script whose entry is not guarded: every worker dies before it takes anything on.
    monkeypatch.setattr("videor1.workers._init_worker", die_at_start)
    with prefetcher() as ahead, pytest.raises(RuntimeError, match=r"__main__.*data\.workers=0"):
        list(ahead.iterate([Work("square")]))


LOOP = """
    import os, sys, time
    from videor1.cache import Key
    from videor1.prefetch import Prefetcher

    def load(item):
        if item < 2:
            return os.getpid()
        time.sleep(1000)

    if __name__ == "__main__":
        ahead = Prefetcher(load, workers=2, depth=3, timeout=500, key=Key)
        try:
            for _, pid in ahead.iterate([0, 1, 2, 3]):
                print(pid, flush=True)
        except KeyboardInterrupt:
            sys.exit(5)
    """


def test_ctrl_c_ends_everything_without_workers_tracebacks_even_unclosed(tmp_path):
    script = run_script(tmp_path, LOOP, start_new_session=True)
    pids = [int(script.stdout.readline()) for _ in range(2)]
    time.sleep(0.5)
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, err = script.communicate(timeout=20)
    assert script.returncode == 5
    assert err == ""
    wait_until(lambda: not any(map(alive, pids)))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = run_script(tmp_path, LOOP)
    pids = [int(script.stdout.readline()) for _ in range(2)]
    script.kill()
    script.communicate(timeout=20)
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("options", [{"workers": -1}, {"depth": 0}, {"timeout": 0.0}, {"cache_bytes": -1}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="Prefetcher: expected"):
        prefetcher(**options)


def sample(path, data_type="video", index=0):
    return Sample(index, str(index), "Which?", data_type, "free-form", "<answer>x</answer>", path=path)


def test_load_media(tmp_path):
    config = VideoConfig(max_frames=4, max_pixels=56 * 56)  # the minimum goes down with it
    video = write_video(tmp_path / "v.mp4", numbered_frames(30, 56, 56))
    media = load_media(sample(video), config)
    clip = read_frames(video, max_frames=4, max_pixels=56 * 56, min_pixels=56 * 56, planes=True)
    expected = media_from_clip(clip, "video")
    assert torch.equal(media.patches, expected.patches)
    assert media.grid_thw == expected.grid_thw == (2, 4, 4)
    assert media.second_per_grid == pytest.approx(2 * 3 / 4)
    assert media.seconds > 0
    Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(tmp_path / "i.png")
    image = load_media(sample(tmp_path / "i.png", "image"), VideoConfig(image_max_pixels=28 * 56, image_min_pixels=784))
    assert (image.kind, image.grid_thw, image.second_per_grid) == ("image", (1, 2, 2), 0.0)
    assert load_media(sample(None, "text"), config) is None
    with pytest.raises(SampleError, match="no path"):
        load_media(sample(None), config)
    with pytest.raises(ConfigError, match="backend"):
        load_media(sample(video), VideoConfig(backend="vlc"))
    assert media_key(sample(None, "text")) is None
    assert media_key(sample(video)) == media_key(sample(video, index=9)) != media_key(sample(video, "image"))


def test_real_videos_text_and_bad_files_together():
    names = ["nasa.mp4", "pancake.mkv", "corrupted.mp4", "av1.mkv", "rotated_90.mov", "missing.mp4"]
    samples = [sample(real_video(name), index=i) for i, name in enumerate(names)]
    samples.insert(2, sample(None, "text", index=6))
    load = functools.partial(load_media, video=VideoConfig())
    with Prefetcher(load, workers=2, depth=4, timeout=60, cache_bytes=2**26, key=media_key) as ahead:
        first = list(ahead.iterate(samples))
        again = list(ahead.iterate(samples))
        assert ahead.stats.errors == {"decode": 2, "missing_file": 2}
        assert ahead.stats.cache_hits == 4
    assert [s for s, _ in first] == samples
    for (s, result), (_, second) in zip(first, again, strict=True):
        if s.data_type == "text":
            assert result is None
        elif s.path.name in ("corrupted.mp4", "missing.mp4"):
            assert isinstance(result, SampleError)
            assert result.path == str(s.path)
        else:
            assert isinstance(result, Media)
            assert second is result
            assert torch.equal(result.patches, load(s).patches)
            T, h, w = result.grid_thw
            assert result.patches.shape == (T * h * w, 1176)


def test_no_thread_or_process_is_left_behind():
    before = threading.active_count()
    with prefetcher(workers=2) as ahead:
        list(ahead.iterate([Work("square", n) for n in range(3)]))
    wait_until(lambda: threading.active_count() <= before)


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
        videor1.cache._write_file = hang_in_the_write
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


def decoder(tmp_path=None, *, workers=1, cache_bytes=0, depth=4, timeout=60, limit=2**20):
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

    monkeypatch.setattr("videor1.cache._write_file", full)
    monkeypatch.setattr("videor1.prefetch._PAUSE_SECONDS", 0.0)
    ahead, reports = decoder(tmp_path, workers=0, cache_bytes=2**20)
    with ahead:
        for _ in range(2):
            assert all(isinstance(r, Media) for _, r in ahead.iterate(map(Decode, paths)))
        assert (ahead.stats.cache_errors, ahead.stats.loaded, ahead.stats.cache_hits) == (4, 4, 4)
    assert len(tries) == 4
    failed = f"write failed: {tmp_path / 'cache'}: No space left on device"
    assert reports == [f"disk cache: {failed}; training goes on without"]
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr("videor1.prefetch._PAUSE_SECONDS", 1000.0)
    ahead, reports = decoder(tmp_path, workers=0)
    with ahead:
        list(ahead.iterate(map(Decode, paths)))
        assert (ahead.stats.cache_errors, ahead.stats.loaded, len(tries)) == (1, 4, 5)  # not tried at every video
        monkeypatch.undo()
        ahead._write_again = 0.0  # the pause is over
        list(ahead.iterate(map(Decode, paths)))
    assert left_in(tmp_path / "cache") == [".safetensors"] * 4


def test_a_disk_that_takes_no_more_bytes_in_the_workers(tmp_path):
    """The kernel ends each write in the middle, in real worker processes."""
    paths = files(tmp_path)
    body = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_prefetch import *

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
    _, err = script.communicate(timeout=60)
    assert script.returncode == 0, err
    assert [decodes(path) for path in paths] == [1] * 4
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("end", ["killed", "timeout", "closed"])
def test_a_worker_that_ends_in_a_write_leaves_nothing_behind(tmp_path, end):
    paths = files(tmp_path)
    ahead, _ = decoder(tmp_path, workers=1, timeout=2.0 if end == "timeout" else 60)
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
            assert ahead.stats.worker_deaths == 1
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
    """SIGKILL from outside to the worker that decodes a file, once it writes to the cache."""
    wait_until(lambda: list(folder.glob(".*.tmp")))
    os.kill(int(Path(f"{path}.log").read_text()), signal.SIGKILL)


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
    assert (record.levelname, record.name) == ("WARNING", "videor1.prefetch")
    assert str(path) in record.getMessage()
