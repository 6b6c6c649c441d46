"""Compute the figures of an evaluation from its answers alone: overall, as the benchmark's authors define it, and by
category."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from videor1.evaluation.intervals import Estimate, mean_of_differences, mean_of_shares
from videor1.evaluation.suites.base import Loaded, Overall
from videor1.logs.progress import summary_table

AnswerRecord = Mapping[str, Any]  # a line of answers.jsonl

_TEXT_ERRORS = ("too_long", "special_token")  # kinds of SampleError that the text causes and not the video
_SCORE_ERRORS = ("reward",)  # those of a score that the judge did not give


def figures(answers: Sequence[AnswerRecord], overall: Overall | None = None) -> dict[str, Any]:
    """Compute the figures of some answers.

    The result has these keys::

        questions, videos           numbers of questions and of videos
        accuracy                    accuracy on all questions, with frames in order
        ordered, shuffled, gap      accuracies on the questions about videos; gap = ordered - shuffled, paired
        finished, shuffled_finished share of completions that were not cut at max_completion_length
        answered, shuffled_answered share of completions with an <answer> tag that is not empty

    ``accuracy``, ``ordered``, ``shuffled`` and ``gap`` are {"value", "low", "high"}, with 95% confidence intervals that
    are clustered by video. Values that the data cannot give are null.

    Args:
        answers: lines of answers.jsonl.
        overall: how the benchmark's authors average over questions; default: the mean over all questions.
    """
    paired = [row for row in answers if row["shuffled_accuracy"] is not None]

    def estimate(make: Any, rows: Sequence[AnswerRecord], value: Any) -> dict[str, float | None]:
        strata = None if overall is None else _strata(rows, overall)
        return _to_json(make([value(row) for row in rows], [_video(row) for row in rows], strata))

    def share(rows: Sequence[AnswerRecord], name: str) -> float | None:
        return sum(row[name] for row in rows) / len(rows) if rows else None

    return {
        "questions": len(answers),
        "videos": len({_video(row) for row in paired}),
        "accuracy": estimate(mean_of_shares, answers, lambda row: row["accuracy"]),
        "ordered": estimate(mean_of_shares, paired, lambda row: row["accuracy"]),
        "shuffled": estimate(mean_of_shares, paired, lambda row: row["shuffled_accuracy"]),
        "gap": estimate(mean_of_differences, paired, lambda row: row["accuracy"] - row["shuffled_accuracy"]),
        "finished": share(answers, "finished"),
        "shuffled_finished": share(paired, "shuffled_finished"),
        "answered": share(answers, "answered"),
        "shuffled_answered": share(paired, "shuffled_answered"),
    }


def benchmark_results(
    loaded: Loaded, asked: int, answers: Sequence[AnswerRecord], unanswered: Sequence[AnswerRecord]
) -> dict[str, Any]:
    """Return the entry of a benchmark in results.json.

    Args:
        loaded: the benchmark.
        asked: number of questions that were to be answered.
        answers: the benchmark's lines of answers.jsonl.
        unanswered: the benchmark's lines of skipped.jsonl.
    """
    assert asked == len(answers) + len(unanswered), (asked, len(answers), len(unanswered))
    axes = list(answers[0]["categories"]) if answers else []
    wrong = [{**row, "accuracy": 0.0, "shuffled_accuracy": None} for row in unanswered]
    counted = mean_of_shares(
        [row["accuracy"] for row in (*answers, *wrong)],
        [_video(row) for row in (*answers, *wrong)],
        _strata([*answers, *wrong], loaded.overall),
    )
    return {
        "asked": asked,
        "unreadable": _unanswered([row for row in unanswered if row["kind"] not in (*_TEXT_ERRORS, *_SCORE_ERRORS)]),
        "unaskable": _unanswered([row for row in unanswered if row["kind"] in _TEXT_ERRORS]),
        "malformed": _malformed(answers),
        "unscored": _unanswered([row for row in unanswered if row["kind"] in _SCORE_ERRORS]),
        "bad_rows": dict(Counter(error.kind for error in loaded.errors)),
        "left_out": dict(loaded.left_out),
        "overall_is": loaded.overall.text,
        "overall": figures(answers, loaded.overall),
        "accuracy_unanswered_as_wrong": _to_json(counted),
        "categories": {axis: _by_category(answers, axis, loaded.overall) for axis in axes},
    }


def _malformed(answers: Sequence[AnswerRecord]) -> dict[str, dict[str, int]]:
    """Return the number of malformed answers from frames in order by problem type and fault."""
    found: dict[str, Counter[str]] = {}
    for row in answers:
        if row.get("malformed"):
            found.setdefault(row["problem_type"], Counter()).update(row["malformed"])
    return {kind: dict(sorted(faults.items())) for kind, faults in sorted(found.items())}


def _unanswered(rows: Sequence[AnswerRecord]) -> dict[str, Any]:
    kinds = Counter(row["kind"] for row in rows)
    return {
        "questions": len(rows),
        "videos": len({_video(row) for row in rows}),
        "by_kind": dict(sorted(kinds.items())),
    }


def _by_category(answers: Sequence[AnswerRecord], axis: str, overall: Overall) -> dict[str, Any]:
    rows: dict[str, list[AnswerRecord]] = {}
    for row in answers:
        rows.setdefault(row["categories"][axis], []).append(row)
    found = {name: figures(rows[name]) for name in sorted(rows)}
    if axis == overall.axis:
        for group in sorted(set(overall.groups.values())):
            members = [row for name in rows if overall.groups.get(name) == group for row in rows[name]]
            if members:
                found[group] = figures(members, overall)
    return found


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figures of benchmarks as a table, in percent with 95% confidence intervals.

    The column ``ordered`` is included if not all questions are about videos. A blank line precedes and follows the
    categories of each axis.
    """
    columns = ["accuracy", *["ordered"] * _mixed(results), "shuffled", "gap"]
    rows = [["", "questions", *columns, "cut", "no answer"]]
    blank = [""] * len(rows[0])
    by_category = False
    for name, result in results.items():
        rows += [blank] * by_category + [[name, *_cells(result["overall"], columns)]]
        tables = [(axis, categories) for axis, categories in result["categories"].items() if len(categories) > 1]
        by_category = bool(tables)
        for axis, categories in tables:
            rows.append(blank)
            rows += [[f"  {axis}: {category}", *_cells(found, columns)] for category, found in categories.items()]
    return summary_table(rows)


def results_legend(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Explain the columns of ``results_table``."""
    figures = (
        "accuracy: of all questions, frames in order; ordered, shuffled: of those on videos; gap: ordered less shuffled"
        if _mixed(results)
        else "accuracy: frames in order; shuffled: frames shuffled; gap: accuracy less shuffled"
    )
    return (
        f"In percent, 95% intervals clustered by video. {figures}; cut: at max_completion_length; "
        "no answer: without an <answer> tag."
    )


def _mixed(results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether some questions are not about videos."""
    overall = [result["overall"] for result in results.values()]
    return any(found["accuracy"] != found["ordered"] for found in overall)


def _cells(found: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    cut, no_answer = (None if found[name] is None else 1 - found[name] for name in ("finished", "answered"))
    return [str(found["questions"]), *(_interval(found[name]) for name in columns), _percent(cut), _percent(no_answer)]


def _interval(estimate: Mapping[str, float | None]) -> str:
    if estimate["value"] is None:
        return "—"
    if estimate["low"] is None:
        return f"{_percent(estimate['value'])} [—]"
    return f"{_percent(estimate['value'])} [{_percent(estimate['low'])}, {_percent(estimate['high'])}]"


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f}"


def _strata(rows: Sequence[AnswerRecord], overall: Overall) -> list[tuple[str, ...]] | None:
    if overall.axis is None:
        return None
    categories = [row["categories"][overall.axis] for row in rows]
    return [(overall.groups.get(category, category), category) for category in categories]


def _video(row: AnswerRecord) -> str:
    """Return what identifies a question's video. A question without media counts as a video of its own."""
    return row["path"] or f"#{row['index']}"


def _to_json(estimate: Estimate) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in asdict(estimate).items()}
