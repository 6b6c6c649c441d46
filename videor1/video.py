"""A video or image file to upright RGB frames and the size the vision tower will see.

A file that cannot be read in full is a ``SampleError``: never a shortened or replaced clip. (Damage inside a frame that
the decoder repairs without reporting it goes unnoticed, and so does a cut MPEG-TS or raw stream.) Kinds:
``missing_file``, ``not_video``, ``truncated``, ``zero_frames``, ``too_few_frames``, ``decode``, ``image``,
``aspect_ratio``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps

from videor1.config import IMAGE_MAX_PIXELS, VIDEO_MAX_PIXELS
from videor1.errors import ConfigError
from videor1.truncation import missing_bytes
from videor1.types import Clip, SampleError

FACTOR = 28  # pixels: 14 a patch, patches merged 2 x 2
MIN_FRAMES = 4  # the reference's lower bound, where the file has as many
MAX_ASPECT_RATIO = 200
IMAGE_MIN_PIXELS = 4 * 28 * 28

# Containers of video. What is not here stays closed: still images, text, and playlists, which can name other files.
_CONTAINERS = (
    "3g2,3gp,apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegtsraw,mpegvideo,mxf,nut,obu,"
    "ogg,rm,swf,vc1,vob,webm,wtv,yuv4mpegpipe"
)
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}


def read_frames(
    path: str | Path,
    *,
    max_frames: int = 16,
    fps: float = 2.0,
    max_pixels: int = VIDEO_MAX_PIXELS,
    min_pixels: int | None = None,
    backend: str = "auto",
    device: str | torch.device = "cpu",
) -> Clip:
    """Decode the sampled frames of a video, upright, at the source's resolution.

    n = frames in the file / its fps * ``fps``, clipped to [4, min(max_frames, frames in the file)], floored to even;
    the frames are number round(linspace(0, frames - 1, n)) in presentation order (the reference's rule; a file of two
    or three frames gives two). Frames are counted by demuxing and checked against what decodes, never taken from a
    header. The target ``Clip.size`` is ``smart_resize`` with the cap max(max_pixels, int(1.05 * min_pixels)).

    Args:
        path: the file; H.264, HEVC, AV1, VP9 and what else FFmpeg decodes, any pixel format.
        max_frames: frames at most, at least 2.
        fps: frames per second to sample.
        max_pixels, min_pixels: bounds on a resized frame's pixels; min_pixels defaults to the smaller of max_pixels
            and ``VIDEO_MAX_PIXELS`` (the reference's minimum equals its maximum).
        backend: "auto" or "pyav".
        device: where the frames go.

    Raises:
        SampleError: for a file that cannot be used (the kinds are listed at the top of this module).
        ValueError: for an option out of range or a backend that is not there (``ConfigError``).
    """
    check_backend(backend)
    if max_frames < 2 or not fps > 0:
        raise ValueError(f"read_frames: expected max_frames of 2 or more and fps above 0, got {max_frames} and {fps}")
    min_pixels = min(max_pixels, VIDEO_MAX_PIXELS) if min_pixels is None else min_pixels
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(f"read_frames: expected 1 <= min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
    path = Path(path)
    _check_file(path, "not_video")
    if missing := missing_bytes(path):
        raise SampleError("truncated", f"the file is cut: its last {missing} bytes are missing", path)
    with _as_sample_errors(path):
        decoded, total, source_fps = _decode_sampled(path, max_frames, fps)
    frames = torch.from_numpy(np.stack(decoded.images))
    height, width = frames.shape[1:3]
    return Clip(
        frames=frames.to(device),
        size=_resize_or_sample_error(path, height, width, min_pixels, video_pixel_cap(min_pixels, max_pixels)),
        fps=len(frames) / total * source_fps,
        timestamps=tuple(decoded.seconds),
        total_frames=total,
        source_fps=source_fps,
        path=str(path),
        backend="pyav",
    )


def read_image(
    path: str | Path, *, max_pixels: int = IMAGE_MAX_PIXELS, min_pixels: int = IMAGE_MIN_PIXELS
) -> Clip:
    """Read a still image as a clip of one frame, fps 0: EXIF orientation applied, transparency laid on white.

    Palette, grey (8 and 16 bit) and CMYK images become RGB; of an animation, the first frame is taken.

    Raises:
        SampleError: ``missing_file``; ``image`` if it is no image, is broken or cut; ``aspect_ratio``.
    """
    path = Path(path)
    _check_file(path, "image")
    try:
        with Image.open(path) as image:
            rgb = np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's readers raise many types on broken bytes
        raise SampleError("image", f"cannot read the image: {error}", path) from error
    height, width = rgb.shape[:2]
    return Clip(
        frames=torch.from_numpy(rgb)[None],
        size=_resize_or_sample_error(path, height, width, min_pixels, max_pixels),
        fps=0.0,
        timestamps=(0.0,),
        total_frames=1,
        source_fps=0.0,
        path=str(path),
        backend="pillow",
    )


def smart_resize(
    height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = FACTOR
) -> tuple[int, int]:
    """Qwen2-VL's target size: both sides multiples of ``factor``, pixels within bounds, aspect ratio about kept.

    Sides are rounded half to even to a multiple, at least one. Above max_pixels both are scaled by
    sqrt(max_pixels / (height * width)) and floored, below min_pixels by sqrt(min_pixels / (height * width)) and raised
    to the next multiple (which may exceed max_pixels).

    Raises:
        ValueError: a side below 1, an aspect ratio above 200, or min_pixels above max_pixels.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"expected sides of 1 or more, their ratio at most {MAX_ASPECT_RATIO}, got {width}x{height}")
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(f"expected 1 <= min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
    new_height, new_width = (max(factor, round(side / factor) * factor) for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def video_pixel_cap(min_pixels: int, max_pixels: int) -> int:
    """The cap on a video frame's pixels that the reference arrives at: max(max_pixels, int(1.05 * min_pixels)).

    With its minimum equal to its maximum (128 * 784) that is 105369, so that 640x480 becomes 364x280. The reference
    also shares a budget of pixels over the frames; it only binds above 384 frames and is not applied here.
    """
    return max(max_pixels, int(min_pixels * 1.05))


def sample_indices(total: int, source_fps: float, *, max_frames: int, fps: float) -> list[int]:
    """Which of ``total`` frames to use (the reference's rule, see ``read_frames``); empty where fewer than 2 exist."""
    n = min(max(total / source_fps * fps, MIN_FRAMES), min(max_frames, total) // 2 * 2)
    n = int(n) // 2 * 2
    return torch.linspace(0, total - 1, n).round().long().tolist() if n else []


def check_backend(backend: str) -> None:
    """Raise a ``ConfigError`` for a decoder that this version does not have."""
    if backend not in ("auto", "pyav"):
        raise ConfigError(f"video.backend: {backend!r} is not available in this version; use 'auto' or 'pyav'")


@dataclass
class _Decoded:
    """One pass over a file: the wanted frames in presentation order, and the pts of every frame that came out."""

    images: list[np.ndarray] = field(default_factory=list)  # uint8 [H, W, 3]
    seconds: list[float] = field(default_factory=list)
    stamps: list[int | None] = field(default_factory=list)


def _decode_sampled(path: Path, max_frames: int, fps: float) -> tuple[_Decoded, int, float]:
    """(wanted frames, frames in the file, source fps), holding no more decoded frames than are wanted."""
    stamps, header_fps, time_base = _demux(path)
    # Packets are not always frames (hidden frames, packed streams): if the count proves wrong, decode once more.
    for _ in range(2):
        by_pts = None not in stamps and len(set(stamps)) == len(stamps)
        keys = sorted(s for s in stamps if s is not None) if by_pts else list(range(len(stamps)))
        source_fps = _frame_rate(header_fps, keys if by_pts else [], time_base)
        indices = sample_indices(len(keys), source_fps, max_frames=max_frames, fps=fps) if keys else []
        decoded = _decode(path, {keys[i] for i in indices}, by_pts, source_fps)
        if sorted(decoded.stamps, key=str) == sorted(stamps, key=str) if by_pts else len(decoded.stamps) == len(keys):
            break
        stamps = decoded.stamps
    else:
        raise SampleError("decode", "two passes over the file gave different frames", path)
    if not keys:
        raise SampleError("zero_frames", "the video stream holds no frame", path)
    if not indices:
        raise SampleError("too_few_frames", f"a video needs at least 2 frames, this one has {len(keys)}", path)
    assert len(decoded.images) == len(indices)
    return decoded, len(keys), source_fps


def _demux(path: Path) -> tuple[list[int | None], Fraction | None, Fraction]:
    """(pts of every packet that is to be shown, the header's frame rate, seconds per unit of pts)."""
    with _open(path) as (container, stream):
        stamps: list[int | None] = []
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise SampleError("truncated", f"packet {len(stamps)} is damaged or cut", path)
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
        return stamps, stream.average_rate or stream.guessed_rate, stream.time_base


def _decode(path: Path, wanted: Collection[int], by_pts: bool, source_fps: float) -> _Decoded:
    """Decode everything; keep the frames whose pts (or, without usable pts, ordinal) is wanted."""
    result = _Decoded()
    kept: list[tuple[int, float, np.ndarray]] = []
    with _open(path) as (container, stream):
        for ordinal, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise SampleError("decode", f"frame {ordinal} is damaged", path)
            result.stamps.append(frame.pts)
            key = frame.pts if by_pts else ordinal
            if key in wanted:
                seconds = ordinal / source_fps if frame.time is None else float(frame.time)
                kept.append((key, seconds, _upright_rgb(frame, path)))
    if len({image.shape for _, _, image in kept}) > 1:
        raise SampleError("decode", "the frame size changes within the video", path)
    for _, seconds, image in sorted(kept, key=lambda entry: entry[0]):
        result.images.append(image)
        result.seconds.append(seconds)
    return result


def _upright_rgb(frame: av.VideoFrame, path: Path) -> np.ndarray:
    quarter_turns, rest = divmod(frame.rotation, 90)
    if rest:
        raise SampleError("decode", f"the file asks for a rotation by {frame.rotation} degrees", path)
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns))  # both count anticlockwise


def _frame_rate(header: Fraction | None, keys: list[int], time_base: Fraction) -> float:
    """Average frames per second: the header's, unless the frames' own times differ from it by more than 1%."""
    measured = 0.0
    if len(keys) > 1:
        measured = float((len(keys) - 1) / ((keys[-1] - keys[0]) * time_base))
    if header and (not measured or abs(float(header) - measured) <= 0.01 * measured):
        return float(header)
    return measured or float(header or 25)


@contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        # The prefix keeps a colon in the name from reading as a protocol.
        container = av.open(f"file:{path}", options=_OPEN_OPTIONS)
    except av.error.FFmpegError as error:
        raise SampleError("not_video", f"not a video container that can be read: {_reason(error)}", path) from error
    with container:
        # Cover art is a video stream too, of audio files.
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise SampleError("not_video", "the file has no video stream", path)
        streams[0].codec_context.thread_count = 1  # parallel over files, not inside one
        yield container, streams[0]


@contextmanager
def _as_sample_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        raise SampleError("decode", f"decoding failed: {_reason(error)}", path) from error
    except (OSError, ValueError) as error:
        raise SampleError("decode", f"decoding failed: {error}", path) from error


def _reason(error: av.error.FFmpegError) -> str:
    log = error.log[2].strip() if error.log else ""
    return f"{error.strerror} ({log})" if log else str(error.strerror)


def _check_file(path: Path, kind: str) -> None:
    if not path.exists():
        raise SampleError("missing_file", "no such file", path)
    if not path.is_file():
        raise SampleError(kind, "not a regular file", path)
    if path.stat().st_size == 0:
        raise SampleError(kind, "the file is empty", path)


def _resize_or_sample_error(
    path: Path, height: int, width: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        message = f"{width}x{height}: one side is more than {MAX_ASPECT_RATIO} times the other"
        raise SampleError("aspect_ratio", message, path)
    return smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # Pillow would clip these to 0..255 without a word
        raise ValueError(f"pixels of mode {image.mode} have no defined range")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
