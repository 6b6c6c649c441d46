"""silu_mul on the backend that is asked for, and as one node of a compiled graph."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch


def run(gate_up: Tensor, inner: Tensor | None, b: Tensor | None, backend: str) -> Tensor:
    """Return [R, I]."""
    chosen = dispatch.resolve("silu_mul", backend, gate_up.device, gate_up.dtype)
    with dispatch.running_on(gate_up):
        return chosen.silu_mul(gate_up, inner, b)


@torch.library.custom_op("videor1::silu_mul", mutates_args=())
def silu_mul_op(gate_up: Tensor, inner: Tensor | None, b: Tensor | None, backend: str) -> Tensor:
    return run(gate_up, inner, b, backend)


@silu_mul_op.register_fake
def _(gate_up: Tensor, inner: Tensor | None, b: Tensor | None, backend: str) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
