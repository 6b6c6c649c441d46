"""The scoring rules at their borders."""

from functools import partial
from typing import Any

import pytest

from videor1.evaluation.suites.scoring import score_choice, score_mra, score_open, score_yes_no

dog = partial(score_choice, letter="B", text="a big dog")
yes = partial(score_yes_no, truth="yes")
EIGHT = "['8', 'eight']"

# (rule, the text in the answer tag) -> score
CASES: list[tuple[Any, str, float]] = [
    *((dog, text, 1) for text in ("B", "b", "(B)", "B.", "B. a big dog", "A big dog.", "a  big dog")),
    *((dog, text, 0) for text in ("A", "A big dog and a cat", "", "A) or B)", "dog")),
    (partial(score_choice, letter="B", text=""), "", 0),
    *((yes, text, 1) for text in ("Yes.", "yes, it is")),
    *((yes, text, 0) for text in ("no", "1", "no, not yes")),
    *((4.0, text, 1) for text in ("4", "4.0", "4.", "4 chairs")),
    *((4.0, text, 0) for text in ("four", "", "-4", "8", "1e400", "nan", "inf", "+3.9m")),
    *((4.0, text, 0.1) for text in ("2", "6")),
    (4.0, "3.9 m", 1),
    (1000.0, "1,000", 1),
    *((100.0, text, score) for text, score in (("95", 1), ("94.9", 0.9), ("90", 0.9), ("89.9", 0.8))),
    *((100.0, text, score) for text, score in (("50", 0.1), ("49.9", 0))),
    *((0.0, text, score) for text, score in (("0", 1), ("1", 0))),
    *(("12.50", text, score) for text, score in (("12.5", 1), ("about 12.499", 1), ("12", 0))),
    ("1250", "1,250", 1),
    ("-3", "x = -3", 1),
    *(("red", text, score) for text, score in (("the red curve", 1), ("RED", 1), ("blue", 0), ("", 0))),
    *(("m", text, score) for text, score in (("m", 1), ("5 m", 1), ("metre", 0))),
    *((EIGHT, text, score) for text, score in (("8", 1), ("Eight.", 1), ("seven", 0))),
    ("[x", "[x]", 1),
]


@pytest.mark.parametrize(("rule", "text", "score"), CASES)
def test_scores(rule: Any, text: str, score: float) -> None:
    """A number stands for mean relative accuracy, a text for an open question."""
    if isinstance(rule, float):
        rule = partial(score_mra, truth=rule)
    elif isinstance(rule, str):
        rule = partial(score_open, truth=rule)
    assert rule(f"<think>so</think><answer>{text}</answer>") == pytest.approx(score)


def test_the_formula_and_the_tag() -> None:
    for given in (1.03, 3.1, 4.77, 5.3, 9.9):  # away from the thresholds, by the paper's formula
        expected = sum(abs(given - 4.2) / 4.2 <= 1 - (0.5 + 0.05 * i) for i in range(10)) / 10
        assert score_mra(f"<answer>{given}</answer>", truth=4.2) == pytest.approx(expected)
    for rule in (partial(score_choice, letter="B"), partial(score_mra, truth=4.0), partial(score_open, truth="4"), yes):
        for text in ("B", "4", "yes"):  # the answer tag alone counts
            assert rule(text) == rule(f"<think>{text}</think>") == 0.0
