"""Decoding with torchcodec: RGB, turned by the library but not mirrored, on the CPU or with NVDEC on a CUDA device.

The library scans the file (``seek_mode="exact"``) and reports the presentation time of every frame that it returns,
which must be that of the requested frame. Where it numbers the frames in another way (edit lists, hidden frames), they
are requested by time. On a CUDA device it falls back to the CPU by itself for formats that the GPU does not decode. The
package needs an FFmpeg of the system, and its wheels on PyPI need a CUDA runtime; without them a ``ConfigError`` says
which library is missing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from videor1.errors import ConfigError
from videor1.video.decoders.index import frames_to_decode
from videor1.video.decoders.library import LibraryDecoder
from videor1_kernels.frames_to_patches import YuvFrames

_TOLERANCE = 1e-6  # seconds; covers the rounding of pts * time_base in fp64 and is far below the time between frames


class TorchcodecDecoder(LibraryDecoder):
    """``Decoder`` by torchcodec; always RGB, whatever ``planes`` says."""

    backend = "torchcodec"
    module = "torchcodec.decoders"

    def _read(self, numbers: list[int], planes: bool) -> tuple[Tensor | YuvFrames, int]:
        decoder = self._open()
        seconds = [self.index.info.seconds[number] for number in numbers]
        batch = decoder.get_frames_at(numbers) if len(decoder) == self.index.info.num_frames else None
        if batch is None or self._first_mismatch(batch, seconds) is not None:
            # The times are a little later than the frames', so that rounding does not lead to the frame before.
            batch = decoder.get_frames_played_at([second + _TOLERANCE / 10 for second in seconds])
        if (wrong := self._first_mismatch(batch, seconds)) is not None:
            raise self.error(f"gives no frame of its own for frame {numbers[wrong]} at {seconds[wrong]:.6f} s")
        return batch.data.to(self.device), frames_to_decode(self.index.info, numbers)

    def _open(self) -> Any:
        """Open the file with the library. Raises a ConfigError that says what is missing where it does not load."""
        try:
            return self.library.VideoDecoder(
                self.file.name,
                stream_index=self.stream_index,
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

    def _first_mismatch(self, batch: Any, seconds: list[float]) -> int | None:
        """Return the position of the first frame that does not have its expected time; None where all have."""
        reported = batch.pts_seconds.tolist()
        if len(reported) != len(seconds) or len(batch.data) != len(seconds):
            raise self.error(f"it gave {len(reported)} frames of the {len(seconds)} asked for")
        pairs = enumerate(zip(reported, seconds, strict=True))
        return next((position for position, (a, b) in pairs if not abs(a - b) <= _TOLERANCE), None)
