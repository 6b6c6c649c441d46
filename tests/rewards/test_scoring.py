"""Rewards of an answer by the kind of its question, strict as the reference's and lenient, and the user's own."""

import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videor1.config import RewardConfig
from videor1.errors import ConfigError
from videor1.rewards import accuracy_reward, format_reward, load_reward, score
from videor1.types import Sample

TYPES = ["multiple choice", "numerical", "OCR", "free-form", "regression"]
TAGS = {"[": "<think>", "]": "</think>", "(": "<answer>", ")": "</answer>"}


def tagged(text: str) -> str:
    """``[thoughts](answer)`` with the tags of a completion."""
    return "".join(TAGS.get(letter, letter) for letter in text)


def earn(output: str, truth: str, problem_type: Any, **options: bool) -> float:
    return accuracy_reward(f"<answer>{output}</answer>", f"<answer>{truth}</answer>", problem_type, **options)


def pairs(text: str) -> list[list[str]]:
    """Of ``answer = truth | answer = truth``."""
    return [pair.split(" = ") for pair in text.split(" | ")]


def test_answer_and_format() -> None:
    first = {"(B)": "B", "[A or B]\n(\n  B \t) and more": "B", "(A)(B)": "A", ")A(B)": "B", "(A(B))": "A(B"}
    first |= {"(two\nlines)": "two\nlines"} | dict.fromkeys(("()", "(B", "B)", "<Answer>B</Answer>", "B", ""), "")
    for completion, answer in first.items():
        assert accuracy_reward(tagged(completion), tagged(f"({answer})"), "multiple choice") == 1.0, completion
        assert accuracy_reward(tagged(completion), tagged(f"({answer}x)"), "multiple choice") == 0.0, completion
    # Missing on both sides they are equal, as in the reference.
    earned = {kind: accuracy_reward("I do not know", "B", kind) for kind in TYPES}
    assert earned == {"multiple choice": 1.0, "numerical": 0.0, "OCR": 1.0, "free-form": 0.0, "regression": 0.0}
    # The format.
    for right in ("[a](B)", "[a] \n\n(B)", "[]()", "[a\nb]\n(c\nd)", "[a]b](B)", "[a](B)(C)"):
        assert format_reward(tagged(right)) == 1.0, right
    for wrong in ("[a] so (B)", " [a](B)", "[a](B)\n", "[a](B", "[a(B)", "(B)", "<THINK>a</THINK>(B)", "[)", ""):
        assert format_reward(tagged(wrong)) == 0.0, wrong


@pytest.mark.parametrize(
    ("opened", "right", "wrong"),
    [
        ("[\n", ("a]\n\n(B)", "]()", "a\nb]b](B)(C)"), ("[a](B)", "a [b](B)", "a(B)", "(B)", "a](B", "a](B)\n", "")),
        ("[\n\n]\n\n", ("(B)", "\n(B)", "](B)"), ("[a](B)", "a(B)", "(B", "(B) ", "")),
    ],
)
def test_an_answer_that_the_template_opened(opened: str, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    """The format is the whole answer's, in which the model opens nothing again; others' rewards read the whole, too."""
    opened, given = tagged(opened), []
    note = SimpleNamespace(note=lambda completions, _: [float(given.append(text) or 0) for text in completions])
    texts = [tagged(text) for text in (*right, *wrong)]
    sample = Sample(0, "0", "?", "text", "multiple choice", "<answer>B</answer>")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "noting", note)
        config = RewardConfig(functions=["noting:note"])
        accuracy, form = score(texts, [sample] * len(texts), config, opened=opened)
    load_reward.cache_clear()
    assert form == [1.0] * len(right) + [0.0] * len(wrong)
    assert [format_reward(text, opened=opened) for text in texts] == form
    assert given == [opened + text for text in texts]
    assert accuracy == [accuracy_reward(opened + text, sample.solution, sample.problem_type) for text in texts]
    assert score(["B</answer>"], [sample], RewardConfig(), opened="<think></think><answer>") == ([1.0], [1.0])


PIECES = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "\x1f", "\u3000", "B", "<", ">"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_tags_are_read_as_the_references_regular_expressions_read_them(text: str) -> None:
    match = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    answer = match.group(1).strip() if match else ""
    assert accuracy_reward(text, f"<answer>{answer}</answer>", "multiple choice") == 1.0
    assert accuracy_reward(text, "<answer>no piece</answer>", "multiple choice") == 0.0
    wanted = re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL) is not None
    assert format_reward(text) == float(wanted)


# 2.675 is a little less in binary; 0.125 is a tie, which rounds to even
NUMBERS = "3 = 3 | -3 = -3 | +3 = 3 | -0 = 0 | 3. = 3.00 | 3.14 = 3.141 | 2.675 = 2.67 | 0.125 = 0.12 | 1,000 = 1000.0"
NUMBERS += " | 1,000 = 1,000 | 1,0,0,0 = 1000. | 1e3 = 1000 | 1_000 = 1000 | ٣ = 3 |  3\n = 3 | 1e999 = 1e999"
NUMBERS += " | inf = 1e999 | 1e308 = 1e308"
NO_NUMBERS = "3 = 4 | 3.0 = 3 | 3 = 3.0 | 3.14 = 3.15 | 1,000 = 1000 | 1,5 = 1.5 | 0x10 = 16 | 1/2 = 0.5 | 50% = 50"
NO_NUMBERS += f" | 50% = 50% | three = 3 | , = 3.0 | 3 cars = 3 | inf = -inf | nan = nan | {'9' * 10_000} = 3 |  = 3"
# A ground truth of 0 earns nothing: (0 + 1e-9) / (0 + 1e-9) is 1.
FAR = "10 = 5 | 100 = 5 | -5 = 5 | 0 = 0 | 1 = 0 | 1e400 = 5 | five = 5 |  = 5 | 5 = five"
FAR += " | nan = 5 | 5 = nan | inf = inf"
TURN = " | ".join(f"{text} = no left turn" for text in ("no right turn", "No left turn", "no left", "no left turn now"))
SPACES = "no  left\n\tturn = no left turn | no\u00a0left\u3000turn = no left turn"


CHOICES = "b = B | B. = B | (b) = B | **B** = B | B) = B | B) two cars = B | (B) Two cars. = B | B. a dog = B"
CHOICES += " | B: 2 cars = B | B = B. two cars | Two  cars. = two cars"
OTHERS = "C = B | C) two cars = B | A) or B) = A | A. or B = A | A: B = A | A, B = A | AB = A | A dog = A"
OTHERS += " | B two cars = B | C++ = C | -5 = 5 |  = B | ... = !"
# 1e999 and 2e9999 are equal as in the strict mode: both are infinite.
EQUAL = "3.0 = 3 | .5 = 0.50 | 1,000 = 1000 | 1,234,567.5 = 1234567.5 | 1/2 = 0.5 | 1 / 2 = 0.5 | 0.33 = 1/3 | 3. = 3"
EQUAL += " | −3 = -3 | 1e3 = 1,000 | 50% = 50 % | 3 cars = 3 | 1e999 = 2e9999"
UNEQUAL = "50% = 50 | 50% = 0.5 | 1,5 = 1.5 | 10,00 = 1000 | 1/0 = 0 | 1/2/3 = 0.5 | 0/0 = nan | 3 cars = 3 dogs"
UNEQUAL += " | 1e999. = 2e9999 | 3.1 = 3 |  = "


STRICT = [
    ("multiple choice", 1, "B = B |  B\n = B | A,B = A,B"),
    ("multiple choice", 0, "b = B | B. = B | (B) = B |  = B"),
    ("numerical", 1, NUMBERS),
    ("numerical", 0, NO_NUMBERS),
    ("regression", 1, "5 = 5 | 1,000 = 1000"),
    ("regression", 0.8, "4 = 5 | -4 = -5"),
    ("regression", 0.9, "4.5 = 5"),
    ("regression", 0, FAR),
    ("OCR", 1, f"no left turn = no left turn | {SPACES} |  = "),
    ("OCR", 2 / 3, TURN),
    ("OCR", 1 / 3, "turn left no = no left turn"),
    ("OCR", 0, "a b c d e f g = no left turn |  = no left turn | stop = "),
    # unigrams 2 of 3 and 2 of 2, bigrams 1 of 2 and 1 of 1, longest common subsequence 2
    ("free-form", (0.8 + 2 / 3 + 0.8) / 3, "the cat sat = the cat"),
    ("free-form", (1 + 0 + 0.5) / 3, "cat the = the cat"),
    ("free-form", 1, "The CAT, sat! = the cat sat | cats running = cat run | running fast = runs fast"),
    ("free-form", (0.5 + 0 + 0.5) / 3, "as running = a run"),  # words of up to three letters keep their endings
    ("free-form", 2 / 3, "dog = dog"),
    ("free-form", 0, "bird = the cat |  = the cat | 猫 = 猫"),
]
UNKNOWN = [(kind, 0, "B = B") for kind in ("", "Multiple Choice", "ocr", "caption", None)]
LENIENT = [
    ("multiple choice", 1, CHOICES),
    ("multiple choice", 0, OTHERS),
    ("numerical", 1, EQUAL),
    ("numerical", 0, UNEQUAL),
    ("regression", 1, "1/2 = 0.5 | 1,5 = 15"),  # the strict rule drops every comma
    ("regression", 0.8, "40% = 50%"),
    ("regression", 0, "50% = 50"),
    ("OCR", 1, "STOP, now! = stop now"),
    ("OCR", 2 / 3, "$5 - 3 = $5 + 3"),
]


@pytest.mark.parametrize(
    ("lenient", "problem_type", "reward", "answers"),
    [*((False, *case) for case in STRICT + UNKNOWN), *((True, *case) for case in LENIENT + UNKNOWN)],
)
def test_accuracy(lenient: bool, problem_type: Any, reward: float, answers: str) -> None:
    for output, truth in pairs(answers):
        earned = earn(output, truth, problem_type, lenient=lenient)
        exact = problem_type in ("multiple choice", "numerical")
        assert earned == (reward if exact else pytest.approx(reward, abs=1e-8)), (output[:20], truth)


def edit_distance(a: list[str], b: list[str]) -> int:
    """Counted by its recursion, over a table."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, change)
    return table[len(a), len(b)]


words = st.lists(st.sampled_from(["a", "b", "A", "ab", "-1", "-2", "é"]), max_size=9)


@given(words, words, st.sampled_from(" \n\t\u2003"))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_ocr_is_one_minus_the_word_error_rate(output: list[str], truth: list[str], blank: str) -> None:
    wanted = max(0.0, 1 - edit_distance(truth, output) / max(1, len(truth)))
    assert earn(blank.join(output), " ".join(truth), "OCR") == wanted


texts = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(), max_size=30),
    st.text("0123456789.,-+eE/% _", max_size=8),
    st.text("ABab().: ", max_size=8),
)


@given(texts, texts, st.sampled_from(TYPES), st.booleans())
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_text_earns_a_reward_between_0_and_1(output: str, truth: str, problem_type: str, tags: bool) -> None:
    wrap = "<answer>{}</answer>".format if tags else str
    strict = accuracy_reward(wrap(output), wrap(truth), problem_type)
    lenient = accuracy_reward(wrap(output), wrap(truth), problem_type, lenient=True)
    assert 0.0 <= strict <= lenient <= 1.0
    assert type(strict) is type(lenient) is float


UNITS = ["y", "ay", " ", "word ", "9", "1,", ",000", "(", "b) ", ".", "<answer>", "</think> ", "\ud800"]


@pytest.mark.parametrize("unit", UNITS)
def test_long_answers_are_scored_in_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    begin = time.process_time()  # CPU seconds; what grows with the square of the length takes minutes
    for problem_type in TYPES:
        for completion in (f"<answer>{text}</answer>", f"<answer>{text}", f"<answer>1{text}x</answer>"):
            reward = accuracy_reward(completion, "<answer>the red car stops</answer>", problem_type, lenient=True)
            assert 0.0 <= reward <= 1.0
    assert format_reward(f"<think>{text}") == 0.0
    assert format_reward(f"<think>{text}</answer>") == 0.0
    assert time.process_time() - begin < 20


def make_sample(solution: str = "B", problem_type: Any = "multiple choice") -> Sample:
    return Sample(0, "0", "Which?", "text", problem_type, f"<answer>{solution}</answer>")


COMPLETIONS = ["<think>x</think><answer>B</answer>", "<answer>b</answer>", "<think>x</think><answer>7</answer>"]
SAMPLES = [make_sample(), make_sample(), make_sample("7", "numerical")]


def scored(*functions: str, **options: Any) -> tuple[list[float], list[float]]:
    return score(COMPLETIONS, SAMPLES, RewardConfig(functions=list(functions), **options))


@pytest.fixture
def my_rewards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of the user's."""
    module = ModuleType("my_rewards")
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    load_reward.cache_clear()
    yield module
    load_reward.cache_clear()


def test_score(my_rewards: Any) -> None:
    assert scored() == ([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert scored(lenient=True)[0] == [1.0, 1.0, 1.0]
    assert scored(format_weight=0.25)[1] == [0.25, 0.0, 0.25]
    assert score([], [], RewardConfig()) == ([], [])
    # Functions of the user's are added to the format. They cannot change the rollout.
    my_rewards.length = lambda completions, samples: [len(completion) / 100 for completion in completions]
    my_rewards.numbers = SimpleNamespace(
        by_type=lambda completions, samples: torch.tensor([s.problem_type == "numerical" for s in samples])
    )
    my_rewards.greedy = lambda completions, samples: [completions.clear() or samples.clear() or 0.0] * 3
    before = list(COMPLETIONS), list(SAMPLES)
    accuracy, form = scored("my_rewards:greedy", "my_rewards:length", "my_rewards:numbers.by_type")
    assert accuracy == [1.0, 0.0, 1.0]
    assert form == pytest.approx([1.34, 0.18, 2.34])
    assert before == (COMPLETIONS, SAMPLES)
    my_rewards.broken = lambda completions, samples: {}["colour"]
    with pytest.raises(KeyError, match="colour") as error:
        scored("my_rewards:broken")
    assert error.value.__notes__ == ["raised by the reward function my_rewards:broken"]


def test_custom_rewards_that_are_refused(my_rewards: Any) -> None:
    for returned, message in (
        ([1.0, 2.0], "expected 3 values, one per completion, got 2"),
        (1.0, "expected a list of 3 floats, got float"),
        (None, "expected a list of 3 floats, got NoneType"),
        ([1.0, None, 1.0], "expected a finite number for completion 1, got None"),
        ([1.0, 1.0, "1"], "expected a finite number for completion 2, got '1'"),
        ([math.nan, 1.0, 1.0], "expected a finite number for completion 0, got nan"),
        ([1.0, math.inf, 1.0], "expected a finite number for completion 1, got inf"),
        ([1.0, 10**400, 1.0], "expected a finite number for completion 1, got 1000"),
        (torch.zeros(3, 2), "expected a finite number for completion 0, got tensor"),
    ):
        my_rewards.broken = Mock(return_value=returned)
        load_reward.cache_clear()
        with pytest.raises(ConfigError, match=f"my_rewards:broken: {re.escape(message)}"):
            scored("my_rewards:broken")
    # Those that cannot be loaded.
    unnamed = (":score", "videor1.rewards:", "..rewards:score", "my rewards:score")
    for name, message in {
        "videor1.rewards": "expected 'module:function', got 'videor1.rewards'",
        **dict.fromkeys(unnamed, "expected 'module:function'"),
        "vidoer1:score": "no module 'vidoer1'; did you mean 'videor1'?",
        "videor1.reward:score": "no module 'videor1.reward'; did you mean 'videor1.rewards'?",
        "zzqx_nothing_like_it:score": "no module 'zzqx_nothing_like_it'; it must be",
        "videor1.rewards:scor": "'videor1.rewards' has no 'scor'; did you mean 'score'?",
        "videor1.rewards:score.x.y": "'videor1.rewards' has no 'score.x.y'",
        "videor1.config:IMAGE_MAX_PIXELS": "is int, expected a function",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_reward(name)


def test_modules_of_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are loaded once, and a broken import in one is shown as it is."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks_inside.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_reward("breaks_inside:reward")
    (tmp_path / "counts_loads.py").write_text("def reward(completions, samples):\n    return [0.5] * len(samples)\n")
    assert load_reward("counts_loads:reward") is load_reward("counts_loads:reward")
    assert scored("counts_loads:reward")[1] == [1.5, 0.5, 1.5]
