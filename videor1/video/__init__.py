"""Reading video and image files into frames and into patches."""

from __future__ import annotations

from videor1.video.decoders import check_backend
from videor1.video.reading import (
    frames_between,
    read_frames,
    read_image,
    sample_indices,
    smart_resize,
    target_size,
    video_pixel_cap,
)
from videor1.video.still import read_rgb

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
