"""Ground truths that no completion can earn: refused where data are read, and said."""

import json
import string
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import json_lines, row, samples, stream_of

from videor1.answer import extract_answer
from videor1.config import RewardConfig
from videor1.data import load_samples
from videor1.errors import DataError
from videor1.rewards import accuracy_reward
from videor1.rewards.scoring import solution_reward
from videor1.rewards.solutions import option_labels, why_unearnable
from videor1.types import Sample

STRICT, LENIENT = RewardConfig(), RewardConfig(lenient=True)

NEVER, LENIENTLY, ALWAYS = range(3)  # who can reward them
ANSWERS = {
    (NEVER, "numerical"): "blue | nan | three | $ | 1,5 or 2 | 1/0 | 12 cm or 13 cm",
    (NEVER, "regression"): "blue | nan | inf | -inf | 1e999",
    (NEVER, "free-form"): "... | ?! | → | \u200b-",
    (LENIENTLY, "numerical"): r"12 cm | $\frac{1}{2}$ | $12 | 50% | 1/2 | 1,234.5 m | −3 | ३ मीटर",
    (LENIENTLY, "regression"): "0 | 0.0 | -0 | 12 cm | $12 | 1/2 | 50% | 0 kg",
    (LENIENTLY, "free-form"): "赤い車 | κόκκινο | красный | สีแดง | أحمر | लाल | 빨간 | 猫",
    (ALWAYS, "numerical"): "12 | -3.5 | 1,000 | 1.5e3 | 1_000 | ٣",
    (ALWAYS, "regression"): "12 | -3.5 | 1e-9",
    (ALWAYS, "free-form"): "dog | a red car | café | BMW の車 | 7",
    (ALWAYS, "OCR"): "STOP | 止まれ | ? | 12 cm",
}
CASES = [(kind, text, mode) for (mode, kind), texts in ANSWERS.items() for text in texts.split(" | ")]


@pytest.mark.parametrize(("problem_type", "answer", "mode"), CASES)
def test_a_solution_must_earn_a_reward_for_itself(problem_type: str, answer: str, mode: int) -> None:
    reasons = [why_unearnable(answer, problem_type, reward=reward) for reward in (STRICT, LENIENT)]
    assert [reason is None for reason in reasons] == [mode == ALWAYS, mode != NEVER]
    if mode != ALWAYS:
        assert problem_type in str(reasons[0])
        assert "reward.correct_above" in str(reasons[0])
        assert ("reward.lenient true can" in str(reasons[0])) == (mode == LENIENTLY)
    assert why_unearnable(answer, problem_type) is None
    assert why_unearnable(answer, problem_type, reward=RewardConfig(functions=["a:b"])) is None


@given(
    st.one_of(st.text(max_size=12), st.text("0123456789.,-%$/ cmA猫", max_size=8)).map(str.strip).filter(bool),
    st.sampled_from(["multiple choice", "numerical", "OCR", "free-form", "regression"]),
    st.booleans(),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_a_solutions_reward_is_what_it_earns_for_itself(answer: str, problem_type: str, lenient: bool) -> None:
    whole = f"<answer>{answer}</answer>"
    if extract_answer(whole) == answer:
        earned = accuracy_reward(whole, whole, problem_type, lenient=lenient)
        assert solution_reward(answer, problem_type, lenient=lenient) == pytest.approx(earned)


A_B = "A. red | B. blue", "(A) red | (B) blue", "A) red | B) blue", "A: red | B: blue", "A、赤 | B、青", "A | B"
A_B += "**A.** red | **B.** blue", "red | blue", "A dog | A cat", "3.5 m | 4.5 m", "A. red | A. blue"
LABELS = dict.fromkeys(A_B, "A B") | {"a. red | b. blue": "a b", "C. red | D. blue": "C D", "猫 | 犬": "A B 猫 犬"}
LABELS |= {"1. red | 2. blue": "A B 1 2", " | ".join(f"{i}?" for i in range(30)): " ".join(string.ascii_uppercase)}


def test_a_multiple_choice_needs_the_letter_of_an_option() -> None:
    for options, labels in LABELS.items():
        assert option_labels(options.split(" | ")) == labels.split()
    for answers, strict, lenient in (
        (["A", "B"], True, True),
        (["b", "B.", "(B)", "B. blue"], False, True),
        (["C", "AB", "A, B", "C. green", "blue", "1", "Ａ", "\u0410", "?"], False, False),  # the last A is Cyrillic
    ):
        for answer, (reward, right) in product(answers, ((STRICT, strict), (LENIENT, lenient), (None, lenient))):
            reason = why_unearnable(answer, "multiple choice", ["A. red", "B. blue"], reward=reward)
            assert (reason is None) == right, answer
            assert right or "expected the letter of an option (A, B), got" in str(reason)
    # The threshold is the run's own.
    assert why_unearnable("dog", "free-form", reward=RewardConfig(correct_above=0.6)) is None
    assert "earns 0.67 for itself" in str(why_unearnable("dog", "free-form", reward=RewardConfig(correct_above=0.7)))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("[4, 3.5]", "wrong_form"),
        ('{"time": [4, 3.5]}', "reversed"),
        ("at noon", "not_json"),
        ('{"time": [-1, 3]}', "out_of_frame"),
    ],
)
def test_a_malformed_solution_is_told_its_fault_and_its_bar(answer: str, fault: str) -> None:
    reward = RewardConfig(correct_above_for=["temporal grounding=0.5"])
    assert f"more than 0.5 for (reward.correct_above_for), got {answer!r} ({fault}), which" in str(
        why_unearnable(answer, "temporal grounding", reward=reward)
    )
    assert "more than 0.1 for (reward.correct_above), got" in str(
        why_unearnable(answer, "temporal grounding", reward=RewardConfig())
    )
    # A well-formed one without length has no fault to name.
    assert "got '{\"time\": [3, 3]}', which" in str(
        why_unearnable('{"time": [3, 3]}', "temporal grounding", reward=STRICT)
    )


@pytest.mark.parametrize(("answer", "problem_type"), [("inf", "numerical"), ("1e400", "numerical"), ("NaN", "math")])
def test_a_number_that_is_not_finite_is_no_solution(answer: str, problem_type: str) -> None:
    """Though it equals itself."""
    assert why_unearnable(answer, problem_type, reward=STRICT)


BAD = [row(9, problem_type=kind, solution=f"<answer>{text}</answer>") for kind, text, mode in CASES if mode != ALWAYS]
BAD.append(row(8, problem_type="multiple choice", options=["A. red", "B. blue"], solution="<answer>C</answer>"))


def test_entries_that_cannot_be_earned_are_counted_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row(1), *BAD]))
    strict, lenient = load_samples(path), load_samples(path, reward=LENIENT)
    count = sum(mode == LENIENTLY for _, _, mode in CASES)
    assert strict.error_counts() == {"solution": len(BAD)}
    assert lenient.error_counts() == {"solution": len(BAD) - count}
    assert f"{len(BAD)} entries are left out for their solution; {count} of them" in strict.reward_note()
    assert "reward.lenient true" in strict.reward_note()
    assert lenient.reward_note() == ""
    assert load_samples(path, reward=None).error_counts() == {"solution": 1}  # the letter
    # A stream counts them in their place.
    (tmp_path / "data.jsonl").write_bytes(json_lines([row(1), *BAD]))
    good, *bad = samples(stream_of(tmp_path / "data.jsonl"), 1 + len(BAD))
    assert isinstance(good, Sample)
    assert [error.kind for error in bad] == ["solution"] * len(BAD)
    # A file of nothing else says why.
    path.write_text(json.dumps([row(1, solution="<answer>12 cm</answer>")] * 3))
    message = r"solution 3.*\n.*'12 cm'.*as numerical earns 0 for itself; reward.lenient true"
    with pytest.raises(DataError, match=message):
        load_samples(path)
