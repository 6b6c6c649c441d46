"""Worker processes that can be killed: a pool on pebble that survives crashes, hangs and even its own breakdown."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any

import torch
from pebble import ProcessExpired, ProcessPool
from torch import Tensor

from videor1.errors import ConfigError
from videor1.types import SampleError

PRELOAD = ["videor1.data.prefetch", "videor1.video.media"]  # imported once, by the process that workers are forked from


@dataclass
class Reply:
    """What came of one call: its value or the sample's error, and the seconds it took."""

    value: Any
    error: SampleError | None
    seconds: float


@dataclass(eq=False)
class Task:
    """One call on its way."""

    function: Callable[[Any], Any]
    item: Any
    future: Future[Any] | None = None
    submitted: float = field(default_factory=time.monotonic)


def call(function: Callable[[Any], Any], item: Any) -> Reply:
    """``function(item)``; any exception is the sample's error, except a ``ConfigError``, which is the user's."""
    started = time.perf_counter()
    value, error = None, None
    try:
        value = function(item)
    except SampleError as caught:
        error = caught
    except ConfigError:
        raise
    except (Exception, SystemExit) as caught:
        error = SampleError("decode", f"unexpected {type(caught).__name__}: {caught}", getattr(item, "path", None))
    return Reply(value, error, time.perf_counter() - started)


class WorkerPool:
    """Processes that run ``call(function, item)``; each call may take ``timeout`` seconds, then its worker is killed.

    A crashed worker costs only the call it ran. If the pool itself breaks (a worker killed between calls, or while it
    held the pipe), everything unfinished runs again on new workers.
    """

    stall_seconds = 60.0  # beyond the timeout, without any reply, before the pool counts as stuck
    max_restarts = 3  # in a row, without a reply in between

    def __init__(self, workers: int, timeout: float) -> None:
        self.restarts = 0
        self._workers, self._timeout = workers, timeout
        self._fruitless_restarts = 0
        self._unfinished: set[Task] = set()
        self._last_reply = 0.0
        self._start()

    def submit(self, function: Callable[[Any], Any], item: Any) -> Task:
        """Queue a call. ``function`` and ``item`` must be picklable."""
        task = Task(function, item)
        self._unfinished.add(task)
        self._schedule(task)
        return task

    def result(self, task: Task) -> Reply:
        """Wait for a call. Its timeout or its worker's death is an error of the sample (kinds timeout, worker_died)."""
        reply = None
        while reply is None:
            reply = self._poll(task)
        self._unfinished.discard(task)
        return reply

    def cancel(self, task: Task) -> None:
        """Drop a call that nobody waits for. One that is running is left to end, so that its worker lives on."""
        self._unfinished.discard(task)
        if task.future is not None and not task.future.running():
            task.future.cancel()

    def stop(self) -> None:
        """Kill the workers, whatever they do."""
        self._unfinished.clear()
        discarding = self._discard()
        discarding.join(timeout=15)

    def _poll(self, task: Task) -> Reply | None:
        """The reply, or None after half a second or after a restart."""
        path = getattr(task.item, "path", None)
        if task.future and wait([task.future], timeout=0.5).done and not _is_broken(task.future):
            try:
                payload, error, seconds = task.future.result()
            except TimeoutError:
                message = f"took longer than {self._timeout:g} s; its worker was killed"
                return Reply(None, SampleError("timeout", message, path), self._timeout)
            except ProcessExpired as died:
                message = f"the worker died (exit code {died.exitcode}) while it worked on this sample"
                return Reply(None, SampleError("worker_died", message, path), 0.0)
            self._fruitless_restarts = 0
            return Reply(None if payload is None else pickle.loads(payload), error, seconds)
        quiet = time.monotonic() - max(self._last_reply, task.submitted)
        if _is_broken(task.future) or not self._pool.active or quiet > self._timeout + self.stall_seconds:
            self._restart()
        return None

    def _schedule(self, task: Task) -> None:
        self._starting.join()
        task.submitted = time.monotonic()
        try:
            task.future = self._pool.schedule(_call_and_pack, args=(task.function, task.item), timeout=self._timeout)
        except RuntimeError:  # the pool is broken: the wait for this task restarts it
            task.future = None
        else:
            task.future.add_done_callback(self._note_reply)

    def _note_reply(self, _: Future[Any]) -> None:
        self._last_reply = time.monotonic()

    def _start(self) -> None:
        pool = ProcessPool(max_workers=self._workers, initializer=_init_worker, context=_context())
        self._pool = pool
        # In the background: it takes seconds, until the process that workers are forked from has imported torch.
        self._starting = threading.Thread(target=_start_pool, args=(pool,), daemon=True)
        self._starting.start()

    def _restart(self) -> None:
        if self._fruitless_restarts == self.max_restarts:
            raise RuntimeError(
                f"the decode workers broke down {self.max_restarts + 1} times in a row without decoding anything; is "
                'the script\'s entry guarded by if __name__ == "__main__"? data.workers=0 decodes without workers'
            )
        self._fruitless_restarts += 1
        self.restarts += 1
        self._discard()
        self._start()
        for task in sorted(self._unfinished, key=lambda task: task.submitted):
            if task.future is None or _is_broken(task.future) or not task.future.done():
                self._schedule(task)

    def _discard(self) -> threading.Thread:
        """Stop the pool in a thread of its own: a broken one may never finish stopping."""
        thread = threading.Thread(target=_stop_pool, args=(self._pool, self._starting), daemon=True)
        thread.start()
        return thread


def _call_and_pack(function: Callable[[Any], Any], item: Any) -> tuple[bytes | None, SampleError | None, float]:
    reply = call(function, item)
    return (_dumps(reply.value) if reply.error is None else None), reply.error, reply.seconds


class _Pickler(pickle.Pickler):
    """Tensors as plain bytes: torch's own transport opens a shared-memory file for each, and runs out of them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and obj.device.type == "cpu" and obj.dtype != torch.bfloat16:
            return torch.from_numpy, (obj.detach().contiguous().numpy(),)
        return NotImplemented


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def _context() -> Any:
    """Fork from a clean process (a killed worker is replaced at once), or spawn where the system has no fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _init_worker() -> None:
    torch.set_num_threads(1)
    logging.getLogger("videor1_kernels").setLevel(logging.ERROR)  # the process that started them has said it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # even from the middle of a decode


def _start_pool(pool: ProcessPool) -> None:
    if hasattr(signal, "pthread_sigmask"):
        # Ctrl-C must not hit the processes started here while they still import: they inherit the mask, as do the
        # pool's threads, which start the later ones. The resource tracker's start unblocks SIGINT: it comes first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pool.active  # noqa: B018  (the property starts the workers)


def _stop_pool(pool: ProcessPool, starting: threading.Thread) -> None:
    starting.join()
    pool.stop()
    pool.join()


def _is_broken(future: Future[Any] | None) -> bool:
    """Never scheduled, or ended by the pool's end and not by its call's."""
    if future is None or future.cancelled():
        return True
    return future.done() and isinstance(future.exception(), BrokenProcessPool)
