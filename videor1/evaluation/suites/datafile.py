"""Use a data file in the Video-R1 JSON format as a benchmark. The reference's own evaluation files have this format."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial

from videor1.answer import extract_answer
from videor1.config import RewardConfig
from videor1.data import Dataset
from videor1.errors import DataError
from videor1.evaluation.suites.base import Loaded, Overall, Question
from videor1.evaluation.suites.scoring import score_mra, score_quantity
from videor1.rewards import accuracy_of
from videor1.rewards.quantity import read_quantity
from videor1.types import Sample, SampleError


def from_dataset(
    dataset: Dataset,
    *,
    lenient: bool = False,
    correct_above: float = 0.1,
    reward: RewardConfig | None = None,
    judged: Container[str] = (),
) -> Loaded:
    """Return a data set as a benchmark with the name of its file.

    Completions are scored by ``rewards.accuracy_reward``, except that ``regression`` is scored by mean relative
    accuracy. The reference, too, trains on regression with the former and evaluates it with the latter.

    Args:
        dataset: the samples.
        lenient: whether ``accuracy_reward`` reads answers leniently.
        correct_above: a sample is left out, as an error ``solution``, if its own solution scores no more than this.
        reward: says both of these, and the values of single problem types, in their place.
        judged: problem types that a judge scores instead, whose samples are all kept.

    Raises:
        DataError: no solution scores more.
    """
    reward = reward or RewardConfig(lenient=lenient, correct_above=correct_above)
    lenient = reward.lenient
    questions, errors = [], list(dataset.errors)
    for sample in dataset.samples:
        question = Question(sample, _categories(sample), _score(sample, lenient))
        scored = question.score(sample.solution)
        if scored > reward.above(sample.problem_type) or sample.problem_type in judged:
            questions.append(question)
        else:
            answer = extract_answer(sample.solution)[:60]
            message = f"problem {sample.problem_id}: expected an answer that a completion can give, got {answer!r}"
            hint = "" if lenient else "; reward.lenient true reads more numbers and scripts"
            kind = f"which as {sample.problem_type} scores {scored:.2g} for itself"
            errors.append(SampleError("solution", f"{message}, {kind}{hint}", dataset.path))
    if not questions:
        last = errors[-1].message
        raise DataError(f"{dataset.path}: none of its {len(errors)} samples can be asked. The last: {last}")
    regression = any(question.sample.problem_type == "regression" for question in questions)
    overall = Overall("mean over all questions" + " (regression: mean relative accuracy)" * regression)
    return Loaded(dataset.path.stem, questions, overall, errors)


def _categories(sample: Sample) -> dict[str, str]:
    return {"data_source": sample.data_source or "unnamed", "problem_type": sample.problem_type}


def _score(sample: Sample, lenient: bool) -> Callable[[str], float]:
    if sample.problem_type == "regression":
        answer = extract_answer(sample.solution)
        if lenient and (quantity := read_quantity(answer)):
            return partial(score_quantity, truth=quantity)
        try:
            return partial(score_mra, truth=float(answer.replace(",", "")))
        except ValueError:  # The solution is not a number, and no answer is right by either rule.
            pass
    return partial(accuracy_of, sample=sample, lenient=lenient)
