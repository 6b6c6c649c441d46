"""When the frames of a video are shown: their order, times and rate, from the times of its packets or its frames.

Clocks can be wrong in two ways that a decoder does not mind. Times may follow the order of decoding instead of that of
presentation (AVI, and whatever was copied from it), and a recording may set its clock back and go on. In both cases
frames are shown in the order in which they leave the decoder, and no time says which frame is which.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

MAX_REORDER = 16  # most frames by which a codec can hold back a frame: the size of the largest picture buffer


class Timeline(NamedTuple):
    """The frames of a video in the order they are shown.

    Attributes:
        stamps: pts of each frame; ascending where ``by_pts`` is True, otherwise in no particular order.
        by_pts: whether every frame has a pts of its own that follows the order, so that frames can be found by it.
        seconds: time of each frame, never descending.
        fps: average frames per second.
    """

    stamps: tuple[int | None, ...]
    by_pts: bool
    seconds: tuple[float, ...]
    fps: float


def timeline_of_packets(
    stamps: Sequence[int | None],
    clock: Sequence[int | None],
    key: Sequence[bool],
    reorder: int,
    time_base: Fraction,
    header_fps: Fraction | None,
) -> Timeline:
    """Return the timeline of packets that each become a frame.

    Args:
        stamps: presentation time of each packet in decode order, in units of ``time_base``.
        clock: decode time of each packet.
        key: whether decoding can begin at the packet.
        reorder: most frames that the codec holds back; a packet that is further from its place shows a clock that was
            set back.
        time_base: in seconds.
        header_fps: frame rate that the file's header states.
    """
    known = [stamp for stamp in stamps if stamp is not None]
    if not known or len(known) < len(stamps):
        return _untimed(stamps, header_fps)
    fell = _falls(clock)
    # Where FFmpeg works out decode times for itself, they fall more than once after a clock was set back.
    begins = [a and b for a, b in zip(fell, key, strict=True)]
    pieces = _pieces(known, begins, reorder)
    by_pts = len(pieces) == 1 and not any(fell) and len(set(known)) == len(known)
    return _joined(tuple(pieces[0]) if by_pts else tuple(stamps), by_pts, pieces, time_base, header_fps)


def timeline_of_frames(stamps: Sequence[int | None], time_base: Fraction, header_fps: Fraction | None) -> Timeline:
    """Return the timeline of decoded frames, from the pts of each in the order in which the decoder gave them."""
    known = [stamp for stamp in stamps if stamp is not None]
    if not known or len(known) < len(stamps):
        return _untimed(stamps, header_fps)
    pieces = _pieces(known, [False] * len(known), MAX_REORDER)
    return _joined(tuple(stamps), ascending(known), pieces, time_base, header_fps)


def ascending(stamps: Sequence[int | None]) -> bool:
    """Return whether all of these are times, each later than the one before."""
    if None in stamps:
        return False
    return all(a < b for a, b in pairwise(stamps))  # type: ignore[operator]


def _falls(clock: Sequence[int | None]) -> list[bool]:
    """Return for each packet whether its decode time is earlier than the one before."""
    fell: list[bool] = []
    last: int | None = None
    for ticks in clock:
        fell.append(last is not None and ticks is not None and ticks < last)
        last = last if ticks is None else ticks
    return fell


def _pieces(stamps: Sequence[int], begins: Sequence[bool], reorder: int) -> list[list[int]]:
    """Cut a sequence where the clock was set back, and return the sorted times of each piece.

    Args:
        stamps: the times, in any order.
        begins: whether a time is known to begin a piece.
        reorder: a time that is earlier than more than so many of those before it begins a piece too.
    """
    pieces: list[list[int]] = [[]]
    latest: list[int] = []  # heap of the latest times of the piece, one more than may be later than the next one
    for stamp, begin in zip(stamps, begins, strict=True):
        if begin or (len(latest) > reorder and stamp < latest[0]):
            pieces.append([])
            latest = []
        pieces[-1].append(stamp)
        if len(latest) > reorder:
            heapq.heappushpop(latest, stamp)
        else:
            heapq.heappush(latest, stamp)
    for piece in pieces:
        piece.sort()
    return pieces


def _joined(
    stamps: tuple[int | None, ...],
    by_pts: bool,
    pieces: Sequence[Sequence[int]],
    time_base: Fraction,
    header_fps: Fraction | None,
) -> Timeline:
    """Return the timeline of pieces that follow each other, each one frame after the one before."""
    ticks = sum(piece[-1] - piece[0] for piece in pieces)
    steps = sum(len(piece) - 1 for piece in pieces)
    if ticks <= 0 and len(stamps) > 1:
        return _untimed(stamps, header_fps)
    fps = _frame_rate(header_fps, float(steps / (ticks * time_base)) if steps else 0.0)
    seconds: list[float] = []
    for piece in pieces:
        # This rounds stamp * time_base only once; computing with exact fractions would take long.
        times = [stamp * time_base.numerator / time_base.denominator for stamp in piece]
        shift = seconds[-1] + 1 / fps - times[0] if seconds else 0.0
        seconds += [time + shift for time in times] if seconds else times
    return Timeline(stamps, by_pts, tuple(seconds), fps)


def _untimed(stamps: Sequence[int | None], header_fps: Fraction | None) -> Timeline:
    """Return the timeline of frames without usable times, which are spread evenly."""
    fps = _frame_rate(header_fps, 0.0)
    return Timeline(tuple(stamps), False, tuple(number / fps for number in range(len(stamps))), fps)


def _frame_rate(header: Fraction | None, measured: float) -> float:
    """Return the average frames per second: the header's, unless the frames' times differ from it by more than 1%."""
    if header and (not measured or abs(float(header) - measured) <= 0.01 * measured):
        return float(header)
    return measured or float(header or 25)
