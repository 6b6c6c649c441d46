"""Decoders return the requested frames for every structure of file and with every backend."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_videos import COUNT, MADE, Make, decode, decoded_numbers, picks
from media import coded_frames, write_video

from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video import read_frames
from videor1.video.decoders import BACKENDS, check_backend, open_decoder
from videor1.video.decoders.pyav import PyAvDecoder

OTHER_RATES = ("variable frame rate", "variable frame rate mp4", "no times")  # than 10 a second


def installed() -> list[str]:
    """The optional backends that load here."""
    names = []
    for name in BACKENDS[3:]:
        try:
            check_backend(name)
        except ConfigError:
            continue
        names.append(name)
    return names


@pytest.mark.parametrize("name", MADE)
def test_the_frames_asked_for(made: Make, name: str) -> None:
    file, path = MADE[name], made(name)
    total = COUNT - file.offset
    everything = decode(path, range(total))
    assert decoded_numbers(everything) == [file.offset + i for i in range(total)]
    with closing(PyAvDecoder(path, threads=0)) as decoder:
        info = decoder.probe()
        assert info.num_frames == len(info.seconds) == total
        assert info.seconds == pytest.approx(everything.seconds)
        assert name in OTHER_RATES or info.fps == pytest.approx(10)
        for indices in picks(total):
            frames = decoder.frames(indices)
            assert torch.equal(frames.pixels, everything.pixels[indices]), indices
            assert frames.seconds == tuple(everything.seconds[i] for i in indices)
            if len(indices) == 3 and file.max_packets:
                assert frames.decoded <= file.max_packets


@pytest.mark.parametrize("backend", installed())
@pytest.mark.parametrize("name", ["gop 12", "b-frames", "open gop mkv", "variable frame rate", "edit list", "odd size"])
def test_every_backend_gives_the_frames_asked_for_or_says_why_not(made: Make, name: str, backend: str) -> None:
    file, indices = MADE[name], [200, 7, 200]
    device = "cuda" if backend == "pynvvideocodec" else "cpu"
    with closing(open_decoder(made(name), backend=backend, device=device)) as decoder:
        total = decoder.probe().num_frames
        assert total == COUNT - file.offset
        try:
            for asked in (range(total), [3, 100, 101, total - 1], indices):
                frames = decoder.frames(asked)
                assert decoded_numbers(frames) == [file.offset + i for i in asked]
                assert frames.backend == backend
        except SampleError:
            assert name != "b-frames", "every library reads these"
        else:
            assert (frames.pixels.cpu().int() - decode(made(name), indices).pixels.int()).abs().max() <= 3


def test_order_duplicates_and_bounds(made: Make, tmp_path: Path) -> None:
    with closing(PyAvDecoder(made("b-frames"))) as decoder:
        for planes in (False, True):
            frames = decoder.frames([300, 5, 300, 6], planes=planes)
            assert decoded_numbers(frames) == [300, 5, 300, 6]
            assert frames.seconds == pytest.approx((30.0, 0.5, 30.0, 0.6))
            assert len(decoder.frames([], planes=planes).pixels) == 0
        for number in (-1, COUNT):
            with pytest.raises(IndexError, match=f"frame {number} of a video of {COUNT} frames"):
                decoder.frames([0, number])
    assert decoded_numbers(decode(write_video(tmp_path / "1.mp4", coded_frames(1)), [0, 0])) == [0, 0]


def test_backends_by_name(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made("gop 12")
    for backend in ("auto", "pyav"):
        with closing(open_decoder(path, backend=backend)) as decoder:
            assert decoder.frames([1]).backend == decoder.backend == "pyav"
    monkeypatch.setitem(sys.modules, "decord", None)
    for call in (lambda: check_backend("decord"), lambda: open_decoder(path, backend="decord")):
        with pytest.raises(ConfigError, match="decord"):
            call()
    with (
        closing(open_decoder(path, backend="pyav-nvdec")) as decoder,
        pytest.raises(ConfigError, match="the frames are wanted on cpu"),
    ):
        decoder.frames([0])


def test_threads_default_to_one_in_a_worker(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["threads"])
        return open_decoder(*args, **kwargs)

    monkeypatch.setattr("videor1.video.reading.open_decoder", spy)
    read_frames(made("gop 12"))
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    read_frames(made("gop 12"))
    read_frames(made("gop 12"), threads=3)
    assert asked == [0, 1, 3]
