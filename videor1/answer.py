"""Parsing of completions in the format ``<think>reasoning</think> <answer>answer</answer>``."""

from __future__ import annotations

import re

_THINK_TO_ANSWER = re.compile(r"</think>\s*<answer>")


def extract_answer(text: str) -> str:
    """Return the stripped text between the first ``<answer>`` and the first ``</answer>`` after it; "" without a pair.

    The result equals that of the reference's ``<answer>\\s*(.*?)\\s*</answer>`` (DOTALL, first match, stripped). That
    pattern's backtracking takes cubic time on an unclosed tag followed by blanks; this function takes linear time.
    """
    _, opened, rest = text.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() if opened and closed else ""


def follows_format(text: str) -> bool:
    """Return whether the whole unstripped text matches ``<think>.*?</think>\\s*<answer>.*?</answer>`` (DOTALL).

    In a full match each lazy ``.*?`` may cross other tags. The test is therefore for the outer tags at both ends and,
    anywhere between them, a ``</think>`` with only blanks before an ``<answer>``. It takes linear time; the reference's
    pattern takes quadratic time.
    """
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return False
    return _THINK_TO_ANSWER.search(text, 0, len(text) - len("</answer>")) is not None
