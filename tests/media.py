"""Small video, sound and image files for tests."""

import itertools
import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from videor1.types import Sample, SampleError

REAL_VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "videos"
Change = Callable[[av.Packet], None]
LEVELS_PER_FRAME = 5  # grey levels between neighbours of ``numbered_frames``: more than a codec blurs


def real_video(name: str) -> Path:
    """A video made by others; skips the test where the folder of them is missing."""
    if not REAL_VIDEOS.is_dir():
        pytest.skip(f"the folder of real videos is missing: {REAL_VIDEOS}")
    return REAL_VIDEOS / name


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> SampleError:
    """The error of a call that must refuse the file of its first argument, which the error names."""
    with pytest.raises(SampleError) as caught:
        call(*args, **kwargs)
    assert caught.value.path == str(getattr(args[0], "path", args[0])), "an error must name its file"
    return caught.value


def sample_of(path: Path, kind: str = "video", **options: Any) -> Sample:
    """A question about a file."""
    return Sample(0, "0", "Which?", kind, "free-form", "<answer>x</answer>", path=path, **options)  # type: ignore[arg-type]


def packets_of(path: Path) -> list[av.Packet]:
    """The packets of a file's first video, in the order in which they are stored."""
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def ffmpeg_frames(path: Path) -> list[av.VideoFrame]:
    """All frames of a file as they leave the decoder, without this library's reader."""
    with av.open(str(path)) as container:
        return list(container.decode(container.streams.best("video")))


def rgb_of(frame: av.VideoFrame) -> np.ndarray:
    """A frame as FFmpeg converts it by the frame's own matrix and range, which PyAV before 17 has to be told."""
    if int(av.__version__.partition(".")[0]) >= 17:
        return frame.to_ndarray(format="rgb24")
    full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
    matrix = int(frame.colorspace) if int(frame.colorspace) in (1, 4, 7, 9) else 6
    told = {"src_colorspace": matrix, "dst_colorspace": 5, "src_color_range": 2 if full else 1, "dst_color_range": 2}
    return frame.reformat(format="rgb24", **told).to_ndarray()


# The eight orientations, (degrees anticlockwise, mirrored first): the matrix of an MP4 that FFmpeg shows so.
ORIENTATIONS = {(0, False): (1, 0, 0, 1), (90, False): (0, -1, 1, 0), (180, False): (-1, 0, 0, -1)}
ORIENTATIONS |= {(270, False): (0, 1, -1, 0), (0, True): (-1, 0, 0, 1), (90, True): (0, 1, 1, 0)}
ORIENTATIONS |= {(180, True): (1, 0, 0, -1), (270, True): (0, -1, -1, 0)}


def turned(pixels: np.ndarray, rotation: int, mirrored: bool) -> np.ndarray:
    """Pictures [F, height, width, ...] mirrored left to right, then turned anticlockwise."""
    return np.rot90(pixels[:, :, ::-1] if mirrored else pixels, rotation // 90, (1, 2))


def numbered_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 [count, height, width, 3]: frame i is grey of level 5 i, so that a decoded frame tells its number."""
    assert count * LEVELS_PER_FRAME <= 256
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None] * LEVELS_PER_FRAME
    return np.broadcast_to(levels, (count, height, width, 3)).copy()


def coded_frames(count: int, height: int = 48, width: int = 80) -> np.ndarray:
    """uint8 [count, height, width, 3]: frame i shows i in binary, as 2 x 5 black (0) and white (1) blocks."""
    assert count <= 1 << 10
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 5 // width
    block = rows[:, None] * 5 + columns  # which bit a pixel shows, the lowest at the top left
    bits = np.arange(count)[:, None, None] >> block & 1
    return np.repeat((bits * 255).astype(np.uint8)[..., None], 3, axis=-1)


def coded_numbers(frames: Any) -> list[int]:
    """Which of ``coded_frames`` these are (RGB or luma, upright), however strongly they were compressed."""
    pixels = np.asarray(frames)
    count, height, width = pixels.shape[:3]
    numbers = np.zeros(count, int)
    for bit in range(10):
        top, left = (bit // 5) * height / 2, (bit % 5) * width / 5
        rows = slice(int(top + height / 6), int(top + height / 3))
        columns = slice(int(left + width / 15), int(left + width / 7))
        numbers |= (pixels[:, rows, columns].reshape(count, -1).mean(1) > 128).astype(int) << bit
    return numbers.tolist()


def frame_numbers(frames: Any) -> list[int]:
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
    """Encode frames [F, H, W, 3]; ``pts_ms`` gives each its own time in milliseconds; ``rotation``
    (degrees anticlockwise, MP4 only) is written into the header."""
    with av.open(str(path), "w", format=container, options=mux_options or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if "vp" in codec:  # threads of libvpx wait for each other in a loop: for minutes on a busy machine
            stream.codec_context.thread_count = 1
        if pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    if rotation is not None:
        cosine, sine = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
        set_matrix(path, (cosine, -sine, sine, cosine))
    return path


def set_matrix(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """Write a matrix into an MP4's track header, in the standard's terms: (x', y') = (ax + cy, bx + dy)."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (round(value * 65536) for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def remux(path: Path, target: Path, change: Change, most: int | None = None, **options: str) -> Path:
    """Copy the first packets of a video, each changed before, into another file; ``options`` are of its muxer."""
    with av.open(str(path)) as source, av.open(str(target), "w", options=options) as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in itertools.islice((packet for packet in source.demux(stream) if packet.size), most):
            change(packet)
            packet.stream = copy
            out.mux(packet)
    return target


def in_decode_order(packet: av.Packet) -> None:
    """Let a packet's presentation time be that of decoding, as where a container has no other."""
    packet.pts = packet.dts


def later(seconds: float) -> Change:
    """Return a change that lets packets begin so much later."""

    def change(packet: av.Packet) -> None:
        ticks = round(seconds / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks

    return change


def join(pieces: Sequence[Path], target: Path) -> Path:
    """Append recordings to each other, byte by byte, as a recorder does that goes on: MPEG-TS, FLV, live Matroska."""
    first, *rest = (piece.read_bytes() for piece in pieces)
    begin = {".ts": lambda data: 0, ".flv": lambda data: 13, ".mkv": lambda data: data.index(b"\x1f\x43\xb6\x75")}
    target.write_bytes(first + b"".join(data[begin[target.suffix](data) :] for data in rest))
    return target


def shift_edit_list(path: Path, seconds: float) -> Path:
    """Let an MP4's edit list cut away its beginning."""
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12
    duration, media_time = struct.unpack_from(">Ii", data, entry)
    with av.open(str(path)) as container:
        ticks = round(container.streams.video[0].time_base.denominator * seconds)
    struct.pack_into(">Ii", data, entry, duration - round(1000 * seconds), media_time + ticks)
    path.write_bytes(data)
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
