"""What a decoder is: ``probe`` tells which frames a file shows, ``frames`` gives those asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from videor1_kernels.frames_to_patches import YuvFrames


@dataclass(frozen=True)
class VideoInfo:
    """A video file's frames, numbered from 0 in the order they are shown."""

    num_frames: int
    fps: float  # average frames per second
    width: int  # pixels as stored, before the rotation
    height: int
    rotation: int  # degrees anticlockwise that bring a stored frame upright: 0, 90, 180 or 270
    codec: str  # FFmpeg's name: h264, hevc, av1, ...
    pix_fmt: str  # FFmpeg's name: yuv420p, ...
    seconds: tuple[float, ...]  # presentation time of each frame
    key_frames: tuple[int, ...]  # numbers of the frames that decoding can begin at, ascending


@dataclass(frozen=True)
class Frames:
    """Frames as asked for: in the order of the indices, duplicates repeated."""

    pixels: Tensor | YuvFrames  # uint8 RGB [F, height, width, 3], or planes
    rotation: int  # degrees anticlockwise that bring them upright: 0 where the decoder has done it
    seconds: tuple[float, ...]  # presentation time of each
    backend: str  # what ran: "pyav", "pyav-nvdec", "decord", "torchcodec", "pynvvideocodec"
    decoded: int  # frames decoded on the way


class FramesChangedError(Exception):
    """Other frames came out than the packets promised; ``probe`` now tells the right ones. Raised once a file."""


class Decoder(Protocol):
    """One open file. Not for use from several threads.

    Errors about the file are ``SampleError``s with its path.
    """

    backend: str

    def probe(self) -> VideoInfo:
        """Which frames there are, from the packets: nothing but the first frame is decoded, for its rotation."""
        ...

    def frames(self, indices: Sequence[int], *, planes: bool = False) -> Frames:
        """The frames of these numbers, each found by its presentation time.

        planes: leave 4:2:0 frames as the decoder's planes, where it has them; else RGB.

        Raises:
            SampleError: the file cannot be decoded there.
            FramesChangedError: ask ``probe`` again.
            IndexError: an index outside of 0..num_frames-1.
        """
        ...

    def close(self) -> None: ...
