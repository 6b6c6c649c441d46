"""Decoders return the requested frames for every structure of file and with every backend."""

import random
import sys

import av
import numpy as np
import pytest
import torch
from coded_videos import COUNT, MADE, decoded_numbers
from media import coded_frames, coded_numbers, real_video, rgb_of, write_video

from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video import read_frames
from videor1.video.decoders import BACKENDS, check_backend, open_decoder
from videor1.video.decoders.pyav import PyAvDecoder

REAL = ("nasa.mp4", "pancake.mkv", "av1.mkv", "hevc.mp4", "rotated_90.mov")


def available():
    names = []
    for name in BACKENDS:
        try:
            check_backend(name)
        except ConfigError:
            continue
        if name not in ("auto", "pyav-nvdec"):
            names.append(name)
    return names


def picks(count):
    """Yield sparse, dense and single choices of frames, each ascending."""
    rng = random.Random(count)
    yield [0, count // 2, count - 1]
    yield sorted(rng.sample(range(count), 16))
    yield [count - 1]
    yield list(range(count // 3, count // 3 + 30))
    for _ in range(12):
        yield sorted(rng.sample(range(count), rng.choice((1, 2, 3, 5))))


@pytest.mark.parametrize("threads", [1, 0])
@pytest.mark.parametrize("name", MADE)
def test_the_frames_asked_for(made, name, threads):
    file, path = MADE[name], made(name)
    total = COUNT - file.offset
    with_all = PyAvDecoder(path, threads=threads)
    info = with_all.probe()
    assert info.num_frames == len(info.seconds) == total
    everything = with_all.frames(range(total))
    with_all.close()
    assert decoded_numbers(everything) == [file.offset + i for i in range(total)]
    assert everything.seconds == pytest.approx(info.seconds)
    decoder = PyAvDecoder(path, threads=threads)
    for indices in picks(total):
        frames = decoder.frames(indices)
        assert torch.equal(frames.pixels, everything.pixels[indices]), indices
        assert frames.seconds == tuple(everything.seconds[i] for i in indices)
        if len(indices) == 3 and file.max_packets:
            assert frames.decoded <= file.max_packets
    decoder.close()


@pytest.mark.parametrize("backend", available())
@pytest.mark.parametrize("name", ["gop 12", "b-frames", "open gop mkv", "variable frame rate", "edit list", "odd size"])
def test_every_backend_gives_the_frames_asked_for_or_says_why_not(made, name, backend):
    file = MADE[name]
    decoder = open_decoder(made(name), backend=backend)
    try:
        total = decoder.probe().num_frames
        assert total == COUNT - file.offset
        for indices in (range(total), [3, 100, 101, total - 1], [200, 7, 200]):
            frames = decoder.frames(indices)
            assert coded_numbers(frames.pixels) == [file.offset + i for i in indices]
            assert frames.backend == backend
    except SampleError:
        if backend == "pyav":
            raise
    finally:
        decoder.close()


def test_order_duplicates_and_bounds(made):
    decoder = PyAvDecoder(made("b-frames"))
    for planes in (False, True):
        frames = decoder.frames([300, 5, 300, 6], planes=planes)
        assert coded_numbers(frames.pixels.planes[0] if planes else frames.pixels) == [300, 5, 300, 6]
        assert frames.seconds == pytest.approx((30.0, 0.5, 30.0, 0.6))
        assert len(decoder.frames([], planes=planes).pixels) == 0
    for number in (-1, COUNT):
        with pytest.raises(IndexError, match=f"frame {number} of a video of {COUNT} frames"):
            decoder.frames([0, number])
    decoder.close()


@pytest.mark.parametrize("name", REAL)
def test_sparse_frames_of_real_videos_are_those_of_a_whole_decode(name):
    path = real_video(name)
    with av.open(str(path)) as container:
        whole = np.stack([rgb_of(frame) for frame in container.decode(container.streams.best("video"))])
    decoder = PyAvDecoder(path)
    for indices in picks(len(whole)) if len(whole) > 60 else ([0], [len(whole) - 1], list(range(len(whole)))):
        assert np.array_equal(decoder.frames(indices).pixels.numpy(), whole[indices])
    decoder.close()


def test_one_frame(tmp_path):
    decoder = PyAvDecoder(write_video(tmp_path / "1.mp4", coded_frames(1)))
    assert decoded_numbers(decoder.frames([0, 0])) == [0, 0]
    decoder.close()


def test_backends_by_name(made, monkeypatch):
    path = made("gop 12")
    for backend in ("auto", "pyav"):
        decoder = open_decoder(path, backend=backend)
        assert decoder.frames([1]).backend == decoder.backend == "pyav"
        decoder.close()
    with pytest.raises(ConfigError, match="did you mean 'decord'"):
        open_decoder(path, backend="decrod")
    monkeypatch.setitem(sys.modules, "decord", None)
    for call in (lambda: check_backend("decord"), lambda: open_decoder(path, backend="decord")):
        with pytest.raises(ConfigError, match="decord"):
            call()
    decoder = open_decoder(path, backend="pyav-nvdec")
    with pytest.raises(ConfigError, match="the frames are wanted on cpu"):
        decoder.frames([0])
    decoder.close()


def test_threads_default_to_one_in_a_worker(made, monkeypatch):
    asked = []

    def spy(*args, **kwargs):
        asked.append(kwargs["threads"])
        return open_decoder(*args, **kwargs)

    monkeypatch.setattr("videor1.video.reading.open_decoder", spy)
    read_frames(made("gop 12"))
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    read_frames(made("gop 12"))
    read_frames(made("gop 12"), threads=3)
    assert asked == [0, 1, 3]
