"""What the optional decoders share: frames come from a library, their numbers and times from the packets.

Libraries number frames in their own ways (edit lists, hidden frames, open GOPs). Each decoder here compares what its
library says of a frame with the index of the file, and raises a ``SampleError`` rather than give another frame than
was asked for. A file whose frames have no presentation times cannot be compared, so it is refused too; the "pyav"
backend reads it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videor1.errors import ConfigError, install
from videor1.types import SampleError
from videor1.video.decoders.index import FrameIndex, open_video, read_index
from videor1.video.decoders.protocol import Frames, VideoInfo
from videor1.video.decoders.stack import taken
from videor1_kernels.frames_to_patches import YuvFrames

_SOURCE_LINE = re.compile(r"^(\[[\d:]+\] )?\S+\.(cc|cpp|h):\d+: ")  # "[20:22:32] /some/file.cc:151: "


class LibraryDecoder:
    """A ``Decoder`` on top of a library; the subclass says how to ask it.

    Args:
        path: the file.
        threads: that the library may use; 0: as many as it likes.
        device: where the frames go.

    Raises:
        ConfigError: the library is not there or does not load.
        SampleError: no such file, no video, cut.
    """

    backend: str
    module: str  # to import
    applies_rotation = True

    def __init__(self, path: str | Path, *, threads: int = 1, device: str | torch.device = "cpu") -> None:
        self.library = import_library(self.module, self.backend)
        self.path = Path(path)
        self.threads = threads
        self.device = torch.device(device)
        self.index: FrameIndex = read_index(self.path)
        self._streams: tuple[int, int] | None = None

    def probe(self) -> VideoInfo:
        return self.index.info

    def frames(self, indices: Sequence[int], *, planes: bool = False) -> Frames:
        info = self.index.info
        asked = [int(number) for number in indices]
        if outside := [number for number in asked if not 0 <= number < info.num_frames]:
            raise IndexError(f"{self.path}: frame {outside[0]} of 0..{info.num_frames - 1}")
        numbers = sorted(set(asked))
        pixels: Tensor | YuvFrames = torch.empty((0, *self._upright_size(), 3), dtype=torch.uint8, device=self.device)
        decoded = 0
        if numbers:
            if not self.index.by_pts:
                raise self.error("its frames have no presentation times, so they cannot be told apart")
            with self._errors():
                pixels, decoded = self._read(numbers, planes)
            self._check_shape(pixels, len(numbers))
        return Frames(
            pixels=taken(pixels, [numbers.index(number) for number in asked]),
            rotation=0 if self.applies_rotation else info.rotation,
            seconds=tuple(info.seconds[number] for number in asked),
            backend=self.backend,
            decoded=decoded,
        )

    def close(self) -> None:
        """Nothing stays open between calls."""

    def error(self, message: str) -> SampleError:
        return SampleError("decode", f"{self.backend}: {message}", self.path)

    def stream_index(self) -> tuple[int, int]:
        """(The stream that the index is of, the one that FFmpeg calls the best and libraries read)."""
        if self._streams is None:
            with open_video(self.path) as (container, stream):
                self._streams = stream.index, container.streams.best("video").index
        return self._streams

    def check_stream(self) -> None:
        """For libraries that cannot be told which stream to read."""
        ours, best = self.stream_index()
        if ours != best:
            raise self.error(f"it reads the file's stream {best}, the frames are those of stream {ours}")

    def _read(self, numbers: list[int], planes: bool) -> tuple[Tensor | YuvFrames, int]:
        """(The frames of these ascending numbers, frames decoded on the way); never a doubtful frame."""
        raise NotImplementedError

    def _upright_size(self) -> tuple[int, int]:
        info = self.index.info
        turned = self.applies_rotation and info.rotation % 180 == 90
        return (info.width, info.height) if turned else (info.height, info.width)

    def _check_shape(self, pixels: Tensor | YuvFrames, count: int) -> None:
        first = pixels.planes[0] if isinstance(pixels, YuvFrames) else pixels
        expected = (count, *self._upright_size()) + (() if isinstance(pixels, YuvFrames) else (3,))
        if tuple(first.shape) != expected:
            raise self.error(f"frames of {list(first.shape)} where {list(expected)} was expected")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the library raises is the file's error, unless memory ran out."""
        try:
            yield
        except (SampleError, ConfigError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = one_line(error).replace(f"[{self.path.absolute()}]", "").strip()
            raise self.error(f"decoding failed: {reason}") from error


def import_library(module: str, extra: str) -> Any:
    """Import an optional library; a ``ConfigError`` says how to install it, or in one line why it does not load."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a missing shared library is an OSError or a RuntimeError, depending on who loads it
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            message = f'video.backend: {extra} is not installed; {install(extra)}, or use "pyav"'
        else:
            message = f'video.backend: {extra} is installed but does not load ({root_cause(error)}); use "pyav"'
        raise ConfigError(message) from error


def root_cause(error: BaseException) -> str:
    """The first line of the exception at the bottom of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def one_line(error: BaseException) -> str:
    """An exception's first line, without the source line that C++ libraries put before it."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    while match := _SOURCE_LINE.match(text):
        text = text[match.end() :]
    return text or type(error).__name__
