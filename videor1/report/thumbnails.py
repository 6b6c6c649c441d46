"""Decode the frames of prompts again and shrink them for the page."""

from __future__ import annotations

import base64
import io
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from videor1.config import VideoConfig
from videor1.types import Clip, MediaItem, SampleError
from videor1.video import QWEN2_RULES, FrameRules, read_frames, read_image
from videor1.video.frame_folder import read_frame_files, read_frame_folder

SIDE = 144  # pixels of the longer side of a frame, for media of up to MANY frames; with more frames they are smaller
MANY = 16
SMALLEST = 48  # least pixels of the longer side


@dataclass
class Thumbnails:
    """Collects the frames of media files as small JPEGs, once for each file.

    Attributes:
        media: an entry for each file, with ``frames`` (data URIs) and ``times`` (seconds), or with a ``note`` that says
            why there are none.
        byte_limit: bytes of frames after which further files only get a note.
        seconds: time of decoding after which further files only get a note.
    """

    byte_limit: int
    seconds: float

    def __post_init__(self) -> None:
        self.media: list[dict[str, Any]] = []
        self._made: dict[tuple[Any, ...], int] = {}
        self._bytes, self._spent = 0, 0.0

    def add(
        self, item: MediaItem, video: VideoConfig, root: Path | None = None, rules: FrameRules = QWEN2_RULES
    ) -> int:
        """Decode a medium's frames, sampled by the options in ``video``, its own and the model's rules, and return
        their index in ``media``.

        The files that are opened must lie in ``root``, a folder with its symlinks resolved; None: anywhere.
        """
        key = (item, video.max_frames, video.fps, root, rules.name)
        if key not in self._made:
            full = self._full()
            named = item.named or Path()
            self._made[key] = self.note(named, full) if full else self._decode(item, named, video, root, rules)
        return self._made[key]

    def note(self, path: Path | str, reason: str) -> int:
        """Add an entry that only says why there are no frames, and return its index in ``media``."""
        self.media.append({"name": Path(path).name, "frames": [], "times": [], "note": reason})
        return len(self.media) - 1

    def _full(self) -> str:
        if self._bytes >= self.byte_limit:
            return "left out: the page's room for pictures is used up; ask for fewer rollouts"
        if self._spent >= self.seconds:
            return f"left out: the frames before it took {self._spent:.0f} seconds to decode; ask for fewer rollouts"
        return ""

    def _decode(self, item: MediaItem, path: Path, video: VideoConfig, root: Path | None, rules: FrameRules) -> int:
        started, kind = time.perf_counter(), item.kind
        try:
            frames = small_jpegs(clip := _read(item, path, video, root, rules))
        except SampleError as error:
            return self.note(path, f"{error.message} [{error.kind}]")
        except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
            return self.note(path, f"{type(error).__name__}: {error}")
        finally:
            self._spent += time.perf_counter() - started
        self._bytes += sum(map(len, frames))
        times = [round(seconds, 2) for seconds in clip.timestamps]
        if kind == "video" and len(frames) % 2:  # as the model sees the last one, twice
            frames, times = [*frames, frames[-1]], [*times, times[-1]]
        self.media.append({"name": path.name, "frames": frames, "times": times, "note": ""})
        return len(self.media) - 1


def _read(item: MediaItem, path: Path, video: VideoConfig, root: Path | None, rules: FrameRules) -> Clip:
    """Read the frames of a medium that the model has seen, in the size of the file."""
    if item.kind == "image":
        return read_image(path, root=root)
    given: dict[str, Any] = {"max_frames": item.max_frames or video.max_frames, "fps": item.fps or video.fps}
    given |= {"start": item.start, "end": item.end, "root": root, "rules": rules}
    shown: dict[str, Any] = {"frames_per_second": item.frames_per_second, "timestamps": item.timestamps}
    if item.frames:
        return read_frame_files(item.frames, name=path, **shown, **given)
    if item.timestamps or item.frames_per_second is not None:
        return read_frame_folder(path, **shown, **given)
    # Every backend returns the same frames, so the one that is always installed is used here.
    return read_frames(path, threads=1, **given)


def small_jpegs(clip: Clip) -> list[str]:
    """Return the frames of a clip (RGB, upright) as data URIs, with at most SIDE pixels on the longer side."""
    side = max(SMALLEST, min(SIDE, int(SIDE * math.sqrt(MANY / len(clip.timestamps)))))
    uris: list[str] = []
    assert isinstance(clip.frames, Tensor), "planes were not asked for"
    for pixels in clip.frames.cpu().numpy():
        image = Image.fromarray(pixels)
        image.thumbnail((side, side))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=72)
        uris.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii"))
    return uris
