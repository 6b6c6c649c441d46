"""Video-MMMU: https://huggingface.co/datasets/lmms-lab/VideoMMMU

It has three tracks of 300 questions about lectures: Perception, Comprehension and Adaptation. The image that a question
of Adaptation is about stands at the end of its video, and the question says so; the last frame is always among the
sampled frames. In the other tracks the image is to be ignored. Open questions are scored by MMMU's rules. The overall
figure is the mean over all questions. No question is left out. The benchmark's knowledge gain is not computed, because
it needs a second run without the lectures.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from videor1.evaluation.suites.base import BadRowError, Draft, Overall, Reader, Suite, lettered, option_text
from videor1.evaluation.suites.scoring import score_choice, score_open

TRACKS = ("Perception", "Comprehension", "Adaptation")
DISCIPLINES = {
    "Art": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities": ("History", "Literature", "Sociology", "Psychology"),
    "Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DISCIPLINE = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}
_APPLY = "Learn from the video, then use it to answer. The image of this question is at the end of the video."
_IGNORE = "Ignore the quiz at the end of the video."


def read(reader: Reader) -> None:
    """Read all rows of the benchmark."""
    for track in TRACKS:
        for file in reader.files(f"{track}/test-*.parquet"):
            reader.read(file, ("id", "question", "options", "answer"), partial(_question, reader, track))


def _question(reader: Reader, track: str, row: dict[str, Any]) -> Draft:
    name, answer = row["id"], row["answer"]
    subject = name.partition("_")[2].rpartition("_")[0]  # validation_Art_Theory_3
    if subject not in _DISCIPLINE:
        raise BadRowError("wrong_type", f"id: expected <split>_<subject>_<number>, got {name!r}")
    common: dict[str, Any] = {
        "problem_id": f"{track}/{name}",
        "problem": f"{_APPLY}\n{row['question']}" if track == "Adaptation" else f"{row['question']}\n{_IGNORE}",
        "path": reader.video(f"{name}.mp4"),
        "answer": answer,
        "categories": {"track": track, "discipline": _DISCIPLINE[subject]},
    }
    options = lettered(row["options"] or [])
    if not options:
        return Draft(**common, score=partial(score_open, truth=answer), problem_type="free-form")
    score = partial(score_choice, letter=answer, text=option_text(options, answer))
    return Draft(**common, score=score, options=options)


SUITE = Suite(
    name="videommmu",
    repository="lmms-lab/VideoMMMU",
    layout="Perception/test-*.parquet\nComprehension/test-*.parquet\nAdaptation/test-*.parquet\n"
    + "\n".join(f"{name}/*.mp4" for name in DISCIPLINES),
    unpack="for f in *.zip; do unzip -q $f; done",
    overall=Overall("mean over all questions"),
    read=read,
    needs="Its page asks to accept conditions first; then log in with: hf auth login",
)
