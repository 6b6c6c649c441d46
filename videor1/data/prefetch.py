"""Decode samples ahead of the training step, in worker processes, with bounded memory and caches.

Results come in the order of the input. A sample that hangs, crashes its worker or cannot be read yields a
``SampleError`` in its place, and the other samples are not affected. A worker that is killed from outside costs one
more try. A file that changes is decoded again. The process
that decodes a file takes its key before and after the decode: only if both keys are equal does the result belong to one
version of the file, and it is cached under that version. A sample of several media is one call in a worker, and each of
its media is cached by itself.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from videor1.data.cache import ABSENT, CacheFailure, DiskCache, MemoryCache
from videor1.data.workers import Reply, Task, WorkerPool, call
from videor1.types import SampleError
from videor1.video.version import Key
from videor1_kernels.dispatch import chosen_backend

T = TypeVar("T")
R = TypeVar("R")

_PAUSE_SECONDS = 60.0  # how long nothing is written to the disk cache after a write failed


@dataclass
class PrefetchStats:
    """Counts since the prefetcher was created."""

    waited_seconds: float = 0.0  # how long the consumer waited for results that were not ready
    load_seconds: float = 0.0  # time in load() and in the disk cache, summed over the workers
    loaded: int = 0  # calls of load() that returned a result, without cheap items (key None)
    cache_hits: int = 0  # results that were returned again from memory
    disk_hits: int = 0  # results that were read from the disk cache
    backends: Counter[str] = field(default_factory=Counter)  # the ``loaded`` results by the decoder that ran
    errors: Counter[str] = field(default_factory=Counter)  # failed calls by SampleError.kind
    retries: int = 0  # calls that ran again, after their worker was killed from outside
    restarts: int = 0  # restarts of all workers, after the pool itself broke
    changed_files: int = 0  # times that a cached result was outdated or a file changed while it was decoded
    cache_errors: int = 0  # failed reads and writes of the disk cache
    cache_damaged: int = 0  # damaged files of the disk cache

    @property
    def worker_deaths(self) -> int:
        """How often a worker died or was killed during a call, plus the restarts of all workers."""
        return self.errors["worker_died"] + self.errors["timeout"] + self.retries + self.restarts


@dataclass
class _Loaded:
    """The result that a worker returns for an item that has a key."""

    value: Any
    key: Key  # holds the version of the file that the value was made from
    from_disk: bool = False  # whether the value was read from the disk cache
    changed: bool = False  # whether the file, or the version in the disk cache, turned out to be another
    cache_failures: list[CacheFailure] = field(default_factory=list)


def _load_version(
    item: Any, load: Callable[[Any], Any], key: Callable[[Any], Key], disk: DiskCache | None, write: bool
) -> _Loaded:
    """Load an item from the disk cache, or with ``load(item)``. This runs in a worker.

    A file that changed while it was decoded, whether or not the decode succeeded, is decoded once more.

    Args:
        item: the item to load.
        load: the prefetcher's ``load``.
        key: the prefetcher's ``key``.
        disk: the disk cache, if there is one.
        write: whether the result may be written to the disk cache.

    Raises:
        SampleError: ``load`` failed, or the file changed a second time (kind ``changed``).
    """
    changed, cache_failures = False, []
    for _ in range(2):
        before = key(item)
        if disk is not None and before.version is not None:
            found = disk.read(before)
            changed |= found.changed
            cache_failures += [found.failure] if found.failure else []
            if found.media is not None:
                return _Loaded(found.media, before, True, changed, cache_failures)
        try:
            value = load(item)
        except SampleError:
            if key(item) == before:
                raise
        else:
            if key(item) == before:
                if disk is not None and write and before.version is not None:
                    failure = disk.write(before, value)
                    cache_failures += [failure] if failure else []
                return _Loaded(value, before, False, changed, cache_failures)
        changed = True
    raise SampleError("changed", "the file changed twice while it was decoded", getattr(item, "path", None))


def _load_versions(
    item: Any,
    which: Sequence[int],
    load: Callable[[Any], Any],
    parts: Callable[[Any], Sequence[Any]],
    key: Callable[[Any], Key],
    disk: DiskCache | None,
    write: bool,
) -> list[_Loaded]:
    """Load parts of an item, one after the other, as :func:`_load_version` does. This runs in a worker.

    Args:
        which: the numbers of the parts to load.
        parts: the prefetcher's ``parts``.

    Raises:
        SampleError: that of the first part that fails.
    """
    every = parts(item) or (item,)
    loaded = []
    for number in which:
        one = functools.partial(_load_version, load=load, key=key, disk=disk, write=write)
        reply = call(one, every[number])
        if reply.error is not None:
            raise reply.error
        loaded.append(reply.value)
    return loaded


def _undivided(item: Any) -> Sequence[Any]:
    return ()


def _as_tuple(item: Any, values: Sequence[Any]) -> Any:
    return tuple(values)


@dataclass
class _SharedCall:
    """A call in a worker that loads parts of an item, shared by all items that miss the same parts."""

    task: Task
    users: int = 0  # items that wait for the call
    outcome: Any = ABSENT  # the list of results, or a SampleError, once the call has ended


@dataclass
class _Job(Generic[T]):
    """An item that was drawn and whose result has not been consumed."""

    item: T
    parts: Sequence[T]  # the item itself, or what it is divided into
    keys: Sequence[Key]  # of the parts; empty for a cheap item
    missing: dict[Key, int]  # the parts that were not in memory when it was drawn: their keys and numbers
    found: dict[Key, Any]  # the results of the parts that are known
    changed: list[int]  # the parts of which the cache in memory held another version
    shared: _SharedCall | None = None

    @property
    def name(self) -> tuple[Key, ...]:
        """By which items that miss the same parts share a call."""
        return tuple(self.missing)

    def add(self, results: Sequence[Any]) -> None:
        """Note the results of the missing parts."""
        self.found |= dict(zip(self.missing, results, strict=True))


class Prefetcher(Generic[T, R]):
    """Runs ``load(item)`` in worker processes, ahead of the consumer of the results.

    Workers start in the background, so creating a ``Prefetcher`` does not wait for them. They are fresh processes that
    import the main module: guard a script's entry with ``if __name__ == "__main__"``, and keep heavy imports out of
    its top level. Use a ``Prefetcher`` as a context manager, or call ``close``. It may not be used from several
    threads.

    Args:
        load: a picklable function of one item (a top-level function, or ``functools.partial`` of one).
        workers: number of worker processes; with 0, an item is loaded in this process when its turn comes, and a call
            that hangs cannot be killed.
        depth: largest number of items that are being loaded or wait to be consumed; it bounds the memory.
        timeout: seconds that one item may take in a worker before that worker is killed.
        cache_bytes: bytes of results that are kept in memory for items that come again; the least recently used are
            dropped first, and 0 keeps none. A cached result is returned again as the same object: treat it as
            read-only.
        key: a picklable function that returns what an item's result depends on. It is called when the item is drawn,
            and before and after its load(). Items with equal keys are loaded once, as long as the result is cached or
            the call is running. None marks a cheap item, which is loaded in this process when its turn comes.
        disk: a disk cache, which the workers read before they load an item and write afterwards, so that the training
            step waits for neither. Results must be ``Media``.
        parts: a picklable function that divides an item into items that have keys, are loaded and cached one by one,
            and in one call of a worker, which ``timeout`` bounds; it returns none for an item that is not divided.
        join: makes the result of a divided item from (item, the results of its parts); a SampleError that it raises is
            the item's.

    Attributes:
        on_report: called with a message for each problem that did not stop the run: a changed file (once for each
            change), a damaged file of the disk cache, and the first error of each kind of the disk cache. The default
            logs a warning.
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
        parts: Callable[[T], Sequence[T]] = _undivided,
        join: Callable[[T, Sequence[Any]], R] = _as_tuple,
    ) -> None:
        if workers < 0 or depth < 1 or not timeout > 0 or cache_bytes < 0:
            raise ValueError(
                "Prefetcher: expected workers >= 0, depth >= 1, timeout > 0 and cache_bytes >= 0, got "
                f"{workers}, {depth}, {timeout} and {cache_bytes}"
            )
        self._load, self._key, self._depth = load, key, depth
        self._parts, self._join = parts, join
        self._stats = PrefetchStats()
        self._memory, self._disk = MemoryCache(cache_bytes), disk
        self._reported: set[Hashable] = set()
        self._no_write_until = 0.0  # a time of the monotonic clock, for writes to the disk cache
        self.on_report: Callable[[str], None] = logging.getLogger(__name__).warning
        self._running_calls: dict[Hashable, _SharedCall] = {}  # by the key of their items
        self._closed = False
        chosen_backend("frames_to_patches")  # The first use compiles the operation: once here, not in each worker.
        self._pool = WorkerPool(workers, timeout) if workers else None

    @property
    def stats(self) -> PrefetchStats:
        """The counts up to now."""
        if self._pool is not None:
            self._stats.restarts, self._stats.retries = self._pool.restarts, self._pool.retries
        return self._stats

    def __enter__(self) -> Prefetcher[T, R]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers and kill their running calls. A second call has no effect."""
        if self._pool is not None and not self._closed:
            self._pool.stop()
        if self._disk is not None and not self._closed:
            self._disk.clean()
        self._closed = True
        self._running_calls.clear()

    def iterate(self, items: Iterable[T]) -> Iterator[tuple[T, R | SampleError]]:
        """Yield (item, its result or its error) in the order of ``items``, which may be endless.

        Items are drawn up to ``depth`` ahead of the consumer.

        Raises:
            ConfigError: ``load`` rejects an option.
            RuntimeError: the workers break down several times in a row without a result, or the prefetcher is closed.
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
        parts = self._parts(item) or (item,)
        keys = [key for key in map(self._key, parts) if key is not None]
        assert len(keys) == len(parts) or len(parts) == 1, "only an undivided item is cheap"
        changed = [number for number, key in enumerate(keys) if self._drop_outdated(key)]
        found = {key: value for key in keys if (value := self._memory.get(key)) is not ABSENT}
        missing = {key: number for number, key in reversed(list(enumerate(keys))) if key not in found}
        job = _Job(item, parts, keys, dict(reversed(missing.items())), found, changed)
        if missing and self._pool is not None:
            job.shared = self._running_calls.get(job.name)
            if job.shared is None:
                task = self._pool.submit(self._load_function(job), item)
                job.shared = self._running_calls[job.name] = _SharedCall(task)
            job.shared.users += 1
        return job

    def _drop_outdated(self, key: Key) -> bool:
        """Drop another version of the file from memory, and return whether the file changed.

        A file that has vanished does not count as changed: its load() reports the error.
        """
        if not self._memory.holds_other(key):
            return False
        self._memory.drop(key.name)
        return key.version is not None

    def _load_function(self, job: _Job[T]) -> Callable[[T], Any]:
        """Return the function that loads an item: the missing parts of one that has keys, in a worker or here."""
        if not job.keys:
            return self._load
        return functools.partial(
            _load_versions,
            which=tuple(job.missing.values()),
            load=self._load,
            parts=self._parts,
            key=self._key,  # type: ignore[arg-type]
            disk=self._disk,
            write=time.monotonic() >= self._no_write_until,
        )

    def _finish(self, job: _Job[T]) -> R | SampleError:
        """Return the outcome of a job, and wait for it or load it here if needed."""
        for number in job.changed:
            self._note_change(job.keys[number], job.parts[number])
        if job.shared is not None and job.shared.outcome is not ABSENT:
            self._stats.cache_hits += 1
            return self._take(job, job.shared.outcome)
        # This process may have loaded the missing parts since the job began.
        since = [self._memory.get(key) for key in job.missing]
        if job.keys and all(value is not ABSENT for value in since):
            self._abandon(job)
            self._stats.cache_hits += 1
            return self._take(job, since)
        started = time.perf_counter()
        if job.shared is not None and self._pool is not None:
            reply = self._pool.result(job.shared.task)
        else:
            reply = call(self._load_function(job), job.item)
        self._stats.waited_seconds += time.perf_counter() - started
        return self._process_reply(job, reply)

    def _take(self, job: _Job[T], outcome: list[Any] | SampleError) -> R | SampleError:
        """Return the item's result from the results of its missing parts, or their error."""
        if isinstance(outcome, SampleError):
            return outcome
        job.add(outcome)
        values = [job.found[key] for key in job.keys]
        if len(values) == 1:
            return values[0]
        try:
            return self._join(job.item, values)
        except SampleError as error:
            self._stats.errors[error.kind] += 1
            return error

    def _process_reply(self, job: _Job[T], reply: Reply) -> R | SampleError:
        """Count a reply, store its outcome for the other items of the same call, and return the outcome."""
        self._stats.load_seconds += reply.seconds
        if reply.error is not None:
            outcome: Any = reply.error
            self._stats.errors[reply.error.kind] += 1
        elif not job.keys:
            return reply.value
        else:
            outcome = [
                self._unwrap(loaded, job.parts[number])
                for loaded, number in zip(reply.value, job.missing.values(), strict=True)
            ]
        if job.shared is not None:
            job.shared.outcome = outcome
            self._remove_call(job)
        return self._take(job, outcome)

    def _unwrap(self, loaded: _Loaded, item: T) -> Any:
        """Count a loaded result, report what happened to its files, cache it in memory, and return its value."""
        if loaded.from_disk:
            self._stats.disk_hits += 1
        else:
            self._stats.loaded += 1
            self._stats.backends[getattr(loaded.value, "backend", "other")] += 1
        if self._drop_outdated(loaded.key) or loaded.changed:
            self._note_change(loaded.key, item)
        for failure in loaded.cache_failures:
            self._note_cache_failure(failure)
        self._memory.put(loaded.key, loaded.value)
        return loaded.value

    def _note_change(self, key: Key, item: T) -> None:
        if key not in self._reported:  # Both caches may have held the old version; it is one change.
            self._reported.add(key)
            self._stats.changed_files += 1
            self.on_report(f"changed while it was cached or decoded: {getattr(item, 'path', item)}; decoded anew")

    def _note_cache_failure(self, failure: CacheFailure) -> None:
        if failure.kind == "damaged":
            self._stats.cache_damaged += 1
            self.on_report(f"disk cache: {failure.message}")
            return
        self._stats.cache_errors += 1
        if failure.kind == "write":
            self._no_write_until = time.monotonic() + _PAUSE_SECONDS
        kind_and_code = (failure.kind, failure.code)
        if kind_and_code not in self._reported:
            self._reported.add(kind_and_code)
            self.on_report(f"disk cache: {failure.kind} failed: {failure.message}; training goes on without")

    def _abandon(self, job: _Job[T]) -> None:
        """Give up a job that nobody consumes, and cancel its call if no other job waits for it."""
        if job.shared is None or job.shared.outcome is not ABSENT:
            return
        job.shared.users -= 1
        if job.shared.users == 0:
            self._remove_call(job)
            if self._pool is not None and not self._closed:
                self._pool.cancel(job.shared.task)

    def _remove_call(self, job: _Job[T]) -> None:
        if self._running_calls.get(job.name) is job.shared:
            del self._running_calls[job.name]
