"""Calls in the background: how many at a time, how long, how often, and how they end."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from videor1.errors import TrainingStopped
from videor1.rewards import background
from videor1.rewards.background import AttemptFailed, BackgroundLoop, Caller, CallFailed


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    made = BackgroundLoop()
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "videor1-rewards"]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.001)


def results(loop: BackgroundLoop, caller: Caller, makes: list[Any]) -> list[Any]:
    """What each call gives, or the message with which it fails."""
    futures = [loop.submit(caller.call(make)) for make in makes]
    loop.wait(futures, 60)
    return [str(f.exception()) if f.exception() else f.result() for f in futures]


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_so_many_at_a_time_and_not_one_after_the_other(concurrency: int, loop: BackgroundLoop) -> None:
    running, most = 0, 0

    async def call() -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return running

    started = time.perf_counter()
    found = results(loop, Caller(concurrency=concurrency, timeout=60, retries=0), [call] * 20)
    rounds = -(-20 // concurrency)
    seconds = time.perf_counter() - started
    assert seconds >= 0.05 * rounds
    assert seconds < 0.05 * 20 or concurrency == 1
    assert most == concurrency
    assert len(found) == 20


def test_retries_and_what_the_last_attempt_says(loop: BackgroundLoop) -> None:
    attempts, retries = [], []

    def failing(times: int, error: Exception) -> Any:
        async def call() -> str:
            attempts.append(times)
            if attempts.count(times) <= times:
                raise error
            return "done"

        return call

    caller = Caller(concurrency=4, timeout=60, retries=2, on_retry=lambda: retries.append(1))
    found = results(
        loop,
        caller,
        [
            failing(0, ValueError("x")),
            failing(2, ValueError("x")),
            failing(3, ValueError("y" * 5000)),
            failing(9, AttemptFailed("refused", final=True)),
            failing(1, AttemptFailed("busy", wait=0.0)),
        ],
    )
    assert found[:2] == ["done", "done"]
    assert found[2] == f"ValueError: {'y' * 400}... (tried 3 times)"
    assert found[3:] == ["refused (tried once)", "done"]
    assert [attempts.count(times) for times in (0, 2, 3, 9, 1)] == [1, 3, 3, 1, 2]
    assert len(retries) == 0 + 2 + 2 + 0 + 1


def test_no_call_can_hold_up_others_or_end_the_loop(loop: BackgroundLoop) -> None:
    async def forever() -> None:
        await asyncio.sleep(1e6)

    async def stubborn() -> None:
        for _ in range(20):
            try:
                await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                continue

    async def leaves() -> None:
        raise SystemExit

    async def interrupts() -> None:
        raise KeyboardInterrupt

    async def cancels() -> None:
        raise asyncio.CancelledError

    async def fine() -> int:
        return 1

    def no_coroutine() -> Any:
        return 5

    calls = [forever, stubborn, leaves, interrupts, cancels, no_coroutine, fine]
    started = time.perf_counter()
    found = results(loop, Caller(concurrency=1, timeout=0.1, retries=0), calls)
    assert time.perf_counter() - started < 2
    expected = ["no result within 0.1 s"] * 2 + ["it raised SystemExit", "it raised KeyboardInterrupt"]
    expected += ["it was cancelled", "TypeError: "]
    assert all(str(one).startswith(words) for one, words in zip(found, expected, strict=False)), found
    assert found[-1] == 1


def test_it_ends_with_calls_in_the_air_and_begins_anew(loop: BackgroundLoop) -> None:
    ended = []

    async def forever() -> None:
        try:
            await asyncio.sleep(1e6)
        finally:
            ended.append("call")

    async def last() -> None:
        ended.append("last")

    caller = Caller(concurrency=9, timeout=1e6, retries=3)
    futures = [loop.submit(caller.call(forever)) for _ in range(3)]
    time.sleep(0.05)
    loop.close(last)
    assert ended == ["call"] * 3 + ["last"]
    assert all(future.cancelled() for future in futures)
    loop.close()  # twice is nothing

    async def fine() -> int:
        return 7

    assert results(loop, caller, [fine]) == [7]


def test_a_loop_that_is_blocked_is_told(loop: BackgroundLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "BLOCKED_SECONDS", 0.5)
    free = threading.Event()

    async def blocks() -> None:
        free.wait(60)

    future = loop.submit(Caller(concurrency=1, timeout=0.1, retries=0).call(blocks))
    try:
        with pytest.raises(TrainingStopped, match=r"the event loop has done nothing .* asyncio\.to_thread"):
            loop.wait([future], 0.5)
    finally:
        free.set()

    async def slow() -> int:
        await asyncio.sleep(2.5)
        return 1

    # What only waits is no block, however long.
    slept = loop.submit(Caller(concurrency=1, timeout=9, retries=0).call(slow))
    loop.wait([slept], 0.5)
    assert slept.result() == 1


def test_failures_are_of_one_kind(loop: BackgroundLoop) -> None:
    async def fails() -> None:
        raise ValueError("no")

    future = loop.submit(Caller(concurrency=1, timeout=9, retries=0).call(fails))
    with pytest.raises(CallFailed, match=r"^ValueError: no \(tried once\)$"):
        future.result()
