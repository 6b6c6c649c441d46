"""ROUGE as the package scores it, of any script, and of long texts."""

import random
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from videor1.errors import ConfigError
from videor1.rewards import accuracy_reward, rouge
from videor1.rewards.rouge import MAX_TOKENS, any_script_rouge, self_rouge, word_rouge

NAMES = ["rouge1", "rouge2", "rougeL"]


def by_the_package(output: str, truth: str) -> float:
    scores = rouge_scorer.RougeScorer(NAMES, use_stemmer=True).score(truth, output)
    return sum(scores[name].fmeasure for name in NAMES) / 3


WORDS = ["a", "cats", "run", "running", "été", "x1", "--", "Doors", "ß", "猫"]
words = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@given(words, words)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_words_are_scored_as_the_package_scores_them(output: str, truth: str) -> None:
    assert word_rouge(output, truth) == by_the_package(output, truth)


def test_a_package_that_cannot_be_imported_is_no_reward_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("videor1.rewards.rouge._package", rouge._Package)  # which is kept once it is there
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"its import failed.* set HOME"):
        accuracy_reward("a cat", "a dog", "free-form")


def random_text(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(["red", "car", "stops", "before", "houses", "then"], k=count))


def test_long_texts_take_seconds_and_say_what_is_left_out() -> None:
    output, truth = random_text(1, 300), random_text(2, 250)
    assert word_rouge(output, truth) == by_the_package(output, truth)
    begin = time.process_time()
    assert 0.0 < word_rouge(random_text(1, 6000), random_text(2, 6000)) < 1.0
    text = "".join(chr(0x4E00 + random.Random(3).randrange(2000)) for _ in range(6000))
    assert any_script_rouge(text, text[::-1]) > 0.0
    with pytest.warns(UserWarning, match=f"first {MAX_TOKENS} words"):
        assert word_rouge("a " * 2 * MAX_TOKENS, "a " * MAX_TOKENS) == pytest.approx(1.0)
    assert time.process_time() - begin < 20


SCRIPTS = {
    "Japanese": ("赤い車が止まる", "赤い車が走る", "青空"),
    "Greek": ("το κόκκινο αυτοκίνητο", "το κόκκινο σπίτι", "ψψψ"),
    "Arabic": ("السيارة الحمراء تتوقف", "السيارة الحمراء", "ظظظ"),
    "Chinese": ("红色的汽车停下来", "红色的汽车", "蓝天"),
    "Thai": ("รถสีแดงหยุด", "รถสีแดง", "ฟฟฟ"),
    "Hindi": ("लाल कार रुकती है", "लाल कार", "घघघ"),
    "Cyrillic": ("красная машина остановилась", "красная машина", "ъъъ"),
    "Korean": ("빨간 차가 멈춘다", "빨간 차", "하늘"),
    "Hebrew": ("המכונית האדומה", "המכונית", "צצצ"),
    "mixed": ("BMW の赤い車", "BMW の車", "青空"),
    "accents": ("ở đây", "ở đó", "zzz"),
    "emoji": ("👍👍", "👍", "🙈"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_scored_leniently(script: str) -> None:
    truth, near, far = (f"<answer>{text}</answer>" for text in SCRIPTS[script])
    assert accuracy_reward(truth, truth, "free-form") == by_the_package(SCRIPTS[script][0], SCRIPTS[script][0])
    right, close, wrong = (accuracy_reward(x, truth, "free-form", lenient=True) for x in (truth, near, far))
    assert right == pytest.approx(1.0)
    assert 0.1 < close < 1.0
    assert wrong < 0.1
    for one, other in (("ｶﾞ ①２", "ガ 12"), ("СТОП сейчас", "стоп Сейчас"), ("٣ ٤", "3 4")):  # forms of a character
        assert any_script_rouge(one, other) == any_script_rouge(other, other) == pytest.approx(1.0)


@given(st.one_of(st.text(max_size=20), st.text("ab 1é猫า́\ud800", max_size=8)), st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_the_score_for_itself_is_known_in_advance(text: str, any_script: bool) -> None:
    scored = (any_script_rouge if any_script else word_rouge)(text, text)
    assert self_rouge(text, any_script=any_script) == pytest.approx(scored)
