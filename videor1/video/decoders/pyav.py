"""Decoding with PyAV (FFmpeg), on the CPU or on the GPU's video engine.

Only the packets that the requested frames need are decoded: from the last key frame that each of them can be decoded
from, without frames that no other frame refers to. Parts that are not decoded are not checked, so damage there goes
unnoticed. The decoded frames are compared with those that the packets announce. Where they differ, where they leave
the decoder in another order than their times say, and where a file has no usable times, the whole file is decoded, and
the frames that come out of the decoder count, in the order in which they do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Literal

import av
import torch
from torch import Tensor

from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video.decoders import hardware as nvdec
from videor1.video.decoders.container import MAX_PIXELS, open_video, sample_errors
from videor1.video.decoders.hardware import SurfaceStack
from videor1.video.decoders.index import FrameIndex, frames_to_decode, index_packets
from videor1.video.decoders.protocol import Frames, FramesChangedError, VideoInfo
from videor1.video.decoders.seeking import OutOfStepError, PacketReader, Planner, Segment
from videor1.video.decoders.stack import FrameStack, MixedLayoutError, take_frames
from videor1.video.decoders.timeline import ascending
from videor1.video.opened import MediaFile, media_file
from videor1_kernels.frames_to_patches import YuvFrames

log = logging.getLogger(__name__)

# Codecs in which each picture states whether others refer to it. (HEVC's states this only for its own temporal layer.)
_SKIPPABLE = frozenset(("h264",))
_MIN_THREADED_PIXELS = 100 * 1280 * 720  # pixels to decode, below which threads take longer to start than they save


class _UnreliableError(Exception):
    """Raised where decoding from a key frame failed, or gave other frames than the packets announce."""


class _OrderError(Exception):
    """Raised where frames leave the decoder in another order than their times say."""


class PyAvDecoder:
    """``protocol.Decoder`` by PyAV.

    Args:
        path: the file.
        threads: threads for decoding; 0: as many as there are cores, or one where there is little to decode.
        hardware: "none" (the CPU), "auto" (NVDEC where it is faster, see ``hardware.decide``) or "cuda" (NVDEC).
        device: the device that the frames are needed on; frames of NVDEC stay there, others are in main memory.
        max_pixels: most pixels of a frame.

    Raises:
        SampleError: the file is missing, cut or no video, or its frames are too large.
        ConfigError: from ``frames``, where ``hardware`` is "cuda" and NVDEC cannot decode the file.
    """

    def __init__(
        self,
        path: str | Path | MediaFile,
        *,
        threads: int = 1,
        hardware: nvdec.Hardware = "none",
        device: str | torch.device = "cpu",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._file = media_file(path, "not_video")
        self._opened_here = self._file is not path
        self._path, self._requested_threads, self._hardware = self._file.path, threads, hardware
        self._max_pixels = max_pixels
        self._threads = 1  # number of threads that the open file is decoded with
        self._device = torch.device(device)
        self._where: Literal["cpu", "nvdec"] = "cpu"
        self.backend = "pyav"
        self._index: FrameIndex | None = None
        self._planner: Planner | None = None  # None: only decoding the whole file gives reliable frames
        self._counted = False  # whether the index is that of the frames of a whole decode
        self._reader = PacketReader(self._open)

    def probe(self) -> VideoInfo:
        return self._indexed().info

    def frames(self, indices: Sequence[int], *, planes: bool = False) -> Frames:
        info = self.probe()
        for number in indices:
            if not 0 <= number < info.num_frames:
                raise IndexError(f"frame {number} of a video of {info.num_frames} frames")
        where = nvdec.decide(info, indices, self._device, self._hardware, planes=planes).where
        numbers = sorted(set(indices))
        done = self._run_on_card(numbers) if where == "nvdec" else None
        failed = where == "nvdec" and done is None
        run, stack = done or self._run_on_cpu(numbers, planes, self._threads_for(info, numbers))
        backend = "pyav-after-nvdec" if failed else self.backend  # told apart where decoded videos are counted
        pixels = stack.pixels()
        if isinstance(pixels, YuvFrames) and not planes:
            pixels = _to_rgb(pixels)
        slots = {number: slot for slot, number in enumerate(numbers)}
        order = [slots[number] for number in indices]
        seconds = tuple(run.seconds[slot] for slot in order)
        left = stack.orientation
        return Frames(take_frames(pixels, order), left.rotation, seconds, backend, run.decoded, left.mirrored)

    def in_order(self, indices: Sequence[int]) -> bool:
        """Return whether the times of the file say in which order these frames are shown; this may decode them."""
        numbers = sorted(set(indices))
        if self._indexed().by_pts and self._planner is not None and self._planner.is_doubtful(numbers):
            self._run(numbers, _NoStack())
        return self._indexed().by_pts

    def close(self) -> None:
        self._reader.close()
        if self._opened_here:
            self._file.close()

    def _threads_for(self, info: VideoInfo, numbers: Sequence[int]) -> int:
        """Return the number of threads to decode these frames with."""
        pixels = frames_to_decode(info, numbers) * info.width * info.height
        if self._requested_threads == 0 and pixels < _MIN_THREADED_PIXELS:
            return 1
        return self._requested_threads

    def _open(self) -> AbstractContextManager[tuple[av.container.InputContainer, av.VideoStream]]:
        accelerator = nvdec.hwaccel(self._device) if self._where == "nvdec" else None
        return open_video(self._file, threads=self._threads, hwaccel=accelerator, max_pixels=self._max_pixels)

    def _indexed(self) -> FrameIndex:
        if self._index is None:
            with sample_errors(self._path):
                self._index = index_packets(self._path, self._reader.container, self._reader.stream)
            self._planner = Planner(self._index)
        return self._index

    def _run_on_card(self, numbers: Sequence[int]) -> tuple[_Run, SurfaceStack] | None:
        """Decode these frames on NVDEC; return None where that failed and the CPU may try."""
        cpu_index = self._index, self._planner, self._counted
        try:
            self._move_to("nvdec", threads=1)
            stack = SurfaceStack(self._path, len(numbers), self._device)
            return self._run(numbers, stack), stack
        except FramesChangedError:
            if self._hardware == "cuda":
                raise
            self._index, self._planner, self._counted = cpu_index  # where NVDEC's frames differ, the CPU's count
            return None
        except (SampleError, MixedLayoutError, RuntimeError) as error:  # CUDA's and PyAV's own errors are RuntimeErrors
            if self._hardware == "cuda":
                raise ConfigError(f"video.backend: NVDEC cannot decode {self._path}: {error}") from error
            log.warning("%s: decoded on the CPU, because NVDEC failed: %s", self._path, error or type(error).__name__)
            return None

    def _run_on_cpu(self, numbers: Sequence[int], planes: bool, threads: int) -> tuple[_Run, FrameStack]:
        self._move_to("cpu", threads)
        stack = FrameStack(self._path, len(numbers), planes=planes)
        try:
            return self._run(numbers, stack), stack
        except MixedLayoutError:  # the pixel format changes within the video, so each frame is converted to RGB
            stack = FrameStack(self._path, len(numbers), planes=False)
            return self._run(numbers, stack), stack

    def _move_to(self, where: Literal["cpu", "nvdec"], threads: int) -> None:
        """Open the file again where it is to be decoded elsewhere or with another number of threads."""
        if (self._where, self._threads) != (where, threads):
            self._where, self._threads = where, threads
            self.backend = "pyav" if where == "cpu" else "pyav-nvdec"
            self._reader.restart()

    def _run(self, numbers: Sequence[int], stack: FrameStack | SurfaceStack | _NoStack) -> _Run:
        """Decode these frames into the stack, by segments where possible and otherwise from the whole file."""
        index, planner = self._indexed(), self._planner
        run = _Run(stack, numbers, index)
        with sample_errors(self._path):
            plan = planner.plan(list(run.slots)) if planner is not None and index.by_pts else None
            if plan is not None and planner is not None:
                try:
                    for segment in plan:
                        self._decode_segment(planner, segment, run)
                    return run
                except (_UnreliableError, OutOfStepError, _OrderError):
                    pass
            self._decode_whole(index, run)
            return run

    def _decode_segment(self, planner: Planner, segment: Segment, run: _Run) -> None:
        """Decode a segment, and once more from an earlier key frame where that fails."""
        try:
            self._decode(planner, segment, run)
        except _UnreliableError:
            earlier = planner.earlier(segment)
            if earlier is None:
                raise
            self._decode(planner, earlier, run)

    def _decode(self, planner: Planner, segment: Segment, run: _Run) -> None:
        """Decode a segment's packets, keep the requested frames, and check that all announced frames come out."""
        check = _SegmentCheck(planner.index, segment)
        skips = planner.index.info.codec in _SKIPPABLE
        packets = self._reader.read(planner, segment.start, segment.stop)
        first = next(packets)
        context = self._reader.stream.codec_context
        try:
            for position, packet in enumerate(chain((first,), packets), segment.start):
                watched = packet.pts in segment.requested or position in segment.watched
                skip = skips and position > segment.start and not watched
                context.skip_frame = "NONREF" if skip else "DEFAULT"
                check.add_packet(position, packet.pts, skip)
                try:
                    frames = context.decode(packet)
                except av.error.FFmpegError as error:
                    if position > segment.last:
                        break
                    if check.is_optional(packet.pts):
                        continue
                    raise _UnreliableError from error
                run.keep(frames, check)
            run.keep(context.decode(None), check)
        except av.error.FFmpegError as error:
            raise _UnreliableError from error
        finally:
            context.flush_buffers()
        check.finish()

    def _decode_whole(self, index: FrameIndex, run: _Run) -> None:
        """Decode the whole file; a frame is the one that it is by the order in which frames leave the decoder.

        Raises:
            SampleError: a frame is damaged, or a second pass over the file gave other frames than the first.
            FramesChangedError: the first pass over the file gave other frames, or other times, than the packets
                announce.
        """
        stamps: list[int | None] = []
        for number, frame in enumerate(self._reader.decode()):
            if frame.is_corrupt:
                raise SampleError("decode", f"frame {number} is damaged", self._path)
            stamps.append(frame.pts)
            run.put(frame, number)
        if _announced(index, stamps):
            if index.by_pts and not ascending(stamps):
                self._index = index.in_decoder_order()
            return
        if self._threads != 1:  # with several threads, an error in one of them may be lost
            self._threads = 1
            self._decode_whole(index, run)
            return
        if self._counted:
            raise SampleError("decode", "two passes over the file gave different frames", self._path)
        self._index, self._planner, self._counted = index.reindexed(stamps), None, True
        raise FramesChangedError(f"{self._path}: {len(stamps)} frames, not the {index.info.num_frames} of its packets")


def _announced(index: FrameIndex, stamps: Sequence[int | None]) -> bool:
    """Return whether the frames of a whole decode, with these times, are those of the index at the times it tells."""
    if index.by_pts:
        return sorted(stamps, key=str) == sorted(index.stamps, key=str)
    if len(stamps) != index.info.num_frames:
        return False
    # Where times were not believed that prove to be right, they are those of the frames.
    return not ascending(stamps) or index.reindexed(stamps).info.seconds == index.info.seconds


class _NoStack:
    """In place of a stack of frames, where only their order is wanted."""

    def put(self, slot: int, frame: av.VideoFrame) -> None:
        """Forget a frame."""


class _Run:
    """Collects the requested frames of one call, ascending, with their times."""

    def __init__(self, stack: FrameStack | SurfaceStack | _NoStack, numbers: Sequence[int], index: FrameIndex) -> None:
        self.stack = stack
        self.slots = {index.stamps[number]: slot for slot, number in enumerate(numbers)} if index.by_pts else {}
        self._slots_by_number = {number: slot for slot, number in enumerate(numbers)}
        self.seconds = [index.info.seconds[number] for number in numbers]
        self.decoded = 0

    def keep(self, frames: Iterable[av.VideoFrame], check: _SegmentCheck) -> None:
        """Put those frames of a segment that are reliable and requested; count the others as decoded."""
        for frame in frames:
            self.decoded += 1
            if check.add_frame(frame) and frame.pts in self.slots:
                self.stack.put(self.slots[frame.pts], frame)

    def put(self, frame: av.VideoFrame, number: int) -> None:
        """Put a frame of a whole decode if it is requested."""
        self.decoded += 1
        if number in self._slots_by_number:
            self.stack.put(self._slots_by_number[number], frame)


class _SegmentCheck:
    """Compares the frames that a segment's packets announce with those that come out of the decoder."""

    def __init__(self, index: FrameIndex, segment: Segment) -> None:
        self._index, self._segment = index, segment
        self._required: set[int | None] = set(segment.requested)
        self._allowed: set[int | None] = set()
        self._received: set[int | None] = set()
        self._latest: int | None = None  # pts of the frame that came out last, without leading pictures
        self._extra: set[int | None] = set()  # frames that only show the order

    def is_optional(self, stamp: int | None) -> bool:
        """Return whether this is a leading picture, which may refer to pictures that are not decoded."""
        since = self._segment.since
        return since is not None and (stamp is None or stamp < since)

    def add_packet(self, position: int, stamp: int | None, skipped: bool) -> None:
        """Register the frame of a packet that is given to the decoder."""
        if not self._index.shown[position]:
            return
        self._allowed.add(stamp)
        if position > self._segment.last:
            self._extra.add(stamp)
            return
        # The first frame must come out. It does not where its packet is wrongly marked as a key frame (gradual
        # refresh).
        if position == self._segment.start or not (skipped or self.is_optional(stamp)):
            self._required.add(stamp)

    def add_frame(self, frame: av.VideoFrame) -> bool:
        """Register a frame that came out of the decoder, and return whether it is reliable.

        Raises:
            _UnreliableError: the frame is damaged.
            _OrderError: it is earlier than the one before it.
        """
        self._received.add(frame.pts)
        if self.is_optional(frame.pts):
            return False
        if self._latest is not None and frame.pts < self._latest:
            raise _OrderError
        self._latest = frame.pts
        if frame.pts in self._extra:
            return False
        if frame.is_corrupt:
            raise _UnreliableError
        return True

    def finish(self) -> None:
        """Raise ``_UnreliableError`` where a required frame is missing or a frame that is not allowed came out."""
        if not self._required <= self._received <= self._allowed:
            raise _UnreliableError


def _to_rgb(frames: YuvFrames) -> Tensor:
    """Convert frames to uint8 RGB [F, height, width, 3]."""
    rgb = [frames.to_rgb(i, i + 1, torch.float32).round_().to(torch.uint8) for i in range(len(frames))]
    return torch.cat(rgb).permute(0, 2, 3, 1).contiguous()
