"""Decoding with PyAV (FFmpeg), on the CPU or on the card's video engine.

Only what the wanted frames need is decoded: from the last key frame each of them can be decoded from, leaving out
frames that nothing refers to. What is not decoded is not checked: damage there goes unnoticed. Frames that are decoded
are compared with those that the packets promise; where they differ, and where a file has no usable times, the whole
file is decoded and what comes out is the truth.
"""

from __future__ import annotations

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
from videor1.video.decoders.hardware import SurfaceStack
from videor1.video.decoders.index import FrameIndex, frames_to_decode, index_packets, open_video, sample_errors
from videor1.video.decoders.protocol import Frames, FramesChangedError, VideoInfo
from videor1.video.decoders.seeking import OutOfStepError, PacketReader, Planner, Segment
from videor1.video.decoders.stack import FrameStack, MixedLayoutError, taken
from videor1_kernels.frames_to_patches import YuvFrames

# Codecs of which each picture says by itself whether others refer to it. (HEVC's say so for their own temporal layer.)
_SKIPPABLE = frozenset(("h264",))
_MIN_SHARED_PIXELS = 100 * 1280 * 720  # to decode: below, threads take longer to start than they save


class _UnreliableError(Exception):
    """Decoding from a key frame failed, or gave other frames than promised."""


class PyAvDecoder:
    """See ``protocol.Decoder``.

    Args:
        path: the file.
        threads: for decoding; 0: as many as there are cores, or one where there is little to decode.
        hardware: "none", "auto" (NVDEC for what it is faster at, see ``hardware.decide``) or "cuda" (NVDEC).
        device: where the frames are wanted; those of NVDEC stay there, others are in main memory.

    Raises:
        SampleError: the file is missing, cut or no video.
        ConfigError: from ``frames``: hardware is "cuda", and NVDEC cannot decode this.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int = 1,
        hardware: nvdec.Hardware = "none",
        device: str | torch.device = "cpu",
    ) -> None:
        self._path, self._asked_threads, self._hardware = Path(path), threads, hardware
        self._threads = 1  # of the file as it is open now
        self._device = torch.device(device)
        self._where: Literal["cpu", "nvdec"] = "cpu"
        self.backend = "pyav"
        self._reader = PacketReader(self._open)
        self._index: FrameIndex | None = None
        self._planner: Planner | None = None  # None: only whole passes are to be trusted

    def probe(self) -> VideoInfo:
        return self._indexed().info

    def frames(self, indices: Sequence[int], *, planes: bool = False) -> Frames:
        info = self.probe()
        for number in indices:
            if not 0 <= number < info.num_frames:
                raise IndexError(f"frame {number} of a video of {info.num_frames} frames")
        where = nvdec.decide(info, indices, self._device, self._hardware, planes=planes).where
        numbers = sorted(set(indices))
        run = self._run_on_card(numbers) if where == "nvdec" else None
        run = run or self._run_on_cpu(numbers, planes, self._threads_for(info, numbers))
        pixels = run.stack.pixels()
        if isinstance(pixels, YuvFrames) and not planes:
            pixels = _to_rgb(pixels)
        slots = {number: slot for slot, number in enumerate(numbers)}
        order = [slots[number] for number in indices]
        seconds = tuple(run.seconds[slot] for slot in order)
        return Frames(taken(pixels, order), run.stack.rotation, seconds, self.backend, run.decoded)

    def close(self) -> None:
        self._reader.close()

    def _threads_for(self, info: VideoInfo, numbers: Sequence[int]) -> int:
        if self._asked_threads == 0 and frames_to_decode(info, numbers) * info.width * info.height < _MIN_SHARED_PIXELS:
            return 1
        return self._asked_threads

    def _open(self) -> AbstractContextManager[tuple[av.container.InputContainer, av.VideoStream]]:
        accelerator = nvdec.hwaccel(self._device) if self._where == "nvdec" else None
        return open_video(self._path, threads=self._threads, hwaccel=accelerator)

    def _indexed(self) -> FrameIndex:
        if self._index is None:
            with sample_errors(self._path):
                self._index = index_packets(self._path, self._reader.container, self._reader.stream)
            self._planner = Planner(self._index)
        return self._index

    def _run_on_card(self, numbers: Sequence[int]) -> _Run | None:
        """None: it failed there, and the CPU may try."""
        known = self._index, self._planner
        try:
            self._move_to("nvdec", threads=1)
            return self._run(numbers, SurfaceStack(self._path, len(numbers), self._device))
        except FramesChangedError:
            if self._hardware == "cuda":
                raise
            self._index, self._planner = known  # the CPU's frames are the truth
            return None
        except (SampleError, MixedLayoutError) as error:
            if self._hardware == "cuda":
                raise ConfigError(f"video.backend: NVDEC cannot decode {self._path}: {error}") from error
            return None

    def _run_on_cpu(self, numbers: Sequence[int], planes: bool, threads: int) -> _Run:
        self._move_to("cpu", threads)
        try:
            return self._run(numbers, FrameStack(self._path, len(numbers), planes=planes))
        except MixedLayoutError:  # as the formats change, each frame to RGB by itself
            return self._run(numbers, FrameStack(self._path, len(numbers), planes=False))

    def _move_to(self, where: Literal["cpu", "nvdec"], threads: int) -> None:
        if (self._where, self._threads) != (where, threads):
            self._where, self._threads = where, threads
            self.backend = "pyav" if where == "cpu" else "pyav-nvdec"
            self._reader.restart()

    def _run(self, numbers: Sequence[int], stack: FrameStack | SurfaceStack) -> _Run:
        index, planner = self._indexed(), self._planner
        run = _Run(stack, numbers, index)
        with sample_errors(self._path):
            plan = planner.plan(run.slots) if planner is not None and index.by_pts else None
            if plan is not None and planner is not None:
                try:
                    for segment in plan:
                        self._decode_segment(planner, segment, run)
                    return run
                except (_UnreliableError, OutOfStepError):
                    pass
            self._decode_whole(index, run)
            return run

    def _decode_segment(self, planner: Planner, segment: Segment, run: _Run) -> None:
        try:
            self._decode(planner, segment, run)
        except _UnreliableError:
            earlier = planner.earlier(segment)
            if earlier is None:
                raise
            self._decode(planner, earlier, run)

    def _decode(self, planner: Planner, segment: Segment, run: _Run) -> None:
        """Decode a segment's packets, keep its wanted frames, and check that what was promised comes."""
        check = _Promises(planner.index, segment)
        skips = planner.index.info.codec in _SKIPPABLE
        packets = self._reader.read(planner, segment.start, segment.stop)
        first = next(packets)
        context = self._reader.stream.codec_context
        try:
            for position, packet in enumerate(chain((first,), packets), segment.start):
                skip = skips and position > segment.start and packet.pts not in segment.wanted
                context.skip_frame = "NONREF" if skip else "DEFAULT"
                check.fed(position, packet.pts, skip)
                try:
                    frames = context.decode(packet)
                except av.error.FFmpegError as error:
                    if check.optional(packet.pts):
                        continue
                    raise _UnreliableError from error
                run.keep(frames, check)
            run.keep(context.decode(None), check)
        except av.error.FFmpegError as error:
            raise _UnreliableError from error
        finally:
            context.flush_buffers()
        check.kept()

    def _decode_whole(self, index: FrameIndex, run: _Run) -> None:
        """Decode everything; frames are found by pts or, without usable pts, by ordinal.

        Raises:
            SampleError: a frame is damaged, or a second whole pass gave other frames than the first.
            FramesChangedError: the first whole pass gave other frames than the packets promise.
        """
        stamps: list[int | None] = []
        for ordinal, frame in enumerate(self._reader.decode()):
            if frame.is_corrupt:
                raise SampleError("decode", f"frame {ordinal} is damaged", self._path)
            stamps.append(frame.pts)
            run.put(frame, ordinal)
        if index.by_pts:
            same = sorted(stamps, key=str) == sorted(index.stamps, key=str)
        else:
            same = len(stamps) == index.info.num_frames
        if same:
            return
        if self._threads != 1:  # several threads may lose an error of one of them
            self._threads = 1
            self._decode_whole(index, run)
            return
        if self._planner is None:
            raise SampleError("decode", "two passes over the file gave different frames", self._path)
        self._index, self._planner = index.reindexed(stamps), None
        raise FramesChangedError(f"{self._path}: {len(stamps)} frames, not the {index.info.num_frames} of its packets")


class _Run:
    """What decoding gathers: the wanted frames, ascending, and their times."""

    def __init__(self, stack: FrameStack | SurfaceStack, numbers: Sequence[int], index: FrameIndex) -> None:
        self.stack, self._index = stack, index
        # By pts or, without usable pts, by number.
        self.slots = {index.stamps[n] if index.by_pts else n: slot for slot, n in enumerate(numbers)}
        self.seconds = [index.info.seconds[number] for number in numbers]
        self.decoded = 0

    def keep(self, frames: Iterable[av.VideoFrame], check: _Promises) -> None:
        """Of frames that came out of a segment: those that can be relied on."""
        for frame in frames:
            if check.came(frame):
                self.put(frame, None)
            else:
                self.decoded += 1

    def put(self, frame: av.VideoFrame, ordinal: int | None) -> None:
        """Keep a frame if it is wanted."""
        self.decoded += 1
        slot = self.slots.get(frame.pts if self._index.by_pts else ordinal)
        if slot is not None:
            self.stack.put(slot, frame)


class _Promises:
    """The frames that a segment's packets promise against those that come out of the decoder."""

    def __init__(self, index: FrameIndex, segment: Segment) -> None:
        self._index, self._segment = index, segment
        self._promised: set[int | None] = set(segment.wanted)
        self._allowed: set[int | None] = set()
        self._came: set[int | None] = set()

    def optional(self, stamp: int | None) -> bool:
        """A leading picture: what it refers to may not have been decoded."""
        since = self._segment.since
        return since is not None and (stamp is None or stamp < since)

    def fed(self, position: int, stamp: int | None, skipped: bool) -> None:
        if not self._index.shown[position]:
            return
        self._allowed.add(stamp)
        # The first must come out: after a key frame by name only (gradual refresh), it does not.
        if position == self._segment.start or not (skipped or self.optional(stamp)):
            self._promised.add(stamp)

    def came(self, frame: av.VideoFrame) -> bool:
        """Whether to rely on a frame."""
        self._came.add(frame.pts)
        if self.optional(frame.pts):
            return False
        if frame.is_corrupt:
            raise _UnreliableError
        return True

    def kept(self) -> None:
        if not self._promised <= self._came <= self._allowed:
            raise _UnreliableError


def _to_rgb(frames: YuvFrames) -> Tensor:
    """uint8 [F, height, width, 3]."""
    rgb = [frames.to_rgb(i, i + 1, torch.float32).round_().to(torch.uint8) for i in range(len(frames))]
    return torch.cat(rgb).permute(0, 2, 3, 1).contiguous()
