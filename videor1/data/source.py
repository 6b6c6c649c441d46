"""The stream of training records: samples in a seeded order, decoded ahead of time and turned into records.

Samples that cannot be used are skipped, and each skip is reported.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from videor1.config import CommonConfig, VideoConfig
from videor1.data.cache import disk_cache
from videor1.data.order import Draw, ListOrder
from videor1.data.prefetch import Prefetcher, PrefetchStats
from videor1.data.samples import Dataset
from videor1.data.stream import RowStream, StreamOrder
from videor1.errors import DataError
from videor1.types import Media, PromptMedia, Sample, SampleError
from videor1.video.media import join_media, load_media, media_key, media_parts
from videor1.video.rules import QWEN2_RULES, FrameRules
from videor1.video.version import Key

R = TypeVar("R")


class Source(Generic[R]):
    """An endless iterator over the records that are built from a data set or a stream.

    Args:
        dataset: the samples.
        config: the options of the run; its seed, data and video options and its batch size are used.
        build: makes a record of (sample, media, number of the draw); a SampleError that it raises skips the sample.
        on_skip: called with (number of the draw, error) for every skipped draw.
        start: the ``state`` of the source that this one continues, or 0 for the beginning.
        shard: (rank, ranks); together, the ranks see every sample once in an epoch.
        rules: the model family's, by which frames become patches.

    Attributes:
        skipped: the number of skipped draws by SampleError.kind.
    """

    def __init__(
        self,
        dataset: Dataset | RowStream,
        config: CommonConfig,
        build: Callable[[Sample, PromptMedia, int], R],
        *,
        on_skip: Callable[[int, SampleError], None],
        start: Any = 0,
        shard: tuple[int, int] = (0, 1),
        rules: FrameRules = QWEN2_RULES,
    ) -> None:
        self.dataset = dataset
        self._order = _order(dataset, config, shard)
        self._next = self._order.begin(start)  # position of the next draw
        self._since = self._next  # position after the last record
        self.skipped: Counter[str] = Counter()
        self._build, self._on_skip = build, on_skip
        self._prefetcher: Prefetcher[Draw, PromptMedia] = Prefetcher(
            functools.partial(_load, video=config.video, max_decoded_mb=config.data.max_decoded_mb, rules=rules),
            workers=config.data.workers,
            depth=max(config.data.prefetch, config.per_device_train_batch_size * config.gradient_accumulation_steps),
            timeout=config.data.timeout,
            cache_bytes=config.data.cache_mb * 2**20,
            key=_key,
            parts=_parts,
            join=functools.partial(_join, max_decoded_mb=config.data.max_decoded_mb),
            disk=disk_cache(config.data.cache_dir, config.data.cache_dir_mb, config.video, rules),
        )
        self._results = self._prefetcher.iterate(self._order.iterate(self._next))
        self._failed: dict[Any, str] = {}  # samples skipped since the last record, with the kind of their error

    @property
    def position(self) -> int:
        """The number of draws that this rank has made, including skipped ones."""
        return self._order.draws(self._next)

    @property
    def state(self) -> Any:
        """The position of the next draw, in a form that JSON can hold. A resumed run needs only this and the seed."""
        return self._order.save(self._next)

    @property
    def note(self) -> str:
        """What the user should know of the position that this source has begun at; "" if there is nothing."""
        return self._order.note

    @property
    def epoch(self) -> float:
        """How many passes over the data have been made."""
        return self._order.epochs(self._next)

    @property
    def waited_seconds(self) -> float:
        """Total seconds that the consumer has waited for data."""
        return self._prefetcher.stats.waited_seconds

    @property
    def stats(self) -> PrefetchStats:
        """Counts of decodes, cache hits and handled failures since this source was created."""
        return self._prefetcher.stats

    @property
    def on_report(self) -> Callable[[str], None]:
        """The function that is called with a message for each problem that cost no sample; see ``Prefetcher``."""
        return self._prefetcher.on_report

    @on_report.setter
    def on_report(self, report: Callable[[str], None]) -> None:
        self._prefetcher.on_report = report

    def __iter__(self) -> Iterator[R]:
        return self

    def __next__(self) -> R:
        while True:
            draw, outcome = next(self._results)
            try:
                if isinstance(outcome, SampleError):
                    raise outcome
                assert isinstance(draw.sample, Sample), "an error's load raises it"
                record = self._build(draw.sample, outcome, draw.number)
            except SampleError as error:
                self._skip(draw, error)
                continue
            self._next = self._since = draw.after
            self._failed.clear()
            return record

    def take(self, count: int) -> list[R]:
        """Return the next ``count`` records.

        Raises:
            DataError: so many samples failed since the last record that the data counts as unusable.
        """
        return [next(self) for _ in range(count)]

    def close(self) -> None:
        """Stop the decode workers."""
        self._prefetcher.close()

    def _skip(self, draw: Draw, error: SampleError) -> None:
        self._next = draw.after
        self.skipped[error.kind] += 1
        self._failed[draw.sample.index if isinstance(draw.sample, Sample) else draw.number] = error.kind
        if error.path is None and draw.path is not None:
            error = SampleError(error.kind, error.message, draw.path)
        self._on_skip(draw.number, error)
        reason = self._order.unusable_reason(self._failed, self._since, self._next)
        if reason is not None:
            kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(self._failed.values()).most_common())
            raise DataError(f"{self.dataset.path}: {reason} ({kinds}). The last: {error}")


def _order(dataset: Dataset | RowStream, config: CommonConfig, shard: tuple[int, int]) -> Any:
    """Return the order of a data set's draws. Only the order itself knows the form of its positions."""
    if isinstance(dataset, RowStream):
        return StreamOrder(dataset, config.seed, config.data.shuffle, shard, changed_ok=config.data.changed_ok)
    return ListOrder(dataset, config.seed, config.data.shuffle, shard)


def _load(draw: Draw, video: VideoConfig, max_decoded_mb: int, rules: FrameRules) -> PromptMedia:
    if isinstance(draw.sample, SampleError):
        raise draw.sample
    return load_media(draw.sample, video, max_decoded_mb, rules)


def _key(draw: Draw) -> Key | None:
    """Return the cache key of a draw; None for the error of a row, which needs no worker."""
    return media_key(draw.sample) if isinstance(draw.sample, Sample) else None


def _parts(draw: Draw) -> list[Draw]:
    """Return a draw for each medium of a sample with several."""
    if not isinstance(draw.sample, Sample):
        return []
    return [dataclasses.replace(draw, sample=part) for part in media_parts(draw.sample)]


def _join(draw: Draw, loaded: Sequence[Media], max_decoded_mb: int) -> PromptMedia:
    assert isinstance(draw.sample, Sample)
    return join_media(draw.sample, loaded, max_decoded_mb)
