"""TempCompass: https://huggingface.co/datasets/lmms-lab/TempCompass

It has questions of the kinds multi-choice, yes/no and caption matching, along five temporal aspects. The overall figure
is the mean over their questions. The captions to match, which the files label "Option 1", "Sentence A" or "Caption A",
are labelled A and B here like any options. Captioning is left out and counted, because a language model would have to
judge the answers.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from videor1.evaluation.suites.base import BadRowError, Draft, LeftOutError, Overall, Reader, Suite, lettered
from videor1.evaluation.suites.scoring import score_choice, score_yes_no

TASKS = ("multi-choice", "yes_no", "caption_matching")
JUDGED = "captioning"
FIELDS = ("video_id", "question", "answer", "dim")
_LABEL = {
    "multi-choice": re.compile(r"[A-Z]\.\s*"),
    "caption_matching": re.compile(r"(?:Option|Sentence|Caption) \w+:\s*"),
}


def read(reader: Reader) -> None:
    """Read all rows of the benchmark."""
    for task in TASKS:
        for file in reader.files(f"{task}/test-*.parquet"):
            reader.read(file, FIELDS, partial(_question, reader, task))
    for file in reader.folder.glob(f"{JUDGED}/test-*.parquet"):
        reader.read(file, (), _left_out)


def _left_out(row: dict[str, Any]) -> Draft:
    raise LeftOutError(f"{JUDGED}: a language model would have to judge the answers")


def _question(reader: Reader, task: str, row: dict[str, Any]) -> Draft:
    common: dict[str, Any] = {
        "problem_id": f"{task}/{row['video_id']}",
        "path": reader.video(f"{row['video_id']}.mp4"),
        "categories": {"task": task, "aspect": row["dim"]},
    }
    question, answer = row["question"], row["answer"].strip()
    if task == "yes_no":
        truth = answer.lower()
        if truth not in ("yes", "no"):
            raise BadRowError("solution", f"answer: expected yes or no, got {answer!r}")
        score = partial(score_yes_no, truth=truth)
        return Draft(
            **common, problem=f"{question}\nAnswer yes or no.", answer=truth, score=score, problem_type="free-form"
        )
    label = _LABEL[task]
    lines = question.splitlines()
    first = next((i for i, line in enumerate(lines) if label.match(line)), len(lines))
    options = [label.sub("", line, count=1).strip() for line in lines[first:]]
    right = [i for i, line in enumerate(lines[first:]) if line.strip() == answer]
    if not first or len(right) != 1:
        raise BadRowError("options", f"expected a question, then options with {answer!r} once among them: {question!r}")
    named = lettered(options)
    letter = named[right[0]][0]
    score = partial(score_choice, letter=letter, text=options[right[0]])
    return Draft(**common, problem="\n".join(lines[:first]), answer=letter, score=score, options=named)


SUITE = Suite(
    name="tempcompass",
    repository="lmms-lab/TempCompass",
    layout="multi-choice/test-*.parquet\nyes_no/test-*.parquet\ncaption_matching/test-*.parquet\nvideos/*.mp4",
    unpack="unzip -q tempcompass_videos.zip",
    overall=Overall("mean over the questions of multi-choice, yes_no and caption_matching"),
    read=read,
)
