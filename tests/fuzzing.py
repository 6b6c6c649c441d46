"""Fuzz tests: so many examples of a hypothesis strategy, and how bytes and values are damaged."""

from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

T = TypeVar("T")

ROUND = 50  # examples of a seed, before it is another's turn


def fuzz(examples: int, strategy: st.SearchStrategy[T], check: Callable[[T], object]) -> None:
    """Call ``check`` with that many examples, the same every time. A failure is made small."""
    run = settings(max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for number in range(examples // ROUND):
        seed(number)(run(given(strategy)(lambda example: check(example) and None)))()


def check_message(error: Exception, most: int = 5000) -> None:
    """Check that an error says something, and not all of what it is about."""
    assert 0 < len(str(error)) < most, str(error)[:most]


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**63, 10**18, 1e308, -0.0])
)
TEXTS = st.one_of(st.text(max_size=20), st.text("\ud83d\ude00\udcff\0\n<>/\\{}[]\"'é猫 AB12.,%$", max_size=12))
ATOMS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


# Whatever JSON can hold; Python reads and writes NaN and Infinity too.
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(ATOMS, st.integers(5, 900).map(nested)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """The bytes of ``whole``, in half of the cases with parts changed, removed, repeated or inserted."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 3]))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.sampled_from([0, 1, 2, 16, 400]))
        part = draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"", b"\xff", b"\xed\xa0\xbd", b"[" * 2000, b"9" * 5000]))
        )
        data[start:end] = part if draw(st.booleans()) else bytes(data[start:end]) * 2 + part
    return bytes(data)


@st.composite
def changed(draw: st.DrawFn, good: Any, depth: int = 4) -> Any:
    """A value like ``good`` in which parts at any depth are replaced, removed or added."""
    choice = draw(st.integers(0, 9))
    if choice == 0 or depth == 0:
        return draw(VALUES)
    if isinstance(good, dict):
        made = {
            key: draw(changed(value, depth - 1)) if draw(st.integers(0, 3)) == 0 else value
            for key, value in good.items()
        }
        if choice == 1 and made:
            del made[draw(st.sampled_from(sorted(made)))]
        return made | (draw(st.dictionaries(TEXTS, VALUES, max_size=1)) if choice == 2 else {})
    if isinstance(good, list):
        made = [draw(changed(value, depth - 1)) if draw(st.integers(0, 3)) == 0 else value for value in good]
        return made * 2 if choice == 1 else made[:-1] if choice == 2 else made
    return good if choice < 6 else draw(VALUES)
