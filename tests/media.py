"""Small video, sound and image files for tests."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

REAL_VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "videos"
LEVELS_PER_FRAME = 5  # grey levels between neighbours of ``numbered_frames``: more than a codec blurs


def real_video(name: str) -> Path:
    """A video made by others; skips the test where the folder of them is missing."""
    if not REAL_VIDEOS.is_dir():
        pytest.skip(f"the folder of real videos is missing: {REAL_VIDEOS}")
    return REAL_VIDEOS / name


def numbered_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 [count, height, width, 3]: frame i is grey of level 5 i, so that a decoded frame tells its number."""
    assert count * LEVELS_PER_FRAME <= 256
    return np.repeat(np.arange(count, dtype=np.uint8) * LEVELS_PER_FRAME, height * width * 3).reshape(
        count, height, width, 3
    )


def frame_numbers(frames) -> list[int]:
    """Which of ``numbered_frames`` these are."""
    return [round(float(frame.double().mean()) / LEVELS_PER_FRAME) for frame in frames]


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    rate: int = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    pts_ms: Sequence[int] | None = None,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
    mux_options: dict[str, str] | None = None,
    container: str | None = None,
) -> Path:
    """Encode frames [F, H, W, 3]; ``pts_ms`` gives each its own time in milliseconds."""
    with av.open(str(path), "w", format=container, options=mux_options or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def write_sound(path: Path, *, with_empty_video: bool = False) -> Path:
    """A second of silence, and if asked for a video stream without a frame beside it."""
    with av.open(str(path), "w") as out:
        if with_empty_video:
            video = out.add_stream("libx264", rate=10)
            video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        stream = out.add_stream("aac", rate=16000)
        for i in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, i * 1024
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def cut(path: Path, target: Path, fraction: float = 0.6) -> Path:
    """The first part of a file."""
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return target
