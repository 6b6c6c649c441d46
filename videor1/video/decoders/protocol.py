"""The protocol of decoders: ``probe`` describes the frames that a file shows, and ``frames`` decodes some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from videor1.video.orientation import Orientation
from videor1_kernels.frames_to_patches import YuvFrames


@dataclass(frozen=True)
class VideoInfo:
    """A description of a video file's frames, which are numbered from 0 in the order they are shown."""

    num_frames: int
    fps: float  # average frames per second
    width: int  # pixels as stored, before they are brought upright
    height: int
    rotation: int  # degrees anticlockwise that a stored frame is turned by after it was mirrored: see ``orientation``
    codec: str  # FFmpeg's name: h264, hevc, av1, ...
    pix_fmt: str  # FFmpeg's name: yuv420p, ...
    seconds: tuple[float, ...]  # presentation time of each frame
    key_frames: tuple[int, ...]  # numbers of the frames that decoding can begin at, ascending
    mirrored: bool = False  # whether a stored frame is mirrored left to right before it is turned

    @property
    def orientation(self) -> Orientation:
        """What brings a stored frame upright; a decoder does or refuses what is no multiple of 90 degrees."""
        return Orientation(self.rotation, self.mirrored)


@dataclass(frozen=True)
class Frames:
    """The requested frames in the order of the indices; a number that is given twice is repeated."""

    pixels: Tensor | YuvFrames  # uint8 RGB [F, height, width, 3], or planes
    rotation: int  # degrees anticlockwise that are left to turn them by: 0, 90, 180 or 270
    seconds: tuple[float, ...]  # presentation time of each frame
    backend: str  # the one used: "pyav", "pyav-nvdec", "pyav-after-nvdec" (which failed), "decord", "torchcodec", ...
    decoded: int  # number of frames that had to be decoded to get these
    mirrored: bool = False  # whether they are still to be mirrored left to right, before they are turned


class FramesChangedError(Exception):
    """Raised where decoding gave other frames than the packets announce; ``probe`` then describes the right ones.

    It is raised at most once for a file.
    """


class Decoder(Protocol):
    """An open video file, not to be used from several threads.

    An error of the file is raised as a ``SampleError`` with its path.
    """

    backend: str

    def probe(self) -> VideoInfo:
        """Describe the file's frames from its packets; only the first frame is decoded, to learn its orientation."""
        ...

    def frames(self, indices: Sequence[int], *, planes: bool = False) -> Frames:
        """Decode the frames of these numbers, each found by its presentation time, or by its order where times lie.

        Args:
            indices: numbers of the frames, in any order.
            planes: return 4:2:0 frames as the decoder's planes where it gives them; otherwise frames are RGB.

        Raises:
            SampleError: these frames cannot be decoded.
            FramesChangedError: the file has other frames than ``probe`` returned; call it again.
            IndexError: an index is outside of 0..num_frames-1.
        """
        ...

    def close(self) -> None: ...
