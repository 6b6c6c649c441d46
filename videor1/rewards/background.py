"""Calls that wait for somebody else (a judge's reply, a service), in an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from videor1.errors import TrainingStopped

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before the first retry, and the most before a later one
CLOSING_SECONDS = 5.0  # how long the end of a run waits for calls that are cancelled
BLOCKED_SECONDS = 60.0  # how much longer than a call may take the loop may be silent
_QUOTED = 400  # characters of an error that a message shows


class AttemptFailed(Exception):
    """One attempt at a call failed. The message says how.

    Attributes:
        final: whether another attempt would fail in the same way.
        wait: seconds to wait before the next attempt; None: the pause grows from attempt to attempt.
    """

    def __init__(self, message: str, *, final: bool = False, wait: float | None = None) -> None:
        super().__init__(message)
        self.final, self.wait = final, wait


class CallFailed(Exception):
    """A call failed, as did its retries. The message says how the last attempt did."""


class BackgroundLoop:
    """An event loop in one thread, from the first :meth:`submit` to :meth:`close`; then it may begin anew.

    The thread ends with the process at the latest. Only one thread may use this object.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``work`` in the loop, and return its future result."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="videor1-rewards", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, futures: Sequence[Future[Any]], patience: float) -> None:
        """Wait until all futures are done, in whichever way; the thread sleeps meanwhile.

        Args:
            patience: seconds for which the loop may be busy with one piece of work.

        Raises:
            TrainingStopped: the loop has been busy for longer: something in it blocks, so that no timeout can end it.
        """
        alive = time.monotonic()

        def beat() -> None:
            nonlocal alive
            alive = time.monotonic()

        while wait(futures, timeout=0.25).not_done:
            if (silent := time.monotonic() - alive) > patience + BLOCKED_SECONDS:
                raise TrainingStopped(
                    f"reward.functions: the event loop has done nothing for {silent:.0f} s: an async reward blocks it "
                    "(use an asynchronous client, or asyncio.to_thread for what blocks)"
                )
            if self._loop is not None:
                self._loop.call_soon_threadsafe(beat)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel all calls, and end the loop and its thread.

        Args:
            last: called in the loop once they have ended.
        """
        if self._loop is None or self._thread is None:
            return
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=CLOSING_SECONDS)
            if last is not None:
                await asyncio.wait_for(last(), CLOSING_SECONDS)

        with suppress(Exception):  # What cannot be ended in order is left to the end of the process.
            asyncio.run_coroutine_threadsafe(end(), loop).result(3 * CLOSING_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSING_SECONDS)
        if not thread.is_alive():
            loop.close()


class Caller:
    """Makes calls of one kind in an event loop: so many at a time, each within a time, and again where it fails.

    Args:
        concurrency: most calls at a time; a call that pauses before a retry counts.
        timeout: seconds of one attempt.
        retries: attempts after the first.
        on_retry: called in the loop before each of them.
    """

    def __init__(
        self, *, concurrency: int, timeout: float, retries: int, on_retry: Callable[[], None] = lambda: None
    ) -> None:
        self._concurrency, self._timeout, self._retries, self._on_retry = concurrency, timeout, retries, on_retry
        self._places: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """Return what ``make()`` gives.

        Raises:
            CallFailed: no attempt succeeded.
        """
        loop = asyncio.get_running_loop()
        if self._places is None or self._places[0] is not loop:
            self._places = loop, asyncio.Semaphore(self._concurrency)
        async with self._places[1]:
            for number in itertools.count():
                try:
                    return await _within(make, self._timeout)
                except Exception as error:
                    if number == self._retries or getattr(error, "final", False):
                        times = "once" if number == 0 else f"{number + 1} times"
                        raise CallFailed(f"{_told(error)} (tried {times})") from error
                    pause = getattr(error, "wait", None)
                self._on_retry()
                await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**number) if pause is None else pause)
        raise AssertionError("the last attempt returns or raises")


async def _within(make: Callable[[], Awaitable[T]], timeout: float) -> T:
    """Return the result of one attempt; raise any ``Exception``.

    One that does not end when it is cancelled is left behind, so that it cannot hold up others.
    """

    async def attempt() -> T:
        try:
            return await make()
        except (KeyboardInterrupt, SystemExit) as error:  # either would end the loop, and all calls with it
            raise AttemptFailed(f"it raised {type(error).__name__}") from error

    task = asyncio.ensure_future(attempt())
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        task.add_done_callback(lambda late: late.cancelled() or late.exception())  # so that it is not reported as lost
        raise AttemptFailed(f"no result within {timeout:g} s")
    if task.cancelled():
        raise AttemptFailed("it was cancelled")
    return task.result()


def _told(error: Exception) -> str:
    text = str(error)
    text = text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
    return text if isinstance(error, AttemptFailed) else f"{type(error).__name__}: {text}"
