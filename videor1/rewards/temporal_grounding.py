"""Temporal grounding: when something happens, as ``{"time": [start, end]}`` in seconds."""

from __future__ import annotations

from videor1.rewards.structured import Reading, Score, interval_iou


def score(output: str, truth: str, *, lenient: bool = False) -> Score:
    """Return the intersection of the two intervals divided by their union (tIoU). Other keys are ignored."""
    answer, right = Reading(output, lenient=lenient), Reading(truth, lenient=lenient)
    accuracy = interval_iou(answer.interval(), right.interval())
    return Score(accuracy, answer.malformed, float(not answer.malformed))
