"""The index of a video file: the frames that it shows and their times, found from its packets instead of a header.

A file that cannot be read completely raises a ``SampleError`` of kind ``missing_file``, ``not_video``, ``truncated`` or
``decode``. (A cut MPEG-TS or raw stream goes unnoticed, because these formats do not store their length.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import av

from videor1.types import SampleError
from videor1.video.decoders.protocol import VideoInfo
from videor1.video.decoders.truncation import missing_bytes

# The containers that are opened. Others are refused: still images, text, and playlists, which can name other files.
_CONTAINERS = (
    "3g2,3gp,apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegtsraw,mpegvideo,mxf,nut,obu,"
    "ogg,rm,swf,vc1,vob,webm,wtv,yuv4mpegpipe"
)
_MAX_PIXELS = 2**26  # pixels of a frame, 8192 x 8192: a damaged size must not exhaust the memory
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}


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
    by_pts: bool  # every frame has a pts of its own, so that frames can be found by it
    time_base: Fraction  # in seconds
    header_fps: Fraction | None  # frame rate that the file's header states
    info: VideoInfo

    def reindexed(self, stamps: Sequence[int | None]) -> FrameIndex:
        """Return an index of the same packets that shows the frames of these pts, given in the decoder's order."""
        shown = _frames(stamps, self.pts, self.key, self.time_base, self.header_fps, self.info)
        return replace(self, stamps=shown.stamps, by_pts=shown.by_pts, info=shown.info)


def read_index(path: str | Path) -> FrameIndex:
    """Build the index of a file by demuxing all of it: the video's packets are read, only the first frame is decoded.

    Raises:
        SampleError: the file is missing, no video or cut, or has a damaged packet. A file without frames is no error.
    """
    with open_video(path) as (container, stream), sample_errors(path):
        return index_packets(Path(path), container, stream)


def index_packets(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> FrameIndex:
    """Build the index of a file that ``open_video`` has just opened. The container is left at its end."""
    pts: list[int | None] = []
    dts: list[int | None] = []
    key: list[bool] = []
    shown: list[bool] = []
    is_vp8 = stream.codec_context.codec.canonical_name == "vp8"
    rotation: int | None = None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise SampleError("truncated", f"packet {sum(shown)} is damaged or cut", path)
        if not packet.size:
            continue
        if rotation is None and packet.is_keyframe:
            rotation = _rotation(path, stream.codec_context, packet)
        pts.append(packet.pts)
        dts.append(packet.dts)
        key.append(packet.is_keyframe)
        shown.append(not packet.is_discard and not (is_vp8 and _is_hidden_vp8(packet)))
    context = stream.codec_context
    info = VideoInfo(
        num_frames=0,
        fps=0.0,
        width=context.width,
        height=context.height,
        rotation=rotation or 0,
        codec=context.codec.canonical_name,
        pix_fmt=context.pix_fmt or "",
        seconds=(),
        key_frames=(),
    )
    header_fps = stream.average_rate or stream.guessed_rate
    assert stream.time_base is not None
    frames = _frames(tuple(compress(pts, shown)), pts, key, stream.time_base, header_fps, info)
    return FrameIndex(
        path=path,
        pts=tuple(pts),
        dts=tuple(dts),
        key=tuple(key),
        shown=tuple(shown),
        stamps=frames.stamps,
        by_pts=frames.by_pts,
        time_base=stream.time_base,
        header_fps=header_fps,
        info=frames.info,
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


@contextmanager
def open_video(
    path: str | Path, *, threads: int = 1, hwaccel: object | None = None
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Check that a file exists and is complete, and open its first video stream for demuxing and decoding.

    Args:
        path: the file.
        threads: number of threads that the decoder may use; 0: as many as there are cores.
        hwaccel: PyAV's ``HWAccel``.

    Raises:
        SampleError: ``missing_file``, ``not_video`` or ``truncated``.
    """
    path = Path(path)
    check_file(path, "not_video")
    if missing := missing_bytes(path):
        raise SampleError("truncated", f"the file is cut: its last {missing} bytes are missing", path)
    hardware = {} if hwaccel is None else {"hwaccel": hwaccel}
    try:
        # Without the prefix, a colon in the name would be taken for a protocol. Titles may be in any encoding.
        container = av.open(f"file:{path}", container_options=_OPEN_OPTIONS, metadata_errors="replace", **hardware)
    except av.error.FFmpegError as error:
        raise SampleError("not_video", f"not a video container that can be read: {_reason(error)}", path) from error
    with container:
        # Audio files store cover art as a video stream, which is not wanted here.
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise SampleError("not_video", "the file has no video stream", path)
        context = streams[0].codec_context
        if context is None:
            raise SampleError("decode", "there is no decoder for the video's codec", path)
        context.options = {"max_pixels": str(_MAX_PIXELS)}
        context.thread_count = threads
        if threads != 1:
            context.thread_type = "AUTO"
        yield container, streams[0]


@contextmanager
def sample_errors(path: str | Path) -> Iterator[None]:
    """Turn exceptions of PyAV into a ``SampleError`` of kind ``decode``."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise SampleError("decode", f"decoding failed: {_reason(error)}", path) from error
    except (OSError, ValueError, IndexError) as error:  # PyAV raises IndexError where a stream appears late in the file
        raise SampleError("decode", f"decoding failed: {error}", path) from error


def check_file(path: Path, kind: str) -> None:
    """Raise a ``SampleError`` unless the path is a file of at least one byte.

    Its kind is ``missing_file`` where nothing exists at the path, and otherwise ``kind``.
    """
    if not path.exists():
        raise SampleError("missing_file", "no such file", path)
    if not path.is_file():
        raise SampleError(kind, "not a regular file", path)
    if path.stat().st_size == 0:
        raise SampleError(kind, "the file is empty", path)


def quarter_turn(path: Path, degrees: int) -> int:
    """Return a rotation as 0, 90, 180 or 270 degrees. Raises SampleError for any other angle."""
    if degrees % 90:
        raise SampleError("decode", f"the file asks for a rotation by {degrees} degrees", path)
    return degrees % 360


class _Frames(NamedTuple):
    """The fields of a ``FrameIndex`` that depend on which frames are shown."""

    stamps: tuple[int | None, ...]
    by_pts: bool
    info: VideoInfo


def _frames(
    stamps: Sequence[int | None],
    pts: Sequence[int | None],
    key: Sequence[bool],
    time_base: Fraction,
    header_fps: Fraction | None,
    info: VideoInfo,
) -> _Frames:
    """Find the order and times of the frames of these pts, the frame rate, and which of them are key frames."""
    usable = [stamp for stamp in stamps if stamp is not None]
    by_pts = bool(stamps) and len(set(usable)) == len(stamps)
    if by_pts:
        usable.sort()
    fps = _frame_rate(header_fps, usable if by_pts else [], time_base)
    if by_pts:
        # This rounds stamp * time_base only once; computing with exact fractions would take long.
        seconds = tuple(stamp * time_base.numerator / time_base.denominator for stamp in usable)
        keys = set(compress(pts, key))
        key_frames = tuple(number for number, stamp in enumerate(usable) if stamp in keys)
    else:
        seconds = tuple(number / fps for number in range(len(stamps)))
        key_frames = (0,) if stamps else ()
    info = replace(info, num_frames=len(stamps), fps=fps, seconds=seconds, key_frames=key_frames)
    return _Frames(tuple(usable) if by_pts else tuple(stamps), by_pts, info)


def _frame_rate(header: Fraction | None, stamps: Sequence[int], time_base: Fraction) -> float:
    """Return the average frames per second: the header's, unless the frames' times differ from it by more than 1%."""
    measured = 0.0
    if len(stamps) > 1:
        measured = float((len(stamps) - 1) / ((stamps[-1] - stamps[0]) * time_base))
    if header and (not measured or abs(float(header) - measured) <= 0.01 * measured):
        return float(header)
    return measured or float(header or 25)


def _rotation(path: Path, context: av.VideoCodecContext, packet: av.Packet) -> int:
    """Return the rotation in degrees, from the first frame, as PyAV does not expose the container's value."""
    try:
        frames = [*context.decode(packet), *context.decode(None)]
    except av.error.FFmpegError:
        return 0  # decoding the frame later will raise the error that explains this
    finally:
        context.flush_buffers()
    return quarter_turn(path, frames[0].rotation) if frames else 0


def _is_hidden_vp8(packet: av.Packet) -> bool:
    """Return whether a VP8 packet's picture is only referred to by others and not shown (RFC 6386, 9.1: show_frame)."""
    return not memoryview(packet)[0] >> 4 & 1


def _reason(error: av.error.FFmpegError) -> str:
    """Return FFmpeg's error message, with its last log line where it has one."""
    log = error.log[2].strip() if error.log else ""
    return f"{error.strerror} ({log})" if log else str(error.strerror)
