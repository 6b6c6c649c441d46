"""EasyR1: ``problem``, ``answer``, ``images``, ``videos``.

The field names are the defaults of its ``data.prompt_key``, ``answer_key``, ``image_key`` and ``video_key``
(hiyouga/EasyR1, verl/utils/dataset.py), with ``prompt_key`` set to problem as all of its examples do. EasyVideoR1 adds
``problem_type`` and ``data_type``; the rows that it evaluates on (cyuQ1n/EasyVideoR1, eval/data/valid_data) are of the
Video-R1 format, and OneThinker's are too (tulerfeng/OneThinker, Evaluation/Eval/eval_bench.py).
"""

from __future__ import annotations

from videor1.answer import extract_answer
from videor1.data.formats import video_r1
from videor1.data.formats.parts import (
    OF_A_ROW,
    Entry,
    Row,
    kind_of_question,
    make_entry,
    needed,
    read_answer,
    read_messages,
    same_answer,
)
from videor1.data.shown import shown
from videor1.types import SampleError

FIELDS = ("problem", "answer", "solution", "process", *OF_A_ROW, *video_r1.OF_THE_MEDIA)


def read(row: Row, problem_type: str | None = None) -> Entry:
    """Return the entry of a row. Raises SampleError where it cannot be read."""
    if row.get("answer") is None and row.get("solution") is not None and row.get("path") is not None:
        return video_r1.read(row, problem_type)
    turns, inline, _ = read_messages("problem", [{"role": "user", "content": needed(row, "problem")}])
    answer = read_answer("answer", needed(row, "answer"))
    solution = row.get("solution")
    if isinstance(solution, str) and extract_answer(solution) and not same_answer(answer, {"solution": solution}):
        raise SampleError("ambiguous", f"answer is {shown(row['answer'])} and solution {shown(solution)}")
    if row.get("process") is not None:
        answer["process"] = row["process"]
    kind = kind_of_question(
        {"problem_type": row.get("problem_type")}, {"data_source": row.get("data_source")}, problem_type
    )
    return make_entry(row, turns, inline, answer, kind, row.get("options"))
