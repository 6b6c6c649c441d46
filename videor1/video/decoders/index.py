"""The index of a video file: the frames that it shows and their times, found from its packets instead of a header.

A file that cannot be read completely raises a ``SampleError`` of kind ``missing_file``, ``not_video``, ``truncated`` or
``decode``. (A cut MPEG-TS or raw stream goes unnoticed, because these formats do not store their length.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import compress
from pathlib import Path

import av

from videor1.types import SampleError
from videor1.video.decoders.container import open_video, sample_errors
from videor1.video.decoders.protocol import VideoInfo
from videor1.video.decoders.timeline import MAX_REORDER, Timeline, timeline_of_frames, timeline_of_packets
from videor1.video.opened import MediaFile
from videor1.video.orientation import Orientation, frame_orientation

# Containers that flag a packet where their own counters do not go on: after a loss, but also where two recordings were
# joined. Whether a picture is damaged, only the decoder can tell.
_COUNTED = ("mpegts", "mpegtsraw")


@dataclass(frozen=True)
class FrameIndex:
    """A file's packets in decode order, and the frames that they show in presentation order.

    Lengths: P packets, F frames. A packet that is shown normally becomes one frame. For a file where this does not
    hold, ``reindexed`` makes the index from the frames that a decoder gave.
    """

    path: Path
    pts: tuple[int | None, ...]  # [P] presentation time of each packet, in units of time_base
    dts: tuple[int | None, ...]  # [P] decode time of each packet, in units of time_base
    key: tuple[bool, ...]  # [P] whether decoding can begin at the packet
    shown: tuple[bool, ...]  # [P] False: the packet is empty, or needed only to decode others (edit list, hidden frame)
    stamps: tuple[int | None, ...]  # [F] pts of each frame; ascending where by_pts is True
    by_pts: bool  # every frame has a pts of its own, so that frames can be found by it; False: by their order alone
    time_base: Fraction  # in seconds
    header_fps: Fraction | None  # frame rate that the file's header states
    reorder: int  # most frames that the codec holds back to show others first; 0: it shows them as it decodes them
    info: VideoInfo

    def reindexed(self, stamps: Sequence[int | None]) -> FrameIndex:
        """Return an index of the same packets that shows the frames of these pts, given in the decoder's order."""
        return self._with(timeline_of_frames(stamps, self.time_base, self.header_fps))

    def in_decoder_order(self) -> FrameIndex:
        """Return an index of the same frames at the same times, which are found by their order alone."""
        return replace(self, by_pts=False, info=replace(self.info, key_frames=(0,)))

    def _with(self, timeline: Timeline) -> FrameIndex:
        info = _described(self.info, timeline, self.pts, self.key)
        return replace(self, stamps=timeline.stamps, by_pts=timeline.by_pts, info=info)


def read_index(source: str | Path | MediaFile) -> FrameIndex:
    """Build the index of a file by demuxing all of it: the video's packets are read, only the first frame is decoded.

    Raises:
        SampleError: the file is missing, no video or cut, or has a damaged packet. A file without frames is no error.
    """
    path = source.path if isinstance(source, MediaFile) else Path(source)
    with open_video(source) as (container, stream), sample_errors(path):
        return index_packets(path, container, stream)


def index_packets(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> FrameIndex:
    """Build the index of a file that ``open_video`` has just opened. The container is left at its end."""
    pts: list[int | None] = []
    dts: list[int | None] = []
    key: list[bool] = []
    shown: list[bool] = []
    context = stream.codec_context
    is_vp8 = context.codec.canonical_name == "vp8"
    reorder = _reorder_depth(context)  # decoding the first frame may change it
    orientation: Orientation | None = None
    for packet in container.demux(stream):
        if packet.is_corrupt and container.format.name not in _COUNTED:
            raise SampleError("truncated", f"packet {sum(shown)} is damaged or cut", path)
        if not packet.size:
            continue
        if orientation is None and packet.is_keyframe:
            orientation = _orientation(context, packet)
        pts.append(packet.pts)
        dts.append(packet.dts)
        key.append(packet.is_keyframe)
        shown.append(not packet.is_discard and not (is_vp8 and _is_hidden_vp8(packet)))
    header_fps = stream.average_rate or stream.guessed_rate
    assert stream.time_base is not None
    timeline = timeline_of_packets(
        tuple(compress(pts, shown)),
        tuple(compress(dts, shown)),
        tuple(compress(key, shown)),
        reorder,
        stream.time_base,
        header_fps,
    )
    orientation = orientation or Orientation()
    info = VideoInfo(
        num_frames=0,
        fps=0.0,
        width=context.width,
        height=context.height,
        rotation=orientation.rotation,
        mirrored=orientation.mirrored,
        codec=context.codec.canonical_name,
        pix_fmt=context.pix_fmt or "",
        seconds=(),
        key_frames=(),
    )
    return FrameIndex(
        path=path,
        pts=tuple(pts),
        dts=tuple(dts),
        key=tuple(key),
        shown=tuple(shown),
        stamps=timeline.stamps,
        by_pts=timeline.by_pts,
        time_base=stream.time_base,
        header_fps=header_fps,
        reorder=reorder,
        info=_described(info, timeline, pts, key),
    )


def frames_to_decode(info: VideoInfo, indices: Sequence[int]) -> int:
    """Return about how many frames must be decoded to get those of these numbers.

    For each of them, decoding begins at the last key frame before it; no frame is counted twice.
    """
    total = done = 0
    for number in sorted(set(indices)):
        key = bisect_right(info.key_frames, number) - 1
        total += number + 1 - max(done, info.key_frames[key] if key >= 0 else 0)
        done = number + 1
    return total


def _described(info: VideoInfo, timeline: Timeline, pts: Sequence[int | None], key: Sequence[bool]) -> VideoInfo:
    """Return a description with these frames. Key frames are told by their times, or else only the first is known."""
    count = len(timeline.stamps)
    key_frames: tuple[int, ...] = (0,) if count else ()
    if timeline.by_pts:
        keys = set(compress(pts, key))
        key_frames = tuple(number for number, stamp in enumerate(timeline.stamps) if stamp in keys)
    return replace(info, num_frames=count, fps=timeline.fps, seconds=timeline.seconds, key_frames=key_frames)


def _reorder_depth(context: av.VideoCodecContext) -> int:
    """Return the most frames that the decoder holds back; newer versions of PyAV tell it, older ones whether it does.

    A codec states it in the stream. Where it does not, FFmpeg has found it in the first frames.
    """
    return int(getattr(context, "reorder_depth", MAX_REORDER if context.has_b_frames else 0))


def _orientation(context: av.VideoCodecContext, packet: av.Packet) -> Orientation:
    """Return the orientation of the first frame, as PyAV does not expose the container's."""
    try:
        frames = [*context.decode(packet), *context.decode(None)]
    except av.error.FFmpegError:
        return Orientation()  # decoding the frame later will raise the error that explains this
    finally:
        context.flush_buffers()
    return frame_orientation(frames[0]) if frames else Orientation()


def _is_hidden_vp8(packet: av.Packet) -> bool:
    """Return whether a VP8 packet's picture is only referred to by others and not shown (RFC 6386, 9.1: show_frame)."""
    return not memoryview(packet)[0] >> 4 & 1
