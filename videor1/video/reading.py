"""A video or image file to upright RGB frames and the size the vision tower will see.

A file whose sampled frames cannot be read is a ``SampleError``: never a shortened or replaced clip. (Damage in parts
that need not be decoded, or that the decoder repairs without reporting it, goes unnoticed, and so does a cut MPEG-TS or
raw stream.) Kinds:
``missing_file``, ``not_video``, ``truncated``, ``zero_frames``, ``too_few_frames``, ``decode``, ``image``,
``aspect_ratio``.
"""

from __future__ import annotations

import bisect
import math
import multiprocessing
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from videor1.config import IMAGE_MAX_PIXELS, VIDEO_MAX_PIXELS
from videor1.errors import ConfigError
from videor1.types import Clip, SampleError
from videor1.video.decoders import Decoder, Frames, FramesChangedError, VideoInfo, check_backend, open_decoder
from videor1.video.decoders.index import check_file
from videor1_kernels.frames_to_patches import YuvFrames

__all__ = [
    "check_backend",
    "frames_between",
    "read_frames",
    "read_image",
    "read_rgb",
    "sample_indices",
    "smart_resize",
    "target_size",
    "video_pixel_cap",
]

FACTOR = 28  # pixels: 14 a patch, patches merged 2 x 2
MIN_FRAMES = 4  # the reference's lower bound, where the file has as many
MAX_ASPECT_RATIO = 200
IMAGE_MIN_PIXELS = 4 * 28 * 28


def read_frames(
    path: str | Path,
    *,
    max_frames: int = 16,
    fps: float = 2.0,
    max_pixels: int = VIDEO_MAX_PIXELS,
    min_pixels: int | None = None,
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    planes: bool = False,
    threads: int | None = None,
) -> Clip:
    """Decode the sampled frames of a video, upright, at the source's resolution.

    n = frames in the file / its fps * ``fps``, clipped to [4, min(max_frames, frames in the file)], floored to even;
    the frames are number round(linspace(0, frames - 1, n)) in presentation order (the reference's rule; a file of two
    or three frames gives two). Frames are counted by demuxing and checked against what decodes, never taken from a
    header; no more is decoded than the sampled frames need. The target ``Clip.size`` is ``smart_resize`` with the cap
    max(max_pixels, int(1.05 * min_pixels)).

    Args:
        path: the file; H.264, HEVC, AV1, VP9 and what else FFmpeg decodes, any pixel format.
        max_frames: frames at most, at least 2.
        fps: frames per second to sample.
        max_pixels, min_pixels: bounds on a resized frame's pixels; min_pixels defaults to the smaller of max_pixels
            and ``VIDEO_MAX_PIXELS`` (the reference's minimum equals its maximum).
        start, end: seconds from the first frame; the frames outside are as if the file did not hold them.
        backend: see ``decoders.open_decoder``; ``Clip.backend`` says what ran.
        device: where the frames go.
        planes: leave 4:2:0 video as ``YuvFrames``, not rotated (``Clip.rotation``), where the decoder gives planes;
            else RGB, upright.
        threads: CPU threads for decoding, 0 for as many as there are cores; default: 1 in a worker process, else 0.

    Returns:
        :class:`Clip`: uint8 RGB frames [F, height, width, 3], or planes; their times in seconds, the target size in
        pixels.

    Raises:
        SampleError: for a file that cannot be used (the kinds are listed at the top of this module).
        ValueError: for an option out of range or a backend that is not there (``ConfigError``).

    Source:
        Which frames, and the sizes: Video-R1 (arXiv 2503.21776; https://github.com/tulerfeng/Video-R1). This library
        decodes.
    """
    if max_frames < 2 or not fps > 0:
        raise ValueError(f"read_frames: expected max_frames of 2 or more and fps above 0, got {max_frames} and {fps}")
    if not (start or 0) >= 0 or not (end is None or end > (start or 0)):
        raise ValueError(f"read_frames: expected 0 <= start < end (seconds, or None), got {start} and {end}")
    low, high = pixel_bounds(min_pixels, max_pixels)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"video.device: {device}: torch finds no CUDA device here; use cpu")
    path = Path(path)
    threads = _default_threads() if threads is None else threads
    with closing(open_decoder(path, backend=backend, device=device, threads=threads)) as decoder:
        decoded, info, seen = _decode(decoder, path, max_frames, fps, planes, start, end)
    pixels, rotation = _moved(decoded.pixels, device), decoded.rotation
    if isinstance(pixels, Tensor):
        pixels, rotation = _upright(pixels, rotation), 0
    height, width = pixels.planes[0].shape[1:] if isinstance(pixels, YuvFrames) else pixels.shape[1:3]
    if rotation % 180:
        height, width = width, height
    return Clip(
        frames=pixels,
        size=target_size(path, height, width, low, high),
        fps=len(pixels) / seen * info.fps,
        timestamps=decoded.seconds,
        total_frames=info.num_frames,
        source_fps=info.fps,
        path=str(path),
        backend=decoded.backend,
        rotation=rotation,
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
    rgb = read_rgb(path)
    height, width = rgb.shape[:2]
    return Clip(
        frames=torch.from_numpy(rgb)[None],
        size=target_size(path, height, width, min_pixels, max_pixels),
        fps=0.0,
        timestamps=(0.0,),
        total_frames=1,
        source_fps=0.0,
        path=str(path),
        backend="pillow",
    )


def read_rgb(path: Path) -> np.ndarray:
    """A still image's pixels, uint8 RGB [height, width, 3], as ``read_image`` has them. Raises its errors."""
    check_file(path, "image")
    try:
        with Image.open(path) as image:
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's readers raise many types on broken bytes
        raise SampleError("image", f"cannot read the image: {error}", path) from error


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


def pixel_bounds(min_pixels: int | None, max_pixels: int) -> tuple[int, int]:
    """(lowest, highest) pixels of a resized video frame, as ``read_frames`` takes them. Raises ValueError."""
    low = min(max_pixels, VIDEO_MAX_PIXELS) if min_pixels is None else min_pixels
    if not 1 <= low <= max_pixels:
        raise ValueError(f"read_frames: expected 1 <= min_pixels <= max_pixels, got {low} and {max_pixels}")
    return low, video_pixel_cap(low, max_pixels)


def frames_between(path: Path, seconds: Sequence[float], start: float | None, end: float | None) -> range:
    """Which frames, of those shown at ``seconds`` (ascending), are shown from ``start`` to ``end``, both counted from
    the first frame and included. SampleError ``too_few_frames``: less than two of a longer video."""
    if start is None and end is None:
        return range(len(seconds))
    first = seconds[0] if seconds else 0.0
    begin = bisect.bisect_left(seconds, first + (start or 0))
    stop = len(seconds) if end is None else bisect.bisect_right(seconds, first + end)
    if stop - begin < 2 <= len(seconds):
        until = "the end" if end is None else f"{end:g}"
        message = (
            f"a video needs at least 2 frames, from second {start or 0:g} to {until} there are "
            f"{max(stop - begin, 0)} (its last frame is at {seconds[-1] - first:.2f})"
        )
        raise SampleError("too_few_frames", message, path)
    return range(begin, stop)


def sample_indices(total: int, source_fps: float, *, max_frames: int, fps: float) -> list[int]:
    """Which of ``total`` frames to use (the reference's rule, see ``read_frames``); empty where fewer than 2 exist."""
    n = min(max(total / source_fps * fps, MIN_FRAMES), min(max_frames, total) // 2 * 2)
    n = int(n) // 2 * 2
    return torch.linspace(0, total - 1, n).round().long().tolist() if n else []


def _decode(
    decoder: Decoder, path: Path, max_frames: int, fps: float, planes: bool, start: float | None, end: float | None
) -> tuple[Frames, VideoInfo, int]:
    """The sampled frames, the file's, and how many frames they were sampled from."""
    # Packets are not always frames (hidden frames, packed streams): if the count proves wrong, ask once more.
    for last in (False, True):
        info = decoder.probe()
        seen = frames_between(path, info.seconds, start, end)
        chosen = sample_indices(len(seen), info.fps, max_frames=max_frames, fps=fps) if seen else []
        indices = [seen[i] for i in chosen]
        try:
            frames = decoder.frames(indices or range(info.num_frames), planes=planes)
        except FramesChangedError as error:
            if last:
                raise SampleError("decode", f"its frames change from pass to pass: {error}", path) from error
            continue
        if not info.num_frames:
            raise SampleError("zero_frames", "the video stream holds no frame", path)
        if not indices:
            message = f"a video needs at least 2 frames, this one has {info.num_frames}"
            raise SampleError("too_few_frames", message, path)
        return frames, info, len(seen)
    raise AssertionError("unreachable")


def _moved(pixels: Tensor | YuvFrames, device: str | torch.device) -> Tensor | YuvFrames:
    if isinstance(pixels, Tensor):
        return pixels.to(device)
    return YuvFrames(tuple(plane.to(device) for plane in pixels.planes), pixels.matrix, pixels.range)


def _upright(pixels: Tensor, rotation: int) -> Tensor:
    """RGB [F, height, width, 3] turned anticlockwise by a multiple of 90 degrees."""
    return torch.rot90(pixels, rotation // 90, dims=(1, 2)).contiguous() if rotation else pixels


def _default_threads() -> int:
    """Decode workers run side by side: one thread each. The main process may use every core (0)."""
    return 1 if multiprocessing.parent_process() is not None else 0


def target_size(path: Path, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """``smart_resize``, its error a SampleError ``aspect_ratio``."""
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
