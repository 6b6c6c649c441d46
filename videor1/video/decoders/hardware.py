"""Decoding on the GPU's video engine (NVDEC) through PyAV: when to use it, and its surfaces as ``YuvFrames``.

The engine is slower than the cores of a CPU for small frames and for a few scattered frames, and it opens slowly. It
pays for long runs of large frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import av
import torch
from av.codec.hwaccel import HWAccel, hwdevices_available
from torch import Tensor

from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video.decoders.index import frames_to_decode
from videor1.video.decoders.protocol import VideoInfo
from videor1.video.decoders.stack import (
    Layout,
    MixedLayoutError,
    as_pixels,
    check_same_size,
    colour_matrix,
    colour_range,
    empty_planes,
)
from videor1.video.orientation import Orientation, frame_orientation
from videor1_kernels.frames_to_patches import YuvFrames

Hardware = Literal["none", "auto", "cuda"]

# The pixel formats that NVDEC decodes in every GPU generation still sold: 4:2:0 only, and H.264 in 8 bits only.
_FORMATS = {
    "h264": {"yuv420p", "yuvj420p"},
    "hevc": {"yuv420p", "yuvj420p", "yuv420p10le"},
    "av1": {"yuv420p", "yuvj420p", "yuv420p10le"},
    "vp9": {"yuv420p", "yuvj420p", "yuv420p10le"},
}
# Both thresholds await measurement on a card.
MIN_PIXELS = 1280 * 720  # pixels of a frame, below which the cores of a CPU are faster
MIN_RUN = 64  # number of frames to decode, below which opening the engine takes longer than it saves


class Choice(NamedTuple):
    """Where frames are decoded, and why."""

    where: Literal["cpu", "nvdec"]
    reason: str


def decide(
    info: VideoInfo, indices: Sequence[int], device: torch.device | str, hardware: Hardware, *, planes: bool = True
) -> Choice:
    """Choose where to decode these frames.

    Args:
        info: the video.
        indices: numbers of the frames to decode.
        device: the device that the frames are needed on.
        hardware: "none": always the CPU; "auto": NVDEC where it can be used and pays; "cuda": always NVDEC.
        planes: whether planes are requested. False (RGB) keeps "auto" on the CPU, whose conversion to RGB is exact.

    Raises:
        ConfigError: ``hardware`` is "cuda", and NVDEC cannot be used.
        ValueError: ``hardware`` has another value.
    """
    if hardware not in ("none", "auto", "cuda"):
        raise ValueError(f"hardware: expected none, auto or cuda, got {hardware!r}")
    if hardware == "none":
        return Choice("cpu", "hardware decoding is not asked for")
    obstacle = _obstacle(info, torch.device(device))
    if obstacle and hardware == "cuda":
        raise ConfigError(f"video.backend: NVDEC cannot decode this: {obstacle}; use backend 'auto' or 'pyav'")
    if obstacle:
        return Choice("cpu", obstacle)
    if hardware == "cuda":
        return Choice("nvdec", "hardware decoding is forced")
    if not planes:
        return Choice("cpu", "RGB frames are asked for")
    if info.width * info.height < MIN_PIXELS:
        return Choice("cpu", f"{info.width}x{info.height} is below {MIN_PIXELS} pixels")
    run = frames_to_decode(info, indices)
    if run < MIN_RUN:
        return Choice("cpu", f"{run} frames to decode are below {MIN_RUN}")
    return Choice("nvdec", f"{run} frames of {info.width}x{info.height} to decode")


def hwaccel(device: torch.device | str) -> HWAccel:
    """Return PyAV's setting for frames that stay in GPU memory, in torch's own CUDA context.

    FFmpeg refuses the primary context where torch has opened it with other flags before, so it is made current instead.
    """
    number = torch.device(device).index
    number = torch.cuda.current_device() if number is None else number
    torch.cuda.synchronize(number)  # opens the context of a device that nothing has used yet, in this thread
    context: dict[str, object] = {"primary_ctx": "0", "current_ctx": "1"}
    return HWAccel("cuda", device=str(number), allow_software_fallback=False, options=context, is_hw_owned=True)


class SurfaceStack:
    """Like ``stack.FrameStack``, for frames in GPU memory: NV12 or P010, copied there on the current stream."""

    def __init__(self, path: Path, count: int, device: torch.device | str) -> None:
        self._path, self._count, self._device = path, count, torch.device(device)
        self._layout: Layout | None = None
        self._tensors: tuple[Tensor, ...] = ()

    @property
    def orientation(self) -> Orientation:
        return self._layout.orientation if self._layout else Orientation()

    def put(self, slot: int, frame: av.VideoFrame) -> None:
        if frame.format.name != "cuda":  # FFmpeg has no decoder for this codec that uses the GPU
            raise SampleError("decode", f"the frames came out in main memory, as {frame.format.name}", self._path)
        # A plane given to torch as it is would be asked for a stream, which PyAV refuses: see the block below instead.
        surfaces = [torch.from_dlpack(plane.__dlpack__()) for plane in frame.planes]
        layout = self._layout_of(frame, surfaces)
        if self._layout is None:
            self._layout = layout
            self._tensors = empty_planes(layout, self._count, surfaces[0].device)
        elif layout != self._layout:
            check_same_size(self._path, self._layout, layout)
            raise MixedLayoutError
        # FFmpeg fills surfaces on the default stream, and reuses them once the frame is released.
        with _ordered_with_default_stream(self._device):
            for target, surface in zip(self._tensors, surfaces, strict=True):
                target[slot].copy_(surface)

    def pixels(self) -> Tensor | YuvFrames:
        assert self._layout is not None
        return as_pixels(self._layout, self._tensors)

    def _layout_of(self, frame: av.VideoFrame, surfaces: list[Tensor]) -> Layout:
        matrix, orientation = colour_matrix(frame), frame_orientation(frame)
        if (
            matrix is None
            or not orientation.is_quarter_turn
            or len(surfaces) != 2
            or surfaces[0].dtype not in (torch.uint8, torch.uint16)
        ):
            raise MixedLayoutError
        height, width = surfaces[0].shape
        return Layout(
            "nv12" if surfaces[0].dtype == torch.uint8 else "p010",
            height,
            width,
            orientation,
            matrix,
            colour_range(frame),
        )


@contextmanager
def _ordered_with_default_stream(device: torch.device) -> Iterator[None]:
    """Order the work of the block after all work queued on the device's default stream, and before its later work."""
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    current.wait_stream(default)
    yield
    default.wait_stream(current)


def _frames_stay_on_card() -> bool:
    """Return whether this PyAV can return frames in GPU memory."""
    try:
        HWAccel("cuda", is_hw_owned=True)  # this does not open the device yet
    except TypeError:
        return False
    return True


def _obstacle(info: VideoInfo, device: torch.device) -> str:
    """Return why NVDEC cannot decode this video here; "" if it can."""
    if device.type != "cuda":
        return f"the frames are wanted on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    if not _frames_stay_on_card() or "cuda" not in hwdevices_available():
        return f"PyAV {av.__version__} does not give out frames on the card (18 does)"
    if info.codec not in _FORMATS:
        return f"NVDEC has no {info.codec}"
    if info.pix_fmt not in _FORMATS[info.codec]:
        return f"NVDEC has no {info.codec} in {info.pix_fmt}"
    if not info.orientation.is_quarter_turn:
        return f"its frames are turned by {info.rotation} degrees, which is done on the CPU"
    if info.width % 2 or info.height % 2:
        return f"its chroma planes of {info.width}x{info.height} would lack a line"
    return ""
