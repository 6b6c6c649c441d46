"""Tests over several options: pairs of values by default, every combination with ``--full``.

    @pytest.mark.grid(loss=LOSSES, level=["token", "sequence"], masked=[False, True])
    def test_equals_naive(loss, level, masked): ...

Every two values of two options meet in one of the tests at least, which is where faults in options lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

try:
    from allpairspy import AllPairs
except ImportError:  # on a machine with a card and without a network: then every combination runs
    AllPairs = None


def pairs(options: dict[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Rows in which every two values of two options meet, the same every time."""
    places = [range(len(values)) for values in options.values()]
    chosen = AllPairs(places) if len(places) > 2 and AllPairs is not None else itertools.product(*places)
    return [tuple(values[i] for values, i in zip(options.values(), row, strict=True)) for row in chosen]


def name(value: Any) -> str:
    """How a value is shown in the name of a test."""
    if isinstance(value, dict):
        return "-".join(name(item) for item in value.values()) or "default"
    if isinstance(value, tuple | list):
        return ",".join(name(item) for item in value) or "none"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(getattr(value, "__name__", value))


def parametrize(metafunc: pytest.Metafunc, *, full: bool) -> None:
    """Give a test with the marker ``grid`` its combinations."""
    for mark in metafunc.definition.iter_markers("grid"):
        rows = list(itertools.product(*mark.kwargs.values())) if full else pairs(mark.kwargs)
        metafunc.parametrize(list(mark.kwargs), rows, ids=["-".join(map(name, row)) for row in rows])
