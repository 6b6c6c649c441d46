"""Tracking: where something is in each frame, as ``{"boxes": {"1": [x1, y1, x2, y2], "2": ...}}``.

The keys are frames, or seconds, compared as text.
"""

from __future__ import annotations

from videor1.rewards.structured import Reading, Score, frames_structure, mean_iou


def score(output: str, truth: str, *, lenient: bool = False) -> Score:
    """Return the mean IoU over the truth's frames; one without a box, or with one that cannot be used, counts 0."""
    answer, right = Reading(output, lenient=lenient), Reading(truth, lenient=lenient)
    limit = right.frame_limit()
    found, boxes = answer.boxes(limit), right.boxes(limit)
    malformed = answer.malformed or ("" if found else "wrong_form")  # an object without a frame says nothing
    return Score(mean_iou(found, boxes, list(boxes)), malformed, frames_structure(malformed, found, boxes))
