"""How much memory decoding a sample takes, told from its headers: what takes more is refused before it is decoded."""

from __future__ import annotations

from pathlib import Path

import av

from videor1.types import SampleError

MAX_DECODED_MB = 1024  # the default of data.max_decoded_mb
# What a video takes besides the frames that are kept: those that the decoder holds, and buffers. Measured with PyAV.
_HELD_FRAMES = 12
_HELD_MB = 32
_IMAGE_BYTES = 10  # per pixel, while an image is decoded, turned and converted to RGB; measured with Pillow
# These formats come out of their library in one piece, which Pillow copies twice.
_WHOLE_IMAGE_BYTES = {"WEBP": 20, "AVIF": 20, "GIF": 14}


def check_video(path: Path, frames: int, width: int, height: int, pix_fmt: str, *, planes: bool, limit_mb: int) -> int:
    """Raise a ``SampleError`` of kind ``too_large`` where decoding these frames takes more than ``limit_mb`` MiB.

    The frames that are kept are counted, as planes or RGB, and those that the decoder holds.

    Returns:
        The bytes that it takes, about.
    """
    stored = _stored_bytes(pix_fmt)
    kept = stored if planes and stored <= 3 else 3.0
    needed = (frames * kept + _HELD_FRAMES * stored) * width * height + _HELD_MB * 2**20
    return _check(path, needed, f"{frames} frames of", width, height, limit_mb)


def check_image(path: Path, width: int, height: int, form: str, *, limit_mb: int) -> int:
    """Raise a ``SampleError`` of kind ``too_large`` where reading an image takes more than ``limit_mb`` MiB.

    Args:
        path: the image, for the error.
        width, height: its size in pixels.
        form: Pillow's name of its format.
        limit_mb: the limit.

    Returns:
        The bytes that it takes, about.
    """
    bytes_per_pixel = _WHOLE_IMAGE_BYTES.get(form, _IMAGE_BYTES)
    return _check(path, bytes_per_pixel * width * height, "an image of", width, height, limit_mb)


def check_images(path: Path, count: int, width: int, height: int, *, limit_mb: int) -> int:
    """Raise a ``SampleError`` of kind ``too_large`` where this many images of one size, kept as RGB, take more.

    Returns:
        The bytes that they take, about.
    """
    return _check(path, (3 * count + _IMAGE_BYTES) * width * height, f"{count} images of", width, height, limit_mb)


def most_pixels(limit_mb: int) -> int:
    """Return the pixels of the largest frame of 4:2:0 of which two can be decoded with ``limit_mb`` MiB."""
    return max(1, int((limit_mb - _HELD_MB) * 2**20 / ((2 + _HELD_FRAMES) * 1.5)))


def check_together(path: Path | None, decoded_bytes: int, count: int, *, limit_mb: int) -> None:
    """Raise a ``SampleError`` of kind ``too_large`` where the media of a sample take more than ``limit_mb`` MiB.

    Args:
        path: the medium with which they do, for the error.
        decoded_bytes: what decoding each takes, added up.
        count: how many media these are.
        limit_mb: the limit.
    """
    if decoded_bytes > limit_mb * 2**20:
        message = (
            f"{count} media of one sample take about {decoded_bytes / 2**20:,.0f} MiB together to decode, more than "
            f"data.max_decoded_mb ({limit_mb})"
        )
        raise SampleError("too_large", message, path)


def _check(path: Path, needed: float, what: str, width: int, height: int, limit_mb: int) -> int:
    if needed > limit_mb * 2**20:
        message = (
            f"{what} {width}x{height} pixels take about {needed / 2**20:,.0f} MiB to decode, more than "
            f"data.max_decoded_mb ({limit_mb})"
        )
        raise SampleError("too_large", message, path)
    return int(needed)


def _stored_bytes(pix_fmt: str) -> float:
    """Return the bytes that a pixel takes in FFmpeg's pixel format; 3 where it is unknown."""
    try:
        components = av.VideoFormat(pix_fmt, 16, 16).components
    except ValueError:
        return 3.0
    return sum(-(-part.bits // 8) * part.width * part.height for part in components) / 256 or 3.0
