"""VSI-Bench: https://huggingface.co/datasets/nyu-visionx/VSI-Bench

It has ten types of questions about scanned rooms. Multiple choices are scored by accuracy, and numbers by mean relative
accuracy. As published, the overall figure is the mean over eight tasks, for which the three levels of
object_rel_direction are first averaged into one. Nothing is left out.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from videor1.evaluation.suites.base import (
    BadRowError,
    Draft,
    MissingFileError,
    Overall,
    Reader,
    Suite,
    option_text,
    plain_options,
)
from videor1.evaluation.suites.scoring import score_choice, score_mra

CHOICE = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
NUMBER = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
FIELDS = ("id", "dataset", "scene_name", "question_type", "question", "ground_truth")


def read(reader: Reader) -> None:
    """Read all rows of the benchmark."""

    def make(row: dict[str, Any]) -> Draft:
        kind, truth = row["question_type"], row["ground_truth"]
        path = reader.video(row["dataset"], f"{row['scene_name']}.mp4")
        common: dict[str, Any] = {"problem_id": row["id"], "problem": row["question"], "path": path, "answer": truth}
        categories = {"question_type": kind}
        if kind in NUMBER:
            if not math.isfinite(float(truth)):
                raise BadRowError("solution", f"ground_truth: expected a finite number, got {truth!r}")
            score = partial(score_mra, truth=float(truth))
            return Draft(**common, categories=categories, score=score, problem_type="regression")
        if kind not in CHOICE:
            raise BadRowError("problem_type", f"question_type: expected one of {[*CHOICE, *NUMBER]}, got {kind!r}")
        options = plain_options(row.get("options"))
        score = partial(score_choice, letter=truth, text=option_text(options, truth))
        return Draft(**common, categories=categories, score=score, options=options)

    try:
        files = reader.files("test.jsonl", "test-*.parquet")
    except MissingFileError:
        # A later release divides the same questions into two files.
        files = [*reader.files("test_debiased.parquet"), *reader.files("test_pruned.parquet")]
    for file in files:
        reader.read(file, FIELDS, make)


SUITE = Suite(
    name="vsibench",
    repository="nyu-visionx/VSI-Bench",
    layout="test.jsonl\narkitscenes/*.mp4\nscannet/*.mp4\nscannetpp/*.mp4",
    unpack="for f in *.zip; do unzip -q $f; done",
    overall=Overall(
        "mean over the 8 tasks (object_rel_direction: the mean of its 3 levels)",
        axis="question_type",
        groups=dict.fromkeys(CHOICE[:3], "object_rel_direction"),
    ),
    read=read,
)
