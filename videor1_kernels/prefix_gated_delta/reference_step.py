"""References of gated_delta_step and causal_conv_step in plain torch. R rows, S slots; heads and sizes as there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from videor1_kernels.checks import check_indices, compute_dtype
from videor1_kernels.prefix_gated_delta.reference import normalised


@dataclass(frozen=True, eq=False)
class DeltaStep:
    """The new token of each row, and the states."""

    q: Tensor  # [R, Hk, Dk]
    k: Tensor  # [R, Hk, Dk]
    v: Tensor  # [R, Hv, Dv]
    g: Tensor  # [R, Hv]
    beta: Tensor  # [R, Hv]
    state: Tensor  # [S, Hv, Dk, Dv]
    slots: Tensor | None  # int64 or int32 [R]; None: row r has slot r


@dataclass(frozen=True, eq=False)
class ConvStep:
    """The new input of each row, the filter, and the last inputs."""

    x: Tensor  # [R, C]
    state: Tensor  # [S, C, K - 1]
    weight: Tensor  # [C, K]
    bias: Tensor | None  # [C]
    slots: Tensor | None  # int64 or int32 [R]; None: row r has slot r


def gated_delta_step(step: DeltaStep, scale: float, use_qk_l2norm: bool) -> Tensor:
    """Return out [R, Hv, Dv] in v's dtype; the states of the rows change."""
    state = _read(step.state, step.slots, len(step.q), "gated_delta_step")
    dtype = compute_dtype(step.q, step.k, step.v, step.g, step.beta, state)
    q, k, v, g, beta, state = (x.to(dtype) for x in (step.q, step.k, step.v, step.g, step.beta, state))
    if use_qk_l2norm:
        q, k = normalised(q), normalised(k)
    repeat = v.shape[1] // k.shape[1]
    q, k = ((x.repeat_interleave(repeat, 1) if repeat > 1 else x).unsqueeze(-1) for x in (q * scale, k))
    state = state * g.exp()[..., None, None]  # [R, Hv, Dk, Dv]
    change = (v - (state * k).sum(2)) * beta[..., None]
    state = state + k * change.unsqueeze(2)
    _write(step.state, step.slots, state)
    return (state * q).sum(2).to(step.v.dtype)


def causal_conv_step(step: ConvStep, activation: str) -> Tensor:
    """Return out [R, C] in x's dtype; the last inputs of the rows change."""
    state = _read(step.state, step.slots, len(step.x), "causal_conv_step")
    window = torch.cat([state, step.x.unsqueeze(-1)], -1)  # [R, C, K]
    dtype = compute_dtype(step.x, step.weight, step.bias)
    out = (window.to(dtype) * step.weight.to(dtype)).sum(-1)
    out = out if step.bias is None else out + step.bias.to(dtype)
    _write(step.state, step.slots, window[..., 1:])
    return (F.silu(out) if activation == "silu" else out).to(step.x.dtype)


def _read(state: Tensor, slots: Tensor | None, rows: int, op: str) -> Tensor:
    if slots is None:
        return state[:rows]
    check_indices(op, "slots", slots, len(state))
    return state.index_select(0, slots)


def _write(state: Tensor, slots: Tensor | None, new: Tensor) -> None:
    if slots is None:
        state[: len(new)] = new
    else:
        state[slots.long()] = new.to(state.dtype)
