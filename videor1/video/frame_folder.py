"""Reading videos that are published as a folder of images."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch

from videor1.config import VIDEO_MAX_PIXELS
from videor1.types import Clip, SampleError
from videor1.video.limits import MAX_DECODED_MB, check_images
from videor1.video.reading import frames_between
from videor1.video.rules import QWEN2_RULES, FrameRules
from videor1.video.still import read_rgb
from videor1.video.version import Key

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_frame_folder(
    path: str | Path,
    *,
    frames_per_second: float,
    max_frames: int = 16,
    fps: float = 2.0,
    max_pixels: int = VIDEO_MAX_PIXELS,
    min_pixels: int | None = None,
    total_pixels: int | None = None,
    rules: FrameRules = QWEN2_RULES,
    start: float | None = None,
    end: float | None = None,
    root: Path | None = None,
    max_decoded_mb: int = MAX_DECODED_MB,
) -> Clip:
    """Read the images of a folder as a video.

    Image i (from 0, ordered by the numbers in the file names) is shown at second i / ``frames_per_second``. Frames are
    sampled and sized as ``video.read_frames`` does; only the sampled images are read. ``root`` and ``max_decoded_mb``
    are as there.

    Raises:
        SampleError: ``missing_file``, ``zero_frames``, ``too_few_frames``, ``image``, ``aspect_ratio``, ``too_large``,
            ``outside_root``; ``decode`` where the images differ in size.
        ValueError: an option is out of range.
    """
    if not frames_per_second > 0 or max_frames < 2 or not fps > 0:
        raise ValueError(
            "read_frame_folder: expected frames_per_second and fps above 0 and max_frames of 2 or more, got "
            f"{frames_per_second}, {fps} and {max_frames}"
        )
    path, limits = Path(path), rules.limits(min_pixels, max_pixels, total_pixels)
    names = _images(path)
    if not names:
        raise SampleError("zero_frames", f"the folder holds no image ({', '.join(IMAGES)})", path)
    seconds = [i / frames_per_second for i in range(len(names))]
    window = frames_between(path, seconds, start, end)
    indices = [window[i] for i in rules.sample(len(window), frames_per_second, max_frames=max_frames, fps=fps)]
    if not indices:
        raise SampleError("too_few_frames", f"a video needs at least 2 frames, this one has {len(names)}", path)
    first = read_rgb(path / names[indices[0]], root=root, max_decoded_mb=max_decoded_mb)
    height, width = first.shape[:2]
    check_images(path, len(indices), width, height, limit_mb=max_decoded_mb)
    frames = np.empty((len(indices), height, width, 3), np.uint8)
    frames[0] = first
    for slot, i in enumerate(indices[1:], start=1):
        image = read_rgb(path / names[i], root=root, max_decoded_mb=max_decoded_mb)
        if image.shape != first.shape:
            shown = f"{width}x{height} and {image.shape[1]}x{image.shape[0]}"
            raise SampleError("decode", f"its images differ in size: {shown}", path)
        frames[slot] = image
    return Clip(
        frames=torch.from_numpy(frames),
        size=rules.size_of_video(path, len(frames), height, width, limits),
        fps=len(frames) / len(window) * frames_per_second,
        timestamps=tuple(seconds[i] for i in indices),
        total_frames=len(names),
        source_fps=frames_per_second,
        path=str(path),
        backend="pillow",
        numbers=tuple(indices),
    )


def folder_key(kind: str, path: str | Path, root: Path | None = None) -> Key:
    """Return the key of a folder of images as it is now.

    It is like that of ``version.file_key``, but the version is a digest of the images' names, sizes and modification
    times.
    """
    resolved = os.path.realpath(path)
    if root is not None and not Path(resolved).is_relative_to(root):
        return Key((kind, resolved))
    try:
        with os.scandir(resolved) as entries:
            found = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if _is_image(e.name))
    except OSError:  # reading the folder will raise the error that explains this
        return Key((kind, resolved))
    return Key((kind, resolved), hashlib.sha256(repr(found).encode()).hexdigest())


def _images(path: Path) -> list[str]:
    """Return the names of a folder's images in order. Raises SampleError ``missing_file``."""
    try:
        return sorted(filter(_is_image, os.listdir(path)), key=_by_number)
    except (FileNotFoundError, NotADirectoryError):
        message = "expected a folder of images, got a file" if path.exists() else "no such folder of images"
        raise SampleError("missing_file", message, path) from None
    except OSError as error:
        raise SampleError("missing_file", f"cannot read the folder of images: {error.strerror}", path) from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES) and not name.startswith(".")


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares the numbers in names by value, so that 2.jpg comes before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
