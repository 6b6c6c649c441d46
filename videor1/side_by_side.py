"""Calls that do not depend on each other, side by side on a CPU's cores.

Passes of a small model are many small operations, which gain little from threads inside of each; two whole passes at a
time take half as long. Waiting threads sleep, where those of OpenMP spin and slow down whatever else uses the cores.
What the calls are must not depend on the number of threads: then no result does. A call that builds a graph for
gradients must also differentiate it: a backward pass adds in the order in which one thread has built its graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

_pool: ThreadPoolExecutor | None = None
_size = 0  # threads of the pool
_count: int | None = None  # see one_thread_each
_as_on_a_card = False
_worker = threading.local()  # whether a thread is one of the pool's


def one_thread_each() -> None:
    """Have torch compute with one thread from now on; :func:`side_by_side` uses as many as torch did until now."""
    global _count
    _count = threads()
    torch.set_num_threads(1)


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """Have a CPU make passes whole and operation by operation, as a plan of a card's memory counts them."""
    global _as_on_a_card
    before, _as_on_a_card = _as_on_a_card, True
    try:
        yield
    finally:
        _as_on_a_card = before


def on_cores(device: torch.device) -> bool:
    """Return whether passes are made for a CPU's cores: divided, and a small model's in one call each."""
    return device.type == "cpu" and not _as_on_a_card


def threads() -> int:
    """Return how many threads compute: those of torch, which OMP_NUM_THREADS sets."""
    return _count or torch.get_num_threads()


def side_by_side(calls: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """Return the results of calls, in their order.

    Each runs in a thread with the caller's modes (gradients, autocast) and its share of torch's threads. They run in
    turn on a device that is no CPU, where there is one thread or one call, and in a call that is one of several itself.

    Raises:
        BaseException: what the first of those that failed has raised, once none is running.
    """
    count = threads()
    if not on_cores(device) or len(calls) < 2 or count < 2 or getattr(_worker, "is_one", False):
        return [call() for call in calls]
    share = max(1, count // len(calls))
    gradients, dtype = torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")
    autocast = torch.is_autocast_enabled("cpu")

    def run(call: Callable[[], T]) -> T:
        _worker.is_one = True
        if torch.get_num_threads() != share:
            torch.set_num_threads(share)
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype, enabled=autocast):
            return call()

    futures = [_threads(count).submit(run, call) for call in calls]
    try:
        wait(futures)
    except BaseException:  # a signal
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    return [future.result() for future in futures]


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool, _size
    if _pool is None or _size != count:
        if _pool is not None:
            _pool.shutdown(wait=False)
        _pool, _size = ThreadPoolExecutor(count, thread_name_prefix="videor1"), count
    return _pool
