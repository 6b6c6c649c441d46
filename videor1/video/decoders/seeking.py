"""Planning which packets to decode for the requested frames, and reading these packets wherever a seek may land.

Packets are numbered from 0 in decode order. A frame is identified by its pts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise

import av

from videor1.video.decoders.index import FrameIndex
from videor1.video.decoders.timeline import MAX_REORDER

# H.264 may leave out how many frames its decoder holds back. FFmpeg then believes the first frames, where it may be 0;
# so at least this many packets are watched.
_LEAST_REORDER = {"h264": 2}
# Codecs whose key frames can be decoded without earlier packets. In other codecs (GIF, APNG, screen recorders) a
# picture may depend on what is already drawn, even if it is flagged as a key frame.
_SEEKABLE = frozenset(("h264", "hevc", "vvc", "av1", "vp8", "vp9", "mpeg1video", "mpeg2video", "mpeg4")) | frozenset(
    ("mjpeg", "prores", "dnxhd", "ffv1", "ffvhuff", "huffyuv", "rawvideo")
)
_MIN_GAP = 4  # segments closer than this many packets are joined: decoding the gap is faster than a new start
_MAX_DROP = 64  # up to this many packets are read and dropped instead of seeking past them


@dataclass(frozen=True)
class Segment:
    """Packets start..stop-1, which are decoded in one pass from a key frame."""

    start: int
    stop: int
    since: int | None  # frames of this pts and later must all come out of the decoder; None: all frames
    requested: frozenset[int]  # pts of the requested frames
    last: int  # the last packet that a requested frame needs; those after it only show in which order frames come out
    watched: frozenset[int] = frozenset()  # packets that must be decoded to show it


class Planner:
    """Plans the segments to decode for requested frames, with as few packets as the key frames allow."""

    def __init__(self, index: FrameIndex) -> None:
        self.index = index

    @cached_property
    def can_seek(self) -> bool:
        """Whether the codec's key frames can be decoded by themselves and every packet has a pts of its own."""
        pts = self.index.pts
        return (
            self.index.by_pts
            and self.index.info.codec in _SEEKABLE
            and None not in pts
            and len(self.positions) == len(pts)
        )

    @cached_property
    def positions(self) -> dict[int | None, int]:
        """The number of the packet of each pts."""
        return {stamp: position for position, stamp in enumerate(self.index.pts)}

    @cached_property
    def _keys(self) -> list[int]:
        """The numbers of the key packets that are shown."""
        index = self.index
        return [position for position, key in enumerate(index.key) if key and index.shown[position]]

    def plan(self, requested: Collection[int | None]) -> list[Segment] | None:
        """Return segments for the frames of these pts in presentation order; None: the whole file must be decoded.

        A frame that is shown before the last key frame but stored after it (a leading picture) may refer to pictures
        from before that key frame, so its segment begins at the key frame before that.

        Where the times around a frame follow the order of decoding, either its neighbours are shown in that order, or
        the times are those of decoding. So the segment then goes on for as many packets as the codec may hold back
        frames, and none of those around the frame is skipped: if the times are wrong, frames come out in another order.
        """
        stamps = sorted(stamp for stamp in requested if stamp is not None)
        if not self.can_seek or len(stamps) != len(requested) or not all(stamp in self.positions for stamp in stamps):
            return None
        segments: list[Segment] = []
        for stamp in stamps:
            position = self.positions[stamp]
            start, around = self.key_before(position + 1, stamp), self.unordered_around(position)
            watched, end = frozenset(around), max(position + 1, around.stop)
            before = segments[-1] if segments else None
            if before is not None and start < before.last + 1 + _MIN_GAP:
                segments[-1] = replace(
                    before,
                    stop=max(before.stop, end),
                    requested=before.requested | {stamp},
                    last=max(before.last, position),
                    watched=before.watched | watched,
                )
            else:
                since = None if start == 0 else self.index.pts[start]
                segments.append(Segment(start, end, since, frozenset((stamp,)), position, watched))
        return segments

    def is_doubtful(self, numbers: Collection[int]) -> bool:
        """Return whether decoding must show in which order these frames are shown."""
        plan = self.plan([self.index.stamps[number] for number in numbers])
        return self.index.reorder > 0 if plan is None else any(segment.watched for segment in plan)

    def unordered_around(self, position: int) -> range:
        """Return the packets around this one that must be decoded to show in which order their frames are shown.

        They are as many before it, and after it up to the next key frame, as the codec holds back frames. The range is
        empty where the codec holds back none, and where times fall from a packet nearby to the next, as those of
        presentation do.
        """
        pts, codec = self.index.pts, self.index.info.codec
        reorder = max(self.index.reorder, _LEAST_REORDER.get(codec, 0))
        nearby = pts[max(0, position - MAX_REORDER) : position + MAX_REORDER + 1]
        if reorder == 0 or any(a > b for a, b in pairwise(nearby)):  # type: ignore[operator]
            return range(0)
        after = bisect_left(self._keys, position + 1)
        next_key = self._keys[after] if after < len(self._keys) else len(pts)
        return range(max(0, position - reorder), min(position + reorder + 1, next_key))

    def key_before(self, position: int, stamp: int) -> int:
        """Return the last key packet before ``position`` that is shown no later than ``stamp``; 0 if there is none."""
        for key in reversed(self._keys[: bisect_right(self._keys, position - 1)]):
            shown = self.index.pts[key]
            if shown is not None and shown <= stamp:
                return key
        return 0

    def earlier(self, segment: Segment) -> Segment | None:
        """Return the segment extended back by one key frame; None where there is none.

        Frames before the original start may still be missing from the decoder's output.
        """
        if segment.start == 0 or segment.since is None:
            return None
        return replace(segment, start=self.key_before(segment.start, segment.since))


class OutOfStepError(Exception):
    """Raised where the packets that are read are not those of the index."""


class PacketReader:
    """Reads a file's video packets from any position on.

    Args:
        open_file: opens the file at its start; called again where seeking fails.
    """

    def __init__(
        self, open_file: Callable[[], AbstractContextManager[tuple[av.container.InputContainer, av.VideoStream]]]
    ) -> None:
        self._open_file = open_file
        self._stack = ExitStack()
        self.container, self.stream = self._stack.enter_context(open_file())
        self._packets: Iterator[av.Packet] = iter(())
        self._next: int | None = None  # number of the packet that is read next; None: unknown

    def close(self) -> None:
        self._stack.close()

    def restart(self) -> None:
        """Open the file again at its start."""
        self._stack.close()
        self.container, self.stream = self._stack.enter_context(self._open_file())
        self._packets, self._next = self._demux(), 0

    def decode(self) -> Iterator[av.VideoFrame]:
        """Decode all frames from the start of the file."""
        self.restart()
        self._next = None
        yield from self.container.decode(self.stream)

    def read(self, planner: Planner, start: int, stop: int) -> Iterator[av.Packet]:
        """Yield packets start..stop-1.

        Seeking may open the file again, so the codec context to decode the packets with is only known once the first
        has been yielded.

        Raises:
            OutOfStepError: the packets of the file are not those that the index lists.
        """
        pts = planner.index.pts
        if self._next is None or not self._next <= start <= self._next + _MAX_DROP:
            self._seek(planner, start)
        while self._next is not None and self._next < stop:
            position, packet = self._next, next(self._packets, None)
            if packet is None or packet.pts != pts[position]:
                self._next = None
                raise OutOfStepError
            self._next += 1
            if position >= start:
                yield packet

    def _seek(self, planner: Planner, start: int) -> None:
        """Move to packet ``start`` or one before it, or to the start of the file where seeking lands anywhere else."""
        stamp = planner.index.pts[start]
        landed, packets, first = None, iter(()), None
        if stamp is not None:
            with suppress(av.error.FFmpegError):
                self.container.seek(stamp, stream=self.stream)
                packets = self._demux()
                first = next(packets, None)
                landed = planner.positions.get(first.pts) if first is not None else None
        if landed is None or landed > start:
            self.restart()
        else:
            self._packets, self._next = chain((first,), packets), landed

    def _demux(self) -> Iterator[av.Packet]:
        return (packet for packet in self.container.demux(self.stream) if packet.size)
