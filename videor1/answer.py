"""Parsing of answers in the format ``<think>reasoning</think> <answer>answer</answer>``.

The chat templates of thinking models end a prompt with ``<think>``: then the template opens an answer, and the model
writes the rest of it. What is parsed is always the whole answer; what is counted, in tokens, is what the model wrote.
"""

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


def whole_text(opened: str, written: str) -> str:
    """Return a whole answer: what the chat template opened it with ("" for most), and what the model wrote."""
    return opened + written


def left_to_write(opened: str, whole: str) -> str | None:
    """Return what a model has to write of a whole answer that its chat template opens; None: it begins otherwise.

    Blanks around the opened tags are the template's own: ``<think>Red.</think>`` after an opened ``<think>\\n`` leaves
    ``Red.</think>``. So ``whole_text(opened, left)`` is the same answer up to blanks.
    """
    if not opened:
        return whole
    rest = whole
    for tag in opened.split():
        if not rest.startswith(tag):
            return None
        rest = rest.removeprefix(tag).lstrip()
    return rest


def follows_format(written: str, opened: str = "") -> bool:
    """Return whether an unstripped answer matches ``<think>.*?</think>\\s*<answer>.*?</answer>`` (DOTALL) as a whole.

    In a full match each lazy ``.*?`` may cross other tags. The test is therefore for the outer tags at both ends and,
    anywhere between them, a ``</think>`` with only blanks before an ``<answer>``. It takes linear time; the reference's
    pattern takes quadratic time.

    Args:
        written: what the model wrote.
        opened: what the chat template opened the answer with. Then a ``<think>`` that the model writes is one too many,
            although the pattern would let it pass.
    """
    if opened and "<think>" in written:
        return False
    text = whole_text(opened, written)
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return False
    return _THINK_TO_ANSWER.search(text, 0, len(text) - len("</answer>")) is not None
