"""Checking that a completion can earn the reward of a sample's solution."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from videor1.config import RewardConfig
from videor1.rewards.scoring import accuracy_reward, judged, malformed_reason, solution_reward

_LABEL = re.compile(r"\W*?([^\W\d_]|\d{1,2})(?:\s*([.):\],>}、．：）】］])(?!\d)|[\s*_]*$)")
_SHOWN = 60  # characters of an answer that a message shows


def why_unearnable(
    answer: str, problem_type: str, options: Sequence[str] = (), *, reward: RewardConfig | None = None
) -> str | None:
    """Return why no completion can be right about a sample, or None if one can.

    A multiple choice needs the label of one of its options: its letter, or its number where the options are numbered;
    options without labels have the letters A, B, ... in their order. Every other solution must earn more than
    ``correct_above`` for itself, unless a judge scores its type.

    Args:
        answer: the right answer, without ``<answer>`` tags; not empty.
        problem_type: the kind of question.
        options: of a multiple choice.
        reward: how completions are scored; None: only the label is checked. Functions of the user's may reward
            anything, so with one of them only the label is checked too.
    """
    if problem_type == "multiple choice" and not _names_an_option(answer, options, reward is None or reward.lenient):
        return f"expected the letter of an option ({', '.join(option_labels(options))}), got {_short(answer)}"
    if reward is None or reward.functions or judged(problem_type, reward):
        return None
    tagged = f"<answer>{answer}</answer>"
    fault = malformed_reason(tagged, tagged, problem_type, lenient=reward.lenient)
    earned = solution_reward(answer, problem_type, lenient=reward.lenient, regression=reward.regression)
    above = reward.above(problem_type)
    if earned > above:
        return f"expected a finite number, got {_short(answer)}" if fault == "not_finite" else None
    hint = "; reward.lenient true can reward it" if lenient_can_reward(answer, problem_type, reward) else ""
    bar = "reward.correct_above_for" if above != reward.correct_above else "reward.correct_above"
    return (
        f"expected an answer that a completion can earn more than {above:g} for ({bar}), got {_short(answer)}"
        f"{f' ({fault})' if fault else ''}, which as {problem_type} earns {earned:.2g} for itself{hint}"
    )


def lenient_can_reward(answer: str, problem_type: str, reward: RewardConfig) -> bool:
    """Return whether ``reward.lenient`` could reward a solution that the strict ``reward`` cannot."""
    how = reward.regression
    strict, lenient = (solution_reward(answer, problem_type, lenient=x, regression=how) for x in (False, True))
    return not reward.lenient and strict <= reward.above(problem_type) < lenient


def _names_an_option(answer: str, options: Sequence[str], lenient: bool) -> bool:
    place = string.ascii_uppercase.find(answer)
    if len(answer) == 1 and 0 <= place < len(options) and options[place].startswith(f"{answer}. "):
        return True  # as in most data files, at once
    labels = option_labels(options)
    solution = f"<answer>{answer}</answer>"
    rewards = (accuracy_reward(f"<answer>{x}</answer>", solution, "multiple choice", lenient=lenient) for x in labels)
    return any(rewards)


def option_labels(options: Sequence[str]) -> list[str]:
    """Return the labels by which an answer can name the options: those that they begin with, or else A, B, ..."""
    letters = list(string.ascii_uppercase[: len(options)])
    matches = [match for match in map(_LABEL.match, options) if match]
    found = [match[1] for match in matches]
    if len(set(found)) < len(options):
        return letters
    if found == letters or all(match[2] and match[1].isalpha() for match in matches):
        return found
    return list(dict.fromkeys([*letters, *found]))


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
