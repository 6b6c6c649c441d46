"""Frames by torchcodec: RGB, rotated upright by the library, on the CPU or decoded by NVDEC on a CUDA device.

It scans the file (``seek_mode="exact"``) and tells the presentation time of every frame it gives, which must be that of
the frame asked for. Where it numbers the frames otherwise (edit lists, hidden frames), they are asked for by time. On a
CUDA device it falls back to the CPU by itself for what the card does not decode. The package needs a system FFmpeg, and
its wheels of PyPI a CUDA runtime: without them a ``ConfigError`` says which library is missing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from videor1.errors import ConfigError
from videor1.video.decoders.index import frames_to_decode
from videor1.video.decoders.library import LibraryDecoder
from videor1_kernels.frames_to_patches import YuvFrames

_TOLERANCE = 1e-6  # seconds: rounding of pts * time_base in fp64, far below the distance of two frames


class TorchcodecDecoder(LibraryDecoder):
    """``Decoder`` by torchcodec; always RGB, whatever ``planes`` says."""

    backend = "torchcodec"
    module = "torchcodec.decoders"

    def _read(self, numbers: list[int], planes: bool) -> tuple[Tensor | YuvFrames, int]:
        decoder = self._open()
        seconds = [self.index.info.seconds[number] for number in numbers]
        batch = decoder.get_frames_at(numbers) if len(decoder) == self.index.info.num_frames else None
        if batch is None or self._wrong(batch, seconds) is not None:
            # A little later, so that rounding does not lead to the frame before.
            batch = decoder.get_frames_played_at([second + _TOLERANCE / 10 for second in seconds])
        if (wrong := self._wrong(batch, seconds)) is not None:
            raise self.error(f"gives no frame of its own for frame {numbers[wrong]} at {seconds[wrong]:.6f} s")
        return batch.data.to(self.device), frames_to_decode(self.index.info, numbers)

    def _open(self) -> Any:
        try:
            return self.library.VideoDecoder(
                str(self.path.absolute()),
                stream_index=self.stream_index()[0],
                dimension_order="NHWC",
                num_ffmpeg_threads=self.threads,
                device=str(self.device),
                seek_mode="exact",
            )
        except RuntimeError as error:
            if "Could not load libtorchcodec" not in str(error):
                raise
            missing = [line.strip() for line in str(error).splitlines() if "cannot open shared object" in line]
            reason = missing[0] if missing else "it finds no FFmpeg that it knows"
            raise ConfigError(f'video.backend: torchcodec does not load ({reason}); use "pyav"') from error

    def _wrong(self, batch: Any, seconds: list[float]) -> int | None:
        """Position of the first frame that is not at its time; None where all are there."""
        theirs = batch.pts_seconds.tolist()
        if len(theirs) != len(seconds) or len(batch.data) != len(seconds):
            raise self.error(f"it gave {len(theirs)} frames of the {len(seconds)} asked for")
        pairs = enumerate(zip(theirs, seconds, strict=True))
        return next((position for position, (a, b) in pairs if not abs(a - b) <= _TOLERANCE), None)
