"""Which frames of a video a Qwen3-VL sees, and in which size."""

from __future__ import annotations

import math

import numpy as np

from videor1.video.rules import MIN_FRAMES, FrameRules, OverBudgetError, PixelLimits

# Of the published checkpoints' video processor, for all frames of a video together.
TOTAL_PIXELS = 24576 * 32 * 32
MIN_PIXELS = 4 * 32 * 32


def _sample(total: int, source_fps: float, *, max_frames: int, fps: float) -> list[int]:
    """Return the frames that transformers' processor takes: evenly spaced, and of an odd number as well."""
    count = min(max(int(total / source_fps * fps), MIN_FRAMES), max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int).tolist() if count >= 2 else []


def _video_size(frames: int, height: int, width: int, limits: PixelLimits, block: int) -> tuple[int, int]:
    """Return the size that transformers' processor gives with ``cap_pixels_per_frame``.

    With F frames, ``max_pixels`` and ``total_pixels`` bound F * H * W to F * max(min(max_pixels, total_pixels // F),
    int(1.05 * min_pixels)); ``min_pixels`` is the least of F * H * W. Sides are multiples of ``block``, half to even.

    Raises:
        OverBudgetError: that size has more than ``total_pixels``, for want of smaller sides or by ``min_pixels``.
    """
    total = limits.total_pixels or TOTAL_PIXELS
    least = limits.min_pixels or min(MIN_PIXELS, limits.max_pixels)
    most = frames * max(min(limits.max_pixels, total // frames), int(1.05 * least))
    if min(height, width) < block:
        grow = max(block / height, block / width)
        height, width = int(height * grow), int(width * grow)
    new_height, new_width = (round(side / block) * block for side in (height, width))
    counted = round(frames / 2) * 2  # as the processor counts them
    if counted * new_height * new_width > most:
        shrink = math.sqrt(frames * height * width / most)
        new_height, new_width = (max(block, math.floor(side / shrink / block) * block) for side in (height, width))
    elif counted * new_height * new_width < least:
        grow = math.sqrt(least / (frames * height * width))
        new_height, new_width = (math.ceil(side * grow / block) * block for side in (height, width))
    if (pixels := min(frames, counted) * new_height * new_width) > total:
        raise OverBudgetError(
            f"{frames} frames of {new_width}x{new_height}, the smallest that video.min_pixels and patches of "
            f"{block // 2} pixels allow, have {pixels} pixels, the limit is {total}: raise video.total_pixels, or "
            "lower video.max_frames"
        )
    return new_height, new_width


QWEN3_RULES = FrameRules("qwen3_vl", 16, (0.5,) * 3, (0.5,) * 3, _sample, _video_size, bounds_total=True)
