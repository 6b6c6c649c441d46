"""The stream of training records: samples in their seeded order, decoded ahead, tokenised; bad ones skipped aloud."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from videor1.cache import Key, disk_cache
from videor1.config import CommonConfig
from videor1.data import Dataset, SampleStream
from videor1.errors import DataError
from videor1.prefetch import Prefetcher, PrefetchStats, load_media, media_key
from videor1.types import Media, Sample, SampleError

R = TypeVar("R")


class Source(Generic[R]):
    """Endless records made from a data set.

    Args:
        dataset: the samples.
        build: makes the record of (sample, media, draw); a SampleError skips the sample.
        on_skip: told every skipped draw.
        start: the draw to begin with (resume).

    Attributes:
        position: the next draw; with the seed, all that a resumed run needs to know.
        skipped: skipped draws by SampleError.kind.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: CommonConfig,
        build: Callable[[Sample, Media | None, int], R],
        *,
        on_skip: Callable[[int, SampleError], None],
        start: int = 0,
    ) -> None:
        self.dataset = dataset
        self.position = start
        self.skipped: Counter[str] = Counter()
        self._build, self._on_skip = build, on_skip
        stream = SampleStream(len(dataset), config.seed, config.data.shuffle)
        self._prefetcher: Prefetcher[_Draw, Media | None] = Prefetcher(
            functools.partial(_load, video=config.video),
            workers=config.data.workers,
            depth=config.data.prefetch,
            timeout=config.data.timeout,
            cache_bytes=config.data.cache_mb * 2**20,
            key=_key,
            disk=disk_cache(config.data.cache_dir, config.data.cache_dir_mb, config.video),
        )
        draws = (_Draw(draw, dataset.samples[index]) for draw, index in stream.iterate(start))
        self._results = self._prefetcher.iterate(draws)
        self._failed: dict[int, str] = {}  # samples skipped since the last record, and why

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
                record = self._build(draw.sample, outcome, draw.number)
            except SampleError as error:
                self._skip(draw, error)
                continue
            self.position = draw.number + 1
            self._failed.clear()
            return record

    def take(self, count: int) -> list[R]:
        """The next ``count`` records. Raises DataError once every sample failed since the last record."""
        return [next(self) for _ in range(count)]

    def close(self) -> None:
        self._prefetcher.close()

    def _skip(self, draw: _Draw, error: SampleError) -> None:
        self.position = draw.number + 1
        self.skipped[error.kind] += 1
        self._failed[draw.sample.index] = error.kind
        if error.path is None and draw.sample.path is not None:
            error = SampleError(error.kind, error.message, draw.sample.path)
        self._on_skip(draw.number, error)
        # Samples, not draws: the end of one epoch and the start of the next may hold the same bad ones.
        if len(self._failed) >= len(self.dataset):
            kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(self._failed.values()).most_common())
            raise DataError(
                f"{self.dataset.path}: none of its {len(self.dataset)} samples can be used ({kinds}). The last: {error}"
            )


class _Draw:
    """One draw of the stream, as the decode workers get it."""

    __slots__ = ("number", "sample")

    def __init__(self, number: int, sample: Sample) -> None:
        self.number, self.sample = number, sample

    @property
    def path(self) -> object:
        return self.sample.path


def _load(draw: _Draw, video: object) -> Media | None:
    return load_media(draw.sample, video)  # type: ignore[arg-type]


def _key(draw: _Draw) -> Key | None:
    return media_key(draw.sample)
