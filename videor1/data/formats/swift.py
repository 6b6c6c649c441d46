"""ms-swift: ``messages``, ``images``, ``videos``, ``solution``.

So docs/source_en/Customization/Custom-dataset.md (modelscope/ms-swift) has its standard format. The assistant's turn at
the end is the answer for SFT; for GRPO the field ``solution`` is, and ms-swift drops such a turn. A conversation of
which nothing says the kind of question is learned as it stands.
"""

from __future__ import annotations

from videor1.data.formats.parts import (
    OF_A_ROW,
    Entry,
    Row,
    answer_of,
    kind_of_question,
    make_entry,
    needed,
    read_messages,
)
from videor1.types import SampleError

FIELDS = ("messages", "solution", "audios", "objects", "tools", *OF_A_ROW)


def read(row: Row, problem_type: str | None = None) -> Entry:
    """Return the entry of a row. Raises SampleError where it cannot be read."""
    for field in ("audios", "objects", "tools"):
        if row.get(field):
            raise SampleError("messages", f"{field}: cannot be read, and the prompt would lack it")
    turns, inline, trace = read_messages("messages", needed(row, "messages"))
    try:
        kind = kind_of_question(
            {"problem_type": row.get("problem_type")}, {"data_source": row.get("data_source")}, problem_type
        )
    except SampleError as error:
        if error.kind != "problem_type" or trace is None or row.get("solution") is not None:
            raise
        return make_entry(row, [*turns, {"role": "assistant", "content": trace}], inline, {}, None)
    return make_entry(row, turns, inline, answer_of(row, ("solution",), trace), kind, row.get("options"))
