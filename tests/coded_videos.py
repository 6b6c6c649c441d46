"""Videos of every structure that decoders must read, with frames whose numbers can be read from their pixels."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import coded_frames, coded_numbers, ffmpeg_frames, rgb_of, shift_edit_list, write_video

from videor1.video.decoders import Decoder, Frames
from videor1.video.decoders.pyav import PyAvDecoder
from videor1_kernels.frames_to_patches import YuvFrames

Make = Callable[[str], Path]  # the fixture ``made``
COUNT = 320
X264 = {"preset": "veryfast", "sc_threshold": "0"}
SPARSE = {"max_packets": 3 * 26}  # three frames in as many groups of at most 24, and the pictures around


@dataclass(frozen=True)
class Made:
    """A file of ``coded_frames``."""

    name: str
    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    max_packets: int | None = None  # most packets that three frames far apart may take to decode; None: no bound
    offset: int = 0  # number of the first frame shown
    vfr: bool = False
    size: tuple[int, int] = (48, 80)
    mux_options: dict[str, str] = field(default_factory=dict)
    all_sync: bool = False  # remove the table of key frames, so that every packet is marked as one

    def write(self, folder: Path) -> Path:
        times = None
        if self.vfr:
            times = [40 * i if i < 100 else 4000 + 300 * (i - 100) for i in range(COUNT)]
        path = write_video(
            folder / self.name,
            coded_frames(COUNT, *self.size),
            codec=self.codec,
            pix_fmt=self.pix_fmt,
            options=self.options,
            pts_ms=times,
            mux_options=self.mux_options,
            container="h264" if self.name.endswith(".264") else None,
        )
        if self.all_sync:
            path.write_bytes(path.read_bytes().replace(b"stss", b"free", 1))
        return shift_edit_list(path, self.offset / 10) if self.offset else path


B_FRAMES = X264 | {"bf": "3", "b-adapt": "0", "g": "24"}
X265 = {"preset": "ultrafast"}
OPEN_GOP = X264 | {"x264-params": "open-gop=1:keyint=12:min-keyint=1:bframes=3:b-adapt=0:scenecut=0"}
REFRESH = X264 | {"x264-params": "intra-refresh=1", "g": "24", "bf": "0"}
CLOSED = "log-level=none:open-gop=0:keyint=12"
MADE = {
    "gop 1": Made("a.mp4", options=X264 | {"g": "1"}, max_packets=3),
    "gop 12": Made("a.mp4", options=X264 | {"g": "12", "bf": "0"}, **SPARSE),
    "gop 250": Made("a.mp4", options=X264 | {"g": "250", "bf": "2"}),
    "b-frames": Made("a.mp4", options=B_FRAMES, **SPARSE),
    "b-frames mkv": Made("a.mkv", options=B_FRAMES, **SPARSE),
    "b-frames ts": Made("a.ts", options=B_FRAMES),
    "b-frames flv": Made("a.flv", options=B_FRAMES),
    "one b-frame": Made("a.mp4", options=X264 | {"bf": "1", "b-adapt": "0", "g": "60"}),
    "b-pyramid": Made("a.mp4", options=B_FRAMES | {"bf": "7", "b-pyramid": "normal"}, **SPARSE),
    "open gop": Made("a.mp4", options=OPEN_GOP, **SPARSE),
    "open gop mkv": Made("a.mkv", options=OPEN_GOP, **SPARSE),
    "intra refresh": Made("a.mp4", options=REFRESH),
    "intra refresh mkv": Made("a.mkv", options=REFRESH),
    "no table of key frames": Made("a.mp4", options=B_FRAMES | {"g": "48"}, all_sync=True),
    "no table of key frames, hevc": Made(
        "a.mp4", "libx265", options=X265 | {"x265-params": "log-level=none:keyint=48"}, all_sync=True
    ),
    "fragments": Made("a.mp4", options=B_FRAMES, mux_options={"movflags": "frag_keyframe+empty_moov"}, **SPARSE),
    "mkv without cues": Made("a.mkv", options=B_FRAMES, mux_options={"live": "1"}, **SPARSE),
    "variable frame rate": Made("a.mkv", options=B_FRAMES, vfr=True, **SPARSE),
    "variable frame rate mp4": Made("a.mp4", options=B_FRAMES, vfr=True, **SPARSE),
    "edit list": Made("a.mp4", options=B_FRAMES | {"bf": "0"}, offset=30, **SPARSE),
    "edit list, b-frames": Made("a.mp4", options=B_FRAMES, offset=30, **SPARSE),
    "no times": Made("a.264", options=B_FRAMES),
    "odd size": Made("a.mp4", options=B_FRAMES, pix_fmt="yuv444p", size=(47, 81), **SPARSE),
    "odd size 4:2:0": Made("a.mkv", "ffv1", options={"g": "24"}, size=(47, 81), **SPARSE),
    "10 bit": Made(
        "a.mp4", "libx265", "yuv420p10le", X265 | {"x265-params": "log-level=none:keyint=24:min-keyint=24"}, **SPARSE
    ),
    "hevc open gop": Made(
        "a.mkv", "libx265", options=X265 | {"x265-params": "log-level=none:keyint=12:open-gop=1:bframes=4"}, **SPARSE
    ),
    "hevc": Made("a.mp4", "libx265", options=X265 | {"x265-params": "log-level=none:keyint=24:bframes=4:b-adapt=0"}),
    "hevc closed gop": Made("a.mp4", "libx265", options=X265 | {"x265-params": CLOSED}, **SPARSE),
    "hevc radl": Made(
        "a.mp4", "libx265", options={"preset": "superfast", "x265-params": f"{CLOSED}:bframes=4:b-adapt=0:radl=3"}
    ),
    "hevc temporal layers": Made(
        "a.mp4", "libx265", options=X265 | {"x265-params": "log-level=none:keyint=24:temporal-layers=3"}
    ),
    "av1": Made("a.mp4", "libsvtav1", options={"preset": "8", "g": "24", "crf": "20"}, size=(96, 160), **SPARSE),
    "vp9": Made("a.webm", "libvpx-vp9", options={"g": "24", "deadline": "realtime", "cpu-used": "8"}, **SPARSE),
    "vp8": Made("a.webm", "libvpx", options={"g": "24", "deadline": "realtime", "cpu-used": "8"}, **SPARSE),
    "mpeg2": Made("a.ts", "mpeg2video", options={"g": "12", "bf": "2", "b": "2M"}),
    "mpeg2 mkv": Made("a.mkv", "mpeg2video", options={"g": "12", "bf": "2", "b": "2M"}, **SPARSE),
    "mpeg4 avi": Made("a.avi", "mpeg4", options={"g": "12", "bf": "2", "b": "2M"}),
    "mpeg4 mp4": Made("a.mp4", "mpeg4", options={"g": "12", "bf": "2", "b": "2M"}, **SPARSE),
    "mjpeg": Made("a.mkv", "mjpeg", "yuvj420p", max_packets=3),
    "prores": Made("a.mov", "prores_ks", "yuv422p10le", max_packets=3),
    "gif": Made("a.gif", "gif", "rgb8"),
    "apng": Made("a.apng", "apng", "rgb24"),
}


def picks(count: int) -> Iterator[list[int]]:
    """Sparse, dense and single choices of frames, each ascending."""
    rng = random.Random(count)
    yield [0, count // 2, count - 1]
    yield sorted(rng.sample(range(count), 16))
    yield [count - 1]
    yield list(range(count // 3, count // 3 + 30))
    for _ in range(7):
        yield sorted(rng.sample(range(count), rng.choice((1, 2, 3, 5))))


def decode(
    path: Path, numbers: Collection[int], *, planes: bool = False, by: Any = PyAvDecoder, **options: Any
) -> Frames:
    with closing(by(path, **options)) as decoder:
        return decoder.frames(list(numbers), planes=planes)


def decoded_numbers(frames: Frames) -> list[int]:
    """Which of ``coded_frames`` these are, RGB or planes."""
    pixels = frames.pixels
    return coded_numbers(pixels.planes[0] if isinstance(pixels, YuvFrames) else pixels)


@functools.lru_cache(2)
def whole(path: Path) -> tuple[torch.Tensor, list[float]]:
    """All frames of a file by FFmpeg, upright, uint8 [F, height, width, 3], and their times in seconds."""
    frames = ffmpeg_frames(path)
    pixels = [np.rot90(rgb_of(frame), frame.rotation // 90) for frame in frames]
    return torch.from_numpy(np.stack(pixels)), [frame.time for frame in frames]


def assert_frames_asked_for(decoder: Decoder, path: Path, *, backend: str, first: int = 0, levels: int = 0) -> None:
    """In any order, with duplicates, one and many; numbers, times and pixels, to so many levels, are the file's."""
    pixels, seconds = whole(path)
    count = decoder.probe().num_frames
    assert count == len(pixels)
    rng = random.Random(1)
    some = [[rng.randrange(count) for _ in range(9)] for _ in range(2)]
    for indices in ([count - 1], [0], list(range(count)), [3, 1, 3], *some):
        frames = decoder.frames(indices)
        assert decoded_numbers(frames) == [first + i for i in indices]
        assert frames.pixels.dtype == torch.uint8
        assert (frames.pixels.int() - pixels[indices].int()).abs().max() <= levels
        assert frames.seconds == pytest.approx([seconds[i] for i in indices], abs=1e-9)
        assert (frames.rotation, frames.backend) == (0, backend)
        assert len(set(indices)) <= frames.decoded <= count
