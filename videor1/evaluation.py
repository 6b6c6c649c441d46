"""Held-out accuracy from frames in order and from shuffled frames; their difference is the temporal gap."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from videor1.cache import disk_cache
from videor1.config import EvalOptions
from videor1.data import Dataset
from videor1.model import VideoLM
from videor1.prefetch import Prefetcher, load_media, media_key
from videor1.prompts import build_input_ids
from videor1.rewards import accuracy_reward
from videor1.rollout import Branch, LocalEngine, Request, RolloutEngine
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


def together(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several parts of the samples, in the samples' order."""
    answers = sorted((answer for part in parts for answer in part.answers), key=lambda answer: answer.sample.index)
    return Evaluation(answers, sum((part.skipped for part in parts), Counter()))


class Evaluator:
    """Answers the samples of a data file, as often as asked; media are decoded once, within ``data.cache_mb``.

    Greedy unless ``config.eval_temperature`` is above 0. The permutation of a sample depends on the seed and its
    position in the file alone, so two models are asked the same. A sample that cannot be read is skipped and counted,
    neither right nor wrong.

    Args:
        on_skip: told each skipped sample.
        shard: (rank, ranks): each rank answers its part; ``together`` joins them.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: EvalOptions,
        *,
        on_skip: Callable[[SampleError], None] = lambda _: None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._samples = dataset.samples[: config.eval_samples or None][shard[0] :: shard[1]]
        self._config, self._on_skip = config, on_skip
        self._prefetcher: Prefetcher[Sample, Media | None] = Prefetcher(
            functools.partial(load_media, video=config.video),
            workers=config.data.workers,
            depth=config.data.prefetch,
            timeout=config.data.timeout,
            cache_bytes=config.data.cache_mb * 2**20,
            key=media_key,
            disk=disk_cache(config.data.cache_dir, config.data.cache_dir_mb, config.video),
        )

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._prefetcher.close()

    def run(self, model: VideoLM) -> Evaluation:
        """Evaluate the model's weights as they are."""
        result, config = Evaluation(), self._config
        options = SamplingOptions(config.max_completion_length, config.eval_temperature)
        engine = LocalEngine(model, options, max_rows=2 * _CHUNK, backend=config.kernels)
        prompts = self._prompts(model, result)
        while chunk := list(itertools.islice(prompts, _CHUNK)):
            result.answers += _answer(model, engine, chunk, config)
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
    model: VideoLM, engine: RolloutEngine, prompts: Sequence[Prompt], config: EvalOptions
) -> list[Answered]:
    orders = [draw_permutation(p, config.temporal.shuffle_unit, config.seed) for p in prompts]
    with model.inference():
        ordered = _features(model, prompts, [None] * len(prompts), config)
        moved = [(p, order) for p, order in zip(prompts, orders, strict=True) if order is not None]
        shuffled = iter(_features(model, [p for p, _ in moved], [order for _, order in moved], config))
    requests = [
        Request(
            p, config.seed, Branch(1, ("eval", p.draw), features),
            None if order is None else Branch(1, ("eval-shuffled", p.draw), next(shuffled), order),
        )
        for p, features, order in zip(prompts, ordered, orders, strict=True)
    ]  # fmt: skip
    answers = []
    for group in engine.generate(requests).groups:
        assert group is not None, "this engine answers or raises"
        sample, text = group.prompt.sample, group.ordered[0].text
        other = group.shuffled[0].text if group.shuffled else None
        scores = [
            None if t is None
            else accuracy_reward(t, sample.solution, sample.problem_type, lenient=config.reward.lenient)
            for t in (text, other)
        ]  # fmt: skip
        assert scores[0] is not None
        answers.append(Answered(sample, scores[0], scores[1], text, other))
    return answers


def _features(
    model: VideoLM, prompts: Sequence[Prompt], orders: Sequence[tuple[int, ...] | None], config: EvalOptions
) -> list[Tensor | None]:
    """Vision features of each prompt, its frames in the given order; None without media. One pass of the tower."""
    media = [(p.media, order) for p, order in zip(prompts, orders, strict=True) if p.media is not None]
    unit = config.temporal.shuffle_unit
    patches = [m.patches if order is None else shuffled_patches(m, order, unit) for m, order in media]
    encoded = iter(model.vision_features([m for m, _ in media], patches))
    return [None if p.media is None else next(encoded) for p in prompts]


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else float("nan")
