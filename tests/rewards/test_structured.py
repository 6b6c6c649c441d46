"""Grounding, tracking and yes or no: against a raster and sampled times, by their properties, and on hostile input."""

import itertools
import json
import math
import random
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videor1.config import RewardConfig
from videor1.rewards import accuracy_reward, malformed_reason, score
from videor1.rewards.scoring import solution_reward, structure_reward
from videor1.rewards.structured import MALFORMED
from videor1.types import Sample

TIME, BOX, BOTH, TRACK = "temporal grounding", "spatial grounding", "spatial-temporal grounding", "tracking"
TYPES = [TIME, BOX, BOTH, TRACK, "boolean", "math", "numerical", "regression", "open-ended"]


def tagged(value: Any) -> str:
    return f"<answer>{value if isinstance(value, str) else json.dumps(value)}</answer>"


def earn(output: Any, truth: Any, kind: str, **options: Any) -> float:
    return accuracy_reward(tagged(output), tagged(truth), kind, **options)


def fault(output: Any, truth: Any, kind: str, **options: Any) -> str:
    return malformed_reason(tagged(output), tagged(truth), kind, **options)


# The oracles: lengths are counted in tenths of seconds, areas in pixels, on whole numbers.


def cells(interval: list[int]) -> set[int]:
    return set(range(10 * interval[0], 10 * interval[1]))


def pixels(box: list[int]) -> np.ndarray:
    frame = np.zeros((30, 30), dtype=bool)
    frame[box[1] : box[3], box[0] : box[2]] = True
    return frame


def share(one: Any, other: Any) -> float:
    if isinstance(one, set):
        return len(one & other) / len(one | other) if one | other else 0.0
    return float((one & other).sum() / (one | other).sum()) if (one | other).any() else 0.0


def oracle(output: dict[str, Any], truth: dict[str, Any], kind: str) -> float:
    if kind == TIME:
        return share(cells(output["time"]), cells(truth["time"]))
    if kind == BOX:
        return share(pixels(output["boxes"]), pixels(truth["boxes"]))
    found, right = output["boxes"], truth["boxes"]
    ious = {frame: share(pixels(found[frame]), pixels(box)) for frame, box in right.items() if frame in found}
    if kind == TRACK:
        return sum(ious.values()) / len(right)
    mean = sum(ious.values()) / len(ious) if ious else 0.0
    return share(cells(output["time"]), cells(truth["time"])) / 2 + mean / 2


whole = st.integers(0, 29)
intervals = st.tuples(whole, whole).map(sorted)
boxes = st.tuples(intervals, intervals).map(lambda sides: [sides[0][0], sides[1][0], sides[0][1], sides[1][1]])
frames = st.dictionaries(st.integers(0, 4).map(str), boxes, min_size=1)
ANSWERS = {
    TIME: st.fixed_dictionaries({"time": intervals}),
    BOX: st.fixed_dictionaries({"boxes": boxes}),
    BOTH: st.fixed_dictionaries({"time": intervals, "boxes": frames}),
    TRACK: st.fixed_dictionaries({"boxes": frames}),
}


@pytest.mark.parametrize("kind", ANSWERS)
@given(data=st.data())
def test_whole_numbers_against_a_raster(kind: str, data: st.DataObject) -> None:
    one, other = data.draw(ANSWERS[kind]), data.draw(ANSWERS[kind])
    earned = earn(one, other, kind)
    assert earned == pytest.approx(oracle(one, other, kind), abs=1e-12)
    assert 0 <= earned <= 1
    assert fault(one, other, kind) == ""
    if kind != TRACK:  # of which the truth's frames alone count
        assert earned == earn(other, one, kind)
    assert earn(one, one, kind) == solution_reward(json.dumps(one), kind) == pytest.approx(oracle(one, one, kind))
    for options in ({"lenient": True}, {"regression": "mra"}):
        assert earn(one, other, kind, **options) == earned


span = st.tuples(st.floats(0, 900), st.floats(0.001, 100)).map(lambda pair: [pair[0], pair[0] + pair[1]])
area = st.tuples(span, span).map(lambda sides: [sides[0][0], sides[1][0], sides[0][1], sides[1][1]])


@given(span, area)
def test_any_truth_earns_1_for_itself(interval: list[float], box: list[float]) -> None:
    assert earn({"time": interval}, {"time": interval}, TIME) == 1
    assert earn({"boxes": box}, {"boxes": box}, BOX) == 1
    many = {"time": interval, "boxes": {str(i): box for i in range(7)}}
    assert (earn(many, many, BOTH), earn(many, many, TRACK)) == (1, 1)


@given(span, st.lists(st.floats(0, 1), min_size=2, max_size=6).map(sorted))
def test_more_overlap_never_earns_less(interval: list[float], steps: list[float]) -> None:
    """An answer of the truth's size that moves onto it, and one inside it that grows."""
    start, end = interval
    length = end - start

    def all_kinds(s: float, e: float) -> list[float]:
        output, truth = {"time": [s, e]}, {"time": interval}
        found, right = ([a, 0, b, 50] for a, b in ((s, e), (start, end)))
        both = {"boxes": {"1": found}} | output, {"boxes": {"1": right}} | truth
        return [
            earn(output, truth, TIME),
            earn({"boxes": found}, {"boxes": right}, BOX),
            earn(*both, BOTH),
            earn(*both, TRACK),
        ]

    onto = [all_kinds(start + (1 - x) * length, end + (1 - x) * length) for x in steps if end + length <= 1000]
    growing = [all_kinds(start, start + x * length) for x in steps]
    for rows in (onto, growing):
        for before, after in itertools.pairwise(rows):
            assert all(a <= b + 1e-9 for a, b in zip(before, after, strict=True))


def test_formulas_by_hand() -> None:
    assert earn({"time": [0, 10]}, {"time": [5, 15]}, TIME) == pytest.approx(1 / 3)
    assert earn({"time": [0, 10]}, {"time": [10, 15]}, TIME) == 0
    assert earn({"boxes": [0, 0, 2, 2]}, {"boxes": [1, 1, 3, 3]}, BOX) == pytest.approx(1 / 7)
    truth = {"time": [4, 8], "boxes": {"4": [0, 0, 10, 10], "5": [0, 0, 10, 10], "6": [0, 0, 10, 10]}}
    half = {"time": [4, 6], "boxes": {"5": [0, 0, 10, 5], "9": [0, 0, 1, 1]}}
    assert earn(half, truth, BOTH) == pytest.approx(0.5 * 0.5 + 0.5 * 0.5)  # frames that only one names do not count
    assert earn(half, truth, TRACK) == pytest.approx(0.5 / 3)  # here those of the truth do
    assert earn({"time": [4, 8]}, truth, BOTH) == 0.5
    assert earn({"boxes": truth["boxes"]}, truth, BOTH) == 0.5


TRUTHS = {
    TIME: {"time": [10, 20]},
    BOX: {"boxes": [10, 10, 90, 90]},
    BOTH: {"time": [10, 20], "boxes": {"10": [10, 10, 90, 90], "11": [20, 10, 90, 90]}},
    TRACK: {"boxes": {"1": [10, 10, 90, 90], "2": [20, 10, 90, 90]}},
    "boolean": "yes",
    "math": "$\\frac{1}{2}$",
    "numerical": "3",
    "regression": "3.5",
    "open-ended": "a red car stops",
}
BAD_NUMBERS = {
    "NaN": "not_finite",
    "-Infinity": "not_finite",
    "1" + "0" * 400: "not_finite",
    "1e999": "not_finite",
    '"15"': "wrong_form",
    "true": "wrong_form",
    "null": "wrong_form",
    "[15]": "wrong_form",
    "1" + "0" * 5000: "not_json",
}


@pytest.mark.parametrize("kind", [TIME, BOX])
@pytest.mark.parametrize(("text", "reason"), BAD_NUMBERS.items())
def test_a_number_that_cannot_be_used(kind: str, text: str, reason: str) -> None:
    answer = f'{{"time": [10, {text}]}}' if kind == TIME else f'{{"boxes": [10, 10, {text}, 90]}}'
    assert (earn(answer, TRUTHS[kind], kind), fault(answer, TRUTHS[kind], kind)) == (0, reason)


@pytest.mark.parametrize(
    ("kind", "answer", "reason"),
    [
        (TIME, "", "no_answer"),
        (TIME, "10 to 20", "not_json"),
        (TIME, "[10, 20]", "wrong_form"),
        (TIME, "[" * 100_000, "not_json"),
        (TIME, {"time": [20, 10]}, "reversed"),
        (TIME, {"time": [-1, 20]}, "out_of_frame"),
        (TIME, {"time": [10, 15, 20]}, "wrong_form"),
        (TIME, {"Time": [10, 20]}, "wrong_form"),
        (BOX, {"boxes": [90, 10, 10, 90]}, "reversed"),
        (BOX, {"boxes": [10, 90, 90, 10]}, "reversed"),
        (BOX, {"boxes": [-1, 10, 90, 90]}, "out_of_frame"),
        (BOX, {"boxes": [10, 10, 90, 1000.5]}, "out_of_frame"),
        (BOX, {"boxes": [[10, 10, 90, 90]]}, "wrong_form"),
        (BOX, {"boxes": {"1": [10, 10, 90, 90]}}, "wrong_form"),
        (TRACK, {"boxes": [10, 10, 90, 90]}, "wrong_form"),
        (TRACK, {"boxes": {}}, "wrong_form"),
        (BOTH, {"time": [20, 10], "boxes": []}, "reversed"),
        ("boolean", "maybe", "not_boolean"),
        ("boolean", "yes and no", "not_boolean"),
        ("numerical", "three", "not_a_number"),
        ("regression", "nan", "not_finite"),
    ],
)
def test_a_malformed_answer_earns_nothing_and_says_why(kind: str, answer: Any, reason: str) -> None:
    assert (earn(answer, TRUTHS[kind], kind), fault(answer, TRUTHS[kind], kind)) == (0, reason)
    assert reason in MALFORMED


def test_a_part_that_cannot_be_used_leaves_the_others() -> None:
    """As in OneThinker, one box of thirty does not undo the rest; but the answer is counted, and the box stays."""
    for bad, reason in (([90, 10, 10, 90], "reversed"), ([10, 10, 90, 2000], "out_of_frame"), ("x", "wrong_form")):
        boxes = {"1": TRUTHS[TRACK]["boxes"]["1"], "2": bad}
        assert (earn({"boxes": boxes}, TRUTHS[TRACK], TRACK), fault({"boxes": boxes}, TRUTHS[TRACK], TRACK)) == (
            0.5,
            reason,
        )
    answer = {"time": [20, 10], "boxes": TRUTHS[BOTH]["boxes"]}
    assert (earn(answer, TRUTHS[BOTH], BOTH), fault(answer, TRUTHS[BOTH], BOTH)) == (0.5, "reversed")
    answer = TRUTHS[BOTH] | {"boxes": {"10": [10, 10, 90, 90], "11": [90, 10, 20, 90]}}
    assert (earn(answer, TRUTHS[BOTH], BOTH), fault(answer, TRUTHS[BOTH], BOTH)) == (0.75, "reversed")


def test_a_truth_in_pixels_has_a_frame_of_unknown_size() -> None:
    truth = {"boxes": [100, 100, 1900, 1000]}
    assert earn(truth, truth, BOX) == 1
    assert fault({"boxes": [0, 0, 3000, 3000]}, truth, BOX) == ""
    assert fault({"boxes": [0, -1, 3000, 3000]}, truth, BOX) == "out_of_frame"
    huge = {"boxes": [0, 0, 1e200, 1e200]}
    assert (earn(huge, huge, BOX), earn({"boxes": [0, 0, 1e308, 1e308]}, truth, BOX)) == (1, 0)


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ('```json\n{"time": [10, 20]}\n```', 0, 1),
        ('```\n{"time": [10, 20]}```', 0, 1),
        ('It is {"time": [10, 20]}.', 0, 1),
        ('{"time": [10, 20], "boxes": {}}', 1, 1),
        (' {"time":[10,20.0]}\n', 1, 1),
        ("It is {time: 10, 20}", 0, 0),
    ],
)
def test_lenient_takes_json_out_of_text(text: str, strict: float, lenient: float) -> None:
    assert (earn(text, TRUTHS[TIME], TIME), earn(text, TRUTHS[TIME], TIME, lenient=True)) == (strict, lenient)
    assert (fault(text, TRUTHS[TIME], TIME) == "") == bool(strict)
    assert (fault(text, TRUTHS[TIME], TIME, lenient=True) == "") == bool(lenient)


def test_boolean() -> None:
    for answer, truth in itertools.product(("yes", "True", "1", "YES"), ("no", "false", "0", "No")):
        assert (earn(answer, truth, "boolean"), earn(truth, answer, "boolean")) == (0, 0)
        assert earn(answer, "yes", "boolean") == earn(truth, "no", "boolean") == 1
    assert (earn("Yes.", "yes", "boolean"), earn("**Yes.**", "yes", "boolean", lenient=True)) == (0, 1)


def junk(rng: random.Random) -> str:
    """A text that begins as an answer of one of the types and goes wrong, or that never was one."""
    good = json.dumps(TRUTHS[rng.choice([TIME, BOX, BOTH, TRACK])])
    cut = good[: rng.randrange(len(good) - 2)]
    numbers = [rng.choice(["NaN", "1e400", "-5", '"1"', "null", "[]", "{}", "99999", "true"]) for _ in range(4)]
    return rng.choice(
        [
            cut,
            cut + "}",
            good.replace("[", "{"),
            f'{{"time": [{numbers[0]}, {numbers[1]}], "boxes": [{", ".join(numbers)}]}}',
            f'{{"time": [9, 1], "boxes": {{"1": [{", ".join(numbers)}]}}}}',
            "".join(chr(rng.choice([*range(32, 127), 0, 0x661, 0xD800, 0x1F600])) for _ in range(rng.randrange(60))),
            rng.choice("[{") * rng.randrange(1, 3000),
            "</answer><answer>" * rng.randrange(1, 4),
            "9" * rng.randrange(1, 6000) + "x",
            "",
        ]
    )


def test_10000_malformed_answers_are_all_counted_and_none_raises() -> None:
    rng, counts, total, began = random.Random(0), Counter[str](), 0, time.perf_counter()
    kinds = [TIME, BOX, BOTH, TRACK, "boolean", "numerical", "regression"]
    for number in range(10_000):
        kind, text = kinds[number % len(kinds)], junk(rng)
        for lenient in (False, True):
            earned = earn(text, TRUTHS[kind], kind, lenient=lenient)
            reason = fault(text, TRUTHS[kind], kind, lenient=lenient)
            assert reason in ("", *MALFORMED)
            assert 0 <= earned < 1
            if kind in (TIME, BOX) and reason:
                assert earned == 0
        total += 1
        counts[fault(text, TRUTHS[kind], kind)] += 1
    assert sum(counts.values()) == total == 10_000
    assert counts[""] < 200  # some of the junk is well-formed JSON of the type
    assert set(counts) >= {"no_answer", "not_json", "wrong_form", "not_finite", "reversed", "out_of_frame"}
    assert time.perf_counter() - began < 120


@settings(deadline=None)  # the first call loads what ROUGE needs
@given(st.text(max_size=200), st.text(max_size=200), st.sampled_from(sorted({*TYPES} - {"math"})), st.booleans())
def test_any_two_texts_earn_between_0_and_1(output: str, truth: str, kind: str, lenient: bool) -> None:
    assert 0 <= earn(output, truth, kind, lenient=lenient) <= 1
    assert fault(output, truth, kind, lenient=lenient) in ("", *MALFORMED)
    assert 0 <= structure_reward(tagged(output), tagged(truth), kind) <= 1


@pytest.mark.parametrize(
    ("kind", "answer", "structure"),
    [
        (TIME, {"time": [1, 2]}, 1.0),
        (TIME, {"time": [2, 1]}, 0.0),
        (BOX, {"boxes": [0, 0, 1, 1]}, 1.0),
        (TRACK, {"boxes": {"1": [0, 0, 1, 1]}}, 0.75),
        (TRACK, {"boxes": {"1": "x", "2": [0, 0, 1, 1]}}, 0.5),
        (BOTH, {"time": [1, 2], "boxes": {"10": [0, 0, 1, 1], "11": [0, 0, 1, 1], "12": [0, 0, 1, 1]}}, 1.0),
        (BOTH, {"time": [1, 2], "boxes": {}}, 0.5),
        ("boolean", "yes", 0.0),
    ],
)
def test_the_bonus_for_structure_is_an_option(kind: Any, answer: Any, structure: float) -> None:
    """It is part of the format reward of a completion that has the form, and 0 by default."""
    sample = Sample(0, "0", "When?", "text", kind, tagged(TRUTHS[kind]))
    texts = [f"<think>Look.</think> {tagged(answer)}", tagged(answer)]
    for bonus in (0.0, 0.5):
        config = RewardConfig(structure_bonus=bonus, format_weight=2.0)
        assert score(texts, [sample] * 2, config)[1] == [2.0 + bonus * structure, 0.0]
    assert RewardConfig().structure_bonus == 0


def test_open_ended_is_rouge() -> None:
    for output, truth in (
        ("a red car", "a red car stops"),
        ("", "a car"),
        ("a car", "a car"),
        ("犬が走る", "犬が走る"),
    ):
        for lenient in (False, True):
            free, opened = (earn(output, truth, kind, lenient=lenient) for kind in ("free-form", "open-ended"))
            assert free == opened


def mra(output: float, truth: float) -> float:
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    return sum(abs(output - truth) / abs(truth) < 1 - t for t in thresholds) / 10


@given(st.floats(-1e6, 1e6), st.floats(0.01, 1e6))
def test_regression_as_mean_relative_accuracy(output: float, truth: float) -> None:
    error = abs(output - truth) / truth
    if any(abs(error - 0.05 * i) < 1e-6 for i in range(1, 11)):
        return  # at a threshold rounding decides
    earned = earn(str(output), str(truth), "regression", regression="mra")
    assert earned == pytest.approx(mra(output, truth))
    assert earn(str(truth), str(truth), "regression", regression="mra") == 1


def test_regression_is_a_relative_error_by_default() -> None:
    assert earn("90", "100", "regression") == pytest.approx(0.9)
    assert earn("91", "100", "regression", regression="mra") == pytest.approx(0.9)
    assert [earn(text, "0", "regression", regression="mra") for text in ("0", "0.0", "1", "x", "nan")] == [
        1,
        1,
        0,
        0,
        0,
    ]
    for text in ("nan", "inf", "-inf", "1e400"):
        assert earn(text, "3", "regression", regression="mra") == 0
        assert not math.isnan(earn(text, text, "regression", regression="mra"))
    assert earn("12 cm", "12", "regression", regression="mra", lenient=True) == 1
    assert earn("12 cm", "12", "regression", regression="mra") == 0
