"""Numbers with their units, as people and LaTeX write them."""

import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videor1.rewards import accuracy_reward
from videor1.rewards.quantity import Quantity, read_quantity

READ = {
    (12, ""): r"12 | १२ | １２ | $12$ | \(12\) | \boxed{12} | **12**",
    (-3.5, ""): "-3.5",
    (3, ""): "+3 | 3.",
    (-3, ""): "−3",
    (0.5, ""): r".5 | 1/2 | ½ | $\frac{1}{2}$ | \frac12",
    (1234567.5, ""): "1,234,567.5",
    (1234567, ""): "1 234 567",
    (1500, ""): r"1.5e3 | 1.5 × 10³ | 1.5 x 10^3 | 1.5 \times 10^{3}",
    (0.0015, ""): "1.5E-3",
    (0.02, ""): "2*10^-2",
    (1000, ""): "10^3 | 1{,}000",
    (-0.75, ""): r"-3 / 4 | $$-\dfrac{3}{4}$$",
    (1.5, ""): r"1 1/2 | 1½ | 1\frac{1}{2}",
    (3.5, ""): "٣٫٥",
    (2 * math.pi, ""): "2π",
    (2 * math.pi / 3, ""): r"\frac{2\pi}{3}",
    (math.sqrt(3) / 2, ""): r"√3/2 | \frac{\sqrt{3}}{2}",
    (36, ""): "3 dozen",
    (12, "cm"): r"12 cm | 12cm | 12 centimetres | $12\text{ cm}$ | 12 cm.",
    (1234.5, "m"): "1,234.5 m",
    (12, "m2"): "12 m² | 12 m^2 | 12 square meters",
    (9.8, "m/s2"): r"9.8 m/s^2 | 9.8\,\mathrm{m/s^2}",
    (60, "mi/h"): "60 miles per hour",
    (30, "°c"): "30°C | 30 degrees Celsius",
    (45, "degree"): r"45° | 45^{\circ}",
    (5, "people"): "5 people",
    (2.5e6, "people"): "2.5 million people",
    (3, "car"): "3 cars",
    (12, "厘米"): "12厘米",
    (12, "किलो"): "12 किलो",
    (50, "%"): r"50% | 50 percent | ５０％ | 50\%",
    (12, "$"): r"$12 | 12 dollars | \$12",
    (-12.5, "$"): "-$12.50",
    (1200, "$"): "US$ 1,200",
    (3, "€"): "€3 | 3 €",
    (1.2e6, "£"): "£1.2 million",
}


WORDS = ["", "blue", "nan", "inf", "-inf", "three", "$", "%", "cm", "A 12", "x = 5", "5 is wrong", "\ud800", "9" * 201]
NUMBERS = "1,5 | 10,00 | 1/0 | 0/0 | 1/2/3 | 3-5 | 3 x 4 | 2i | 5! | 1e999 | 12:30 | 1.2.3 | --3 | 12 cm 3"
TWO = ["3 or 4", "3 and a half", "3 halves", "12 cm or 13 cm", "$€3", "€3 dollars", r"\frac{1}{0}", r"\frac{}{}"]


def test_a_number_is_read_with_its_unit_and_what_is_none_alone_is_not() -> None:
    for (value, unit), texts in READ.items():
        for text in texts.split(" | "):
            assert read_quantity(text) == Quantity(pytest.approx(value), unit), text
    assert [text for text in (*WORDS, *NUMBERS.split(" | "), *TWO) if read_quantity(text) is not None] == []


def earn(output: str, truth: str, problem_type: str = "numerical") -> float:
    return accuracy_reward(f"<answer>{output}</answer>", f"<answer>{truth}</answer>", problem_type, lenient=True)


FORMS = [
    r"12 | 12.0 | 12 cm | 12 centimeters | $12$ | 24/2 | 1.2e1 | 1.2 × 10^1 | \frac{24}{2} \text{ cm} | 12 cm.",
    "1,234.5 m | 1234.5 | 1.2345e3 meters | 1 234.5",
    *(r"1/2 | 0.5 | ½ | $\frac{1}{2}$ | .50", "$3 | 3 dollars | 3 | USD 3 | 3.00"),
    r"50% | 50 % | 50 percent | 50\% | 50.0%",
]


def test_every_form_of_a_value_earns_for_every_other() -> None:
    for output, truth in (pair for forms in FORMS for pair in itertools.product(forms.split(" | "), repeat=2)):
        assert earn(output, truth) == 1.0, (output, truth)
        assert earn(output, truth, "regression") == pytest.approx(1.0), (output, truth)
    # Units must agree, and a right answer to a regression of 0 earns 1.
    for pair in ("12 m = 12 cm", "$12 = €12", "50% = 50", "50 = 50%", "50% = 0.5", "5 cm = 5%"):
        output, truth = pair.split(" = ")
        assert earn(output, truth) == earn(output, truth, "regression") == 0.0, pair
    assert Quantity(1, "pound").agrees(Quantity(1, "lb"))
    assert Quantity(1, "degree").agrees(Quantity(1, "°c"))
    assert not Quantity(1, "lb").agrees(Quantity(1, "£"))
    for text, right in {"0": 1, "0.0": 1, "-0": 1, "0 cm": 1, "0.001": 1, "0.1": 0, "1": 0}.items():
        assert earn(text, "0", "regression") == right, text


@given(st.text(st.sampled_from("0123456789.,-+eE/%$ \\{}^_xfractimescm()√π½²°"), max_size=40))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_text_is_a_finite_number_or_none(text: str) -> None:
    found = read_quantity(text)
    assert found is None or (math.isfinite(found.value) and found.unit == read_quantity(f" {text} ").unit)  # type: ignore


def test_a_long_text_takes_no_time() -> None:
    for unit in ("1", "1,000,", " ", "{", "\\frac{", "a ", "½", "√", "10^", "1 000 "):
        begin = time.process_time()
        for length in (190, 100_000):
            read_quantity(unit * (length // len(unit)))
        assert time.process_time() - begin < 5, unit
