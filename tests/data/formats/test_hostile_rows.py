"""Rows of any content: an entry that the check takes or refuses, or a counted error; never another exception."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from videor1.data.formats import FORMATS, RowReader
from videor1.types import SampleError

NAMES = sorted({field for one in FORMATS.values() for field in one.fields})
INNER = ["role", "content", "type", "text", "video", "image", "path", "bytes", "fps", "ground_truth", "problem_type"]
TEXTS = st.sampled_from(["user", "assistant", "system", "text", "video", "image", "<video>2?", "<image>", "<answer>"])
TEXTS |= st.sampled_from(["<think>a</think><answer>4</answer>", "A. x\nB. y", "multiple choice", "numerical", "v.mp4"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.text(max_size=5) | st.binary(max_size=2)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=4),
    max_leaves=12,
)


def outcome(reader: RowReader, row: Any) -> Any:
    """The entry of a row, or its error."""
    try:
        return reader("row 0", row, "data.json")
    except SampleError as error:
        return error


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    row=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES, max_size=8),
    format=st.sampled_from(["auto", *FORMATS]),
    problem_type=st.sampled_from([None, "numerical", "multiple choice"]),
)
def test_no_row_raises_anything_else(row: dict[str, Any], format: str, problem_type: str | None) -> None:
    before = repr(row)
    reader = RowReader(format, problem_type)
    result = outcome(reader, row)
    assert isinstance(result, dict) or result.message.startswith("row 0: ")
    assert repr(row) == before
    assert sum(reader.took.values()) == (format == "auto")


def test_a_row_that_is_nested_deeply() -> None:
    deep: Any = "x"
    for _ in range(20_000):
        deep = [deep]
    for format in ("auto", "easyr1", "swift"):
        row = {"problem": "2?", "answer": {"a": deep}, "messages": [{"role": deep}]}
        assert len(outcome(RowReader(format), row).message) < 1000
