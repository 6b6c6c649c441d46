"""Which frames of a video a model family sees, in which size and cut into which patches.

The defaults are those of Qwen2-VL, Qwen2.5-VL and the reference (Video-R1). The records of other families say theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from videor1.config import VIDEO_MAX_PIXELS
from videor1.types import SampleError
from videor1_kernels.frames_to_patches import FACTOR, MEAN, PATCH, STD

MIN_FRAMES = 4  # lower bound on sampled frames, for files that have as many
MAX_ASPECT_RATIO = 200


class PixelLimits(NamedTuple):
    """The options of ``video`` that bound the pixels of a resized video."""

    min_pixels: int | None  # None: the family's default
    max_pixels: int  # of a frame
    total_pixels: int | None = None  # of all frames together; None: the family's default


class OverBudgetError(Exception):
    """Raised for a video that no size brings into the limits."""


def sample_indices(total: int, source_fps: float, *, max_frames: int, fps: float) -> list[int]:
    """Return the numbers of the frames to sample, out of ``total``, by the rule that ``read_frames`` states.

    The result is empty where fewer than 2 frames exist.
    """
    n = min(max(total / source_fps * fps, MIN_FRAMES), min(max_frames, total) // 2 * 2)
    n = int(n) // 2 * 2
    return torch.linspace(0, total - 1, n).round().long().tolist() if n else []


def smart_resize(height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = FACTOR) -> tuple[int, int]:
    """Return Qwen2-VL's target size (height, width) for a frame.

    Both sides are multiples of ``factor``, the number of pixels is within the bounds, and the aspect ratio is about
    kept. Each side is rounded to a multiple of ``factor`` (half to even), but to at least one. If that has more than
    max_pixels, both sides are scaled by sqrt(max_pixels / (height * width)) and floored to a multiple; if it has less
    than min_pixels, both are scaled by sqrt(min_pixels / (height * width)) and raised to the next multiple (which may
    exceed max_pixels).

    Raises:
        ValueError: a side is below 1, the aspect ratio is above 200, or min_pixels is above max_pixels.
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
    """Return the cap on a video frame's pixels that the reference computes: max(max_pixels, int(1.05 * min_pixels)).

    With the reference's minimum equal to its maximum (128 * 784) the cap is 105369, so that 640x480 becomes 364x280.
    The reference also divides a budget of pixels among the frames. It only has an effect above 384 frames and is not
    applied here.
    """
    return max(max_pixels, int(min_pixels * 1.05))


def _size_of_frame(frames: int, height: int, width: int, limits: PixelLimits, block: int) -> tuple[int, int]:
    """Return the reference's size: that of one frame, whatever their number."""
    low = limits.min_pixels or min(limits.max_pixels, VIDEO_MAX_PIXELS)
    cap = video_pixel_cap(low, limits.max_pixels)
    return smart_resize(height, width, min_pixels=low, max_pixels=cap, factor=block)


@dataclass(frozen=True)
class FrameRules:
    """How a family's vision tower takes frames. In every family 2 x 2 patches of two frames are one token.

    Attributes:
        name: by which a cache on disk tells the patches of two rules apart.
        patch_size: pixels of a patch's side, 14 or 16.
        mean, std: of the channels' pixels, scaled to 0..1.
        sample: (frames in the file, its frames per second, max_frames=, fps=) -> the numbers of the frames to sample;
            none where there are fewer than two.
        video_size: (sampled frames, height, width, limits, block) -> the target (height, width), multiples of block.
            It raises OverBudgetError for a video that no size brings into the limits.
        bounds_total: whether there is a bound on the pixels of all frames together (``video.total_pixels``).
    """

    name: str = "qwen2_vl"
    patch_size: int = PATCH
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    sample: Callable[..., list[int]] = sample_indices
    video_size: Callable[[int, int, int, PixelLimits, int], tuple[int, int]] = _size_of_frame
    bounds_total: bool = False

    @property
    def block(self) -> int:
        """The side in pixels of 2 x 2 patches, of which sizes are multiples."""
        return 2 * self.patch_size

    def limits(self, min_pixels: int | None, max_pixels: int, total_pixels: int | None = None) -> PixelLimits:
        """Return checked limits of a video's pixels.

        Raises:
            ValueError: they contradict each other, or this family has no bound on all frames together.
        """
        low = min(max_pixels, VIDEO_MAX_PIXELS) if min_pixels is None else min_pixels
        if not 1 <= low <= max_pixels:
            raise ValueError(f"read_frames: expected 1 <= min_pixels <= max_pixels, got {low} and {max_pixels}")
        if total_pixels is not None and not self.bounds_total:
            raise ValueError(
                f"read_frames: total_pixels: got {total_pixels}, but this model's family bounds the pixels of each "
                "frame alone: set max_pixels and max_frames"
            )
        return PixelLimits(min_pixels, max_pixels, total_pixels)

    def size_of_video(self, path: Path, frames: int, height: int, width: int, limits: PixelLimits) -> tuple[int, int]:
        """Return the target size (height, width) of a video's frames.

        Raises:
            SampleError: ``aspect_ratio`` where one side is more than 200 times the other; ``over_budget`` where no
                size brings the video into the limits.
        """
        _check_aspect(path, height, width)
        try:
            return self.video_size(frames, height, width, limits, self.block)
        except OverBudgetError as error:
            raise SampleError("over_budget", str(error), path) from error

    def size_of_image(self, path: Path, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        """Return the target size (height, width) of an image. Raises SampleError ``aspect_ratio`` as above."""
        _check_aspect(path, height, width)
        return smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels, factor=self.block)


def _check_aspect(path: Path, height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        message = f"{width}x{height}: one side is more than {MAX_ASPECT_RATIO} times the other"
        raise SampleError("aspect_ratio", message, path)


QWEN2_RULES = FrameRules()  # of Qwen2-VL, Qwen2.5-VL and the reference
