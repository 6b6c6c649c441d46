"""Reading a video or image file into upright RGB frames and the size that the vision tower will see.

A file whose sampled frames cannot be read raises a ``SampleError``; a shortened or replaced clip is never returned.
(Damage in parts that need not be decoded, or that the decoder repairs without reporting it, goes unnoticed, and so does
a cut MPEG-TS or raw stream.) The kinds of the error are ``missing_file``, ``not_video``, ``truncated``,
``zero_frames``, ``too_few_frames``, ``decode``, ``image``, ``aspect_ratio``, ``over_budget``, ``too_large`` and
``outside_root``.
"""

from __future__ import annotations

import bisect
import multiprocessing
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from videor1.config import IMAGE_MAX_PIXELS, VIDEO_MAX_PIXELS
from videor1.errors import ConfigError
from videor1.types import Clip, SampleError
from videor1.video.decoders import Decoder, Frames, FramesChangedError, VideoInfo, check_backend, open_decoder
from videor1.video.decoders.container import MAX_PIXELS
from videor1.video.limits import MAX_DECODED_MB, check_video, most_pixels
from videor1.video.opened import MediaFile
from videor1.video.orientation import Orientation, upright
from videor1.video.rules import QWEN2_RULES, FrameRules
from videor1.video.still import read_still
from videor1_kernels.frames_to_patches import YuvFrames

IMAGE_MIN_PIXELS = 4 * 28 * 28
ROUNDING = 1e-6  # seconds, of sums of times


def read_frames(
    path: str | Path,
    *,
    max_frames: int = 16,
    fps: float = 2.0,
    max_pixels: int = VIDEO_MAX_PIXELS,
    min_pixels: int | None = None,
    total_pixels: int | None = None,
    rules: FrameRules = QWEN2_RULES,
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    planes: bool = False,
    threads: int | None = None,
    root: Path | None = None,
    max_decoded_mb: int = MAX_DECODED_MB,
) -> Clip:
    """Decode the sampled frames of a video, upright, at the source's resolution.

    Which frames, and their size, are for ``rules`` to say. By the default, the reference's, the number of frames is
    n = frames in the file / its fps * ``fps``, clipped to [4, min(max_frames, frames in the file)] and floored to even;
    the sampled frames are round(linspace(0, frames - 1, n)) in presentation order (a file of two or three frames gives
    two); the target ``Clip.size`` is that of ``smart_resize`` with the cap max(max_pixels, int(1.05 * min_pixels)).

    Frames are counted by demuxing and the count is checked
    against the frames that are decoded; it is never taken from a header. No more is decoded than the sampled frames
    need. Frames are those of the stream that FFmpeg considers the best, upright as its command line shows them; where
    the file's times contradict it, they are taken in the order in which they leave the decoder.

    Args:
        path: the file; H.264, HEVC, AV1, VP9 and whatever else FFmpeg decodes, in any pixel format.
        max_frames: maximum number of frames, at least 2.
        fps: frames per second to sample.
        max_pixels, min_pixels: bounds on a resized frame's pixels; min_pixels defaults to the smaller of max_pixels
            and ``VIDEO_MAX_PIXELS`` (the reference's minimum equals its maximum).
        total_pixels: bound on the pixels of all frames together, where the rules have one.
        rules: which frames are sampled and how large they become. The default is Qwen2.5-VL's and the reference's; the
            records of ``videor1.model.families`` have those of others.
        start, end: seconds from the first frame; frames outside of this window are treated as if the file did not
            hold them.
        backend: see ``decoders.open_decoder``; ``Clip.backend`` names the decoder that was used.
        device: the device that the frames are returned on.
        planes: return 4:2:0 video as ``YuvFrames``, not yet upright (see ``Clip.rotation`` and ``Clip.mirrored``),
            where the decoder gives planes; otherwise frames are RGB and upright.
        threads: CPU threads for decoding, 0 for as many as there are cores; default: 1 in a worker process, else 0.
        root: a folder, with its symlinks resolved, that the opened file must lie in; None: anywhere.
        max_decoded_mb: most memory in MiB that decoding may take, estimated from the headers before it begins.

    Returns:
        :class:`Clip`: uint8 RGB frames [F, height, width, 3], or planes; their times in seconds, the target size in
        pixels.

    Raises:
        SampleError: the file cannot be used (the kinds are listed at the top of this module).
        ValueError: an option is out of range, or the backend is unknown or not installed (``ConfigError``).

    Source:
        Which frames, and the sizes: Video-R1 (arXiv 2503.21776; https://github.com/tulerfeng/Video-R1). This library
        decodes.
    """
    if max_frames < 2 or not fps > 0:
        raise ValueError(f"read_frames: expected max_frames of 2 or more and fps above 0, got {max_frames} and {fps}")
    if not (start or 0) >= 0 or not (end is None or end > (start or 0)):
        raise ValueError(f"read_frames: expected 0 <= start < end (seconds, or None), got {start} and {end}")
    limits = rules.limits(min_pixels, max_pixels, total_pixels)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"video.device: {device}: torch finds no CUDA device here; use cpu")
    path = Path(path)
    threads = _default_threads() if threads is None else threads
    check_backend(backend)
    limit = min(MAX_PIXELS, most_pixels(max_decoded_mb))
    with (
        MediaFile(path, "not_video", root) as file,
        closing(open_decoder(file, backend=backend, device=device, threads=threads, max_pixels=limit)) as decoder,
    ):
        decoded, info, indices, window, needed = _decode(
            decoder, path, rules, max_frames, fps, planes, start, end, max_decoded_mb
        )
    pixels, orientation = _to_device(decoded.pixels, device), Orientation(decoded.rotation, decoded.mirrored)
    if isinstance(pixels, Tensor):
        pixels, orientation = upright(pixels, orientation), Orientation()
    height, width = pixels.planes[0].shape[1:] if isinstance(pixels, YuvFrames) else pixels.shape[1:3]
    if orientation.swaps_sides:
        height, width = width, height
    return Clip(
        frames=pixels,
        size=rules.size_of_video(path, len(pixels), height, width, limits),
        fps=len(pixels) / window * info.fps,
        timestamps=decoded.seconds,
        total_frames=info.num_frames,
        source_fps=info.fps,
        path=str(path),
        backend=decoded.backend,
        rotation=orientation.rotation,
        mirrored=orientation.mirrored,
        numbers=tuple(indices),
        decoded_bytes=needed,
    )


def read_image(
    path: str | Path,
    *,
    max_pixels: int = IMAGE_MAX_PIXELS,
    min_pixels: int = IMAGE_MIN_PIXELS,
    rules: FrameRules = QWEN2_RULES,
    root: Path | None = None,
    max_decoded_mb: int = MAX_DECODED_MB,
) -> Clip:
    """Read a still image (PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF) as a clip of one frame with fps 0.

    The EXIF orientation is applied, transparency is shown on white, and palette, grey (8 and 16 bit) and CMYK images
    become RGB. Of an animation, the first frame is used. ``root`` and ``max_decoded_mb`` are those of ``read_frames``.

    Raises:
        SampleError: ``missing_file``; ``image`` if the file is no image, or is broken or cut; ``aspect_ratio``;
            ``too_large``; ``outside_root``.
    """
    path = Path(path)
    rgb, needed = read_still(path, root=root, max_decoded_mb=max_decoded_mb)
    height, width = rgb.shape[:2]
    return Clip(
        frames=torch.from_numpy(rgb)[None],
        size=rules.size_of_image(path, height, width, min_pixels, max_pixels),
        fps=0.0,
        timestamps=(0.0,),
        total_frames=1,
        source_fps=0.0,
        path=str(path),
        backend="pillow",
        decoded_bytes=needed,
    )


def frames_between(
    path: Path, seconds: Sequence[float], start: float | None, end: float | None, *, beginning: float | None = None
) -> range:
    """Return the numbers of the frames that are shown from ``start`` to ``end``, both included.

    Args:
        path: the video, for the error.
        seconds: presentation time of each frame in seconds, ascending.
        start, end: seconds from the beginning; None: no bound.
        beginning: the time that these seconds count from; None: that of the first frame.

    Raises:
        SampleError: ``too_few_frames`` where fewer than two frames are shown, but the video has two or more.
    """
    if start is None and end is None:
        return range(len(seconds))
    first = beginning if beginning is not None else seconds[0] if seconds else 0.0
    # A sum may round past the time of the frame that stands at a bound, which is included.
    begin = bisect.bisect_left(seconds, first + (start or 0) - ROUNDING)
    stop = len(seconds) if end is None else bisect.bisect_right(seconds, first + end + ROUNDING)
    if stop - begin < 2 <= len(seconds):
        until = "the end" if end is None else f"{end:g}"
        message = (
            f"a video needs at least 2 frames, from second {start or 0:g} to {until} there are "
            f"{max(stop - begin, 0)} (its last frame is at {seconds[-1] - first:.2f})"
        )
        raise SampleError("too_few_frames", message, path)
    return range(begin, stop)


def _decode(
    decoder: Decoder,
    path: Path,
    rules: FrameRules,
    max_frames: int,
    fps: float,
    planes: bool,
    start: float | None,
    end: float | None,
    max_decoded_mb: int,
) -> tuple[Frames, VideoInfo, list[int], int, int]:
    """Decode the sampled frames of the window from ``start`` to ``end``.

    Returns:
        The frames, the file's description, their numbers in the file, the number of frames in the window that they
        were sampled from, and the bytes that decoding takes, about.
    """
    # A packet is not always a frame (hidden frames, packed streams). If the count of frames proves wrong while
    # decoding, the decoder knows the right one afterwards, and the frames are sampled once more.
    for last in (False, True):
        info = decoder.probe()
        window = frames_between(path, info.seconds, start, end)
        chosen = rules.sample(len(window), info.fps, max_frames=max_frames, fps=fps) if window else []
        indices = [window[i] for i in chosen]
        needed = check_video(
            path, len(indices), info.width, info.height, info.pix_fmt, planes=planes, limit_mb=max_decoded_mb
        )
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
        return frames, info, indices, len(window), needed
    raise AssertionError("unreachable")


def _to_device(pixels: Tensor | YuvFrames, device: str | torch.device) -> Tensor | YuvFrames:
    if isinstance(pixels, Tensor):
        return pixels.to(device)
    return YuvFrames(tuple(plane.to(device) for plane in pixels.planes), pixels.matrix, pixels.range)


def _default_threads() -> int:
    """Return 1 in a worker process, as workers run in parallel, and 0 (every core) in the main process."""
    return 1 if multiprocessing.parent_process() is not None else 0
