"""Loading a sample's media file as 8-bit patches, and the key that the patches are cached under."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from videor1.config import VideoConfig
from videor1.types import Media, Sample, SampleError
from videor1.video.frame_folder import folder_key, read_frame_folder
from videor1.video.limits import MAX_DECODED_MB
from videor1.video.patches import media_from_clip
from videor1.video.reading import read_frames, read_image
from videor1.video.rules import QWEN2_RULES, FrameRules
from videor1.video.version import Key, file_key


def load_media(
    sample: Sample, video: VideoConfig, max_decoded_mb: int = MAX_DECODED_MB, rules: FrameRules = QWEN2_RULES
) -> Media | None:
    """Decode a sample's media file into 8-bit patches on the CPU; return None for text.

    A data loader calls it: ``Prefetcher(functools.partial(load_media, video=config.video), ...)``. The file is opened
    once, must then lie in ``sample.root``, and is decoded from what was opened.

    Args:
        sample: the sample.
        video: the options of the run.
        max_decoded_mb: most memory in MiB that decoding may take.
        rules: the model family's.

    Raises:
        SampleError: the file cannot be used.
    """
    if sample.data_type == "text":
        return None
    if sample.path is None:
        raise SampleError("missing_file", f"a sample of data_type {sample.data_type} has no path")
    started = time.perf_counter()
    frames: dict[str, Any] = {
        "max_frames": video.max_frames,
        "fps": video.fps,
        "max_pixels": video.max_pixels,
        "min_pixels": video.min_pixels,
        "total_pixels": video.total_pixels,
        "rules": rules,
        "start": sample.start,
        "end": sample.end,
        "root": sample.root,
        "max_decoded_mb": max_decoded_mb,
    }
    if sample.data_type == "image":
        clip = read_image(
            sample.path,
            max_pixels=video.image_max_pixels,
            min_pixels=video.image_min_pixels,
            rules=rules,
            root=sample.root,
            max_decoded_mb=max_decoded_mb,
        )
    elif sample.frames_per_second is not None:
        clip = read_frame_folder(sample.path, frames_per_second=sample.frames_per_second, **frames)
    else:
        clip = read_frames(sample.path, backend=video.backend, device=video.device, planes=True, **frames)
    media = media_from_clip(clip, sample.data_type, seconds=time.perf_counter() - started, rules=rules)
    return replace(media, patches=media.patches.cpu())  # caches and other processes keep patches in main memory


def media_key(sample: Sample) -> Key | None:
    """Return the key of a sample's patches: the kind of media, the file and its version as it is now.

    The result is None for text, which needs no decoding.
    """
    if sample.data_type == "text":
        return None
    kind: str = sample.data_type
    if sample.start is not None or sample.end is not None:
        kind += f" from {sample.start} to {sample.end}"
    if sample.frames_per_second is not None:
        return folder_key(f"{kind} at {sample.frames_per_second}", sample.path or "", sample.root)
    return file_key(kind, sample.path or "", sample.root)
