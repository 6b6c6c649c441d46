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
from videor1.types import Clip, SampleError
from videor1.video import QWEN2_RULES, FrameRules, read_frames, read_image

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
        self, path: Path, kind: str, video: VideoConfig, root: Path | None = None, rules: FrameRules = QWEN2_RULES
    ) -> int:
        """Decode a file's frames, sampled by the options in ``video`` and the model's rules, and return their index in
        ``media``.

        The file that is opened must lie in ``root``, a folder with its symlinks resolved; None: anywhere.
        """
        key = (str(path), kind, video.max_frames, video.fps, root, rules.name)
        if key not in self._made:
            full = self._full()
            self._made[key] = self.note(path, full) if full else self._decode(path, kind, video, root, rules)
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

    def _decode(self, path: Path, kind: str, video: VideoConfig, root: Path | None, rules: FrameRules) -> int:
        started = time.perf_counter()
        try:
            # Every backend returns the same frames, so the one that is always installed is used here.
            clip = (
                read_image(path, root=root)
                if kind == "image"
                else read_frames(path, max_frames=video.max_frames, fps=video.fps, threads=1, root=root, rules=rules)
            )
            frames = small_jpegs(clip)
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
