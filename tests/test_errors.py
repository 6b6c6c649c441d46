"""The one suggestion of a nearest name."""

from __future__ import annotations

import pytest

from videor1.errors import did_you_mean


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("margins", "; did you mean 'margin'?"),
        (" MARGN ", "; did you mean 'margin'?"),  # neither case nor space around it counts
        ("rule", "; did you mean 'temporal.rule'?"),  # by its last part
        ("alpha", "; did you mean 'lora.alpha' or 'temporal.alpha'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_the_nearest_known_name(given: str, hint: str) -> None:
    assert did_you_mean(given, ["margin", "lora.alpha", "temporal.alpha", "temporal.rule"]) == hint


def test_three_names_at_most_and_without_a_least_something() -> None:
    assert did_you_mean("a", [f"{section}.a" for section in "wxyz"], show=str) == "; did you mean w.a or x.a or y.a?"
    assert did_you_mean("a", []) == did_you_mean("a", [], least=0) == ""
    assert did_you_mean("zzz", ["margin"], least=0) == "; did you mean 'margin'?"


def test_of_a_long_text_in_a_data_file_only_the_beginning_is_compared() -> None:
    """Comparing takes quadratic time."""
    assert did_you_mean("a" * 100 + "b" * 1000, ["a" * 100]) == f"; did you mean {'a' * 100!r}?"
