"""Reference in plain torch. P prompts, each with G ordered and Gs shuffled completions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype, fail

RULES = ("margin", "threshold", "reference")
NORMALIZE = ("std", "none")
APPLY = ("reward", "advantage")


@dataclass(frozen=True)
class AdvantageOptions:
    """The checked options of a call."""

    rule: str
    alpha: float
    mu: float
    correct_above: float
    length_bonus: float
    length_range: tuple[float, float]
    normalize: str
    eps: float
    apply: str


def check_values(accuracy: Tensor, format: Tensor, shuffled_accuracy: Tensor | None) -> None:
    """Check that accuracies and formats are finite; a shuffled accuracy may be NaN. Waits for the device."""
    op = "tgrpo_advantages"
    for name, values in (("accuracy", accuracy), ("format", format)):
        if not bool(values.isfinite().all()):
            raise fail(op, name, "finite values", f"{int((~values.isfinite()).sum())} that are NaN or infinite")
    if shuffled_accuracy is not None and bool(shuffled_accuracy.isinf().any()):
        raise fail(op, "shuffled_accuracy", "finite values, or NaN for a missing completion", "an infinite value")


def tgrpo_advantages(
    accuracy: Tensor, format: Tensor, lengths: Tensor, shuffled_accuracy: Tensor | None, options: AdvantageOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return advantages and rewards, each [P, G], and temporal, p and p_shuffled, each [P]."""
    check_values(accuracy, format, shuffled_accuracy)
    dtype = compute_dtype(accuracy, format, shuffled_accuracy)
    correct = accuracy > options.correct_above  # [P, G]; in the accuracy's own dtype, so that 0.1 does not exceed 0.1
    # In fp64 equal accuracies have equal means whatever the sizes of the two groups, and a bonus that all completions
    # of a group get does not change their advantages.
    accuracy, format = accuracy.double(), format.double()
    p = accuracy.mean(1).to(dtype)
    if shuffled_accuracy is None:
        p_shuffled = torch.full_like(p, torch.nan)
    else:
        p_shuffled = shuffled_accuracy.double().nanmean(1).to(dtype)
    temporal = temporal_bonus(p, p_shuffled, options)

    low, high = options.length_range
    brief = correct & (lengths >= low) & (lengths <= high) & (correct.sum(1, keepdim=True) > 1)
    length = brief.double() * options.length_bonus
    bonus = torch.where(correct, temporal[:, None].double(), 0.0)
    rewards = accuracy + format + length
    if options.apply == "reward":
        rewards = rewards + bonus

    size = accuracy.shape[1]
    centred = rewards - rewards.mean(1, keepdim=True)
    # Sums that are equal may differ in their last bits, as 0.1 + 0.2 and 0.3 do. Such a difference is no preference.
    magnitude = (accuracy.abs() + format.abs() + length.abs()).amax(1)
    spread = rewards.amax(1) - rewards.amin(1)
    equal = spread <= 4 * torch.finfo(dtype).eps * magnitude
    advantages = centred
    if options.normalize == "std":
        std = (centred.square().sum(1, keepdim=True) / max(size - 1, 1)).sqrt()
        advantages = centred / (std + options.eps)
    advantages = advantages.masked_fill(equal[:, None], 0.0)
    if options.apply == "advantage":
        advantages = advantages + bonus
    return advantages.to(dtype), rewards.to(dtype), temporal, p, p_shuffled


def temporal_bonus(p: Tensor, p_shuffled: Tensor, options: AdvantageOptions) -> Tensor:
    """The temporal bonus [P] of p and p_shuffled [P]; 0 if p_shuffled is NaN, for want of a shuffled branch."""
    if options.rule == "margin":
        return torch.where(p > p_shuffled, options.alpha * (p - p_shuffled), 0.0)
    bar = options.mu * p_shuffled
    passed = p > bar if options.rule == "threshold" else p >= bar
    return passed.to(p.dtype) * options.alpha
