"""Decode ahead of the step: results in input order from worker processes, bounded memory, nothing decoded twice.

A sample that hangs, crashes its worker or cannot be read comes out as a ``SampleError`` in its place; the others go on.
A file that changes is decoded anew. Its key is taken before and after the decode, by the process that decodes: only
where both are equal is the result that of one version, and kept under it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from videor1.data.cache import ABSENT, DiskCache, MemoryCache, Trouble
from videor1.data.workers import Reply, Task, WorkerPool, call
from videor1.types import SampleError
from videor1.video.version import Key
from videor1_kernels.dispatch import chosen_backend

T = TypeVar("T")
R = TypeVar("R")

_PAUSE_SECONDS = 60.0  # without a write to the disk cache, after one failed


@dataclass
class PrefetchStats:
    """Counts since the prefetcher was made."""

    waited_seconds: float = 0.0  # the consumer's, for results that were not ready
    load_seconds: float = 0.0  # spent in load() and in the disk cache, summed over the workers
    loaded: int = 0  # calls of load() that gave a result, cheap items (key None) left out
    cache_hits: int = 0  # results handed out again from memory
    disk_hits: int = 0  # results read from the disk cache
    backends: Counter[str] = field(default_factory=Counter)  # of ``loaded``: the decoders that ran
    errors: Counter[str] = field(default_factory=Counter)  # failed calls by SampleError.kind
    restarts: int = 0  # of all workers, after the pool itself broke
    changed_files: int = 0  # a cached result was of an older version, or the file changed under the decoder
    cache_errors: int = 0  # the disk cache could not be read or written
    cache_damaged: int = 0  # files of the disk cache that were not whole

    @property
    def worker_deaths(self) -> int:
        """Workers that died or were killed at work, and restarts of all of them."""
        return self.errors["worker_died"] + self.errors["timeout"] + self.restarts


@dataclass
class _Loaded:
    """What a worker hands back for an item that has a key."""

    value: Any
    key: Key  # of the version that the value was made from
    from_disk: bool = False
    changed: bool = False
    troubles: list[Trouble] = field(default_factory=list)


def _load_version(
    item: Any, load: Callable[[Any], Any], key: Callable[[Any], Key], disk: DiskCache | None, write: bool
) -> _Loaded:
    """``load(item)``, or what the disk cache has; runs in a worker.

    A file that changed while it was decoded, well or not, is decoded once more; SampleError (changed) if it changes
    again.
    """
    changed, troubles = False, []
    for _ in range(2):
        before = key(item)
        if disk is not None and before.version is not None:
            found = disk.read(before)
            changed |= found.changed
            troubles += [found.trouble] if found.trouble else []
            if found.media is not None:
                return _Loaded(found.media, before, True, changed, troubles)
        try:
            value = load(item)
        except SampleError:
            if key(item) == before:
                raise
        else:
            if key(item) == before:
                if disk is not None and write and before.version is not None:
                    trouble = disk.write(before, value)
                    troubles += [trouble] if trouble else []
                return _Loaded(value, before, False, changed, troubles)
        changed = True
    raise SampleError("changed", "the file changed twice while it was decoded", getattr(item, "path", None))


@dataclass
class _Shared:
    """One call of load() and the items that wait for it."""

    task: Task
    users: int = 0
    outcome: Any = ABSENT  # a result or a SampleError


@dataclass
class _Job(Generic[T]):
    item: T
    key: Key | None
    shared: _Shared | None = None
    outcome: Any = ABSENT  # from memory
    changed: bool = False  # memory held another version


class Prefetcher(Generic[T, R]):
    """Runs ``load(item)`` ahead of its consumer.

    Args:
        load: a picklable function of one item (a top-level function, or ``functools.partial`` of one).
        workers: processes; 0 loads in this process when the item's turn comes (then nothing can be killed).
        depth: items on their way or waiting to be consumed, at most: bounds the memory.
        timeout: seconds one item may take in a worker before that worker is killed.
        cache_bytes: results kept for items that come again, the least recently used dropped first; 0 keeps none. A
            cached result is handed out again as the same object: treat it as read-only.
        key: what an item's result depends on, taken when it is drawn and again around its load(); picklable. Items
            with equal keys are loaded once while cached or on their way. None for an item that is cheap: it is loaded
            in this process when its turn comes.
        disk: looked into by the workers before they load, and written by them: the step waits for neither, and the
            bytes are theirs already. Results must be ``Media``.

    Attributes:
        on_report: told in words of what was survived: a changed file (once for each change), a damaged file of the
            disk cache, its first error of each sort. Default: a log warning.

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
        key: Callable[[T], Key | None],
        disk: DiskCache | None = None,
    ) -> None:
        if workers < 0 or depth < 1 or not timeout > 0 or cache_bytes < 0:
            raise ValueError(
                "Prefetcher: expected workers >= 0, depth >= 1, timeout > 0 and cache_bytes >= 0, got "
                f"{workers}, {depth}, {timeout} and {cache_bytes}"
            )
        self._load, self._key, self._depth = load, key, depth
        self._stats = PrefetchStats()
        self._memory, self._disk = MemoryCache(cache_bytes), disk
        self._reported: set[Hashable] = set()
        self._write_again = 0.0  # when the disk cache may be written to, by the monotonic clock
        self.on_report: Callable[[str], None] = logging.getLogger(__name__).warning
        self._on_their_way: dict[Hashable, _Shared] = {}
        self._closed = False
        chosen_backend("frames_to_patches")  # compiles it at its first use: here, and not in each worker
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
        if self._disk is not None and not self._closed:
            self._disk.clean()
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
        job.changed = self._is_outdated(job.key)
        job.outcome = self._memory.get(job.key)
        if job.outcome is ABSENT and self._pool is not None:
            job.shared = self._on_their_way.get(job.key)
            if job.shared is None:
                job.shared = self._on_their_way[job.key] = _Shared(self._pool.submit(self._call(), item))
            job.shared.users += 1
        return job

    def _is_outdated(self, key: Key) -> bool:
        """Whether memory holds another version, which goes. A file that vanished is its load()'s error, no change."""
        if not self._memory.holds_other(key):
            return False
        self._memory.drop(key.name)
        return key.version is not None

    def _call(self) -> Callable[[T], _Loaded]:
        write = time.monotonic() >= self._write_again
        return functools.partial(_load_version, load=self._load, key=self._key, disk=self._disk, write=write)  # type: ignore[arg-type]

    def _finish(self, job: _Job[T]) -> R | SampleError:
        if job.changed and job.key is not None:
            self._note_change(job.key, job.item)
        if job.outcome is ABSENT and job.shared is not None:
            job.outcome = job.shared.outcome
        if job.outcome is ABSENT and job.key is not None:
            job.outcome = self._memory.get(job.key)  # loaded in this process since the job began
        if job.outcome is not ABSENT:
            self._stats.cache_hits += 1
            return job.outcome
        started = time.perf_counter()
        if job.shared is not None and self._pool is not None:
            reply = self._pool.result(job.shared.task)
        else:
            reply = call(self._load if job.key is None else self._call(), job.item)
        self._stats.waited_seconds += time.perf_counter() - started
        return self._settle(job, reply)

    def _settle(self, job: _Job[T], reply: Reply) -> R | SampleError:
        """Count a reply, keep it for whoever else wants it, and unwrap it."""
        self._stats.load_seconds += reply.seconds
        if reply.error is not None:
            outcome: Any = reply.error
            self._stats.errors[reply.error.kind] += 1
        elif job.key is None:
            outcome = reply.value
        else:
            outcome = self._unwrap(reply.value, job.item)
        if job.shared is not None:
            job.shared.outcome = outcome
            self._forget(job)
        return outcome

    def _unwrap(self, loaded: _Loaded, item: T) -> R:
        if loaded.from_disk:
            self._stats.disk_hits += 1
        else:
            self._stats.loaded += 1
            self._stats.backends[getattr(loaded.value, "backend", "other")] += 1
        if self._is_outdated(loaded.key) or loaded.changed:
            self._note_change(loaded.key, item)
        for trouble in loaded.troubles:
            self._note_trouble(trouble)
        self._memory.put(loaded.key, loaded.value)
        return loaded.value

    def _note_change(self, key: Key, item: T) -> None:
        if key not in self._reported:  # memory and disk may both have held the old version
            self._reported.add(key)
            self._stats.changed_files += 1
            self.on_report(f"changed while it was cached or decoded: {getattr(item, 'path', item)}; decoded anew")

    def _note_trouble(self, trouble: Trouble) -> None:
        if trouble.kind == "damaged":
            self._stats.cache_damaged += 1
            self.on_report(f"disk cache: {trouble.message}")
            return
        self._stats.cache_errors += 1
        if trouble.kind == "write":
            self._write_again = time.monotonic() + _PAUSE_SECONDS
        sort = (trouble.kind, trouble.code)
        if sort not in self._reported:
            self._reported.add(sort)
            self.on_report(f"disk cache: {trouble.kind} failed: {trouble.message}; training goes on without")

    def _abandon(self, job: _Job[T]) -> None:
        if job.shared is None or job.shared.outcome is not ABSENT:
            return
        job.shared.users -= 1
        if job.shared.users == 0:
            self._forget(job)
            if self._pool is not None and not self._closed:
                self._pool.cancel(job.shared.task)

    def _forget(self, job: _Job[T]) -> None:
        if self._on_their_way.get(job.key) is job.shared:
            del self._on_their_way[job.key]
