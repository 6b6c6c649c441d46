"""Video-MME: https://huggingface.co/datasets/lmms-lab/Video-MME

It has three questions about each of 900 videos, which are short, medium or long. They are asked without subtitles. The
overall figure is the mean over all questions. Nothing is left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from videor1.evaluation.suites.base import Draft, Overall, Reader, Suite, lettered, option_text, plain_options
from videor1.evaluation.suites.scoring import score_choice

FIELDS = ("videoID", "question_id", "duration", "domain", "sub_category", "task_type", "question", "options", "answer")
AXES = ("duration", "domain", "task_type", "sub_category")


def read(reader: Reader) -> None:
    """Read all rows of the benchmark."""
    for file in reader.files("videomme/test-*.parquet", "test-*.parquet"):
        reader.read(file, FIELDS, partial(_question, reader))


def _question(reader: Reader, row: dict[str, Any]) -> Draft:
    options, letter = lettered(plain_options(row["options"])), row["answer"].strip()
    return Draft(
        problem_id=row["question_id"],
        problem=row["question"],
        answer=letter,
        path=reader.video(row["videoID"]),
        categories={axis: row[axis] for axis in AXES},
        score=partial(score_choice, letter=letter, text=option_text(options, letter)),
        options=options,
    )


SUITE = Suite(
    name="videomme",
    repository="lmms-lab/Video-MME",
    layout="videomme/test-00000-of-00001.parquet\ndata/*.mp4",
    unpack="for f in videos_chunked_*.zip; do unzip -q $f; done",
    overall=Overall("mean over all questions, without subtitles"),
    read=read,
)
