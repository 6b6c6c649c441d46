"""A pool of worker processes, built on pebble, that survives workers that crash or hang and its own breakdown."""

from __future__ import annotations

import io
import logging
import multiprocessing
import pickle
import signal
import sys
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

from videor1.data.groups import WorkerGroups, end_own_group, lead_group
from videor1.errors import ConfigError
from videor1.types import SampleError

# Exit codes of a worker that was killed from outside; pebble's workers end with the number of a SIGTERM.
_KILLED = (-signal.SIGKILL, -signal.SIGTERM, int(signal.SIGTERM)) if hasattr(signal, "SIGKILL") else ()
PRELOAD = ["videor1.data.prefetch", "videor1.video.media"]  # imported once, by the process that forks the workers


@dataclass
class Reply:
    """The result of a call: its value or the sample's error, and the seconds that it took."""

    value: Any
    error: SampleError | None
    seconds: float


@dataclass(eq=False)
class Task:
    """A call that was submitted to the pool."""

    function: Callable[[Any], Any]
    item: Any
    future: Future[Any] | None = None
    submitted: float = field(default_factory=time.monotonic)
    retried: bool = False  # whether a worker was killed while it ran the call


def call(function: Callable[[Any], Any], item: Any) -> Reply:
    """Return the reply of ``function(item)``.

    Any exception becomes the sample's error, except a ``ConfigError``, which is the user's mistake and is raised.
    """
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
    """A pool of processes that run ``call(function, item)``.

    A crashed worker costs only the call that it ran. A worker that was killed from outside, as the system does where
    memory runs out, is no fault of the call, which runs once more. What a worker has started ends with it. If the pool
    itself breaks (a worker was killed between calls, or while it held the pipe), all unfinished calls run again on new
    workers.

    Args:
        workers: number of processes.
        timeout: seconds that a call may take before its worker is killed.
    """

    stall_seconds = 60.0  # The pool counts as stuck if it sends no reply for the timeout and this long.
    max_restarts = 3  # most restarts in a row without a reply in between

    def __init__(self, workers: int, timeout: float) -> None:
        self.restarts = 0
        self.retries = 0  # calls that run again because their worker was killed from outside
        self._workers, self._timeout = workers, timeout
        self._fruitless_restarts = 0
        self._unfinished: set[Task] = set()
        self._last_reply = 0.0
        self._start()

    def submit(self, function: Callable[[Any], Any], item: Any) -> Task:
        """Queue the call ``function(item)``. Both must be picklable."""
        task = Task(function, item)
        self._unfinished.add(task)
        self._schedule(task)
        return task

    def result(self, task: Task) -> Reply:
        """Wait for a call and return its reply.

        A timeout, a crash of its worker and a second kill from outside are errors of the sample (of the kinds
        ``timeout`` and ``worker_died``).

        Raises:
            ConfigError: the function raised it.
            RuntimeError: the workers broke down ``max_restarts + 1`` times in a row.
        """
        reply = None
        while reply is None:
            reply = self._poll(task)
        self._unfinished.discard(task)
        return reply

    def cancel(self, task: Task) -> None:
        """Drop a call that nobody waits for. A running call is left to finish, which keeps its worker alive."""
        self._unfinished.discard(task)
        if task.future is not None and not task.future.running():
            task.future.cancel()

    def stop(self) -> None:
        """Kill the workers and their running calls."""
        self._unfinished.clear()
        # An interpreter that is ending would wait for ever for a new thread to begin; the workers end with it.
        if not sys.is_finalizing():
            self._stop_in_background().join(timeout=15)

    def _poll(self, task: Task) -> Reply | None:
        """Return the reply, or None if there is none after half a second or after a restart."""
        path = getattr(task.item, "path", None)
        if task.future and wait([task.future], timeout=0.5).done and not _is_broken(task.future):
            try:
                payload, error, seconds = task.future.result()
            except TimeoutError:
                message = f"took longer than {self._timeout:g} s; its worker was killed"
                return Reply(None, SampleError("timeout", message, path), self._timeout)
            except ProcessExpired as died:
                if died.exitcode in _KILLED and not task.retried:
                    task.retried = True
                    self.retries += 1
                    self._schedule(task)
                    return None
                message = f"the worker died (exit code {died.exitcode}) while it worked on this sample"
                return Reply(None, SampleError("worker_died", message, path), 0.0)
            finally:
                self._groups.end_dead()
            self._fruitless_restarts = 0
            return Reply(None if payload is None else pickle.loads(payload), error, seconds)
        silence = time.monotonic() - max(self._last_reply, task.submitted)
        if _is_broken(task.future) or not self._pool.active or silence > self._timeout + self.stall_seconds:
            self._restart()
        return None

    def _schedule(self, task: Task) -> None:
        self._starting.join()
        task.submitted = time.monotonic()
        try:
            task.future = self._pool.schedule(_call_and_pack, args=(task.function, task.item), timeout=self._timeout)
        except RuntimeError:  # The pool is broken; waiting for this task will restart it.
            task.future = None
        else:
            task.future.add_done_callback(self._note_reply)

    def _note_reply(self, _: Future[Any]) -> None:
        self._last_reply = time.monotonic()

    def _start(self) -> None:
        context = _context()
        self._groups = WorkerGroups(context)
        pool = ProcessPool(
            max_workers=self._workers, initializer=_init_worker, initargs=(self._groups.writer,), context=context
        )
        self._pool = pool
        # The pool starts in the background, because the process that forks the workers needs seconds to import torch.
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
        self._stop_in_background()
        self._start()
        for task in sorted(self._unfinished, key=lambda task: task.submitted):
            if task.future is None or _is_broken(task.future) or not task.future.done():
                self._schedule(task)

    def _stop_in_background(self) -> threading.Thread:
        """Stop the pool in a thread of its own, because a broken pool may never finish stopping."""
        thread = threading.Thread(target=_stop_pool, args=(self._pool, self._starting, self._groups), daemon=True)
        thread.start()
        return thread


def _call_and_pack(function: Callable[[Any], Any], item: Any) -> tuple[bytes | None, SampleError | None, float]:
    reply = call(function, item)
    return (_dumps(reply.value) if reply.error is None else None), reply.error, reply.seconds


class _Pickler(pickle.Pickler):
    """Pickles tensors as plain bytes.

    torch's own transport would open a shared-memory file for each tensor, and the number of these files is limited.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and obj.device.type == "cpu" and obj.dtype != torch.bfloat16:
            return torch.from_numpy, (obj.detach().contiguous().numpy(),)
        return NotImplemented


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def _context() -> Any:
    """Return the start method of the workers: forkserver, which replaces a killed worker quickly, or else spawn."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _init_worker(writer: Any) -> None:
    lead_group(writer)
    torch.set_num_threads(1)
    logging.getLogger("videor1_kernels").setLevel(logging.ERROR)  # The main process has logged the same warnings.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Wait for the parent process to end, then end this worker."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        end_own_group()  # even in the middle of a decode


def _start_pool(pool: ProcessPool) -> None:
    if hasattr(signal, "pthread_sigmask"):
        # Ctrl-C must not reach the processes started here while they still import. They inherit this thread's signal
        # mask, and so do the pool's threads, which start later workers. Starting the resource tracker unblocks SIGINT,
        # so it has to come first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pool.active  # noqa: B018 (reading the property starts the workers)


def _stop_pool(pool: ProcessPool, starting: threading.Thread, groups: WorkerGroups) -> None:
    starting.join()
    pool.stop()
    pool.join()
    groups.end_all()


def _is_broken(future: Future[Any] | None) -> bool:
    """Return whether a call was never scheduled, or was ended by the end of the pool."""
    if future is None or future.cancelled():
        return True
    return future.done() and isinstance(future.exception(), BrokenProcessPool)
