"""MMVU, the validation set: https://huggingface.co/datasets/yale-nlp/MMVU

It has expert questions in 27 subjects of four disciplines. The overall figure is the mean over the questions asked. The
open-ended questions are left out and counted, because a language model would have to judge the answers. The reference,
too, evaluates only the multiple choices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from videor1.evaluation.suites.base import BadRowError, Draft, LeftOutError, Overall, Reader, Suite, option_text
from videor1.evaluation.suites.scoring import score_choice

DISCIPLINES = {
    "Science": (
        "Astronomy",
        "Biology",
        "Chemistry",
        "Electromagnetism",
        "Geography",
        "Materials Science",
        "Mechanics",
        "Modern Physics",
        "Neurobiology",
        "Thermodynamics",
    ),
    "Engineering": (
        "Biomedical Engineering",
        "Civil Engineering",
        "Computer Science",
        "Electrical Engineering",
        "Electronics and Communication",
        "Mechanical Engineering",
    ),
    "Healthcare": ("Basic Medicine", "Clinical Medicine", "Dentistry", "Pharmacy", "Preventive Medicine"),
    "Humanities & Social Sciences": ("Art", "Economics", "History", "Law", "Literature", "Management"),
}
_DISCIPLINE = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}
_FOLDER = "/videos/"  # The part of a video's address after this is its path in the dataset.


def read(reader: Reader) -> None:
    """Read all rows of the benchmark."""
    (file,) = reader.files("validation.json")
    reader.read(file, ("id", "video", "question_type", "question", "choices", "answer"), partial(_question, reader))


def _question(reader: Reader, row: dict[str, Any]) -> Draft:
    if row["question_type"] == "open-ended":
        raise LeftOutError("open-ended: a language model would have to judge the answers")
    if row["question_type"] != "multiple-choice":
        kind = row["question_type"]
        raise BadRowError("problem_type", f"question_type: expected multiple-choice or open-ended, got {kind!r}")
    _, found, path = row["video"].partition(_FOLDER)
    if not found:
        raise BadRowError("bad_path", f"video: expected an address with {_FOLDER} in it, got {row['video']!r}")
    subject = path.partition("/")[0].replace("_", " ")
    options = [f"{letter}. {text}" for letter, text in row["choices"].items() if text]
    letter = row["answer"].strip()
    return Draft(
        problem_id=row["id"],
        problem=row["question"],
        answer=letter,
        path=reader.video("videos", *path.split("/")),
        categories={"discipline": _DISCIPLINE.get(subject, "other"), "subject": subject},
        score=partial(score_choice, letter=letter, text=option_text(options, letter)),
        options=options,
    )


SUITE = Suite(
    name="mmvu",
    repository="yale-nlp/MMVU",
    layout="validation.json\nvideos/<subject>/*.mp4",
    unpack="",
    overall=Overall("mean over the multiple choices"),
    read=read,
)
