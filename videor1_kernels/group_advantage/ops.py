"""The torch operator of tgrpo_advantages: opaque to torch.compile. Rewards carry no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import compute_dtype
from videor1_kernels.group_advantage.reference import AdvantageOptions


@torch.library.custom_op("videor1::tgrpo_advantages", mutates_args=())
def tgrpo_advantages_op(
    accuracy: Tensor,
    format: Tensor,
    lengths: Tensor,
    shuffled_accuracy: Tensor | None,
    rule: str,
    alpha: float,
    mu: float,
    correct_above: float,
    length_bonus: float,
    low: float,
    high: float,
    normalize: str,
    eps: float,
    apply: str,
    baseline: str,
    batch_std: Tensor | None,
    backend: str,
    correct_above_each: Tensor | None = None,
    p_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return advantages and rewards, each [P, G], and temporal, p and p_shuffled, each [P]."""
    dtype = compute_dtype(accuracy, format, shuffled_accuracy)
    run = dispatch.resolve("tgrpo_advantages", backend, accuracy.device, dtype)
    bar = correct_above if correct_above_each is None else correct_above_each
    options = AdvantageOptions(rule, alpha, mu, bar, length_bonus, (low, high), normalize, eps, apply, baseline)
    with dispatch.running_on(accuracy):
        return run.tgrpo_advantages(accuracy, format, lengths, shuffled_accuracy, options, batch_std, p_mask)


@tgrpo_advantages_op.register_fake
def _(
    accuracy: Tensor, format: Tensor, lengths: Tensor, shuffled_accuracy: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(accuracy, format, shuffled_accuracy)
    advantages, rewards = (accuracy.new_empty(accuracy.shape, dtype=dtype) for _ in range(2))
    temporal, p, p_shuffled = (accuracy.new_empty(len(accuracy), dtype=dtype) for _ in range(3))
    return advantages, rewards, temporal, p, p_shuffled
