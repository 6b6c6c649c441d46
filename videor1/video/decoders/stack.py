"""Stacking decoded frames in one preallocated tensor, or one per plane, so that each frame is copied only once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from videor1.types import SampleError
from videor1.video.orientation import Orientation, Turner, frame_orientation
from videor1_kernels.frames_to_patches import YuvFrames

Kind = Literal["rgb", "i420", "nv12", "i420-10", "p010"]
Matrix = Literal["601", "709", "2020"]
Range = Literal["limited", "full"]

_KINDS: dict[str, Kind] = {
    "yuv420p": "i420",
    "yuvj420p": "i420",
    "nv12": "nv12",
    "yuv420p10le": "i420-10",
    "p010le": "p010",
}
_MATRICES: dict[int, Matrix] = {1: "709", 2: "601", 5: "601", 6: "601", 9: "2020"}  # AVCOL_SPC_*; 2: unspecified
# Newer versions of PyAV would start a thread for every core; older ones do not have the argument. PyAV's methods have
# no signature to inspect, so the docstring is searched for it.
_ONE_THREAD = {"threads": 1} if "int threads" in (VideoReformatter.reformat.__doc__ or "") else {}
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


class MixedLayoutError(Exception):
    """Raised where the pixel format or the colours change within the video, so that planes cannot be stacked."""


@dataclass(frozen=True)
class Layout:
    """The format that all stacked frames share."""

    kind: Kind
    height: int
    width: int
    orientation: Orientation
    matrix: Matrix = "601"
    range: Range = "limited"


class FrameStack:
    """A stack of ``count`` frames in main memory, which are put in any order and all have the layout of the first.

    Raises:
        SampleError: from ``put``, where the size or the orientation changes.
        MixedLayoutError: from ``put``, where planes are requested and the pixel format or the colours change.
    """

    def __init__(self, path: Path, count: int, *, planes: bool) -> None:
        self._path, self._count, self._planes = path, count, planes
        self._layout: Layout | None = None
        self._tensors: tuple[Tensor, ...] = ()
        self._arrays: tuple[np.ndarray, ...] = ()
        self._reformatter = VideoReformatter()
        self._turner = Turner()

    @property
    def orientation(self) -> Orientation:
        return self._layout.orientation if self._layout else Orientation()

    def put(self, slot: int, frame: av.VideoFrame) -> None:
        orientation = frame_orientation(frame)
        if not orientation.is_quarter_turn:
            frame, orientation = self._turner.turn(frame, orientation.rotation), Orientation()
        layout = layout_of(frame, orientation, planes=self._planes)
        if self._layout is None:
            self._layout = layout
            self._tensors = empty_planes(layout, self._count)
            self._arrays = tuple(tensor.numpy() for tensor in self._tensors)
        elif layout != self._layout:
            check_same_size(self._path, self._layout, layout)
            raise MixedLayoutError
        out = [array[slot] for array in self._arrays]
        if layout.kind == "rgb":
            rgb = self._reformatter.reformat(frame, format="rgb24", **_conversion(frame))
            out[0][:] = _rows(rgb.planes[0], layout.width * 3).reshape(out[0].shape)
        elif layout.kind == "i420-10":
            Y, U, V = (_rows(plane, plane.width, np.uint16) for plane in frame.planes)
            np.left_shift(Y, 6, out=out[0])
            np.left_shift(U, 6, out=out[1][..., 0])
            np.left_shift(V, 6, out=out[1][..., 1])
        else:
            for target, plane in zip(out, frame.planes, strict=True):
                rows = _rows(plane, target[0].size, target.dtype.type)
                target[:] = rows.reshape(target.shape)

    def pixels(self) -> Tensor | YuvFrames:
        if self._layout is None:  # no frame was requested
            return torch.empty((0, 0, 0, 3), dtype=torch.uint8)
        return as_pixels(self._layout, self._tensors)


def _conversion(frame: av.VideoFrame) -> dict[str, int]:
    """Return the arguments with which PyAV converts a frame to RGB by the frame's own colour matrix and range."""
    if _ONE_THREAD:
        return _ONE_THREAD
    # Older versions convert everything as BT.601 of limited range, unless they are told two different colour spaces or
    # ranges. 5 and 6 are the same matrix.
    if frame.format.is_rgb or frame.format.has_palette:
        return {}
    matrix = int(frame.colorspace)
    grey = frame.format.name.startswith(("gray", "ya")) and int(frame.color_range) == 0  # untagged: of full range
    return {
        "src_colorspace": matrix if matrix in (1, 4, 7, 9) else 6,
        "dst_colorspace": 5,
        "src_color_range": _FULL_RANGE if grey or colour_range(frame) == "full" else 1,
        "dst_color_range": _FULL_RANGE,
    }


def layout_of(frame: av.VideoFrame, orientation: Orientation, *, planes: bool) -> Layout:
    """Return the layout in which a frame in main memory is stored."""
    kind = _KINDS.get(frame.format.name, "rgb") if planes else "rgb"
    matrix = _MATRICES.get(int(frame.colorspace))
    if kind == "rgb" or matrix is None or any(plane.line_size < 0 for plane in frame.planes):
        return Layout("rgb", frame.height, frame.width, orientation)
    return Layout(kind, frame.height, frame.width, orientation, matrix, colour_range(frame))


def colour_matrix(frame: av.VideoFrame) -> Matrix | None:
    """Return the colour matrix of a frame; None where ``YuvFrames`` does not have it."""
    return _MATRICES.get(int(frame.colorspace))


def colour_range(frame: av.VideoFrame) -> Range:
    """Return whether the luma and chroma of a frame use the limited or the full range."""
    full = int(frame.color_range) == _FULL_RANGE or frame.format.name.startswith("yuvj")
    return "full" if full else "limited"


def check_same_size(path: Path, first: Layout, other: Layout) -> None:
    """Raise a ``SampleError`` where two frames of a video differ in size or orientation."""
    if (first.height, first.width) != (other.height, other.width):
        raise SampleError("decode", "the frame size changes within the video", path)
    if first.orientation != other.orientation:
        raise SampleError("decode", "the orientation changes within the video", path)


def empty_planes(layout: Layout, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Return uninitialised tensors for ``count`` frames: RGB, (Y, U, V) or (Y, UV)."""
    H, W = layout.height, layout.width
    half = (count, -(-H // 2), -(-W // 2))
    dtype = torch.uint16 if layout.kind in ("i420-10", "p010") else torch.uint8
    shapes: dict[Kind, tuple[tuple[int, ...], ...]] = {"rgb": ((count, H, W, 3),), "i420": ((count, H, W), half, half)}
    return tuple(
        torch.empty(shape, dtype=dtype, device=device) for shape in shapes.get(layout.kind, ((count, H, W), (*half, 2)))
    )


def as_pixels(layout: Layout, tensors: tuple[Tensor, ...]) -> Tensor | YuvFrames:
    """Return stacked tensors of a layout as an RGB tensor or as ``YuvFrames``."""
    return tensors[0] if layout.kind == "rgb" else YuvFrames(tensors, layout.matrix, layout.range)


def take_frames(pixels: Tensor | YuvFrames, positions: list[int]) -> Tensor | YuvFrames:
    """Return the frames at these positions, in this order; the input itself where that is all frames in order."""
    if positions == list(range(len(pixels))):
        return pixels
    if isinstance(pixels, Tensor):
        return pixels[positions]
    planes = tuple(_bits(plane)[positions].view(plane.dtype) for plane in pixels.planes)
    return YuvFrames(planes, pixels.matrix, pixels.range)


def _bits(plane: Tensor) -> Tensor:
    """Return a uint16 plane as int16, because torch cannot index uint16."""
    return plane.view(torch.int16) if plane.dtype == torch.uint16 else plane


def _rows(plane: av.video.plane.VideoPlane, samples: int, dtype: type = np.uint8) -> np.ndarray:
    """Return a view [height, samples] of a plane whose lines may be padded."""
    lines: np.ndarray = np.frombuffer(plane, dtype)
    return lines.reshape(plane.height, -1)[:, :samples]
