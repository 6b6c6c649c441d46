"""TRL's conversational format: ``prompt`` (a conversation), ``images`` or ``image``, and a column with the answer.

So huggingface.co/docs/trl/dataset_formats has it. TRL gives the other columns to the reward functions; the answer is
``solution`` in its examples (examples/scripts/grpo_vlm.py), ``answer`` or ``ground_truth`` elsewhere, and for SFT
``completion``, one turn of the assistant.
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
from videor1.data.shown import json_type
from videor1.types import SampleError

ANSWERS = ("solution", "answer", "ground_truth")
FIELDS = ("prompt", *ANSWERS, "completion", "tools", *OF_A_ROW)


def read(row: Row, problem_type: str | None = None) -> Entry:
    """Return the entry of a row. Raises SampleError where it cannot be read."""
    if row.get("tools"):
        raise SampleError("messages", "tools: cannot be read, and the prompt would lack it")
    prompt, completion = needed(row, "prompt"), row.get("completion")
    if completion is not None:
        if not isinstance(prompt, list) or not isinstance(completion, list) or len(completion) != 1:
            raise SampleError(
                "messages", f"completion: expected one turn, the assistant's, got {json_type(completion)}"
            )
        prompt = [*prompt, *completion]
    turns, inline, trace = read_messages("prompt", prompt)
    if (trace is None) != (completion is None):
        raise SampleError("messages", "prompt: expected the user's turn at the end, and the assistant's in completion")
    kind = kind_of_question(
        {"problem_type": row.get("problem_type")}, {"data_source": row.get("data_source")}, problem_type
    )
    return make_entry(row, turns, inline, answer_of(row, ANSWERS, trace), kind, row.get("options"))
