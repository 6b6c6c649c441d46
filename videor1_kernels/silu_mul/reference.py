"""Reference of silu_mul in plain torch. R rows, I intermediate, r rank of an adapter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor, inner: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up, [R, I], of [R, 2 I]; what the adapters give, of [R, 2 r] and [2 I, r], is added first."""
    gate, up = gate_up.chunk(2, 1)
    if inner is not None and b is not None:
        of_gate, of_up = inner.chunk(2, 1)
        b_gate, b_up = b.chunk(2, 0)
        gate, up = torch.addmm(gate, of_gate, b_gate.T), torch.addmm(up, of_up, b_up.T)
    return F.silu(gate) * up
