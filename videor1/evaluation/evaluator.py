"""Held-out accuracy from frames in order and from shuffled frames; their difference is the temporal gap."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from videor1.answer import whole_text
from videor1.config import EvalOptions
from videor1.data import Dataset
from videor1.data.cache import disk_cache
from videor1.data.prefetch import Prefetcher
from videor1.model import VideoLM
from videor1.model.features import prompt_features, shuffled_features
from videor1.model.prompts import build_input_ids
from videor1.rewards import accuracy_of, malformed_reason
from videor1.rewards.judge import Starter
from videor1.rewards.slow import RewardFailed, SlowRewards
from videor1.rollout import Branch, LocalEngine, Request, RolloutEngine, SamplingOptions
from videor1.types import Completion, Prompt, PromptMedia, Sample, SampleError
from videor1.video.media import join_media, load_media, media_key, media_parts
from videor1.video.rules import QWEN2_RULES, FrameRules
from videor1.video.shuffle import draw_permutation

_CHUNK = 32  # prompts whose completions are sampled together

Score = Callable[[str, Sample], float]  # (whole answer, its sample) -> score in [0, 1]


@dataclass(frozen=True)
class Answered:
    """The result of one sample: means over its answers, and their texts as the model wrote them."""

    sample: Sample
    accuracy: float  # mean score from frames in order (or the image)
    shuffled: float | None  # mean score from shuffled frames; None if the sample is not a video
    text: str  # the first answer
    shuffled_text: str | None  # the first answer from shuffled frames
    texts: tuple[str, ...] = ()  # all answers
    shuffled_texts: tuple[str, ...] = ()  # all answers from shuffled frames
    finished: float = 1.0  # share of answers that were not cut at max_completion_length
    shuffled_finished: float | None = None  # the same share for answers from shuffled frames
    opened: str = ""  # what the chat template opened each answer with, before what the model wrote
    malformed: tuple[str, ...] = ()  # of each answer from frames in order that has a fault: one of MALFORMED


@dataclass
class Evaluation:
    """The results of an evaluation."""

    answers: list[Answered] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # number of skipped samples, by kind of error

    @property
    def ordered(self) -> float:
        """Mean accuracy on videos, frames in order; NaN without videos."""
        return _mean([a.accuracy for a in self.answers if a.shuffled is not None])

    @property
    def shuffled(self) -> float:
        """Mean accuracy on the same videos, frames shuffled."""
        return _mean([a.shuffled for a in self.answers if a.shuffled is not None])

    def metrics(self) -> dict[str, float]:
        """Return the metrics ``eval/*`` for metrics.jsonl."""
        others = [a.accuracy for a in self.answers if a.shuffled is None]
        metrics = {
            "eval/ordered": self.ordered,
            "eval/shuffled": self.shuffled,
            "eval/gap": self.ordered - self.shuffled,
            "eval/samples": len(self.answers),
            "eval/skipped": sum(self.skipped.values()),
            "eval/malformed": sum(len(a.malformed) for a in self.answers),
        }
        return metrics | ({"eval/image": _mean(others)} if others else {})


def merge_evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    """Merge the evaluations of several parts of the samples, in the samples' order."""
    answers = sorted((answer for part in parts for answer in part.answers), key=lambda answer: answer.sample.index)
    return Evaluation(answers, sum((part.skipped for part in parts), Counter()))


class Evaluator:
    """Evaluates models on the samples of a data file, from frames in order and from shuffled frames.

    It may be used repeatedly: media are decoded once, as far as they fit in ``data.cache_mb``. Decoding is greedy
    unless ``config.eval_temperature`` is above 0. The permutation of a sample depends only on the seed and its position
    in the file, so that all models see the same frames. A sample that cannot be read is skipped and counted; it is
    neither right nor wrong.

    Args:
        on_skip: called with the error of each skipped sample.
        shard: (rank, number of ranks): each rank evaluates its part; ``merge_evaluations`` merges them.
        score: scores an answer; None: the accuracy reward, as ``config.reward.lenient`` says.
        slow: what the judge scores instead, as soon as it is sampled; None: nothing. A sample whose score fails is
            skipped and counted.
        top_p: nucleus sampling; 1: off.
        count: number of answers to each sample (and as many from shuffled frames).
    """

    def __init__(
        self,
        dataset: Dataset,
        config: EvalOptions,
        *,
        on_skip: Callable[[SampleError], None] = lambda _: None,
        shard: tuple[int, int] = (0, 1),
        score: Score | None = None,
        slow: SlowRewards | None = None,
        top_p: float = 1.0,
        count: int = 1,
        rules: FrameRules = QWEN2_RULES,
    ) -> None:
        self._samples = dataset.samples[: config.eval_samples or None][shard[0] :: shard[1]]
        self._config, self._on_skip = config, on_skip
        self._score = score or functools.partial(
            accuracy_of, lenient=config.reward.lenient, regression=config.reward.regression
        )
        self._slow, self._top_p, self._count = slow, top_p, count
        self._prefetcher: Prefetcher[Sample, PromptMedia] = Prefetcher(
            functools.partial(load_media, video=config.video, max_decoded_mb=config.data.max_decoded_mb, rules=rules),
            workers=config.data.workers,
            depth=config.data.prefetch,
            timeout=config.data.timeout,
            cache_bytes=config.data.cache_mb * 2**20,
            key=media_key,
            parts=media_parts,
            join=functools.partial(join_media, max_decoded_mb=config.data.max_decoded_mb),
            disk=disk_cache(config.data.cache_dir, config.data.cache_dir_mb, config.video, rules),
        )

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._prefetcher.close()

    def run(self, model: VideoLM) -> Evaluation:
        """Evaluate a model with its current weights."""
        result = Evaluation()
        for block in self.answer(model):
            for _, outcome in block:
                if isinstance(outcome, SampleError):
                    result.skipped[outcome.kind] += 1
                else:
                    result.answers.append(outcome)
        return result

    def answer(
        self, model: VideoLM, done: Container[int] = ()
    ) -> Iterator[list[tuple[Sample, Answered | SampleError]]]:
        """Yield blocks of samples, each with its result or the error for which it is skipped.

        Which samples are in a block depends only on their positions, so that a resumed evaluation gives the same
        results.

        Args:
            done: indices of samples to leave out.
        """
        config = self._config
        options = SamplingOptions(config.max_completion_length, config.eval_temperature, self._top_p)
        engine = LocalEngine(model, options, max_rows=2 * _CHUNK * self._count, backend=config.kernels)
        remaining = [(position, s) for position, s in enumerate(self._samples) if s.index not in done]
        loaded = zip(remaining, self._prefetcher.iterate(sample for _, sample in remaining), strict=True)
        for _, block in itertools.groupby(loaded, key=lambda item: item[0][0] // _CHUNK):
            yield self._answer_block(model, engine, [outcome for _, outcome in block])

    def _answer_block(
        self, model: VideoLM, engine: RolloutEngine, block: list[tuple[Sample, PromptMedia | SampleError]]
    ) -> list[tuple[Sample, Answered | SampleError]]:
        limit = self._config.max_prompt_length
        prompts: list[Prompt] = []
        outcomes: dict[int, Answered | SampleError] = {}
        for sample, media in block:
            try:
                if isinstance(media, SampleError):
                    raise media
                asked = model.asked(sample)
                ids = build_input_ids(model.tokenizer, asked, media, max_prompt_length=limit, family=model.family)
                prompts.append(Prompt(asked, ids, media, sample.index))
            except SampleError as error:
                outcomes[sample.index] = error
                self._on_skip(error)
        if prompts:
            answers = _answer_prompts(model, engine, prompts, self._config, self._score, self._count, self._slow)
            for prompt, answer in zip(prompts, answers, strict=True):
                outcomes[prompt.sample.index] = answer
                if isinstance(answer, SampleError):
                    self._on_skip(answer)
        return [(sample, outcomes[sample.index]) for sample, _ in block]


def _answer_prompts(
    model: VideoLM,
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    config: EvalOptions,
    score: Score,
    count: int,
    slow: SlowRewards | None,
) -> list[Answered | SampleError]:
    """Sample ``count`` answers to each prompt from frames in order, and of videos from shuffled frames; score them."""
    unit = config.temporal.shuffle_unit
    orders = [draw_permutation(p, unit, config.seed) for p in prompts]
    with model.inference():
        ordered = prompt_features(model, prompts)
        shuffled = shuffled_features(model, prompts, orders, unit=unit)
    opened = model.opened_text
    judged = [None if slow is None else slow.group(p.sample, opened=opened, functions=False) for p in prompts]
    requests = [
        Request(
            p,
            config.seed,
            Branch(count, ("eval", p.draw), features),
            None if order is None else Branch(count, ("eval-shuffled", p.draw), from_shuffled, order),
            None if scores is None else Starter(scores),
        )
        for p, features, from_shuffled, order, scores in zip(prompts, ordered, shuffled, orders, judged, strict=True)
    ]
    answers: list[Answered | SampleError] = []
    for group, scores in zip(engine.generate(requests).groups, judged, strict=True):
        assert group is not None, "this engine never fails a single request"
        sample = group.prompt.sample
        if scores is not None:
            try:
                group = scores.collect(group)
            except RewardFailed as failure:
                answers.append(SampleError("reward", str(failure), sample.path))
                continue
        shuffled_completions, known = group.shuffled, group.accuracies

        def accuracy(
            completions: Sequence[Completion], sample: Sample = sample, known: Mapping[str, float] = known
        ) -> float:
            scored = [
                known[c.text] if c.text in known else score(whole_text(model.opened_text, c.text), sample)
                for c in completions
            ]
            return sum(scored) / len(completions)

        def faults(completions: Sequence[Completion], sample: Sample = sample) -> Iterator[str]:
            for completion in completions:
                text = whole_text(model.opened_text, completion.text)
                yield malformed_reason(text, sample.solution, sample.problem_type, lenient=config.reward.lenient)

        def finished(completions: Sequence[Completion]) -> float:
            return sum(c.finished for c in completions) / len(completions)

        answers.append(
            Answered(
                sample,
                accuracy(group.ordered),
                accuracy(shuffled_completions) if shuffled_completions else None,
                group.ordered[0].text,
                shuffled_completions[0].text if shuffled_completions else None,
                tuple(c.text for c in group.ordered),
                tuple(c.text for c in shuffled_completions),
                finished(group.ordered),
                finished(shuffled_completions) if shuffled_completions else None,
                opened,
                tuple(filter(None, faults(group.ordered))),
            )
        )
    return answers


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else float("nan")
