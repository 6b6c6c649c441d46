"""Opening a video file for demuxing and decoding: which stream is read, and what is refused before that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

from videor1.types import SampleError
from videor1.video.decoders.truncation import missing_bytes
from videor1.video.opened import MediaFile, media_file

# The containers that are opened. Others are refused: still images, text, and playlists, which can name other files.
_CONTAINERS = (
    "3g2,3gp,apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegtsraw,mpegvideo,mxf,nut,obu,"
    "ogg,rm,swf,vc1,vob,webm,wtv,yuv4mpegpipe"
)
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
MAX_PIXELS = 2**26  # pixels of a frame, 8192 x 8192: a damaged size must not exhaust the memory
_TOO_LARGE = "exceeds specified max pixel count"  # what FFmpeg says of a frame above the limit


@contextmanager
def open_video(
    source: str | Path | MediaFile, *, threads: int = 1, hwaccel: object | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Check that a file is complete, and open the video stream that FFmpeg considers its best.

    Args:
        source: the file, opened or not.
        threads: number of threads that the decoder may use; 0: as many as there are cores.
        hwaccel: PyAV's ``HWAccel``.
        max_pixels: most pixels of a frame.

    Raises:
        SampleError: ``missing_file``, ``not_video`` or ``truncated``; ``too_large`` where the header states larger
            frames.
    """
    file = media_file(source, "not_video")
    try:
        with file.reader() as reader:
            missing = missing_bytes(reader)
        if missing:
            raise SampleError("truncated", f"the file is cut: its last {missing} bytes are missing", file.path)
        hardware = {} if hwaccel is None else {"hwaccel": hwaccel}
        try:
            # Without the prefix, a colon in the name would be taken for a protocol. Titles may be in any encoding.
            name = f"file:{file.name}" if file.is_lasting else file.reader()
            container = av.open(name, container_options=_OPEN_OPTIONS, metadata_errors="replace", **hardware)
        except av.error.FFmpegError as error:
            message = f"not a video container that can be read: {_reason(error)}"
            raise SampleError("not_video", message, file.path) from error
        with container:
            stream = best_stream(container)
            if stream is None:
                raise SampleError("not_video", "the file has no video stream", file.path)
            context = stream.codec_context
            if context is None:
                raise SampleError("decode", "there is no decoder for the video's codec", file.path)
            if context.width * context.height > max_pixels:
                raise too_large(context.width, context.height, file.path)
            context.options = {"max_pixels": str(max_pixels)}
            context.thread_count = threads
            if threads != 1:
                context.thread_type = "AUTO"
            yield container, stream
    finally:
        if file is not source:
            file.close()


def best_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """Return the video stream that FFmpeg considers the best (``av_find_best_stream``); None where there is none.

    It is the one that the file calls its default; among equals, the one with more frames, then that with more bits,
    then the first. Attached pictures, which is how audio files store cover art, are no videos.
    """
    videos = video_streams(container)
    readable = [stream for stream in videos if stream.codec_context is not None] or videos
    best = container.streams.best("video")
    if best is not None and any(stream.index == best.index for stream in readable):
        return best
    return max(readable, key=_rank, default=None)  # the first of equals


def video_streams(container: av.container.InputContainer) -> list[av.VideoStream]:
    """Return the video streams that are not attached pictures."""
    attached = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & attached]


def _rank(stream: av.VideoStream) -> tuple[int, int, int]:
    """Return how FFmpeg ranks a stream, for those files where it ranks an attached picture first."""
    kinds = av.stream.Disposition
    impaired = kinds.hearing_impaired | kinds.visual_impaired
    preference = int(not stream.disposition & impaired) + int(bool(stream.disposition & kinds.default))
    return preference, min(stream.frames, 5), (stream.codec_context and stream.codec_context.bit_rate) or 0


@contextmanager
def sample_errors(path: str | Path) -> Iterator[None]:
    """Turn exceptions of PyAV into a ``SampleError``: ``decode``, or ``too_large`` for a frame above the limit."""
    try:
        yield
    except av.error.FFmpegError as error:
        reason = _reason(error)
        kind = "too_large" if _TOO_LARGE in reason else "decode"
        raise SampleError(kind, f"decoding failed: {reason}", path) from error
    except (OSError, ValueError, IndexError) as error:  # PyAV raises IndexError where a stream appears late in the file
        raise SampleError("decode", f"decoding failed: {error}", path) from error


def too_large(width: int, height: int, path: str | Path) -> SampleError:
    """Return (not raise) the error for frames that are larger than may be decoded."""
    message = f"its frames of {width}x{height} are larger than may be decoded (data.max_decoded_mb sets the limit)"
    return SampleError("too_large", message, path)


def _reason(error: av.error.FFmpegError) -> str:
    """Return FFmpeg's error message, with its last log line where it has one."""
    log = error.log[2].strip() if error.log else ""
    return f"{error.strerror} ({log})" if log else str(error.strerror)
