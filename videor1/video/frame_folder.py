"""Reading videos that are published as images: a folder of them, or a list."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from videor1.config import VIDEO_MAX_PIXELS
from videor1.types import Clip, SampleError
from videor1.video.limits import MAX_DECODED_MB, check_images
from videor1.video.reading import frames_between
from videor1.video.rules import QWEN2_RULES, FrameRules
from videor1.video.still import read_rgb
from videor1.video.version import Key, file_key

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_frame_folder(
    path: str | Path,
    *,
    frames_per_second: float | None = None,
    timestamps: Sequence[float] = (),
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
    """Read the images of a folder as a video, as :func:`read_frame_files` does, ordered by the numbers in their names.

    Raises:
        SampleError: ``missing_file`` or ``zero_frames`` for the folder, and as there.
        ValueError: an option is out of range.
    """
    path = Path(path)
    _check_options(frames_per_second, timestamps, max_frames, fps)
    names = _images(path)
    if not names:
        raise SampleError("zero_frames", f"the folder holds no image ({', '.join(IMAGES)})", path)
    return read_frame_files(
        [path / name for name in names],
        name=path,
        frames_per_second=frames_per_second,
        timestamps=timestamps,
        max_frames=max_frames,
        fps=fps,
        max_pixels=max_pixels,
        min_pixels=min_pixels,
        total_pixels=total_pixels,
        rules=rules,
        start=start,
        end=end,
        root=root,
        max_decoded_mb=max_decoded_mb,
    )


def read_frame_files(
    files: Sequence[Path],
    *,
    name: Path,
    frames_per_second: float | None = None,
    timestamps: Sequence[float] = (),
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
    """Read images as the frames of a video, in their order.

    Image i (from 0) is shown at second ``timestamps[i]``, or i / ``frames_per_second``. Frames are sampled and sized as
    ``video.read_frames`` does, at the mean rate of the images between ``start`` and ``end``; only the sampled images
    are read. ``root`` and ``max_decoded_mb`` are as there.

    Args:
        files: the images.
        name: the path that errors about all of them name.
        frames_per_second: constant rate of the images.
        timestamps: seconds of each image from the video's beginning, ascending; in place of a rate.

    Raises:
        SampleError: ``missing_file``, ``too_few_frames``, ``image``, ``aspect_ratio``, ``too_large``,
            ``outside_root``; ``decode`` where the images differ in size; ``timestamps`` where there are more or fewer
            of them than images.
        ValueError: an option is out of range.
    """
    _check_options(frames_per_second, timestamps, max_frames, fps)
    limits = rules.limits(min_pixels, max_pixels, total_pixels)
    if timestamps and len(timestamps) != len(files):
        raise SampleError("timestamps", f"expected one for each of {len(files)} images, got {len(timestamps)}", name)
    seconds = list(timestamps) or [i / frames_per_second for i in range(len(files))]  # type: ignore[operator]
    window = frames_between(name, seconds, start, end, beginning=0.0 if timestamps else None)
    rate = frames_per_second or 0.0
    if timestamps and len(window) > 1:
        rate = (len(window) - 1) / (seconds[window[-1]] - seconds[window[0]])
    chosen = rules.sample(len(window), rate, max_frames=max_frames, fps=fps) if rate else []
    indices = [window[i] for i in chosen]
    if not indices:
        raise SampleError("too_few_frames", f"a video needs at least 2 frames, this one has {len(files)}", name)
    first = read_rgb(files[indices[0]], root=root, max_decoded_mb=max_decoded_mb)
    height, width = first.shape[:2]
    needed = check_images(name, len(indices), width, height, limit_mb=max_decoded_mb)
    frames = np.empty((len(indices), height, width, 3), np.uint8)
    frames[0] = first
    for slot, i in enumerate(indices[1:], start=1):
        image = read_rgb(files[i], root=root, max_decoded_mb=max_decoded_mb)
        if image.shape != first.shape:
            shown = f"{width}x{height} and {image.shape[1]}x{image.shape[0]}"
            raise SampleError("decode", f"its images differ in size: {shown}", name)
        frames[slot] = image
    return Clip(
        frames=torch.from_numpy(frames),
        size=rules.size_of_video(name, len(frames), height, width, limits),
        fps=len(frames) / len(window) * rate,
        timestamps=tuple(seconds[i] for i in indices),
        total_frames=len(files),
        source_fps=rate,
        path=str(name),
        backend="pillow",
        numbers=tuple(indices),
        given_times=tuple(timestamps[i] for i in indices) if timestamps else (),
        decoded_bytes=needed,
    )


def _check_options(frames_per_second: float | None, timestamps: Sequence[float], max_frames: int, fps: float) -> None:
    """Raise a ValueError for options that are out of range."""
    if max_frames < 2 or not fps > 0 or not (timestamps or (frames_per_second or 0) > 0):
        raise ValueError(
            "read_frame_folder: expected frames_per_second (or timestamps) and fps above 0 and max_frames of 2 or "
            f"more, got {frames_per_second}, {fps} and {max_frames}"
        )
    if not all(one < next_one for one, next_one in itertools.pairwise([-1.0, *timestamps])):
        raise ValueError(f"read_frame_folder: expected timestamps of 0 or more, ascending, got {list(timestamps)}")


def files_key(kind: str, files: Sequence[Path], root: Path | None = None) -> Key:
    """Return the key of images that are a video's frames, as they are now: that of each, in their order.

    Its version is None where one of them cannot be read.
    """
    keys = [file_key(kind, file, root) for file in files]
    names = hashlib.sha256(repr([key.name for key in keys]).encode("utf-8", "surrogateescape")).hexdigest()
    if any(key.version is None for key in keys):
        return Key((kind, names))
    return Key((kind, names), hashlib.sha256(repr([key.version for key in keys]).encode()).hexdigest())


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
