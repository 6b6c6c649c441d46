"""Yes or no: ``yes``, ``true`` and ``1`` are one answer, ``no``, ``false`` and ``0`` the other, in any case."""

from __future__ import annotations

from videor1.rewards.structured import Score

_WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def score(output: str, truth: str, *, lenient: bool = False) -> Score:
    """Return 1 if both say the same, else 0; ``lenient`` takes off the punctuation around the word."""
    answer, right = _read(output, lenient), _read(truth, lenient)
    if answer is None:
        return Score(0.0, "not_boolean" if output else "no_answer")
    return Score(float(answer is right))


def _read(text: str, lenient: bool) -> bool | None:
    return _WORDS.get((text.strip(" \t\r\n.,;:!?\"'`*_()[]{}$") if lenient else text).casefold())
