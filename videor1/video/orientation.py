"""The eight orientations of stored frames: a display matrix read whole, as FFmpeg's command line applies it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import av
import numpy as np
import torch
from torch import Tensor


class Orientation(NamedTuple):
    """What brings a stored frame upright: first it is mirrored left to right, then it is turned.

    Attributes:
        rotation: degrees anticlockwise: 0, 90, 180 or 270; or any other whole number, by which FFmpeg turns the picture
            inside of its frame (and never mirrors it).
        mirrored: whether it is mirrored.
    """

    rotation: int = 0
    mirrored: bool = False

    @property
    def is_quarter_turn(self) -> bool:
        """Whether the turn is a multiple of 90 degrees."""
        return self.rotation % 90 == 0

    @property
    def swaps_sides(self) -> bool:
        """Whether width and height change places."""
        return self.rotation % 180 == 90

    def after(self, turned: int) -> Orientation:
        """Return what is left to do for frames that somebody has already turned, by a multiple of 90 degrees."""
        if self.mirrored:  # mirror, then turn by r = turn back by t, mirror, turn by r + t
            return Orientation((self.rotation + turned) % 360, True)
        return Orientation((self.rotation - turned) % 360, False)


def matrix_angle(matrix: Sequence[int]) -> float:
    """Return the angle of a display matrix in degrees anticlockwise, FFmpeg's ``av_display_rotation_get``.

    Args:
        matrix: its nine numbers; NaN is returned where the first two columns do not both hold something.
    """
    a, b, c, d = (matrix[i] / 65536 for i in (0, 1, 3, 4))
    scale = math.hypot(a, c), math.hypot(b, d)
    if not all(scale):
        return math.nan
    return -math.degrees(math.atan2(b / scale[1], a / scale[0]))


def matrix_orientation(matrix: Sequence[int]) -> Orientation:
    """Return the orientation that FFmpeg's command line (``-autorotate``) gives frames with this display matrix."""
    angle = matrix_angle(matrix)
    if math.isnan(angle):
        return Orientation()
    clockwise = math.copysign(math.floor(abs(angle) + 0.5), -angle) % 360  # C's round(): halves away from zero
    if clockwise == 90:
        return Orientation(90, True) if matrix[3] > 0 else Orientation(270)
    if clockwise == 180:
        return Orientation(180) if matrix[4] < 0 else Orientation(0, True)
    if clockwise == 270:
        return Orientation(270, True) if matrix[3] < 0 else Orientation(90)
    if clockwise > 1:
        return Orientation(360 - int(clockwise))
    return Orientation(180, True) if clockwise == 0 and matrix[4] < 0 else Orientation()


def frame_orientation(frame: av.VideoFrame) -> Orientation:
    """Return the orientation of a decoded frame."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    return matrix_orientation(np.frombuffer(data, np.int32).tolist())


def upright(pixels: Tensor, orientation: Orientation) -> Tensor:
    """Return RGB frames [F, height, width, 3] mirrored and turned by a multiple of 90 degrees."""
    if orientation == Orientation():
        return pixels
    mirrored = pixels.flip(2) if orientation.mirrored else pixels
    return torch.rot90(mirrored, orientation.rotation // 90, dims=(1, 2)).contiguous()


class Turner:
    """Turns pictures inside of their frames by any angle, with the filter that FFmpeg's command line uses.

    What is turned out of a frame is cut off, and its corners become black.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int, str, int], av.filter.Graph] = {}

    def turn(self, frame: av.VideoFrame, rotation: int) -> av.VideoFrame:
        """Return a frame turned by ``rotation`` degrees anticlockwise."""
        key = (frame.width, frame.height, frame.format.name, rotation)
        if key not in self._graphs:
            self._graphs[key] = _turning_graph(frame, rotation)
        self._graphs[key].push(frame)
        return self._graphs[key].pull()


def _turning_graph(frame: av.VideoFrame, rotation: int) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base
    )
    turn = graph.add("rotate", f"{360 - rotation}*PI/180")
    graph.link_nodes(source, turn, graph.add("buffersink")).configure()
    return graph
