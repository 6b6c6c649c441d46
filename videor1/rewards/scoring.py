"""Rewards of a completion: accuracy by problem type, format, and the user's own functions.

Accuracy and format have the exact semantics of Video-R1's reward functions (repository tulerfeng/Video-R1, ``grpo.py``
at commit 59d65c3), quirks included. ``lenient`` is this library's, and can only raise a strict reward.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from rapidfuzz.distance import Levenshtein

from videor1.answer import extract_answer, follows_format, whole_text
from videor1.config import RewardConfig
from videor1.errors import ConfigError, did_you_mean
from videor1.rewards import (
    boolean,
    mathematics,
    open_ended,
    spatial_grounding,
    spatial_temporal_grounding,
    temporal_grounding,
    tracking,
)
from videor1.rewards.open_ended import lenient_rouge, strict_rouge
from videor1.rewards.quantity import read_quantity
from videor1.rewards.regression import closeness, mean_relative_accuracy
from videor1.rewards.rouge import self_rouge
from videor1.rewards.structured import Score
from videor1.types import Sample

RewardFunction = Callable[..., Any]  # (completions, samples) -> floats; if async, (completion, sample) -> float


def accuracy_reward(
    completion: str,
    solution: str,
    problem_type: str,
    *,
    lenient: bool = False,
    regression: Literal["error", "mra"] = "error",
) -> float:
    """Score how right the answer in ``completion`` is, in [0, 1].

    Both texts are reduced to what stands in their first ``<answer>...</answer>``, stripped ("" without the tags): the
    output ``o`` and the ground truth ``g``. Then by ``problem_type``:

    - ``multiple choice``: 1 if o == g (case-sensitive), else 0. So "" equals "" (``load_samples`` refuses such a
      solution).
    - ``numerical``: 0 if just one of the two contains "." or ","; else commas are dropped, both are read by Python's
      ``float`` (which takes "1e3", "1_000", "inf" and non-ASCII digits), and it is 1 if they are equal after
      ``round(., 2)``. Not a number: 0.
    - ``OCR``: max(0, 1 - word edit distance(g, o) / max(1, words of g)); words are split at any whitespace.
    - ``free-form``: mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L with stemming, as the rouge-score package computes it, of
      the first 16,384 words of each text (a longer one is warned about). A text of one word has no bigrams, so it earns
      2/3 at most; one without ASCII letters and digits earns nothing.
    - ``regression``: 1 - min(1, (|o - g| + 1e-9) / (|g| + 1e-9)), read as above. Not a number: 0. The reference's clip
      turns an answer of "nan" into the full reward; here a NaN difference earns 0. That is the one departure. With
      ``regression="mra"`` it is mean relative accuracy: the share of t = 0.5, 0.55, ..., 0.95 with |o - g| / |g| <=
      1 - t (a g of 0 needs an o of 0).
    - ``temporal grounding``: o and g are JSON, ``{"time": [start, end]}`` in seconds: intersection / union (tIoU).
    - ``spatial grounding``: ``{"boxes": [x1, y1, x2, y2]}``: intersection / union (IoU).
    - ``spatial-temporal grounding``: ``{"time": [start, end], "boxes": {"9": [x1, y1, x2, y2], ...}}``: 0.5 tIoU + 0.5
      mean IoU of the frames that both name.
    - ``tracking``: ``{"boxes": {"1": [x1, y1, x2, y2], ...}}``: mean IoU of the truth's frames, a missing one 0.
    - ``boolean``: 1 if both are of yes, true, 1 or both of no, false, 0, in any case.
    - ``math``: 1 if math-verify finds them equal, or they are the same text up to blanks.
    - ``open-ended``: as ``free-form``.
    - anything else: 0.

    Of a structured answer, what cannot be used scores 0: see :func:`malformed_reason`.

    With ``lenient`` the reward is the larger of the strict one and this:

    - ``multiple choice``: case and the punctuation and brackets around the answer do not count, and an option's letter
      may be followed by its text: "b", "B.", "(B)", "B) two cars" and "B: two cars" are B. "A) or B)" is neither; a
      letter without a mark ("A dog") is text.
    - ``numerical``: numbers are read by value: "3" equals "3.0"; "1,000" equals "1000" (commas count as thousands
      separators only where they cut groups of three digits); "1/2", "½" and "$\\frac{1}{2}$" equal "0.5"; "1.5 × 10^3"
      equals "1,500"; a trailing "." or "," is dropped. A number may have a unit or a currency, which must be the same
      on both sides where both have one: "12 cm" equals "12" and "12 centimeters", not "12 m". A percentage equals only
      a percentage: "50%" is "50 percent", and neither 50 nor 0.5. Infinite numbers equal nothing.
    - ``regression``: numbers are read in that way, and a right answer to a ground truth of 0 earns 1.
    - ``OCR``: words are compared without case and without punctuation at their ends.
    - ``free-form``, ``open-ended``: in scripts other than Latin, ROUGE compares single characters; Latin words keep
      their accents.
    - grounding, ``tracking``: the JSON may stand in a Markdown code block, or in text.
    - ``boolean``: punctuation around the word does not count.

    Args:
        completion: the whole answer, tags included: what the chat template opened it with, and what the model wrote.
        solution: the right answer, in ``<answer>`` tags.
        problem_type: one of the types above.
        lenient: forgive what is listed above.
        regression: how ``regression`` is scored, as above.

    Returns:
        A reward in [0, 1], without unit.

    Raises:
        Nothing: any two strings are scored.

    Source:
        The reward functions of Video-R1 (arXiv 2503.21776; https://github.com/tulerfeng/Video-R1); ``lenient`` is this
        library's. ROUGE is the rouge-score package's. The types from ``temporal grounding`` on are OneThinker's
        (arXiv 2512.03043; https://github.com/tulerfeng/OneThinker, ``onethinker_reward.py``), ``boolean`` is
        EasyVideoR1's (arXiv 2604.16893; https://github.com/cyuQ1n/EasyVideoR1). Mean relative accuracy: VSI-Bench
        (arXiv 2412.14171).
    """
    output, truth = extract_answer(completion), extract_answer(solution)
    if problem_type in _KINDS:
        return _KINDS[problem_type](output, truth, lenient=lenient).accuracy
    if problem_type == "regression" and regression == "mra":
        return mean_relative_accuracy(*(_read_number(text, lenient) for text in (output, truth)))
    compare = _STRICT.get(problem_type)
    if compare is None:
        return 0.0
    reward = compare(output, truth)
    if lenient and reward < 1.0 and problem_type in _LENIENT:
        reward = max(reward, _LENIENT[problem_type](output, truth))
    return reward


def accuracy_of(
    completion: str, sample: Sample, *, lenient: bool = False, regression: Literal["error", "mra"] = "error"
) -> float:
    """Return the :func:`accuracy_reward` of a whole answer to ``sample``'s prompt."""
    return accuracy_reward(completion, sample.solution, sample.problem_type, lenient=lenient, regression=regression)


def judged(problem_type: str, config: RewardConfig) -> bool:
    """Return whether the judge gives the accuracy of answers to questions of a type."""
    return config.judge.url is not None and problem_type in config.judge.problem_types


def malformed_reason(completion: str, solution: str, problem_type: str, *, lenient: bool = False) -> str:
    """Return what is wrong with the form of an answer: one of ``structured.MALFORMED``, or "" for nothing.

    Asked of the types whose answers are JSON, numbers, yes or no, or mathematics; of any other it is "". Of several
    faults it is the first. Arguments as of :func:`accuracy_reward`; it raises nothing.
    """
    output, truth = extract_answer(completion), extract_answer(solution)
    if problem_type in _KINDS:
        return _KINDS[problem_type](output, truth, lenient=lenient).malformed
    if problem_type not in ("numerical", "regression"):
        return ""
    if not output:
        return "no_answer"
    number = _read_number(output, lenient)
    return "not_a_number" if number is None else "" if math.isfinite(number) else "not_finite"


def structure_reward(completion: str, solution: str, problem_type: str, *, lenient: bool = False) -> float:
    """Score how far an answer has the structure that was asked for, in [0, 1], whatever it says.

    1 for a well-formed ``temporal grounding`` or ``spatial grounding``. For ``spatial-temporal grounding`` and
    ``tracking`` half for a well-formed answer, and half of the share of the truth's frames that it names. 0 for the
    other types. Arguments as of :func:`accuracy_reward`; it raises nothing.

    Source:
        OneThinker's structure reward, which is half of this, and 0.5 for every answer of the other types.
    """
    if problem_type not in _STRUCTURED:
        return 0.0
    output, truth = extract_answer(completion), extract_answer(solution)
    return _KINDS[problem_type](output, truth, lenient=lenient).structure


def solution_reward(
    answer: str, problem_type: str, *, lenient: bool = False, regression: Literal["error", "mra"] = "error"
) -> float:
    """Return what :func:`accuracy_reward` gives for a solution and itself: the most that a completion can earn.

    It takes microseconds, so that a data file can be checked by it.

    Args:
        answer: what stands in the solution's ``<answer>`` tags, stripped; not empty.
        problem_type: as in :func:`accuracy_reward`.
        lenient, regression: as in :func:`accuracy_reward`.
    """
    if problem_type in ("multiple choice", "OCR"):
        return 1.0
    if problem_type in ("free-form", "open-ended"):
        strict = self_rouge(answer, any_script=False)
        return strict if not lenient or answer.isascii() else max(strict, self_rouge(answer, any_script=True))
    if problem_type in _KINDS:
        return _KINDS[problem_type](answer, answer, lenient=lenient).accuracy
    if problem_type == "regression" and regression == "mra":
        number = _read_number(answer, lenient)
        return mean_relative_accuracy(number, number)
    strict = _STRICT[problem_type](answer, answer)
    return max(strict, _LENIENT[problem_type](answer, answer)) if lenient else strict


def format_reward(completion: str, *, opened: str = "") -> float:
    """Score whether a completion has the requested form.

    1 if the whole answer, unstripped, is ``<think>...</think>``, blanks or nothing, ``<answer>...</answer>``;
    else 0 (``re.fullmatch`` of ``<think>.*?</think>\\s*<answer>.*?</answer>`` with DOTALL).

    Args:
        completion: what the model wrote, tags included.
        opened: what the chat template opened the answer with, such as ``<think>``: the whole answer is that and the
            completion, and one that writes ``<think>`` again earns 0.

    Returns:
        1.0 or 0.0.

    Raises:
        Nothing: any string is scored.

    Source:
        Video-R1's format reward (arXiv 2503.21776; https://github.com/tulerfeng/Video-R1).
    """
    return 1.0 if follows_format(completion, opened) else 0.0


def overlong_penalty(length: int, limit: int, cache: int) -> float:
    """Score how far a completion goes into the last tokens that it may have.

    0 up to ``limit`` - ``cache`` tokens, from there falling linearly to -1 at ``limit``.

    Args:
        length: tokens of the completion.
        limit: most tokens of a completion (Lmax).
        cache: the last tokens before the limit (Lcache); 0: the score is always 0.

    Returns:
        Between -1 and 0.

    Raises:
        Nothing.

    Source:
        Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).
    """
    return -min(1.0, max(0.0, (length - (limit - cache)) / cache)) if cache else 0.0


def score(
    completions: list[str], samples: list[Sample], config: RewardConfig, *, opened: str = ""
) -> tuple[list[float], list[float]]:
    """Compute the rewards of completions; ``samples[i]`` is the sample that ``completions[i]`` belongs to.

    Args:
        completions: what the model wrote.
        opened: what the chat template opened every answer with.

    Returns:
        (accuracy rewards, format rewards as of :func:`format_rewards`), one of each per completion.

    Raises:
        ConfigError: as :func:`format_rewards`; or the judge gives the accuracy of one of them.
    """
    for sample in samples:
        if judged(sample.problem_type, config):
            raise ConfigError(f"reward.judge: it scores {sample.problem_type} answers; ask SlowRewards for its scores")
    accuracy = [
        accuracy_of(whole_text(opened, completion), sample, lenient=config.lenient, regression=config.regression)
        for completion, sample in zip(completions, samples, strict=True)
    ]
    return accuracy, format_rewards(completions, samples, config, opened=opened)


def format_rewards(
    completions: list[str],
    samples: list[Sample],
    config: RewardConfig,
    *,
    opened: str = "",
    known: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> list[float]:
    """Compute ``config.format_weight`` * format_reward + the sum of ``config.functions`` for each completion.

    A completion that has the form also gets ``config.structure_bonus`` * :func:`structure_reward`.

    Arguments as of :func:`score`; the functions are given whole answers. An exception inside one is not caught.

    Args:
        known: what functions have given already, one number per completion by the function's name; those of async
            functions must be here.

    Raises:
        ConfigError: a function cannot be loaded, or does not return one finite number per completion.
    """
    assert len(completions) == len(samples), (len(completions), len(samples))
    forms = [format_reward(completion, opened=opened) for completion in completions]
    rewards = [config.format_weight * form for form in forms]
    answers = [whole_text(opened, completion) for completion in completions]
    if bonus := config.structure_bonus:
        rewards = [
            reward + bonus * form * structure_reward(a, s.solution, s.problem_type, lenient=config.lenient)
            for reward, form, a, s in zip(rewards, forms, answers, samples, strict=True)
        ]
    for name in config.functions:
        extra = known[name] if name in known else _call(name, load_reward(name), answers, samples)
        rewards = [a + b for a, b in zip(rewards, extra, strict=True)]
    return rewards


@functools.cache
def load_reward(name: str) -> RewardFunction:
    """Import the function that ``module:function`` names (``function`` may be dotted).

    Raises:
        ConfigError: there is no such module or function.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and attribute and all(part.isidentifier() for part in module_name.split("."))):
        raise ConfigError(f"reward.functions: expected 'module:function', got {name!r}")
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The module exists; a module that it imports is missing.
        raise ConfigError(
            f"reward.functions: {name!r}: no module {error.name!r}{did_you_mean(error.name, _siblings(error.name))}; "
            "it must be installed or stand in the folder the command runs in"
        ) from None
    for part in attribute.split("."):
        if not hasattr(target, part):
            public = [other for other in dir(target) if not other.startswith("_")]
            hint = did_you_mean(part, public)
            raise ConfigError(f"reward.functions: {name!r}: {module_name!r} has no {attribute!r}{hint}")
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(f"reward.functions: {name!r} is {type(target).__name__}, expected a function")
    return target


def is_async(function: RewardFunction) -> bool:
    """Return whether a reward function is async: it is called with one completion and its sample."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def finite_number(value: Any) -> float | None:
    """Return what a reward function gave for a completion as a float; None where it is no finite number."""
    try:
        if isinstance(value, str):
            raise TypeError
        reward = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return reward if math.isfinite(reward) else None


def _siblings(module_name: str) -> list[str]:
    """Return the full names of the modules in the package that ``module_name`` would be in."""
    parent = module_name.rpartition(".")[0]
    path = getattr(sys.modules.get(parent), "__path__", None)
    found = [f"{parent}.{module.name}" if parent else module.name for module in pkgutil.iter_modules(path)]
    # An editable install may be found only by an import hook, which lists no modules; imported ones are known anyway.
    return found + [name for name in list(sys.modules) if name.rpartition(".")[0] == parent]


def _call(name: str, function: RewardFunction, completions: list[str], samples: list[Sample]) -> list[float]:
    if is_async(function):
        raise ConfigError(f"reward function {name}: it is async, and its rewards are not known; ask SlowRewards")
    try:
        returned = function(list(completions), list(samples))
    except Exception as error:
        error.add_note(f"raised by the reward function {name}")
        raise
    try:
        values = list(returned)
    except TypeError:
        raise ConfigError(
            f"reward function {name}: expected a list of {len(completions)} floats, got {type(returned).__name__}"
        ) from None
    if len(values) != len(completions):
        raise ConfigError(
            f"reward function {name}: expected {len(completions)} values, one per completion, got {len(values)}"
        )
    rewards = []
    for index, value in enumerate(values):
        reward = finite_number(value)
        if reward is None:
            raise ConfigError(f"reward function {name}: expected a finite number for completion {index}, got {value!r}")
        rewards.append(reward)
    return rewards


def _multiple_choice(output: str, truth: str) -> float:
    return float(output == truth)


def _numerical(output: str, truth: str) -> float:
    if ("." in output or "," in output) != ("." in truth or "," in truth):
        return 0.0
    o, g = _number(output), _number(truth)
    return 0.0 if o is None or g is None else float(round(o, 2) == round(g, 2))


def _regression(output: str, truth: str) -> float:
    return closeness(_number(output), _number(truth))


def _ocr(output: str, truth: str) -> float:
    return _word_accuracy(output.split(), truth.split())


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _read_number(text: str, lenient: bool) -> float | None:
    number = _number(text)
    if number is None and lenient and (quantity := read_quantity(text)) is not None:
        return quantity.value
    return number


def _word_accuracy(output: list[str], truth: list[str]) -> float:
    # jiwer counts with this function too, but splits words only at spaces: a tab or a newline would join two words.
    return max(0.0, 1.0 - Levenshtein.distance(truth, output) / max(1, len(truth)))


_PUNCTUATION = " \t\r\n.,;:!?\"'`*_()[]{}“”‘’…。，、！？：；（）"
_MARKED_LETTER = re.compile(r"[(\[]?([a-z])[)\].:]+\s+(.*)", re.DOTALL)


def _lenient_choice(output: str, truth: str) -> float:
    o, g = _choice(output), _choice(truth)
    return float(bool(o) and o == g)


def _choice(text: str) -> str:
    """Return the option's letter if the text starts with a marked one and can mean no other.

    Otherwise return the text in lower case, without punctuation around it.
    """
    folded = text.casefold()
    bare = folded.strip(_PUNCTUATION)
    match = _MARKED_LETTER.match(folded)
    if match and len(bare) > 1:
        words = match[2].split()
        others = [word for word in words if len(word.strip(_PUNCTUATION)) == 1]
        if words and words[-1] not in others and set(others) <= {"a", "i"} | set("0123456789"):
            return match[1]
    return " ".join(bare.split())


def _lenient_numerical(output: str, truth: str) -> float:
    o, g = read_quantity(output), read_quantity(truth)
    return float(o is not None and g is not None and o.agrees(g) and round(o.value, 2) == round(g.value, 2))


def _lenient_regression(output: str, truth: str) -> float:
    o, g = read_quantity(output), read_quantity(truth)
    if o is None or g is None or not o.agrees(g):
        return 0.0
    return closeness(o.value, g.value) if g.value else float(round(o.value, 2) == 0)


def _lenient_ocr(output: str, truth: str) -> float:
    o, g = ([word.strip(_PUNCTUATION) or word for word in text.casefold().split()] for text in (output, truth))
    return _word_accuracy(o, g)


_STRICT: dict[str, Callable[[str, str], float]] = {
    "multiple choice": _multiple_choice,
    "numerical": _numerical,
    "OCR": _ocr,
    "free-form": strict_rouge,
    "regression": _regression,
}
_LENIENT: dict[str, Callable[[str, str], float]] = {
    "multiple choice": _lenient_choice,
    "numerical": _lenient_numerical,
    "OCR": _lenient_ocr,
    "free-form": lenient_rouge,
    "regression": _lenient_regression,
}
# Those that are in none of the two tables above; their scores tell what is wrong with an answer, too.
_KINDS: dict[str, Callable[..., Score]] = {
    "temporal grounding": temporal_grounding.score,
    "spatial grounding": spatial_grounding.score,
    "spatial-temporal grounding": spatial_temporal_grounding.score,
    "tracking": tracking.score,
    "boolean": boolean.score,
    "math": mathematics.score,
    "open-ended": open_ended.score,
}
_STRUCTURED = ("temporal grounding", "spatial grounding", "spatial-temporal grounding", "tracking")
