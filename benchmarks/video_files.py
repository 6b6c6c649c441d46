"""Made video files to measure on: moving pictures, cheap to encode, made once into a temporary folder."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import av
import numpy as np


@functools.cache
def folder() -> Path:
    """A temporary folder, deleted when the process ends."""
    kept = tempfile.TemporaryDirectory(prefix="videor1-benchmark-")
    folder.kept = kept  # type: ignore[attr-defined]
    return Path(kept.name)


@functools.cache
def made_video(height: int, seconds: int, *, gop: int, rate: int = 30) -> Path:
    """16:9, H.264 with B-frames, ``rate`` frames a second, a key frame every ``gop`` frames.

    20 seconds are encoded and their packets repeated, each time later: minutes of video in seconds.
    """
    path = folder() / f"{height}-{seconds}-{gop}-{rate}.mp4"
    once = _encoded(height, min(seconds, 20), gop, rate)
    if seconds <= 20:
        return once
    with av.open(str(path), "w") as out, av.open(str(once)) as source:
        template = source.streams.video[0]
        stream = out.add_stream_from_template(template)
        length = round(20 / template.time_base)
        for again in range(seconds // 20):
            source.seek(0)
            for packet in source.demux(template):
                if packet.size:
                    packet.pts += again * length
                    packet.dts += again * length
                    packet.stream = stream
                    out.mux(packet)
    return path


@functools.cache
def _encoded(height: int, seconds: int, gop: int, rate: int) -> Path:
    path = folder() / f"{height}-{seconds}-{gop}-{rate}.once.mp4"
    width = height * 16 // 9 // 2 * 2
    options = {"preset": "veryfast", "crf": "26", "g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "bf": "2"}
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (height // 8 + 1, width // 8 + 64), dtype=np.uint8)
    wide = rough.repeat(8, 0).repeat(8, 1)[:height]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(seconds * rate):
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane, step in zip(frame.planes, (1, 2, 2), strict=True):
                shift = number * 3 % 480
                picture = wide[::step, shift : shift + width : step]
                target = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
                target[:, : plane.width] = picture[: plane.height, : plane.width]
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path
