"""Stand-ins for decord, torchcodec 0.17 and PyNvVideoCodec 2.2 with the signatures of those that are used.

The last two decode with PyAV, since the real ones need CUDA. Class attributes are their faults.
"""

from __future__ import annotations

import enum
import os
import sys
import types
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from coded_videos import COUNT, MADE, whole
from media import ffmpeg_frames


class VideoReader:
    """``decord.VideoReader`` of black frames in the place of ``b-frames``."""

    count, step, shape, left = COUNT, 0.1, (*MADE["b-frames"].size, 3), COUNT

    def __init__(self, uri: str, *, num_threads: int, fault_tol: float) -> None:
        assert 0 < fault_tol * COUNT < 1
        assert num_threads == 1

    def __len__(self) -> int:
        return self.count

    def get_frame_timestamp(self, indices: Iterable[int]) -> np.ndarray:
        return np.array([[self.step * i, self.step * (i + 1)] for i in indices], dtype=np.float32)

    def get_batch(self, indices: list[int]) -> torch.Tensor:
        return torch.zeros(len(indices), *self.shape, dtype=torch.uint8)

    def get_key_indices(self) -> list[int]:
        return list(range(0, COUNT, 24))

    def next(self) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise StopIteration
        return torch.zeros(self.shape, dtype=torch.uint8)


class FrameBatch(NamedTuple):
    data: torch.Tensor
    pts_seconds: torch.Tensor


class VideoDecoder:
    """``torchcodec.decoders.VideoDecoder``; it counts ``more`` frames, and numbers them ``shift`` too low."""

    more = shift = drop = 0
    late, by_time = 0.0, True
    error: Exception | None = None

    def __init__(self, source: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        asked = {"stream_index": 0, "dimension_order": "NHWC", "num_ffmpeg_threads": 1, "device": "cpu"}
        assert options == asked | {"seek_mode": "exact"}
        self.pixels, seconds = whole(Path(os.path.realpath(source)))
        self.seconds = torch.tensor(seconds, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.pixels) + self.more

    def get_frames_at(self, indices: list[int]) -> FrameBatch:
        assert indices == sorted(set(indices))
        if indices[-1] >= len(self):
            raise IndexError(f"Invalid frame index={indices[-1]}")
        return self._batch([(index - self.shift) % len(self.pixels) for index in indices][self.drop :])

    def get_frames_played_at(self, seconds: list[float]) -> FrameBatch:
        if not self.by_time:
            raise RuntimeError("Invalid pts in seconds\n(more)")
        at = torch.searchsorted(self.seconds, torch.tensor(seconds, dtype=torch.float64), right=True) - 1
        return self._batch(at.tolist())

    def _batch(self, numbers: list[int]) -> FrameBatch:
        return FrameBatch(self.pixels[numbers], self.seconds[numbers] + self.late)


class OutputColorType(enum.Enum):
    NATIVE = "nv12"
    RGB = "rgb24"


class Surface:
    """A decoded frame that is read through DLPack; the library reuses its memory at the next call."""

    def __init__(self, pixels: torch.Tensor, pts: int) -> None:
        self.pixels, self.pts = pixels.clone(), pts
        self.__dlpack__, self.__dlpack_device__ = self.pixels.__dlpack__, self.pixels.__dlpack_device__

    def getPTS(self) -> int:  # noqa: N802
        return self.pts


class SimpleDecoder:
    """``PyNvVideoCodec.SimpleDecoder``; it also gives frames of the pts ``unshown``, before the file's."""

    unshown: tuple[int, ...] = ()
    repeat_last = late = drop = 0
    error: Exception | None = None

    def __init__(self, enc_file_path: str, *, output_color_type: OutputColorType, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        assert options == {"gpu_id": 0, "use_device_memory": True, "need_scanned_stream_metadata": True}
        pixels = stored(enc_file_path, output_color_type.value)
        self.pixels = [pixels[0]] * len(self.unshown) + list(pixels)
        self.pts = [*self.unshown, *(frame.pts for frame in ffmpeg_frames(enc_file_path))]
        self.out: list[Surface] = []

    def __len__(self) -> int:
        return len(self.pts)

    def get_batch_frames_by_index(self, indices: list[int]) -> list[Surface]:
        assert indices == sorted(set(indices))
        for surface in self.out:
            surface.pixels.fill_(99)
        for index in indices:
            if not 0 <= index < len(self):
                warnings.warn(f"Skipping index {index}: Out of valid range", stacklevel=2)
        numbers = [min(n, len(self) - 1 - self.repeat_last) for n in indices if 0 <= n < len(self)][self.drop :]
        self.out = [Surface(self.pixels[n], self.pts[n] + self.late) for n in numbers]
        return self.out


def stored(path: str | Path, form: str = "nv12") -> torch.Tensor:
    """The pixels of all frames of a file, not turned."""
    return torch.from_numpy(np.stack([frame.to_ndarray(format=form) for frame in ffmpeg_frames(path)]))


def install(monkeypatch: pytest.MonkeyPatch, library: str, **faults: Any) -> None:
    """Put the stand-in of a library into the place of the real one; of decord, only what reads files."""
    modules: dict[str, tuple[str, type]] = {
        "decord": ("decord", VideoReader),
        "torchcodec": ("torchcodec.decoders", VideoDecoder),
        "pynvvideocodec": ("PyNvVideoCodec", SimpleDecoder),
    }
    name, reader = modules[library]
    wrong = type(reader.__name__, (reader,), faults)
    if library == "decord":
        monkeypatch.setattr("decord.VideoReader", wrong)
        return
    module: Any = types.ModuleType(name)
    module.OutputColorType = OutputColorType
    setattr(module, reader.__name__, wrong)
    monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType(name.partition(".")[0]))
    monkeypatch.setitem(sys.modules, name, module)
