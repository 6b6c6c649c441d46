"""Use a data file in the Video-R1 JSON format as a benchmark. The reference's own evaluation files have this format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from videor1.answer import extract_answer
from videor1.data import Dataset
from videor1.evaluation.suites.base import Loaded, Overall, Question
from videor1.evaluation.suites.scoring import score_mra
from videor1.rewards import accuracy_of
from videor1.types import Sample


def from_dataset(dataset: Dataset, *, lenient: bool = False) -> Loaded:
    """Return a data set as a benchmark with the name of its file.

    Completions are scored by ``rewards.accuracy_reward``, except that ``regression`` is scored by mean relative
    accuracy. The reference, too, trains on regression with the former and evaluates it with the latter.

    Args:
        dataset: the samples.
        lenient: whether ``accuracy_reward`` reads answers leniently.
    """
    questions = [Question(sample, _categories(sample), _score(sample, lenient)) for sample in dataset.samples]
    regression = any(sample.problem_type == "regression" for sample in dataset.samples)
    overall = Overall("mean over all questions" + " (regression: mean relative accuracy)" * regression)
    return Loaded(dataset.path.stem, questions, overall, dataset.errors)


def _categories(sample: Sample) -> dict[str, str]:
    return {"data_source": sample.data_source or "unnamed", "problem_type": sample.problem_type}


def _score(sample: Sample, lenient: bool) -> Callable[[str], float]:
    if sample.problem_type == "regression":
        try:
            return partial(score_mra, truth=float(extract_answer(sample.solution).replace(",", "")))
        except ValueError:  # The solution is not a number, and no answer is right by either rule.
            pass
    return partial(accuracy_of, sample=sample, lenient=lenient)
