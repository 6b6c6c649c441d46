"""verl: ``prompt`` (a conversation), ``reward_model.ground_truth``, ``extra_info``, ``images``, ``videos``.

So verl's examples/data_preprocess write it, mostly as Parquet, and verl/utils/dataset/rl_dataset.py reads it
(volcengine/verl).
"""

from __future__ import annotations

from videor1.data.formats.parts import (
    OF_A_ROW,
    Entry,
    Row,
    kind_of_question,
    make_entry,
    needed,
    object_of,
    read_answer,
    read_messages,
)
from videor1.types import SampleError

FIELDS = ("prompt", "reward_model", "extra_info", "ability", *OF_A_ROW)


def read(row: Row, problem_type: str | None = None) -> Entry:
    """Return the entry of a row. Raises SampleError where it cannot be read."""
    turns, inline, trace = read_messages("prompt", needed(row, "prompt"))
    if trace is not None:
        raise SampleError("messages", "prompt: expected the user's turn at the end, got the assistant's")
    judged = object_of("reward_model", needed(row, "reward_model"))
    extra = object_of("extra_info", row.get("extra_info") or {})
    answer = read_answer("reward_model.ground_truth", needed(judged, "ground_truth"))
    kind = kind_of_question(
        {"problem_type": row.get("problem_type"), "extra_info.problem_type": extra.get("problem_type")},
        {name: row.get(name) for name in ("ability", "data_source")} | {"reward_model.style": judged.get("style")},
        problem_type,
    )
    entry = make_entry(row, turns, inline, answer, kind, row.get("options") or extra.get("options"))
    ids = [one for one in (extra.get("problem_id"), extra.get("index")) if one is not None]
    return entry if "problem_id" in entry or not ids else entry | {"problem_id": ids[0]}
