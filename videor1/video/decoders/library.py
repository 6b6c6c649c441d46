"""The base class of the optional decoders: a library decodes the frames; their numbers and times are the index's.

Libraries number frames in their own ways (edit lists, hidden frames, open GOPs). Each decoder therefore compares what
its library reports about a frame with the index of the file, and raises a ``SampleError`` instead of returning another
frame than requested. A file whose frames have no presentation times, or times that do not follow the order in which
they are shown, cannot be compared and is refused too; the "pyav" backend reads it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videor1.errors import ConfigError, install
from videor1.types import SampleError
from videor1.video.decoders.container import MAX_PIXELS, open_video, sample_errors, video_streams
from videor1.video.decoders.index import FrameIndex, index_packets
from videor1.video.decoders.protocol import Frames, FramesChangedError, VideoInfo
from videor1.video.decoders.pyav import PyAvDecoder
from videor1.video.decoders.seeking import Planner
from videor1.video.decoders.stack import take_frames
from videor1.video.opened import MediaFile, media_file
from videor1_kernels.frames_to_patches import YuvFrames

_SOURCE_LINE = re.compile(r"^(\[[\d:]+\] )?\S+\.(cc|cpp|h):\d+: ")  # "[20:22:32] /some/file.cc:151: "


class LibraryDecoder:
    """A ``Decoder`` on top of a library, which the subclass calls in ``_read``.

    Args:
        path: the file.
        threads: number of threads that the library may use; 0: as many as it chooses.
        device: the device that the frames are returned on.
        max_pixels: most pixels of a frame.

    Raises:
        ConfigError: the library is not installed or does not load.
        SampleError: the file is missing, no video or cut, its frames are too large, or they are turned by an angle that
            only the "pyav" backend turns them by.
    """

    backend: str  # name of the backend, and of the extra that installs the library
    module: str  # name of the module to import
    applies_rotation = True  # whether the library turns frames by the angle of their display matrix

    def __init__(
        self,
        path: str | Path | MediaFile,
        *,
        threads: int = 1,
        device: str | torch.device = "cpu",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.library = import_library(self.module, self.backend)
        self.file = media_file(path, "not_video")
        self._opened_here = self.file is not path
        self.path, self._max_pixels = self.file.path, max_pixels
        self.threads = threads
        self.device = torch.device(device)
        with open_video(self.file, max_pixels=max_pixels) as (container, stream), sample_errors(self.path):
            self.index: FrameIndex = index_packets(self.path, container, stream)
            self.stream_index, self._num_videos = stream.index, len(video_streams(container))
        if not self.index.info.orientation.is_quarter_turn:
            raise self.error(f"it does not turn frames by {self.index.info.rotation} degrees")

    def probe(self) -> VideoInfo:
        return self.index.info

    def frames(self, indices: Sequence[int], *, planes: bool = False) -> Frames:
        info = self.index.info
        requested = [int(number) for number in indices]
        if outside := [number for number in requested if not 0 <= number < info.num_frames]:
            raise IndexError(f"{self.path}: frame {outside[0]} of 0..{info.num_frames - 1}")
        numbers = sorted(set(requested))
        pixels: Tensor | YuvFrames = torch.empty((0, *self._output_size(), 3), dtype=torch.uint8, device=self.device)
        decoded = 0
        if numbers:
            self._check_order(numbers)
            with self._errors():
                pixels, decoded = self._read(numbers, planes)
            self._check_shape(pixels, len(numbers))
        left = info.orientation.after(self._turned()) if self.applies_rotation else info.orientation
        return Frames(
            pixels=take_frames(pixels, [numbers.index(number) for number in requested]),
            rotation=left.rotation,
            mirrored=left.mirrored,
            seconds=tuple(info.seconds[number] for number in requested),
            backend=self.backend,
            decoded=decoded,
        )

    def close(self) -> None:
        """Close the file, unless it was opened by the caller."""
        if self._opened_here:
            self.file.close()

    def error(self, message: str) -> SampleError:
        """Return (not raise) a ``SampleError`` of kind ``decode`` with the name of the backend."""
        return SampleError("decode", f"{self.backend}: {message}", self.path)

    def check_stream(self) -> None:
        """Raise an error where a library that cannot be told which stream to read may read another one.

        Their copies of FFmpeg rank streams by other rules.
        """
        if self._num_videos > 1:
            raise self.error(f"the file has {self._num_videos} video streams, and it cannot be told which to read")

    def _read(self, numbers: list[int], planes: bool) -> tuple[Tensor | YuvFrames, int]:
        """Decode the frames of these ascending numbers.

        A frame of which it is not certain that it is the requested one must raise an error.

        Returns:
            The frames, and how many frames had to be decoded to get them.
        """
        raise NotImplementedError

    def _output_size(self) -> tuple[int, int]:
        """Return the (height, width) of the library's frames, which it may have rotated."""
        info = self.index.info
        swapped = self.applies_rotation and info.orientation.swaps_sides
        return (info.width, info.height) if swapped else (info.height, info.width)

    def _turned(self) -> int:
        """Return the degrees anticlockwise by which the library turns frames that are stored in this orientation.

        Libraries turn by the angle of the display matrix, which mirrors too; as FFmpeg's ``av_display_rotation_get``
        has it, this is the angle of the matrix's first row.
        """
        orientation = self.index.info.orientation
        # A matrix that mirrors left to right, or about a diagonal, has the angle of the turn that gives its first row.
        return (orientation.rotation + 180) % 360 if orientation.mirrored else orientation.rotation

    def _check_order(self, numbers: list[int]) -> None:
        """Raise an error unless the times of these frames say in which order they are shown."""
        told = self.index.by_pts
        if told and self.index.reorder and Planner(self.index).is_doubtful(numbers):
            with closing(PyAvDecoder(self.file, max_pixels=self._max_pixels)) as decoder:
                try:
                    told = decoder.in_order(numbers)
                except FramesChangedError:
                    told = False
        if not told:
            raise self.error("the times of its frames do not say in which order they are shown")

    def _check_shape(self, pixels: Tensor | YuvFrames, count: int) -> None:
        """Raise an error unless there are ``count`` frames of the file's size."""
        first = pixels.planes[0] if isinstance(pixels, YuvFrames) else pixels
        expected = (count, *self._output_size()) + (() if isinstance(pixels, YuvFrames) else (3,))
        if tuple(first.shape) != expected:
            raise self.error(f"frames of {list(first.shape)} where {list(expected)} was expected")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn exceptions of the library into a ``SampleError`` of the file, except where memory ran out."""
        try:
            yield
        except (SampleError, ConfigError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = one_line(error).replace(f"[{self.file.name}]", "").strip()
            raise self.error(f"decoding failed: {reason}") from error


def import_library(module: str, extra: str) -> Any:
    """Import an optional library.

    Raises:
        ConfigError: the library is not installed (the message says how to install it) or does not load (it says why).
    """
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
    """Return the first line of the exception at the bottom of the chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, without the source location that C++ libraries put before it."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    while match := _SOURCE_LINE.match(text):
        text = text[match.end() :]
    return text or type(error).__name__
