"""The check that a call has the same bits every time, whatever its memory held before."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from videor1_kernels.testing import poisoned_memory


def assert_same_bits(call: Callable[[], Iterable[Tensor]]) -> None:
    """Call twice, the second time in memory that held NaN."""
    first = call()
    with poisoned_memory():
        second = call()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
