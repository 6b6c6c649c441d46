"""Decoding with decord 0.6, the reference's decoder: RGB on the CPU, rotated upright by the library.

The last release (2021, with a private copy of FFmpeg 4) has these faults, which are handled here as follows:

- It numbers packets by time, including hidden ones and those outside of an edit list. Its table of times must equal the
  file's, packet by packet. Where some packets are not shown, the whole file is decoded in order: decord then gives the
  frames that are shown, and their number is checked.
- It cannot be told which stream to read; a file of several video streams is refused.
- It turns a picture by the angle of its display matrix, and does not mirror it; that is left to the caller.
- After a seek it may silently give another frame than requested, or a damaged one: where key frames are not shown in
  the order they are stored (open GOPs, the default of x265), where packets are called key frames that are none (intra
  refresh), and in containers without a table of packets (FLV). It is therefore allowed to seek only in MP4 and Matroska
  files of closed GOPs; in others of them all frames up to the last one wanted are decoded in order.
- In a container without such a table it may begin behind the first frame (MPEG-TS with B-frames). All of such a file is
  decoded, and the number of its frames must be the file's.
- It repeats a good frame in place of one that does not decode. ``fault_tol`` makes that an error.
- Frames narrower than about 64 pixels may have another shape than expected, which is an error here. It has no decoder
  for AV1, which is an error too.
- It scales a video whose frame size changes to the first size; this goes unnoticed.
- ``get_batch`` can loop for ever in native code, holding the GIL, on files with fewer frames than packets
  (github.com/dmlc/decord/issues/269, 373, 375), and no thread can stop it. Decode in worker processes with a timeout,
  as the data loader does, so that a hang costs only one sample.
- It loads its libraries with globally visible symbols. ``av`` must be imported first (this package does), or PyAV may
  call decord's old libvpx.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videor1.video.decoders.container import open_video
from videor1.video.decoders.index import frames_to_decode
from videor1.video.decoders.library import LibraryDecoder
from videor1.video.opened import MediaFile
from videor1_kernels.frames_to_patches import YuvFrames

_FAULT_TOLERANCE = 1e-9  # allowed share of repeated frames: so small that a single one is an error
_EBML = b"\x1a\x45\xdf\xa3"  # first bytes of a Matroska file
_RELIABLE_KEYS = ("vp8", "vp9", "mjpeg", "prores", "dnxhd", "ffv1")  # codecs whose key frame flags are always true
# For each codec: the offset in its extradata that holds the size of the length prefixes, the shift and mask of a NAL
# unit's type, the types of pictures, and the types of IDR pictures. No picture refers to another across an IDR picture.
_IDR = {"h264": (4, 0, 31, range(1, 6), (5,)), "hevc": (21, 1, 63, range(32), (19, 20))}


class DecordDecoder(LibraryDecoder):
    """``Decoder`` by decord; always RGB, whatever ``planes`` says. The options are those of ``LibraryDecoder``."""

    backend = "decord"
    module = "decord"

    def __init__(self, path: str | Path | MediaFile, **options: Any) -> None:
        super().__init__(path, **options)
        self.library.logging.set_level(self.library.logging.QUIET)

    def _read(self, numbers: list[int], planes: bool) -> tuple[Tensor | YuvFrames, int]:
        self.check_stream()
        # A new reader is opened each time, because seeking in a used one is less reliable.
        reader = self.library.VideoReader(self.file.name, num_threads=self.threads, fault_tol=_FAULT_TOLERANCE)
        self._check_times(reader)
        with self.library.bridge.use_torch():
            if not all(self.index.shown) or not self._has_table():
                # The decoder leaves out packets that are not shown, and in a container without a table of packets it
                # may begin behind the first. Whether it left out the right number can only be checked at the end.
                pixels = self._read_in_order(reader, numbers, self.index.info.num_frames)
                self._check_end(reader)
                return pixels, self.index.info.num_frames
            if self._may_seek(reader):
                return reader.get_batch(numbers).to(self.device), frames_to_decode(self.index.info, numbers)
            return self._read_in_order(reader, numbers, numbers[-1] + 1), numbers[-1] + 1

    def _check_times(self, reader: Any) -> None:
        """Raise an error unless the reader's table lists all of the file's packets, shown or not, at their times."""
        packets = sorted(stamp for stamp in self.index.pts if stamp is not None)
        if len(reader) != len(self.index.pts) or len(packets) != len(self.index.pts):
            raise self.error(f"it counts {len(reader)} packets of video, the file holds {len(self.index.pts)}")
        reported = torch.from_numpy(reader.get_frame_timestamp(range(len(reader)))[:, 0]).double()  # seconds, from fp32
        expected = (torch.tensor(packets) - packets[0]).double() * float(self.index.time_base)
        close = (reported - reported[0] - expected).abs() <= 1e-6 + expected[-1] * 2**-21
        if not close.all():
            number = int(close.logical_not().nonzero()[0])
            where = f"{reported[number] - reported[0]:.4f} s after the first, the file's is at {expected[number]:.4f} s"
            raise self.error(f"its packet {number} is at {where}: frames cannot be told apart")

    def _has_table(self) -> bool:
        """Return whether this is an MP4 or a Matroska file, which say where their packets are."""
        with self.file.reader() as file:
            head = file.read(8)
        return head[:4] == _EBML or head[4:] == b"ftyp"

    def _may_seek(self, reader: Any) -> bool:
        """Return whether seeking in this file is reliable.

        Each key frame must be decodable by itself and separate the frames shown before it from those shown after it.
        """
        keys = [position for position, key in enumerate(self.index.key) if key]
        if list(reader.get_key_indices()) != keys:
            return False
        pts = [stamp for stamp in self.index.pts if stamp is not None]
        before = [pts[0] - 1, *accumulate(pts, max)]
        after = [*accumulate(reversed(pts), min)][::-1]
        closed = all(before[key] < pts[key] == after[key] for key in keys)
        return closed and (self.index.info.codec in _RELIABLE_KEYS or self._has_idr_keys())

    def _has_idr_keys(self) -> bool:
        """Return whether this is H.264 or HEVC whose key frames are all IDR pictures.

        A container may also mark recovery points, or every packet, as key frames.
        """
        if self.index.info.codec not in _IDR:
            return False
        size_at, shift, mask, pictures, idr = _IDR[self.index.info.codec]
        with open_video(self.file) as (container, stream):
            extradata = stream.codec_context.extradata or b""
            if len(extradata) <= size_at or extradata[0] != 1:  # NAL units follow start codes instead of lengths
                return False
            prefix = (extradata[size_at] & 3) + 1
            for packet in container.demux(stream):
                if packet.is_keyframe and packet.size:
                    kinds = (unit[0] >> shift & mask for unit in _nal_units(bytes(packet), prefix))
                    if next((kind for kind in kinds if kind in pictures), None) not in idr:
                        return False
        return True

    def _read_in_order(self, reader: Any, numbers: list[int], count: int) -> Tensor:
        """Decode the first ``count`` frames in order and return those of these numbers."""
        requested, frames = set(numbers), []
        for number in range(count):
            try:
                frame = reader.next()
            except StopIteration:
                raise self.error(f"it ended after {number} of {self.index.info.num_frames} frames") from None
            if number in requested:
                frames.append(frame.to(self.device, copy=True))
        return torch.stack(frames)

    def _check_end(self, reader: Any) -> None:
        """Raise an error where the reader gives more frames than the file shows."""
        try:
            reader.next()
        except (StopIteration, self.library.DECORDLimitReachedError):  # the latter: it would have to repeat a frame
            return
        raise self.error(f"it shows more than the {self.index.info.num_frames} frames of the file")


def _nal_units(data: bytes, prefix: int) -> Iterator[bytes]:
    """Yield the first byte of each NAL unit in ``data``, where a length of ``prefix`` bytes precedes each unit."""
    position = 0
    while position + prefix < len(data):
        start = position + prefix
        yield data[start : start + 1]
        position = start + int.from_bytes(data[position:start], "big")
