"""Scores that arrive while a server still answers: they stop what they make needless, and are not waited for."""

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from asking import VIDEO, is_shuffled, make_engine, request
from fake_server import Body, FakeServer, Reply, completion
from patience import PATIENCE

from videor1.types import Completion


class Late:
    """One score, which arrives when told."""

    def __init__(self) -> None:
        self.score: Future[bool] = Future()
        self.needed: bool | None = None
        self.ordered = 0

    def ordered_done(self, answer: Completion) -> None:
        self.ordered += 1

    def shuffled_done(self, answer: Completion) -> None: ...

    @property
    def unsettled(self) -> list[Future[bool]]:
        return [self.score] if self.ordered and self.needed is None else []

    def settle(self, *, wait: bool) -> None:
        assert not wait
        if self.ordered and self.score.done():
            self.needed = self.score.result()


@pytest.mark.parametrize("needed", [True, False, None])
def test_a_score_wakes_the_engine(needed: bool | None, server: FakeServer) -> None:
    """``None``: it never arrives, and nothing waits for it."""
    judge = Late()

    def respond(body: Body, attempt: int) -> Reply:
        slow = is_shuffled(body)
        if slow and needed is not None:
            # Only once both are under way; a completion that is needed goes on to its end.
            threading.Timer(0.3, lambda: judge.score.done() or judge.score.set_result(needed)).start()
        long = PATIENCE if slow and needed is False else 0.6 if slow else 0.0
        return Reply(body=completion(body), delay=long)

    server.respond = respond
    asked: Any = replace(request(VIDEO, 2, 2, judge), late=judge)
    started = time.monotonic()
    rollout = make_engine(server).generate([asked])
    assert time.monotonic() - started < PATIENCE / 4
    (group,) = rollout.groups
    assert group is not None
    assert (len(group.ordered), len(group.shuffled)) == (2, 0 if needed is False else 2)
    assert rollout.stats.shuffled_stopped == (2 if needed is False else 0)
    if not judge.score.done():
        judge.score.set_result(True)  # after the engine's loop has ended: nobody is woken
