"""What linear_grpo_loss must know on the host before it starts, read from the device at once.

How many rows a chunk has, and where it ends, are sizes of matrix products. Each value read by itself would stop the
host until the device has caught up.

N rows, S completions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from videor1_kernels.checks import IGNORED


class KnownRows(NamedTuple):
    """What :func:`read_rows` reads."""

    boundaries: list[int]  # the values of cu_seqlens, [S+1]
    tokens: list[int]  # [S]: the unmasked tokens of each completion
    counts: Tensor  # int64 [S]: the same on the device
    zero: list[bool]  # [S]: whether its advantage is 0
    bad_labels: int  # labels that are neither ignored nor of the vocabulary
    bad_temperatures: int  # temperatures that are not finite and above 0


def read_rows(
    labels: Tensor, advantages: Tensor, cu_seqlens: Tensor, temperatures: Tensor | None, vocabulary: int
) -> KnownRows:
    """Read them, and wait for the device once. ``cu_seqlens`` may still hold anything."""
    boundaries = cu_seqlens.long()
    counted = torch.cat([boundaries.new_zeros(1), (labels != IGNORED).long().cumsum(0)])
    tokens = counted[boundaries.clamp(0, len(labels))].diff()
    outside = ((labels < 0) | (labels >= vocabulary)) & (labels != IGNORED)
    values = [boundaries, tokens, (advantages.float() == 0).long(), outside.sum()[None]]
    if temperatures is not None:
        values.append((~((temperatures > 0) & temperatures.isfinite())).sum()[None])
    read, found = torch.cat(values).tolist(), []
    for part in values:
        found.append(read[: len(part)])
        read = read[len(part) :]
    boundaries_read, tokens_read, zero, (bad_labels,), *rest = found
    zeros = [value == 1 for value in zero]
    return KnownRows(boundaries_read, tokens_read, tokens, zeros, bad_labels, rest[0][0] if rest else 0)
