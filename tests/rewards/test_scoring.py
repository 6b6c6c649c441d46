import math
import re
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from videor1.config import RewardConfig
from videor1.errors import ConfigError
from videor1.rewards import accuracy_reward, format_reward, load_reward, score
from videor1.types import Sample

TYPES = ["multiple choice", "numerical", "OCR", "free-form", "regression"]


def earn(output, truth, problem_type, **options):
    return accuracy_reward(f"<answer>{output}</answer>", f"<answer>{truth}</answer>", problem_type, **options)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>B</answer>", "B"),
        ("<think>A or B</think>\n<answer>\n  B \t</answer> and more", "B"),
        ("<answer>A</answer><answer>B</answer>", "A"),
        ("</answer>A<answer>B</answer>", "B"),
        ("<answer>A<answer>B</answer></answer>", "A<answer>B"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer></answer>", ""),
        ("<answer>B", ""),
        ("B</answer>", ""),
        ("<Answer>B</Answer>", ""),
        ("B", ""),
        ("", ""),
    ],
)
def test_answer_is_the_first_pair_of_tags(completion, answer):
    assert accuracy_reward(completion, f"<answer>{answer}</answer>", "multiple choice") == 1.0
    assert accuracy_reward(completion, f"<answer>{answer}x</answer>", "multiple choice") == 0.0


def test_answers_missing_on_both_sides_are_equal_as_in_the_reference():
    assert accuracy_reward("I do not know", "B", "multiple choice") == 1.0
    assert accuracy_reward("I do not know", "B", "numerical") == 0.0
    assert accuracy_reward("I do not know", "B", "OCR") == 1.0
    assert accuracy_reward("I do not know", "B", "free-form") == 0.0
    assert accuracy_reward("I do not know", "B", "regression") == 0.0


PIECES = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "\x1f", "\u3000", "B", "<", ">"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_tags_are_read_as_the_references_regular_expressions_read_them(text):
    match = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    answer = match.group(1).strip() if match else ""
    assert accuracy_reward(text, f"<answer>{answer}</answer>", "multiple choice") == 1.0
    assert accuracy_reward(text, "<answer>no piece</answer>", "multiple choice") == 0.0
    wanted = re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL) is not None
    assert format_reward(text) == float(wanted)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a</think><answer>B</answer>", 1.0),
        ("<think>a</think> \n\n<answer>B</answer>", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>a\nb</think>\n<answer>c\nd</answer>", 1.0),
        ("<think>a</think>b</think><answer>B</answer>", 1.0),
        ("<think>a</think><answer>B</answer><answer>C</answer>", 1.0),
        ("<think>a</think> so <answer>B</answer>", 0.0),
        (" <think>a</think><answer>B</answer>", 0.0),
        ("<think>a</think><answer>B</answer>\n", 0.0),
        ("<think>a</think><answer>B", 0.0),
        ("<think>a<answer>B</answer>", 0.0),
        ("<answer>B</answer>", 0.0),
        ("<THINK>a</THINK><answer>B</answer>", 0.0),
        ("<think></answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion, reward):
    assert format_reward(completion) == reward


@pytest.mark.parametrize(
    ("output", "truth", "reward"),
    [("B", "B", 1), (" B\n", "B", 1), ("b", "B", 0), ("B.", "B", 0), ("(B)", "B", 0), ("", "B", 0), ("A,B", "A,B", 1)],
)
def test_multiple_choice(output, truth, reward):
    assert earn(output, truth, "multiple choice") == reward


@pytest.mark.parametrize(
    ("output", "truth", "reward"),
    [
        ("3", "3", 1),
        ("-3", "-3", 1),
        ("+3", "3", 1),
        ("-0", "0", 1),
        ("3", "4", 0),
        ("3.0", "3", 0),
        ("3", "3.0", 0),
        ("3.", "3.00", 1),
        ("3.14", "3.141", 1),
        ("3.14", "3.15", 0),
        ("2.675", "2.67", 1),  # 2.675 is a little less in binary
        ("0.125", "0.12", 1),  # a tie rounds to even
        ("1,000", "1000", 0),
        ("1,000", "1000.0", 1),
        ("1,000", "1,000", 1),
        ("1,0,0,0", "1000.", 1),
        ("1,5", "1.5", 0),
        ("1e3", "1000", 1),
        ("1_000", "1000", 1),
        ("٣", "3", 1),
        (" 3\n", "3", 1),
        ("0x10", "16", 0),
        ("1/2", "0.5", 0),
        ("50%", "50", 0),
        ("50%", "50%", 0),
        ("three", "3", 0),
        ("", "3", 0),
        (",", "3.0", 0),
        ("3 cars", "3", 0),
        ("1e999", "1e999", 1),
        ("inf", "1e999", 1),
        ("inf", "-inf", 0),
        ("nan", "nan", 0),
        ("1e308", "1e308", 1),
        ("9" * 10_000, "3", 0),
    ],
)
def test_numerical(output, truth, reward):
    assert earn(output, truth, "numerical") == reward


@pytest.mark.parametrize(
    ("output", "truth", "reward"),
    [
        ("5", "5", 1.0),
        ("4", "5", 1 - (1 + 1e-9) / (5 + 1e-9)),
        ("4.5", "5", 1 - (0.5 + 1e-9) / (5 + 1e-9)),
        ("-4", "-5", 1 - (1 + 1e-9) / (5 + 1e-9)),
        ("10", "5", 0.0),
        ("100", "5", 0.0),
        ("-5", "5", 0.0),
        ("0", "0", 0.0),  # (0 + 1e-9) / (0 + 1e-9) is 1: a ground truth of 0 earns nothing
        ("1", "0", 0.0),
        ("1,000", "1000", 1.0),
        ("1e400", "5", 0.0),
        ("five", "5", 0.0),
        ("", "5", 0.0),
        ("5", "five", 0.0),
        ("nan", "5", 0.0),
        ("5", "nan", 0.0),
        ("inf", "inf", 0.0),
    ],
)
def test_regression(output, truth, reward):
    assert earn(output, truth, "regression") == pytest.approx(reward, abs=1e-9)


def edit_distance(a, b):
    """Counted by its recursion, over a table."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, change)
    return table[len(a), len(b)]


@pytest.mark.parametrize(
    ("output", "truth", "reward"),
    [
        ("no left turn", "no left turn", 1.0),
        ("no  left\n\tturn", "no left turn", 1.0),
        ("no\u00a0left\u3000turn", "no left turn", 1.0),
        ("no right turn", "no left turn", 2 / 3),
        ("turn left no", "no left turn", 1 / 3),
        ("No left turn", "no left turn", 2 / 3),
        ("no left", "no left turn", 2 / 3),
        ("no left turn now", "no left turn", 2 / 3),
        ("a b c d e f g", "no left turn", 0.0),
        ("", "no left turn", 0.0),
        ("stop", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_ocr(output, truth, reward):
    assert earn(output, truth, "OCR") == pytest.approx(reward, abs=1e-12)


words = st.lists(st.sampled_from(["a", "b", "A", "ab", "-1", "-2", "é"]), max_size=9)


@given(words, words, st.sampled_from(" \n\t\u2003"))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_ocr_is_one_minus_the_word_error_rate(output, truth, blank):
    wanted = max(0.0, 1 - edit_distance(truth, output) / max(1, len(truth)))
    assert earn(blank.join(output), " ".join(truth), "OCR") == wanted


@pytest.mark.parametrize(
    ("output", "truth", "reward"),
    [
        # unigrams 2 of 3 and 2 of 2, bigrams 1 of 2 and 1 of 1, longest common subsequence 2
        ("the cat sat", "the cat", (0.8 + 2 / 3 + 0.8) / 3),
        ("cat the", "the cat", (1 + 0 + 0.5) / 3),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("cats running", "cat run", 1.0),
        ("as running", "a run", (0.5 + 0 + 0.5) / 3),  # words of up to three letters keep their endings
        ("running fast", "runs fast", 1.0),
        ("dog", "dog", 2 / 3),
        ("bird", "the cat", 0.0),
        ("", "the cat", 0.0),
        ("猫", "猫", 0.0),
    ],
)
def test_free_form(output, truth, reward):
    assert earn(output, truth, "free-form") == pytest.approx(reward, abs=1e-12)


def test_free_form_is_the_mean_of_three_rouge_scores():
    output, truth = "a man quickly opened two doors, then left", "the man opens the door and leaves quickly"
    names = ["rouge1", "rouge2", "rougeL"]
    scores = rouge_scorer.RougeScorer(names, use_stemmer=True).score(truth, output)
    assert earn(output, truth, "free-form") == sum(scores[name].fmeasure for name in names) / 3


@pytest.mark.parametrize("problem_type", ["", "Multiple Choice", "ocr", "caption", None])
def test_other_problem_types_earn_nothing(problem_type):
    assert earn("B", "B", problem_type) == 0.0
    assert earn("B", "B", problem_type, lenient=True) == 0.0


@pytest.mark.parametrize(
    ("output", "truth", "reward"),
    [
        ("b", "B", 1),
        ("B.", "B", 1),
        ("(b)", "B", 1),
        ("**B**", "B", 1),
        ("B)", "B", 1),
        ("B) two cars", "B", 1),
        ("(B) Two cars.", "B", 1),
        ("B. a dog", "B", 1),
        ("B: 2 cars", "B", 1),
        ("B", "B. two cars", 1),
        ("Two  cars.", "two cars", 1),
        ("C", "B", 0),
        ("C) two cars", "B", 0),
        ("A) or B)", "A", 0),
        ("A. or B", "A", 0),
        ("A: B", "A", 0),
        ("A, B", "A", 0),
        ("AB", "A", 0),
        ("A dog", "A", 0),
        ("B two cars", "B", 0),
        ("C++", "C", 0),
        ("-5", "5", 0),
        ("", "B", 0),
        ("...", "!", 0),
    ],
)
def test_lenient_multiple_choice(output, truth, reward):
    assert earn(output, truth, "multiple choice", lenient=True) == reward


@pytest.mark.parametrize(
    ("output", "truth", "reward"),
    [
        ("3.0", "3", 1),
        (".5", "0.50", 1),
        ("1,000", "1000", 1),
        ("1,234,567.5", "1234567.5", 1),
        ("1/2", "0.5", 1),
        ("1 / 2", "0.5", 1),
        ("0.33", "1/3", 1),
        ("3.", "3", 1),
        ("−3", "-3", 1),
        ("1e3", "1,000", 1),
        ("50%", "50 %", 1),
        ("50%", "50", 0),
        ("50%", "0.5", 0),
        ("1,5", "1.5", 0),
        ("10,00", "1000", 0),
        ("1/0", "0", 0),
        ("1/2/3", "0.5", 0),
        ("0/0", "nan", 0),
        ("3 cars", "3", 1),
        ("3 cars", "3 dogs", 0),
        ("1e999", "2e9999", 1),  # as in the strict mode: both are infinite
        ("1e999.", "2e9999", 0),
        ("3.1", "3", 0),
        ("", "", 0),
    ],
)
def test_lenient_numerical(output, truth, reward):
    assert earn(output, truth, "numerical", lenient=True) == reward


def test_lenient_regression_and_ocr():
    assert earn("1/2", "0.5", "regression", lenient=True) == pytest.approx(1.0)
    assert earn("40%", "50%", "regression", lenient=True) == pytest.approx(0.8)
    assert earn("50%", "50", "regression", lenient=True) == 0.0
    assert earn("1,5", "15", "regression", lenient=True) == pytest.approx(1.0)  # the strict rule drops every comma
    assert earn("STOP, now!", "stop now", "OCR", lenient=True) == 1.0
    assert earn("$5 - 3", "$5 + 3", "OCR", lenient=True) == pytest.approx(2 / 3)


texts = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(), max_size=30),
    st.text("0123456789.,-+eE/% _", max_size=8),
    st.text("ABab().: ", max_size=8),
)


@given(texts, texts, st.sampled_from(TYPES), st.booleans())
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_text_earns_a_reward_between_0_and_1(output, truth, problem_type, tags):
    wrap = "<answer>{}</answer>".format if tags else str
    strict = accuracy_reward(wrap(output), wrap(truth), problem_type)
    lenient = accuracy_reward(wrap(output), wrap(truth), problem_type, lenient=True)
    assert 0.0 <= strict <= lenient <= 1.0
    assert type(strict) is type(lenient) is float


@pytest.mark.parametrize(
    "unit", ["y", "ay", " ", "word ", "9", "1,", ",000", "(", "b) ", ".", "<answer>", "</think> ", "\ud800"]
)
def test_long_answers_are_scored_in_time(unit):
    text = unit * (100_000 // len(unit))
    begin = time.process_time()  # CPU seconds; what grows with the square of the length takes minutes
    for problem_type in TYPES:
        for completion in (f"<answer>{text}</answer>", f"<answer>{text}", f"<answer>1{text}x</answer>"):
            reward = accuracy_reward(completion, "<answer>the red car stops</answer>", problem_type, lenient=True)
            assert 0.0 <= reward <= 1.0
    assert format_reward(f"<think>{text}") == 0.0
    assert format_reward(f"<think>{text}</answer>") == 0.0
    assert time.process_time() - begin < 10


def make_sample(solution="B", problem_type="multiple choice"):
    return Sample(0, "0", "Which?", "text", problem_type, f"<answer>{solution}</answer>")


COMPLETIONS = ["<think>x</think><answer>B</answer>", "<answer>b</answer>", "<think>x</think><answer>7</answer>"]
SAMPLES = [make_sample(), make_sample(), make_sample("7", "numerical")]


@pytest.fixture
def my_rewards(monkeypatch):
    module = ModuleType("my_rewards")
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    load_reward.cache_clear()
    yield module
    load_reward.cache_clear()


def test_score():
    assert score(COMPLETIONS, SAMPLES, RewardConfig()) == ([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert score(COMPLETIONS, SAMPLES, RewardConfig(lenient=True))[0] == [1.0, 1.0, 1.0]
    assert score(COMPLETIONS, SAMPLES, RewardConfig(format_weight=0.25))[1] == [0.25, 0.0, 0.25]
    assert score([], [], RewardConfig()) == ([], [])


def test_custom_rewards_are_added_to_the_format(my_rewards):
    my_rewards.length = lambda completions, samples: [len(completion) / 100 for completion in completions]
    my_rewards.numbers = SimpleNamespace(
        by_type=lambda completions, samples: torch.tensor([s.problem_type == "numerical" for s in samples])
    )
    config = RewardConfig(functions=["my_rewards:length", "my_rewards:numbers.by_type"])
    accuracy, form = score(COMPLETIONS, SAMPLES, config)
    assert accuracy == [1.0, 0.0, 1.0]
    assert form == pytest.approx([1.34, 0.18, 2.34])


def test_a_custom_reward_cannot_change_the_rollout(my_rewards):
    my_rewards.greedy = lambda completions, samples: [completions.clear() or samples.clear() or 0.0] * 3
    completions, samples = list(COMPLETIONS), list(SAMPLES)
    score(completions, samples, RewardConfig(functions=["my_rewards:greedy"]))
    assert (completions, samples) == (COMPLETIONS, SAMPLES)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "expected 3 values, one per completion, got 2"),
        (1.0, "expected a list of 3 floats, got float"),
        (None, "expected a list of 3 floats, got NoneType"),
        ([1.0, None, 1.0], "expected a finite number for completion 1, got None"),
        ([1.0, 1.0, "1"], "expected a finite number for completion 2, got '1'"),
        ([math.nan, 1.0, 1.0], "expected a finite number for completion 0, got nan"),
        ([1.0, math.inf, 1.0], "expected a finite number for completion 1, got inf"),
        ([1.0, 10**400, 1.0], "expected a finite number for completion 1, got 1000"),
        (torch.zeros(3, 2), "expected a finite number for completion 0, got tensor"),
    ],
)
def test_what_a_custom_reward_must_not_return(my_rewards, returned, message):
    my_rewards.broken = lambda completions, samples: returned
    with pytest.raises(ConfigError, match=f"my_rewards:broken: {re.escape(message)}"):
        score(COMPLETIONS, SAMPLES, RewardConfig(functions=["my_rewards:broken"]))


def test_an_exception_in_a_custom_reward_passes_with_its_name(my_rewards):
    def broken(completions, samples):
        raise KeyError("colour")

    my_rewards.broken = broken
    with pytest.raises(KeyError, match="colour") as error:
        score(COMPLETIONS, SAMPLES, RewardConfig(functions=["my_rewards:broken"]))
    assert error.value.__notes__ == ["raised by the reward function my_rewards:broken"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("videor1.rewards", "expected 'module:function', got 'videor1.rewards'"),
        (":score", "expected 'module:function'"),
        ("videor1.rewards:", "expected 'module:function'"),
        ("..rewards:score", "expected 'module:function'"),
        ("my rewards:score", "expected 'module:function'"),
        ("vidoer1:score", "no module 'vidoer1'; did you mean 'videor1'?"),
        ("videor1.reward:score", "no module 'videor1.reward'; did you mean 'videor1.rewards'?"),
        ("zzqx_nothing_like_it:score", "no module 'zzqx_nothing_like_it'; it must be"),
        ("videor1.rewards:scor", "'videor1.rewards' has no 'scor'; did you mean 'score'?"),
        ("videor1.rewards:score.x.y", "'videor1.rewards' has no 'score.x.y'"),
        ("videor1.config:IMAGE_MAX_PIXELS", "is int, expected a function"),
    ],
)
def test_custom_rewards_that_cannot_be_loaded(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_reward(name)


def test_a_broken_import_inside_a_reward_module_is_shown_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "breaks_inside.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_reward("breaks_inside:reward")


def test_a_reward_is_loaded_once(tmp_path, monkeypatch):
    (tmp_path / "counts_loads.py").write_text("def reward(completions, samples):\n    return [0.5] * len(samples)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("counts_loads:reward") is load_reward("counts_loads:reward")
    assert score(COMPLETIONS, SAMPLES, RewardConfig(functions=["counts_loads:reward"]))[1] == [1.5, 0.5, 1.5]
