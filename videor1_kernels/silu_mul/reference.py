"""Reference of silu_mul in plain torch. R rows, I intermediate."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [R, I], of [R, 2 I]."""
    gate, up = gate_up.chunk(2, 1)
    return F.silu(gate) * up
