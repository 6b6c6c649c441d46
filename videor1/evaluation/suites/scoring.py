"""How the benchmarks score an answer. Each function takes the whole completion; what counts is its answer tag's text.

A completion without an answer earns 0.
"""

from __future__ import annotations

import ast
import re

import numpy as np

from videor1.answer import extract_answer
from videor1.rewards import accuracy_reward

_MARKS = " \t\r\n.,;:!?\"'`*"
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?<=\d)", re.ASCII)


def score_choice(completion: str, *, letter: str, text: str = "") -> float:
    """1 for the right option: its letter as ``rewards.accuracy_reward`` reads it leniently ("b", "B.", "(B)", "B. a
    dog" are B), or its text alone; else 0."""
    if accuracy_reward(completion, f"<answer>{letter}</answer>", "multiple choice", lenient=True) == 1.0:
        return 1.0
    answer, right = (" ".join(t.casefold().strip(_MARKS).split()) for t in (extract_answer(completion), text))
    return float(bool(right) and answer == right)


def score_yes_no(completion: str, *, truth: str) -> float:
    """1 where the answer's first word is ``truth`` ("yes" or "no"), whatever its case."""
    words = re.findall(r"[a-z]+", extract_answer(completion).casefold())
    return float(words[:1] == [truth])


def score_mra(completion: str, *, truth: float) -> float:
    """Mean relative accuracy: the mean over the thresholds t = 0.5, 0.55, ..., 0.95 of [ |o - g| / |g| <= 1 - t ].

    ``o`` is the answer's first word as a number ("3.5 m" is 3.5, "1,000" is 1000); 0 if it is none.
    """
    words = extract_answer(completion).split()
    match = _NUMBER.fullmatch(words[0].rstrip(".,;:%")) if words else None
    if match is None:
        return 0.0
    value = float(match[0].replace(",", ""))
    if truth == 0:
        return float(value == 0)
    # As in the published code, linspace: at the borders its rounding decides.
    return float(np.mean(abs(value - truth) / abs(truth) <= 1 - np.linspace(0.5, 0.95, 10)))


def score_open(completion: str, *, truth: str) -> float:
    """MMMU's rule for open questions: 1 where a number in the answer equals the truth (both rounded to two decimals),
    or, the truth being text, where the answer contains it (case does not count; a single character must stand beside
    a blank). ``truth`` may be a list of such, written as Python writes it."""
    answer = extract_answer(completion).strip().rstrip(".").lower()
    if not answer:
        return 0.0
    found = {_rounded(number) for number in [answer, *(m[0] for m in _NUMBER.finditer(answer) if m[0])]}
    for option in _alternatives(truth):
        number = _rounded(option)
        text = option.strip().lower()
        if number is not None:
            right = number in found
        elif len(text) == 1:
            right = text == answer or f" {text}" in answer or f"{text} " in answer
        else:
            right = text in answer
        if right:
            return 1.0
    return 0.0


def _alternatives(truth: str) -> list[str]:
    if truth.lstrip().startswith("["):
        try:
            values = ast.literal_eval(truth.strip())
        except (ValueError, SyntaxError):
            return [truth]
        if isinstance(values, list) and values:
            return [str(value) for value in values]
    return [truth]


def _rounded(text: str) -> float | None:
    match = _NUMBER.fullmatch(text.strip())
    return round(float(match[0].replace(",", "")), 2) if match else None
