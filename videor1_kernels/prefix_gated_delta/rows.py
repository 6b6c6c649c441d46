"""Rows of a tensor in another order, and back: the moves between a packed row, its sequences and their chunks.

Torch adds up the gradient of a gather, since an index may stand twice in it. Here none does, so that the gradient is a
gather too, which takes a fraction of the time and gives the same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Move:
    """Neither index names a row twice; one past the last stands for a row of zeros."""

    there: Tensor  # int64 [M]: for each new row the old one, or N
    back: Tensor  # int64 [N]: for each old row the new one, or M

    def __call__(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [M, ...]."""
        moved: Tensor = _Rearranged.apply(rows, self.there, self.back)
        return moved

    @property
    def reverse(self) -> Move:
        return Move(self.back, self.there)


def move_to(there: Tensor, count: int) -> Move:
    """The move of ``count`` rows to where ``there`` says."""
    back = torch.full((count + 1,), len(there), dtype=torch.int64, device=there.device)
    back[there] = torch.arange(len(there), device=there.device)
    return Move(there, back[:count])


class _Rearranged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, 1))
        return padded.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        return _Rearranged.apply(gradients[0], back, there), None, None
