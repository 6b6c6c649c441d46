"""Held-out accuracy from frames in order and from shuffled frames; their difference is the temporal gap."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from videor1.config import EvalOptions
from videor1.data import Dataset
from videor1.model import VideoLM
from videor1.prefetch import Prefetcher, load_media, media_key
from videor1.prompts import build_input_ids
from videor1.rewards import accuracy_reward
from videor1.rollout import Request, Sampler
from videor1.sampling import SamplingOptions
from videor1.shuffle import draw_permutation, shuffled_patches
from videor1.types import Media, Prompt, Sample, SampleError

_CHUNK = 32  # prompts answered together


@dataclass(frozen=True)
class Answered:
    """One evaluated sample."""

    sample: Sample
    accuracy: float  # accuracy reward, from frames in order (or the image)
    shuffled: float | None  # from shuffled frames; None where the sample is not a video
    text: str
    shuffled_text: str | None


@dataclass
class Evaluation:
    """Every sample's result, and the samples that could not be used, by kind of error."""

    answers: list[Answered] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def ordered(self) -> float:
        """Mean accuracy on videos, frames in order; NaN without videos."""
        return _mean([a.accuracy for a in self.answers if a.shuffled is not None])

    @property
    def shuffled(self) -> float:
        """Mean accuracy on the same videos, frames shuffled."""
        return _mean([a.shuffled for a in self.answers if a.shuffled is not None])

    def metrics(self) -> dict[str, float]:
        """``eval/*`` for metrics.jsonl."""
        others = [a.accuracy for a in self.answers if a.shuffled is None]
        metrics = {
            "eval/ordered": self.ordered,
            "eval/shuffled": self.shuffled,
            "eval/gap": self.ordered - self.shuffled,
            "eval/samples": len(self.answers),
            "eval/skipped": sum(self.skipped.values()),
        }
        return metrics | ({"eval/image": _mean(others)} if others else {})


class Evaluator:
    """Answers the samples of a data file, as often as asked; media are decoded once, within ``data.cache_mb``.

    Greedy unless ``config.eval_temperature`` is above 0. The permutation of a sample depends on the seed and its
    position in the file alone, so two models are asked the same. A sample that cannot be read is skipped and counted,
    neither right nor wrong.

    Args:
        on_skip: told each skipped sample.
    """

    def __init__(
        self, dataset: Dataset, config: EvalOptions, *, on_skip: Callable[[SampleError], None] = lambda _: None
    ) -> None:
        self._samples = dataset.samples[: config.eval_samples or None]
        self._config, self._on_skip = config, on_skip
        self._prefetcher: Prefetcher[Sample, Media | None] = Prefetcher(
            functools.partial(load_media, video=config.video),
            workers=config.data.workers,
            depth=config.data.prefetch,
            timeout=config.data.timeout,
            cache_bytes=config.data.cache_mb * 2**20,
            key=media_key,
        )

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._prefetcher.close()

    def run(self, model: VideoLM) -> Evaluation:
        """Evaluate the model's weights as they are."""
        result, config = Evaluation(), self._config
        options = SamplingOptions(config.max_completion_length, config.eval_temperature)
        sampler = Sampler(model, max_rows=2 * _CHUNK)
        prompts = self._prompts(model, result)
        while chunk := list(itertools.islice(prompts, _CHUNK)):
            result.answers += _answer(model, sampler, chunk, options, config)
        return result

    def _prompts(self, model: VideoLM, result: Evaluation) -> Iterator[Prompt]:
        limit = self._config.max_prompt_length
        for sample, outcome in self._prefetcher.iterate(self._samples):
            try:
                if isinstance(outcome, SampleError):
                    raise outcome
                ids = build_input_ids(model.tokenizer, sample, outcome, max_prompt_length=limit)
            except SampleError as error:
                result.skipped[error.kind] += 1
                self._on_skip(error)
                continue
            yield Prompt(sample, ids, outcome, sample.index)


def _answer(
    model: VideoLM, sampler: Sampler, prompts: Sequence[Prompt], options: SamplingOptions, config: EvalOptions
) -> list[Answered]:
    requests: list[Request] = []
    with model.inference():
        for shuffle in (False, True):
            orders = [
                draw_permutation(p, config.temporal.shuffle_unit, config.seed) if shuffle else None for p in prompts
            ]
            chosen = [(p, o) for p, o in zip(prompts, orders, strict=True) if o is not None or not shuffle]
            media = [(p.media, o) for p, o in chosen if p.media is not None]
            unit = config.temporal.shuffle_unit
            patches = [m.patches if o is None else shuffled_patches(m, o, unit) for m, o in media]
            features = iter(model.vision_features([m for m, _ in media], patches))
            branch = "eval-shuffled" if shuffle else "eval"
            requests += [
                Request(p, next(features) if p.media is not None else None, 1, config.seed, (branch, p.draw))
                for p, _ in chosen
            ]
    texts = [answer[0].text for answer in sampler.generate(requests, options)]
    shuffled = iter(texts[len(prompts) :])
    answers = []
    for prompt, text in zip(prompts, texts, strict=False):
        sample = prompt.sample
        other = next(shuffled) if sample.data_type == "video" else None
        scores = [
            None if t is None
            else accuracy_reward(t, sample.solution, sample.problem_type, lenient=config.reward.lenient)
            for t in (text, other)
        ]  # fmt: skip
        assert scores[0] is not None
        answers.append(Answered(sample, scores[0], scores[1], text, other))
    return answers


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else float("nan")
