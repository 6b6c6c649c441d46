"""Decoders return the requested frames for every structure of file and with every backend."""

import sys
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from coded_videos import COUNT, MADE, Make, decode, decoded_numbers, picks
from media import coded_frames, write_video

from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video import read_frames
from videor1.video.decoders import BACKENDS, check_backend, open_decoder
from videor1.video.decoders.pyav import PyAvDecoder

# Frames are counted, not times, and a header is not believed; a raw stream has no rate: FFmpeg says 25.
RATES = dict.fromkeys(("variable frame rate", "variable frame rate mp4"), 319 / (4 + 219 * 0.3)) | {"no times": 25}


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
        fps = RATES.get(name, 10)
        assert info.fps == pytest.approx(fps, rel=0.02 if name in RATES else 1e-6)
        times = [0.04 * n if n < 100 else 4 + 0.3 * (n - 100) for n in range(total)] if file.vfr else None
        expected = times or [n / fps for n in range(total)]
        assert [time - info.seconds[0] for time in info.seconds] == pytest.approx(expected, abs=2e-3)
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
    for call in (check_backend, lambda backend: open_decoder(path, backend=backend)):
        with pytest.raises(ConfigError, match="decord"):
            call("decord")
    with (
        closing(open_decoder(path, backend="pyav-nvdec")) as decoder,
        pytest.raises(ConfigError, match="the frames are wanted on cpu"),
    ):
        decoder.frames([0])


def test_threads_default_to_one_in_a_worker(made: Make) -> None:
    with (
        patch("videor1.video.reading.open_decoder", Mock(side_effect=open_decoder)) as opened,
        patch("multiprocessing.parent_process") as parent,
    ):
        for worker, options in ((None, {}), (object(), {}), (object(), {"threads": 3})):
            parent.return_value = worker
            read_frames(made("gop 12"), **options)
    assert [call.kwargs["threads"] for call in opened.call_args_list] == [0, 1, 3]
