"""Reading video and image files into frames and into patches."""

from __future__ import annotations

from videor1.video.decoders import check_backend
from videor1.video.qwen3_rules import QWEN3_RULES
from videor1.video.reading import frames_between, read_frames, read_image
from videor1.video.rules import QWEN2_RULES, FrameRules, PixelLimits, sample_indices, smart_resize, video_pixel_cap
from videor1.video.still import read_rgb

FRAME_RULES = {rules.name: rules for rules in (QWEN2_RULES, QWEN3_RULES)}  # by the name that a run's rows hold

__all__ = [
    "FRAME_RULES",
    "QWEN2_RULES",
    "QWEN3_RULES",
    "FrameRules",
    "PixelLimits",
    "check_backend",
    "frames_between",
    "read_frames",
    "read_image",
    "read_rgb",
    "sample_indices",
    "smart_resize",
    "video_pixel_cap",
]
