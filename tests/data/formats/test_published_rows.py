"""Rows of the shapes that OneThinker and EasyVideoR1 publish: fields, nulls and kinds of questions as in their files.

The shapes are those of OneThink/OneThinker-train-data and OneThinker-eval, as tulerfeng/OneThinker reads them, and of
cyuQ1n/EasyVideoR1, eval/data/valid_data. The questions are made up.
"""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from videor1.data import load_samples
from videor1.data.formats import RowReader
from videor1.types import MediaItem, ProblemType

Row = dict[str, Any]

STRUCTURED = {
    "temporal grounding": {"time": [24.3, 30.4]},
    "spatial grounding": {"boxes": [35, 227, 437, 932]},
    "spatial-temporal grounding": {"time": [17.0, 18.5], "boxes": {"18": [440, 135, 493, 246]}},
    "tracking": {"boxes": {"1": [405, 230, 654, 463], "2": [435, 223, 678, 446]}},
}
PLAIN = {"boolean": "Yes", "math": "$$-\\dfrac{3}{2}$$", "open-ended": "A red car.", "numerical": "3.14", "OCR": "Hi"}
ANSWERS = {kind: json.dumps(truth) for kind, truth in STRUCTURED.items()} | PLAIN


def trained(kind: str, answer: str, medium: str = "video", **more: Any) -> Row:
    """A row of OneThinker's training data."""
    row = {"problem_id": "7", "problem": f"<{medium}>What is it?", "data_type": medium, "problem_type": kind}
    row |= {"options": [], "data_source": "made", "answer": answer, "problem_reserved_text": "What is it?"}
    return row | {"images": [], "videos": []} | {f"{medium}s": [f"./Made/{medium}"]} | more


def evaluated(kind: str, solution: str, **more: Any) -> Row:
    """A row of the data that OneThinker and EasyVideoR1 evaluate on."""
    row = {"data_type": "video", "data_source": "made", "problem_type": kind, "path": "./v.mp4", "options": []}
    return row | {"problem": "What is it?", "problem_id": 7, "solution": f"<answer>{solution}</answer>"} | more


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("medium", ["video", "image"])
@pytest.mark.parametrize("format", ["auto", "onethinker"])
def test_training_rows(kind: str, medium: str, format: str) -> None:
    entry = RowReader(format)("row 0", trained(kind, ANSWERS[kind], medium), "data.json")
    assert entry == {
        "problem_id": "7",
        "problem": "What is it?",
        "data_type": medium,
        "path": f"./Made/{medium}",
        "problem_type": kind,
        "solution": f"<answer>{ANSWERS[kind]}</answer>",
        "data_source": "made",
    }


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("format", ["auto", "video-r1", "onethinker", "easyr1"])
def test_evaluation_rows(kind: str, format: str) -> None:
    row = evaluated(kind, ANSWERS[kind], preprocessed_video="v.pt", options=None)
    assert RowReader(format)("row 0", row, "data.json") == row


def known(rows: dict[str, Row]) -> list[Row]:
    return [row for kind, row in rows.items() if kind in get_args(ProblemType)]


def test_samples_of_the_kinds_that_are_known(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    for make in (trained, evaluated):
        rows = known({kind: make(kind, answer) for kind, answer in ANSWERS.items()})
        assert rows
        data.write_text(json.dumps(rows), encoding="utf-8")
        dataset = load_samples(data)
        assert dataset.errors == []
        assert [sample.problem_type for sample in dataset.samples] == [row["problem_type"] for row in rows]


def test_choices(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    rows = [
        evaluated("multiple choice", "B", options=["A: red", "B: blue"], ovo_task="EPM"),
        trained("multiple choice", "B", options=["A. red", "B. blue"]),
        trained("multiple choice", "B", options=["(A) red", "(B) blue"], images=None),
    ]
    data.write_text(json.dumps(rows), encoding="utf-8")
    assert [sample.options[1] for sample in load_samples(data).samples] == ["B: blue", "B. blue", "(B) blue"]


@pytest.mark.parametrize("format", ["auto", "video-r1", "onethinker", "easyr1"])
def test_an_image_beside_the_video(format: str, tmp_path: Path) -> None:
    """OneThinker's in additional_path, EasyVideoR1's in image_path where the text mentions it."""
    data = tmp_path / "data.json"
    rows = [
        evaluated("numerical", "3", data_type="video-image", additional_path="./i.png"),
        evaluated("numerical", "3", problem="How many in <image 1>?", image_path="./i.png", options=None),
    ]
    data.write_text(json.dumps(rows), encoding="utf-8")
    for sample in load_samples(data, format=format).samples:
        assert sample.data_type == "video"
        assert sample.media == (
            MediaItem("video", tmp_path / "v.mp4", tmp_path),
            MediaItem("image", tmp_path / "i.png", tmp_path),
        )
    (alone,) = [evaluated("numerical", "3", image_path="./thumbnail.png")]
    data.write_text(json.dumps([alone]), encoding="utf-8")
    assert [sample.media for sample in load_samples(data, format=format).samples] == [()]
    data.write_text(json.dumps([alone, alone | {"data_type": "video-image"}]), encoding="utf-8")
    assert load_samples(data, format=format).error_counts() == {"missing_field": 1}
