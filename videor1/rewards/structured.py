"""What the rewards of structured answers share: a score, and reading JSON with intervals and boxes from an answer.

Times are seconds. Boxes are [x1, y1, x2, y2]; their coordinates go from 0 to 1000, as OneThinker and Qwen3-VL scale
them, or are pixels: of a truth that has one above 1000 the size of the frame is not known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What can be wrong with an answer, by the names that the metrics and the results have.
MALFORMED = (
    "no_answer",  # nothing stands in <answer> tags
    "not_json",
    "wrong_form",  # JSON, but without the keys, the lists or the numbers that its problem type asks for
    "not_finite",  # a NaN, or a number that is or becomes infinite
    "reversed",  # an interval that ends before it begins, or a box whose second corner lies before its first
    "out_of_frame",  # a time below 0, or a box that leaves the frame
    "not_a_number",
    "not_boolean",
    "not_math",
    "too_slow",  # comparing it took more than the time or the memory that a comparison may take
)

FRAME = 1000.0  # width and height of the frame that coordinates are scaled to
_FENCED = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL | re.IGNORECASE)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Score:
    """How right an answer is, and what is wrong with its form."""

    accuracy: float  # in [0, 1]
    malformed: str = ""  # the first fault, one of MALFORMED; "" for none
    structure: float = 0.0  # how far it has the form that was asked for, in [0, 1]; 0 of types without a structure


class _FormError(Exception):
    """Raised inside this file, with one of MALFORMED, for a value that cannot be used."""


class Reading:
    """Reads the parts of an answer in JSON. A part that cannot be used is None, and its fault is kept; nothing raises.

    Args:
        text: the answer without its tags.
        lenient: also take the JSON out of a Markdown code block, or out of the text around it.

    Attributes:
        malformed: the first fault that was met, one of MALFORMED, or "".
    """

    def __init__(self, text: str, *, lenient: bool = False) -> None:
        self.malformed = ""
        self._fields: dict[str, Any] = {}
        try:
            self._fields = _read_object(text, lenient)
        except _FormError as error:
            self.malformed = str(error)

    def interval(self) -> tuple[float, float] | None:
        """Return the [start, end] of the key "time", in seconds."""
        try:
            start, end = _numbers(self._fields.get("time"), 2)
            if end < start:
                raise _FormError("reversed")
            if start < 0:
                raise _FormError("out_of_frame")
        except _FormError as error:
            self._fault(error)
            return None
        return start, end

    def box(self, limit: float) -> Box | None:
        """Return the box of the key "boxes", whose coordinates lie between 0 and ``limit``."""
        return self._box(self._fields.get("boxes"), limit)

    def boxes(self, limit: float) -> dict[str, Box | None]:
        """Return the boxes of the key "boxes" by frame; None for one that cannot be used."""
        value = self._fields.get("boxes")
        if not isinstance(value, dict):
            self._fault(_FormError("wrong_form"))
            return {}
        return {frame: self._box(box, limit) for frame, box in value.items()}

    def frame_limit(self) -> float:
        """Return the largest coordinate that is in the frame, judging by the boxes of this answer (a truth)."""
        value = self._fields.get("boxes")
        boxes = list(value.values()) if isinstance(value, dict) else [value]
        numbers = [number for box in boxes if isinstance(box, list) for number in box if _is_number(number)]
        return FRAME if all(number <= FRAME for number in numbers) else math.inf

    def _box(self, value: object, limit: float) -> Box | None:
        try:
            x1, y1, x2, y2 = _numbers(value, 4)
            if x2 < x1 or y2 < y1:
                raise _FormError("reversed")
            if min(x1, y1) < 0 or max(x2, y2) > limit:
                raise _FormError("out_of_frame")
        except _FormError as error:
            self._fault(error)
            return None
        return x1, y1, x2, y2

    def _fault(self, error: _FormError) -> None:
        self.malformed = self.malformed or str(error)


def _read_object(text: str, lenient: bool) -> dict[str, Any]:
    if not text:
        raise _FormError("no_answer")
    value = _parse(text)
    if value is None and lenient:
        fenced = _FENCED.search(text)
        value = _parse(fenced[1]) if fenced else _parse(text, start=text.find("{"))
    if value is None:
        raise _FormError("not_json")
    if not isinstance(value, dict):
        raise _FormError("wrong_form")
    return value


def _parse(text: str, *, start: int | None = None) -> Any:
    """Return the JSON value of a text, or the one that begins at ``start``; None if there is none (or it is null)."""
    try:
        if start is None:
            return json.loads(text)
        return json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
    except (ValueError, RecursionError):  # ValueError: no JSON, or an integer with thousands of digits
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: object, count: int) -> list[float]:
    """Return a list of ``count`` finite numbers, or raise the fault."""
    if not isinstance(value, list) or len(value) != count or not all(map(_is_number, value)):
        raise _FormError("wrong_form")
    try:
        numbers = [float(number) for number in value]
    except OverflowError:  # an integer that no float holds
        raise _FormError("not_finite") from None
    if not all(map(math.isfinite, numbers)):
        raise _FormError("not_finite")
    return numbers


def interval_iou(one: tuple[float, float] | None, other: tuple[float, float] | None) -> float:
    """Return the length of two intervals' intersection by that of their union; 0 for None, or two without length."""
    if one is None or other is None:
        return 0.0
    shared = min(one[1], other[1]) - max(one[0], other[0])
    union = max(one[1], other[1]) - min(one[0], other[0])
    return shared / union if shared > 0 else 0.0


def box_iou(one: Box | None, other: Box | None) -> float:
    """Return the area of two boxes' intersection by that of their union; 0 for None, or two without area."""
    if one is None or other is None:
        return 0.0
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    union = _area(one) + _area(other) - shared
    if not math.isfinite(union):
        scale = max(*one, *other)
        return box_iou(_scaled(one, scale), _scaled(other, scale))
    return shared / union if union > 0 else 0.0


def mean_iou(found: Mapping[str, Box | None], truth: Mapping[str, Box | None], frames: list[str]) -> float:
    """Return the mean of the boxes' IoU over ``frames``, of which a missing one counts 0; 0 without frames."""
    ious = [box_iou(found.get(frame), truth.get(frame)) for frame in frames]
    return min(1.0, math.fsum(ious) / len(ious)) if ious else 0.0


def frames_structure(malformed: str, found: Mapping[str, Box | None], truth: Mapping[str, Box | None]) -> float:
    """Return half for a well-formed answer, and half of the share of the truth's frames that it names."""
    named = len(found.keys() & truth.keys()) / len(truth) if truth else 0.0
    return 0.5 * (not malformed) + 0.5 * named


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _scaled(box: Box, scale: float) -> Box:
    x1, y1, x2, y2 = (number / scale for number in box)
    return x1, y1, x2, y2
