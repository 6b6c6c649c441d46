"""Loading a sample's media as 8-bit patches, and the keys that the patches are cached under, one for each medium."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from videor1.config import VideoConfig
from videor1.types import Media, MediaItem, PromptMedia, Sample, SampleError
from videor1.video.frame_folder import files_key, folder_key, read_frame_files, read_frame_folder
from videor1.video.limits import MAX_DECODED_MB, check_together
from videor1.video.patches import media_from_clip
from videor1.video.reading import read_frames, read_image
from videor1.video.rules import QWEN2_RULES, FrameRules
from videor1.video.version import Key, file_key


def load_media(
    sample: Sample, video: VideoConfig, max_decoded_mb: int = MAX_DECODED_MB, rules: FrameRules = QWEN2_RULES
) -> PromptMedia:
    """Decode a sample's media into 8-bit patches on the CPU, one after the other; return None for text.

    A data loader calls it: ``Prefetcher(functools.partial(load_media, video=config.video), ...)``. Each file is opened
    once, must then lie in its ``root``, and is decoded from what was opened.

    Args:
        sample: the sample.
        video: the options of the run.
        max_decoded_mb: most memory in MiB that decoding the media of the sample may take together.
        rules: the model family's.

    Returns:
        The medium of a sample with one; several in their order.

    Raises:
        SampleError: one of them cannot be used; it names that one's path.
    """
    loaded: list[Media] = []
    for item in sample.items:
        loaded.append(_load(item, sample.data_type, video, max_decoded_mb, rules))
        _check_sum(sample.items, loaded, max_decoded_mb)
    return loaded[0] if len(loaded) == 1 else tuple(loaded) or None


def join_media(sample: Sample, loaded: Sequence[Media], max_decoded_mb: int) -> PromptMedia:
    """Return the media of a sample with several from those of its :func:`media_parts`, as :func:`load_media` does.

    Raises:
        SampleError: ``too_large`` where decoding them takes more than ``max_decoded_mb`` MiB together.
    """
    for count in range(2, len(loaded) + 1):
        _check_sum(sample.items, loaded[:count], max_decoded_mb)
    return tuple(loaded)


def _check_sum(items: Sequence[MediaItem], loaded: Sequence[Media], max_decoded_mb: int) -> None:
    if len(loaded) > 1:  # A medium alone has been checked before it was decoded.
        total = sum(media.decoded_bytes for media in loaded)
        check_together(items[len(loaded) - 1].named, total, len(loaded), limit_mb=max_decoded_mb)


def media_parts(sample: Sample) -> tuple[Sample, ...]:
    """Return a sample for each medium of a sample with several, in their order; none of one with one medium or none."""
    if len(sample.items) < 2:
        return ()
    return tuple(replace(sample, data_type=item.kind, path=item.named, media=(item,)) for item in sample.items)


def _load(item: MediaItem, kind: str, video: VideoConfig, max_decoded_mb: int, rules: FrameRules) -> Media:
    """Decode one medium."""
    if item.named is None:
        raise SampleError("missing_file", f"a sample of data_type {kind} has no path")
    started = time.perf_counter()
    image = item.kind == "image"
    max_pixels = item.max_pixels or (video.image_max_pixels if image else video.max_pixels)
    min_pixels = video.image_min_pixels if image else video.min_pixels
    if min_pixels is not None and min_pixels > max_pixels:
        option = "video.image_min_pixels" if image else "video.min_pixels"
        message = f"its max_pixels ({max_pixels}) are fewer than {option} ({min_pixels})"
        raise SampleError("max_pixels", message, item.named)
    bounds: dict[str, Any] = {
        "max_pixels": max_pixels,
        "min_pixels": min_pixels,
        "rules": rules,
        "root": item.root,
        "max_decoded_mb": max_decoded_mb,
    }
    frames: dict[str, Any] = bounds | {
        "max_frames": item.max_frames or video.max_frames,
        "fps": item.fps or video.fps,
        "total_pixels": video.total_pixels,
        "start": item.start,
        "end": item.end,
    }
    shown: dict[str, Any] = {"frames_per_second": item.frames_per_second, "timestamps": item.timestamps}
    if image:
        clip = read_image(item.named, **bounds)
    elif item.frames:
        clip = read_frame_files(item.frames, name=item.named, **shown, **frames)
    elif item.frames_per_second is not None or item.timestamps:
        clip = read_frame_folder(item.named, **shown, **frames)
    else:
        clip = read_frames(item.named, backend=video.backend, device=video.device, planes=True, **frames)
    media = media_from_clip(clip, item.kind, seconds=time.perf_counter() - started, rules=rules)
    return replace(media, patches=media.patches.cpu())  # caches and other processes keep patches in main memory


def media_key(sample: Sample) -> Key | None:
    """Return the key of the patches of a sample's medium: its kind, the file and its version as it is now.

    The result is None for text, which needs no decoding. Of a sample with several media each has a key of its own
    (:func:`media_parts`).
    """
    if not sample.items:
        return None
    (item,) = sample.items
    kind = " ".join([item.kind, *_settings(item)])
    if item.frames:
        return files_key(kind, item.frames, item.root)
    if item.frames_per_second is not None or item.timestamps:
        return folder_key(kind, item.path or "", item.root)
    return file_key(kind, item.path or "", item.root)


def _settings(item: MediaItem) -> Iterator[str]:
    """Yield what a medium's patches depend on besides its file and the options of the run."""
    if item.start is not None or item.end is not None:
        yield f"from {item.start} to {item.end}"
    for name in ("fps", "max_frames", "max_pixels"):
        if (value := getattr(item, name)) is not None:
            yield f"{name} {value}"
    if item.frames_per_second is not None:
        yield f"at {item.frames_per_second}"
    if item.timestamps:
        yield f"at times {hashlib.sha256(repr(item.timestamps).encode()).hexdigest()[:16]}"
