"""Spatial grounding: where something is, as ``{"boxes": [x1, y1, x2, y2]}``."""

from __future__ import annotations

from videor1.rewards.structured import Reading, Score, box_iou


def score(output: str, truth: str, *, lenient: bool = False) -> Score:
    """Return the intersection of the two boxes divided by their union (IoU). Other keys are ignored."""
    answer, right = Reading(output, lenient=lenient), Reading(truth, lenient=lenient)
    limit = right.frame_limit()
    accuracy = box_iou(answer.box(limit), right.box(limit))
    return Score(accuracy, answer.malformed, float(not answer.malformed))
