"""Independent calls on a CPU's cores: what they see, what they return, and how they fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from videor1 import side_by_side as module
from videor1.side_by_side import as_on_a_card, on_cores, one_thread_each, side_by_side, threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with patch.object(module, "_count", None):
        yield
    torch.set_num_threads(before)


def together(calls: int) -> list[int]:
    """Calls that return only if they run at the same time; their threads."""
    barrier = threading.Barrier(calls, timeout=20)

    def call() -> int:
        barrier.wait()
        return threading.get_ident()

    return side_by_side([call] * calls, CPU)


def test_calls_run_at_the_same_time_in_order_and_on_their_share_of_the_threads() -> None:
    assert len(set(together(2))) == 2
    assert threading.get_ident() not in together(2)
    assert side_by_side([lambda i=i: i for i in range(7)], CPU) == list(range(7))
    torch.set_num_threads(4)
    assert side_by_side([torch.get_num_threads] * 2, CPU) == [2, 2]
    assert side_by_side([torch.get_num_threads] * 9, CPU) == [1] * 9
    assert torch.get_num_threads() == 4


def test_the_callers_modes_hold() -> None:
    def modes() -> tuple[bool, bool, torch.dtype]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    assert {m[:2] for m in side_by_side([modes] * 2, CPU)} == {(True, False)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert side_by_side([modes] * 2, CPU) == [(False, True, torch.bfloat16)] * 2


@pytest.mark.parametrize("case", ["one call", "one thread", "a card", "as on a card", "inside"])
def test_what_runs_in_turn_stays_in_its_thread(case: str) -> None:
    if case == "one thread":
        torch.set_num_threads(1)
    device, count = torch.device("cuda" if case == "a card" else "cpu"), 1 if case == "one call" else 2

    def found() -> list[int]:
        return side_by_side([threading.get_ident] * count, device)

    if case == "as on a card":
        with as_on_a_card():
            assert found() == [threading.get_ident()] * count
    elif case == "inside":
        for own, inner in side_by_side([lambda: (threading.get_ident(), found())] * 2, CPU):
            assert inner == [own] * 2
    else:
        assert found() == [threading.get_ident()] * count


def test_the_first_failure_is_raised_once_none_is_running() -> None:
    begun, ended = threading.Event(), []

    def fails(name: str) -> None:
        begun.wait(20)
        raise ValueError(name)

    def goes_on() -> None:
        begun.set()
        ended.append(threading.Event().wait(0.2))

    with pytest.raises(ValueError, match="first"):
        side_by_side([lambda: fails("first"), goes_on, lambda: fails("last")], CPU)
    assert ended == [False]
    assert side_by_side([lambda: 1, lambda: 2], CPU) == [1, 2]


def test_one_thread_each_keeps_the_number() -> None:
    one_thread_each()
    assert (torch.get_num_threads(), threads()) == (1, 2)
    assert len(set(together(2))) == 2
    with as_on_a_card():
        assert not on_cores(CPU)
    assert on_cores(CPU)
    assert not on_cores(torch.device("cuda"))
