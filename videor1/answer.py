"""The form of an answer: ``<think>reasoning</think> <answer>answer</answer>``."""

from __future__ import annotations

import re

_TURN = re.compile(r"</think>\s*<answer>")


def extract_answer(text: str) -> str:
    """What stands between the first ``<answer>`` and the first ``</answer>`` after it, stripped; "" without a pair.

    Equals the reference's ``<answer>\\s*(.*?)\\s*</answer>`` (DOTALL, first match, stripped), whose backtracking takes
    cubic time on an unclosed tag followed by blanks; this is linear.
    """
    _, opened, rest = text.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() if opened and closed else ""


def follows_format(text: str) -> bool:
    """Whether the whole text, unstripped, matches ``<think>.*?</think>\\s*<answer>.*?</answer>`` (DOTALL).

    Under a full match each lazy ``.*?`` may cross other tags, so this is: the outer tags at both ends and, anywhere
    between them, a ``</think>`` with only blanks before an ``<answer>``. Linear time; the reference's is quadratic.
    """
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return False
    return _TURN.search(text, 0, len(text) - len("</answer>")) is not None
