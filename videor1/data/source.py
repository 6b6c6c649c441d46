"""The stream of training records: samples in their seeded order, decoded ahead, tokenised; bad ones skipped aloud."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from videor1.config import CommonConfig, VideoConfig
from videor1.data.cache import disk_cache
from videor1.data.order import Draw, ListOrder
from videor1.data.prefetch import Prefetcher, PrefetchStats
from videor1.data.samples import Dataset
from videor1.data.stream import RowStream, StreamOrder
from videor1.errors import DataError
from videor1.types import Media, Sample, SampleError
from videor1.video.media import load_media, media_key
from videor1.video.version import Key

R = TypeVar("R")


class Source(Generic[R]):
    """Endless records made from a data set or a stream.

    Args:
        dataset: the samples.
        build: makes the record of (sample, media, draw); a SampleError skips the sample.
        on_skip: told every skipped draw.
        start: where to begin: what ``state`` was (resume).
        shard: (rank, ranks): together the ranks see every sample once an epoch.

    Attributes:
        skipped: skipped draws by SampleError.kind.
    """

    def __init__(
        self,
        dataset: Dataset | RowStream,
        config: CommonConfig,
        build: Callable[[Sample, Media | None, int], R],
        *,
        on_skip: Callable[[int, SampleError], None],
        start: Any = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.dataset = dataset
        self._order = _order(dataset, config, shard)
        self._next = self._since = self._order.begin(start)  # of the next draw; after the last record
        self.skipped: Counter[str] = Counter()
        self._build, self._on_skip = build, on_skip
        self._prefetcher: Prefetcher[Draw, Media | None] = Prefetcher(
            functools.partial(_load, video=config.video),
            workers=config.data.workers,
            depth=max(config.data.prefetch, config.per_device_train_batch_size * config.gradient_accumulation_steps),
            timeout=config.data.timeout,
            cache_bytes=config.data.cache_mb * 2**20,
            key=_key,
            disk=disk_cache(config.data.cache_dir, config.data.cache_dir_mb, config.video),
        )
        self._results = self._prefetcher.iterate(self._order.iterate(self._next))
        self._failed: dict[Any, str] = {}  # samples skipped since the last record, and why

    @property
    def position(self) -> int:
        """Draws made, skipped ones included."""
        return self._order.draws(self._next)

    @property
    def state(self) -> Any:
        """Where the next draw is, as JSON: with the seed, all that a resumed run needs to know."""
        return self._order.save(self._next)

    @property
    def epoch(self) -> float:
        """Passes over the data."""
        return self._order.epochs(self._next)

    @property
    def waited_seconds(self) -> float:
        """Seconds that the consumer waited for data, in all."""
        return self._prefetcher.stats.waited_seconds

    @property
    def stats(self) -> PrefetchStats:
        """Decodes, cache hits and what was survived, since this source was made."""
        return self._prefetcher.stats

    @property
    def on_report(self) -> Callable[[str], None]:
        """Told in words of what was survived without the loss of a sample; see ``Prefetcher``."""
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
        """The next ``count`` records. Raises DataError once every sample failed since the last record."""
        return [next(self) for _ in range(count)]

    def close(self) -> None:
        self._prefetcher.close()

    def _skip(self, draw: Draw, error: SampleError) -> None:
        self._next = draw.after
        self.skipped[error.kind] += 1
        self._failed[draw.sample.index if isinstance(draw.sample, Sample) else draw.number] = error.kind
        if error.path is None and draw.path is not None:
            error = SampleError(error.kind, error.message, draw.path)
        self._on_skip(draw.number, error)
        reason = self._order.hopeless(self._failed, self._since, self._next)
        if reason is not None:
            kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(self._failed.values()).most_common())
            raise DataError(f"{self.dataset.path}: {reason} ({kinds}). The last: {error}")


def _order(dataset: Dataset | RowStream, config: CommonConfig, shard: tuple[int, int]) -> Any:
    """StreamOrder or ListOrder: positions are their own business."""
    if isinstance(dataset, RowStream):
        return StreamOrder(dataset, config.seed, config.data.shuffle, shard)
    return ListOrder(dataset, config.seed, config.data.shuffle, shard)


def _load(draw: Draw, video: VideoConfig) -> Media | None:
    if isinstance(draw.sample, SampleError):
        raise draw.sample
    return load_media(draw.sample, video)


def _key(draw: Draw) -> Key | None:
    """None, which is loaded in this process, for the error of a row."""
    return media_key(draw.sample) if isinstance(draw.sample, Sample) else None
