"""Decode ahead of the step: results in input order from worker processes, bounded memory, nothing decoded twice.

A sample that hangs, crashes its worker or cannot be read comes out as a ``SampleError`` in its place; the others go on.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from videor1.config import VideoConfig
from videor1.patches import media_from_clip
from videor1.types import Media, Sample, SampleError
from videor1.video import read_frames, read_image
from videor1.workers import Reply, Task, WorkerPool, call

T = TypeVar("T")
R = TypeVar("R")

_ABSENT: Any = object()


def load_media(sample: Sample, video: VideoConfig) -> Media | None:
    """A sample's 8-bit patches; None for text. Raises ``SampleError``.

    Made for ``Prefetcher(functools.partial(load_media, video=config.video), ...)``.
    """
    if sample.data_type == "text":
        return None
    if sample.path is None:
        raise SampleError("missing_file", f"a sample of data_type {sample.data_type} has no path")
    started = time.perf_counter()
    if sample.data_type == "image":
        clip = read_image(sample.path, max_pixels=video.image_max_pixels, min_pixels=video.image_min_pixels)
    else:
        clip = read_frames(
            sample.path,
            max_frames=video.max_frames,
            fps=video.fps,
            max_pixels=video.max_pixels,
            min_pixels=video.min_pixels,
            backend=video.backend,
        )
    return media_from_clip(clip, sample.data_type, seconds=time.perf_counter() - started)


def media_key(sample: Sample) -> Hashable | None:
    """What ``load_media``'s result depends on within one run; None for text, which needs no decoding."""
    return None if sample.data_type == "text" else (sample.data_type, str(sample.path))


@dataclass
class PrefetchStats:
    """Counts since the prefetcher was made."""

    waited_seconds: float = 0.0  # the consumer's, for results that were not ready
    load_seconds: float = 0.0  # spent in load(), summed over the workers
    loaded: int = 0  # calls of load() that gave a result
    cache_hits: int = 0  # results handed out again
    errors: Counter[str] = field(default_factory=Counter)  # failed calls by SampleError.kind
    restarts: int = 0  # of all workers, after the pool itself broke


@dataclass
class _Shared:
    """One call of load() and the items that wait for it."""

    task: Task
    users: int = 0
    outcome: Any = _ABSENT  # a result or a SampleError


@dataclass
class _Job(Generic[T]):
    item: T
    key: Hashable | None
    shared: _Shared | None = None
    outcome: Any = _ABSENT  # from the cache


class Prefetcher(Generic[T, R]):
    """Runs ``load(item)`` ahead of its consumer.

    Args:
        load: a picklable function of one item (a top-level function, or ``functools.partial`` of one).
        workers: processes; 0 loads in this process when the item's turn comes (then nothing can be killed).
        depth: items on their way or waiting to be consumed, at most: bounds the memory.
        timeout: seconds one item may take in a worker before that worker is killed.
        cache_bytes: results kept for items that come again, the least recently used dropped first; 0 keeps none. A
            cached result is handed out again as the same object: treat it as read-only.
        key: what an item's result depends on; items with equal keys are loaded once while cached or on their way.
            None for an item that is cheap: it is loaded in this process when its turn comes.

    Workers start in the background, so making a ``Prefetcher`` does not wait for them. They are fresh processes that
    import the main module: guard a script's entry with ``if __name__ == "__main__"``, and keep heavy imports out of
    its top level. Use as a context manager, or call ``close``. Not for use from several threads.
    """

    def __init__(
        self,
        load: Callable[[T], R],
        *,
        workers: int,
        depth: int,
        timeout: float,
        cache_bytes: int = 0,
        key: Callable[[T], Hashable | None],
    ) -> None:
        if workers < 0 or depth < 1 or not timeout > 0 or cache_bytes < 0:
            raise ValueError(
                "Prefetcher: expected workers >= 0, depth >= 1, timeout > 0 and cache_bytes >= 0, got "
                f"{workers}, {depth}, {timeout} and {cache_bytes}"
            )
        self._load, self._key, self._depth = load, key, depth
        self._stats = PrefetchStats()
        self._cache = _Cache(cache_bytes)
        self._on_their_way: dict[Hashable, _Shared] = {}
        self._closed = False
        self._pool = WorkerPool(workers, timeout) if workers else None

    @property
    def stats(self) -> PrefetchStats:
        """Counts up to now."""
        if self._pool is not None:
            self._stats.restarts = self._pool.restarts
        return self._stats

    def __enter__(self) -> Prefetcher[T, R]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, killing what they do. A second call has no effect."""
        if self._pool is not None and not self._closed:
            self._pool.stop()
        self._closed = True
        self._on_their_way.clear()

    def iterate(self, items: Iterable[T]) -> Iterator[tuple[T, R | SampleError]]:
        """(item, its result or its error), in the order of ``items``, which may be endless.

        Items are drawn up to ``depth`` ahead of what was consumed.

        Raises:
            ConfigError: an option that ``load`` refuses.
            RuntimeError: the workers break down again and again before doing anything, or the prefetcher is closed.
        """
        source = iter(items)
        jobs: deque[_Job[T]] = deque()
        try:
            self._fill(jobs, source)
            while jobs:
                outcome = self._finish(jobs[0])
                item = jobs.popleft().item
                self._fill(jobs, source)
                yield item, outcome
        finally:
            for job in jobs:
                self._abandon(job)

    def _fill(self, jobs: deque[_Job[T]], source: Iterator[T]) -> None:
        if self._closed:
            raise RuntimeError("Prefetcher: it is closed")
        while len(jobs) < self._depth:
            try:
                item = next(source)
            except StopIteration:
                return
            jobs.append(self._begin(item))

    def _begin(self, item: T) -> _Job[T]:
        job = _Job(item, self._key(item))
        if job.key is None:
            return job
        job.outcome = self._cache.get(job.key)
        if job.outcome is _ABSENT and self._pool is not None:
            job.shared = self._on_their_way.get(job.key)
            if job.shared is None:
                job.shared = self._on_their_way[job.key] = _Shared(self._pool.submit(self._load, item))
            job.shared.users += 1
        return job

    def _finish(self, job: _Job[T]) -> R | SampleError:
        if job.outcome is _ABSENT and job.shared is not None:
            job.outcome = job.shared.outcome
        if job.outcome is _ABSENT and job.key is not None:
            job.outcome = self._cache.get(job.key)  # loaded in this process since the job began
        if job.outcome is not _ABSENT:
            self._stats.cache_hits += 1
            return job.outcome
        started = time.perf_counter()
        if job.shared is not None and self._pool is not None:
            reply = self._pool.result(job.shared.task)
        else:
            reply = call(self._load, job.item)
        self._stats.waited_seconds += time.perf_counter() - started
        return self._settle(job, reply)

    def _settle(self, job: _Job[T], reply: Reply) -> R | SampleError:
        """Count a reply, keep it for whoever else wants it, and unwrap it."""
        self._stats.load_seconds += reply.seconds
        outcome = reply.value if reply.error is None else reply.error
        if reply.error is not None:
            self._stats.errors[reply.error.kind] += 1
        else:
            self._stats.loaded += 1
            if job.key is not None:
                self._cache.put(job.key, outcome)
        if job.shared is not None:
            job.shared.outcome = outcome
            self._forget(job)
        return outcome

    def _abandon(self, job: _Job[T]) -> None:
        if job.shared is None or job.shared.outcome is not _ABSENT:
            return
        job.shared.users -= 1
        if job.shared.users == 0:
            self._forget(job)
            if self._pool is not None and not self._closed:
                self._pool.cancel(job.shared.task)

    def _forget(self, job: _Job[T]) -> None:
        if self._on_their_way.get(job.key) is job.shared:
            del self._on_their_way[job.key]


class _Cache:
    """Least recently used results within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        if key not in self._entries:
            return _ABSENT
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, value: Any) -> None:
        size = _tensor_bytes(value)
        if size > self._limit or not self._limit or key in self._entries:
            return
        self._entries[key] = value, size
        self._used += size
        while self._used > self._limit:
            self._used -= self._entries.popitem(last=False)[1][1]


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value) and not isinstance(value, type):
        return sum(_tensor_bytes(getattr(value, f.name)) for f in fields(value))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return 0
