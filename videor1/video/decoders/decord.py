"""Frames by decord 0.6, the reference's decoder: RGB on the CPU, rotated upright by the library.

What its last release (2021, with a private copy of FFmpeg 4) does, and what is done about it here:

- It numbers packets, hidden ones and those outside of an edit list too, and orders them by time. Its table of times
  must equal the file's, packet by packet. Where some are not shown, the whole file is decoded in order: what comes out
  are the frames that are shown, and there must be as many as there should.
- It reads the stream that FFmpeg holds for the best one; where that is not the first, the file is refused.
- After a seek it may give another frame than asked, or a damaged one, without a word: where key frames are not shown in
  the order they are stored (open GOPs, the default of x265), where they are none (intra refresh), and in containers
  without an index (FLV). It is let seek only in MP4 and Matroska files of closed GOPs; elsewhere the frames are decoded
  from the first one on, one after the other.
- It repeats a good frame in place of one that does not decode. ``fault_tol`` makes that an error.
- Frames under about 64 pixels of width may come out in another shape: an error. It has no decoder for AV1: an error.
- A video whose frame size changes is scaled to its first size, unnoticed.
- ``get_batch`` can loop for ever in native code, holding the GIL, on files with fewer frames than packets
  (github.com/dmlc/decord/issues/269, 373, 375): no thread can end it. Decode in worker processes with a timeout, as
  the data loader does: a hang then costs one sample.
- Its libraries are loaded so that their symbols are seen by all: import ``av`` first (this package does), or PyAV may
  call decord's old libvpx.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videor1.video.decoders.index import frames_to_decode, open_video
from videor1.video.decoders.library import LibraryDecoder
from videor1_kernels.frames_to_patches import YuvFrames

_NO_SUBSTITUTES = 1e-9  # of all frames: one repeated frame is too many
_EBML = b"\x1a\x45\xdf\xa3"
_STAND_ALONE = ("vp8", "vp9", "mjpeg", "prores", "dnxhd", "ffv1")  # nothing is called a key frame that is none
# Codec -> where its extradata tells the size of the length prefixes; shift and mask of a NAL unit's type; the types of
# pictures; those of IDR pictures, which nothing refers across.
_IDR = {"h264": (4, 0, 31, range(1, 6), (5,)), "hevc": (21, 1, 63, range(32), (19, 20))}


class DecordDecoder(LibraryDecoder):
    """``Decoder`` by decord; always RGB, whatever ``planes`` says."""

    backend = "decord"
    module = "decord"

    def __init__(self, path: str | Path, *, threads: int = 1, device: str | torch.device = "cpu") -> None:
        super().__init__(path, threads=threads, device=device)
        self.library.logging.set_level(self.library.logging.QUIET)

    def _read(self, numbers: list[int], planes: bool) -> tuple[Tensor | YuvFrames, int]:
        self.check_stream()
        # A new reader each time: one that has been used finds its way back less surely.
        reader = self.library.VideoReader(
            str(self.path.absolute()),  # a relative name with a colon would read as a protocol
            num_threads=self.threads,
            fault_tol=_NO_SUBSTITUTES,
        )
        self._check_times(reader)
        with self.library.bridge.use_torch():
            if not all(self.index.shown):
                # Its decoder leaves out what is not shown; that it left out as much shows only at the end.
                pixels = self._read_in_order(reader, numbers, self.index.info.num_frames)
                self._check_end(reader)
                return pixels, self.index.info.num_frames
            if self._may_seek(reader):
                return reader.get_batch(numbers).to(self.device), frames_to_decode(self.index.info, numbers)
            return self._read_in_order(reader, numbers, numbers[-1] + 1), numbers[-1] + 1

    def _check_times(self, reader: Any) -> None:
        """Its table must list the file's packets, shown or not."""
        packets = sorted(stamp for stamp in self.index.pts if stamp is not None)
        if len(reader) != len(self.index.pts) or len(packets) != len(self.index.pts):
            raise self.error(f"it counts {len(reader)} packets of video, the file holds {len(self.index.pts)}")
        theirs = torch.from_numpy(reader.get_frame_timestamp(range(len(reader)))[:, 0]).double()  # seconds, from fp32
        ours = (torch.tensor(packets) - packets[0]).double() * float(self.index.time_base)
        near = (theirs - theirs[0] - ours).abs() <= 1e-6 + ours[-1] * 2**-21
        if not near.all():
            number = int(near.logical_not().nonzero()[0])
            where = f"{theirs[number] - theirs[0]:.4f} s after the first, the file's is at {ours[number]:.4f} s"
            raise self.error(f"its packet {number} is at {where}: frames cannot be told apart")

    def _may_seek(self, reader: Any) -> bool:
        """The container has an index; each key frame stands alone and parts the frames before it from those after."""
        with self.path.open("rb") as file:
            head = file.read(8)
        keys = [position for position, key in enumerate(self.index.key) if key]
        if (head[:4] != _EBML and head[4:] != b"ftyp") or list(reader.get_key_indices()) != keys:
            return False
        pts = [stamp for stamp in self.index.pts if stamp is not None]
        before = [pts[0] - 1, *accumulate(pts, max)]
        after = [*accumulate(reversed(pts), min)][::-1]
        closed = all(before[key] < pts[key] == after[key] for key in keys)
        return closed and (self.index.info.codec in _STAND_ALONE or self._has_idr_keys())

    def _has_idr_keys(self) -> bool:
        """H.264 or HEVC whose key frames are IDR pictures: a container also calls recovery points so, or everything."""
        if self.index.info.codec not in _IDR:
            return False
        size_at, shift, mask, pictures, idr = _IDR[self.index.info.codec]
        with open_video(self.path) as (container, stream):
            extradata = stream.codec_context.extradata or b""
            if len(extradata) <= size_at or extradata[0] != 1:  # NAL units between start codes, not after lengths
                return False
            prefix = (extradata[size_at] & 3) + 1
            for packet in container.demux(stream):
                if packet.is_keyframe and packet.size:
                    kinds = (unit[0] >> shift & mask for unit in _nal_units(bytes(packet), prefix))
                    if next((kind for kind in kinds if kind in pictures), None) not in idr:
                        return False
        return True

    def _read_in_order(self, reader: Any, numbers: list[int], count: int) -> Tensor:
        """The frames of these numbers, out of the first ``count``."""
        wanted, frames = set(numbers), []
        for number in range(count):
            try:
                frame = reader.next()
            except StopIteration:
                raise self.error(f"it ended after {number} of {self.index.info.num_frames} frames") from None
            if number in wanted:
                frames.append(frame.to(self.device, copy=True))
        return torch.stack(frames)

    def _check_end(self, reader: Any) -> None:
        try:
            reader.next()
        except (StopIteration, self.library.DECORDLimitReachedError):  # it had to repeat a frame
            return
        raise self.error(f"it shows more than the {self.index.info.num_frames} frames of the file")


def _nal_units(data: bytes, prefix: int) -> Iterator[bytes]:
    """The first byte of each NAL unit; a length of ``prefix`` bytes stands before each."""
    position = 0
    while position + prefix < len(data):
        start = position + prefix
        yield data[start : start + 1]
        position = start + int.from_bytes(data[position:start], "big")
