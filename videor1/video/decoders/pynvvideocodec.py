"""Decoding with NVIDIA's PyNvVideoCodec: frames are decoded on the GPU and stay there; they are neither turned
nor mirrored.

8-bit 4:2:0 video is returned as the NV12 surfaces that NVDEC makes, so that its colours are converted by this package
and not by the library; other formats that NVDEC decodes are returned as the library's RGB. The library silently leaves
out frames that it does not find and repeats others near the end of a file, so the number of frames and the pts of each
are checked. Where the library also counts frames that are not shown (edit lists), frames are requested by its numbers.
It does not support raw streams (H.264 or HEVC without a container).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videor1.video.decoders.container import open_video
from videor1.video.decoders.index import frames_to_decode
from videor1.video.decoders.library import LibraryDecoder
from videor1.video.opened import MediaFile
from videor1_kernels.frames_to_patches import YuvFrames

_MATRICES = {1: "709", 2: "601", 5: "601", 6: "601", 9: "2020"}  # AVColorSpace; 2: unspecified
_FULL_RANGE = 2  # AVColorRange
_RGB_PIXELS = 1 << 22  # number of pixels converted to RGB at once


class PyNvVideoCodecDecoder(LibraryDecoder):
    """``Decoder`` by PyNvVideoCodec's ``SimpleDecoder`` on the GPU of ``device`` (GPU 0 for "cpu").

    The options are those of ``LibraryDecoder``.
    """

    backend = "pynvvideocodec"
    module = "PyNvVideoCodec"
    applies_rotation = False

    def __init__(self, path: str | Path | MediaFile, **options: Any) -> None:
        super().__init__(path, **options)
        self._decoder: Any = None
        self._matrix, self._range = self._colours()
        info = self.index.info
        even = info.width % 2 == 0 == info.height % 2
        # The library pads NV12 frames of odd size, and its DLPack view of 10-bit surfaces has wrong strides.
        self._native = info.pix_fmt in ("yuv420p", "yuvj420p", "nv12") and even and self._matrix is not None

    def close(self) -> None:
        self._decoder = None

    def _read(self, numbers: list[int], planes: bool) -> tuple[Tensor | YuvFrames, int]:
        self.check_stream()
        if self._decoder is None:
            colour = self.library.OutputColorType
            self._decoder = self.library.SimpleDecoder(
                self.file.name,
                gpu_id=self.device.index or 0,
                use_device_memory=True,
                need_scanned_stream_metadata=True,  # Matroska's header does not say how many frames there are
                output_color_type=colour.NATIVE if self._native else colour.RGB,
            )
        frames = self._find(numbers)
        # The surfaces are copied now, because the library reuses them at the next call.
        pixels = torch.stack([torch.from_dlpack(frame) for frame in frames]).to(self.device)
        decoded = frames_to_decode(self.index.info, numbers)
        if not self._native:
            return pixels, decoded
        surfaces = self._nv12(pixels)
        return (surfaces if planes else _to_rgb(surfaces)), decoded

    def _find(self, numbers: list[int]) -> list[Any]:
        """Return the library's frames of these numbers, each checked by its pts."""
        stamps = [self.index.stamps[number] for number in numbers]
        frames = self._get_frames(numbers)
        if not all(self.index.shown) and [frame.getPTS() for frame in frames] != stamps:
            rank = {pts: rank for rank, pts in enumerate(sorted(pts for pts in self.index.pts if pts is not None))}
            frames = self._get_frames([rank[stamp] for stamp in stamps if stamp is not None])
        for number, frame, stamp in zip(numbers, frames, stamps, strict=True):
            if frame.getPTS() != stamp:
                raise self.error(f"gives a frame of pts {frame.getPTS()} for frame {number} of pts {stamp}")
        return frames

    def _get_frames(self, numbers: list[int]) -> list[Any]:
        """Return the library's frames of its own numbers. Raises SampleError where it gives fewer or more."""
        frames = self._decoder.get_batch_frames_by_index(numbers)
        if len(frames) != len(numbers):
            raise self.error(f"it gave {len(frames)} frames of the {len(numbers)} asked for")
        return frames

    def _nv12(self, surfaces: Tensor) -> YuvFrames:
        """Split surfaces, uint8 [F, 3/2 height, width] with the chroma rows below the luma rows, into planes."""
        height, width = self.index.info.height, self.index.info.width
        if tuple(surfaces.shape[1:]) != (height * 3 // 2, width):
            raise self.error(f"surfaces of {list(surfaces.shape[1:])} for a video of {width}x{height}")
        chroma = surfaces[:, height:].reshape(len(surfaces), height // 2, width // 2, 2)
        assert self._matrix is not None
        return YuvFrames((surfaces[:, :height], chroma), self._matrix, self._range)

    def _colours(self) -> tuple[Any, Any]:
        """Return the colour matrix (None where ``YuvFrames`` does not have it) and range of the video."""
        with open_video(self.file) as (_, stream):
            context = stream.codec_context
            full = context.color_range == _FULL_RANGE or self.index.info.pix_fmt == "yuvj420p"
            return _MATRICES.get(int(context.colorspace)), "full" if full else "limited"


def _to_rgb(frames: YuvFrames) -> Tensor:
    """Convert frames to uint8 RGB [F, height, width, 3], a few at a time: in fp32 all of them would take gigabytes."""
    count, height, width = frames.planes[0].shape
    rgb = torch.empty((count, height, width, 3), dtype=torch.uint8, device=frames.planes[0].device)
    step = max(1, _RGB_PIXELS // (height * width))
    for start in range(0, count, step):
        levels = frames.to_rgb(start, start + step, torch.float32)  # [n, 3, height, width]
        rgb[start : start + step] = levels.round_().to(torch.uint8).permute(0, 2, 3, 1)
    return rgb
