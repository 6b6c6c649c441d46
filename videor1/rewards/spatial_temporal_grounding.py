"""Spatial-temporal grounding: when and where, as ``{"time": [start, end], "boxes": {"9": [x1, y1, x2, y2], ...}}``.

The keys of the boxes are seconds, compared as text.
"""

from __future__ import annotations

from videor1.rewards.structured import Reading, Score, frames_structure, interval_iou, mean_iou


def score(output: str, truth: str, *, lenient: bool = False) -> Score:
    """Return half of tIoU and half of the mean IoU over the frames that both name.

    A part that cannot be used scores 0, and the other part counts; so does a box among others.
    """
    answer, right = Reading(output, lenient=lenient), Reading(truth, lenient=lenient)
    limit = right.frame_limit()
    times = interval_iou(answer.interval(), right.interval())
    found, boxes = answer.boxes(limit), right.boxes(limit)
    accuracy = 0.5 * times + 0.5 * mean_iou(found, boxes, [frame for frame in boxes if frame in found])
    return Score(accuracy, answer.malformed, frames_structure(answer.malformed, found, boxes))
