"""Score completions as the benchmarks do.

Each function takes the whole completion and scores the text of its answer tag. A completion without an answer scores 0.
"""

from __future__ import annotations

import ast
import re

from videor1.answer import extract_answer
from videor1.rewards import accuracy_reward
from videor1.rewards.quantity import Quantity, read_quantity
from videor1.rewards.regression import mean_relative_accuracy

_MARKS = " \t\r\n.,;:!?\"'`*"
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?<=\d)", re.ASCII)


def score_choice(completion: str, *, letter: str, text: str = "") -> float:
    """Score a multiple choice: 1 for the right option, else 0.

    The answer may be the letter, as ``rewards.accuracy_reward`` reads it leniently ("b", "B.", "(B)" and "B. a dog" are
    B), or the text of the option alone.

    Args:
        completion: the completion.
        letter: the letter of the right option.
        text: the text of the right option; "" if only the letter counts.
    """
    if accuracy_reward(completion, f"<answer>{letter}</answer>", "multiple choice", lenient=True) == 1.0:
        return 1.0
    answer, right = (" ".join(t.casefold().strip(_MARKS).split()) for t in (extract_answer(completion), text))
    return float(bool(right) and answer == right)


def score_yes_no(completion: str, *, truth: str) -> float:
    """Score a yes/no question: 1 if the first word of the answer is ``truth`` ("yes" or "no") in any case, else 0."""
    words = re.findall(r"[a-z]+", extract_answer(completion).casefold())
    return float(words[:1] == [truth])


def score_mra(completion: str, *, truth: float) -> float:
    """Score a number by mean relative accuracy.

    This is the mean over the thresholds t = 0.5, 0.55, ..., 0.95 of [ |o - g| / |g| <= 1 - t ]. Here g is ``truth``,
    and o is the answer's first word as a number ("3.5 m" is 3.5, "1,000" is 1000). If that is not a number, the score
    is 0.
    """
    words = extract_answer(completion).split()
    match = _NUMBER.fullmatch(words[0].rstrip(".,;:%")) if words else None
    if match is None:
        return 0.0
    return mean_relative_accuracy(float(match[0].replace(",", "")), truth)


def score_quantity(completion: str, *, truth: Quantity) -> float:
    """Score a number by mean relative accuracy, as :func:`score_mra`, and read the answer as ``reward.lenient`` does.

    The answer may have a unit, which must be the truth's where both have one, or be a fraction or LaTeX.
    """
    answer = read_quantity(extract_answer(completion))
    if answer is None:
        return score_mra(completion, truth=truth.value)
    return mean_relative_accuracy(answer.value, truth.value) if answer.agrees(truth) else 0.0


def score_open(completion: str, *, truth: str) -> float:
    """Score an open question by MMMU's rule: 1 if the answer is right, else 0.

    If the truth is a number, an answer is right that contains an equal number (both rounded to two decimals). If the
    truth is text, an answer is right that contains it in any case; a single character must stand beside a blank.

    Args:
        completion: the completion.
        truth: the right answer, or several as a list in Python's notation.
    """
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
