"""Reference in plain torch. P prompts, each with G ordered and Gs shuffled completions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype, fail

RULES = ("margin", "threshold", "reference")
NORMALIZE = ("std", "none", "batch", "gdpo")
APPLY = ("reward", "advantage")
BASELINES = ("mean", "leave_one_out")


@dataclass(frozen=True)
class AdvantageOptions:
    """The checked options of a call."""

    rule: str
    alpha: float
    mu: float
    correct_above: float | Tensor  # a tensor: [P], each prompt's
    length_bonus: float
    length_range: tuple[float, float]
    normalize: str
    eps: float
    apply: str
    baseline: str = "mean"


def check_values(
    accuracy: Tensor,
    format: Tensor,
    shuffled_accuracy: Tensor | None,
    batch_std: Tensor | None = None,
    correct_above: float | Tensor = 0.0,
) -> None:
    """Check that accuracies, formats and bars are finite; a shuffled accuracy may be NaN. Waits for the device."""
    op = "tgrpo_advantages"
    for name, values in (("accuracy", accuracy), ("format", format)):
        if not bool(values.isfinite().all()):
            raise fail(op, name, "finite values", f"{int((~values.isfinite()).sum())} that are NaN or infinite")
    if shuffled_accuracy is not None and bool(shuffled_accuracy.isinf().any()):
        raise fail(op, "shuffled_accuracy", "finite values, or NaN for a missing completion", "an infinite value")
    if isinstance(correct_above, Tensor) and not bool(correct_above.isfinite().all()):
        raise fail(op, "correct_above", "finite values", "others")
    if batch_std is not None and not bool(((batch_std >= 0) & batch_std.isfinite()).all()):
        raise fail(op, "batch_std", "finite values of 0 or more", "others")


def tgrpo_advantages(
    accuracy: Tensor,
    format: Tensor,
    lengths: Tensor,
    shuffled_accuracy: Tensor | None,
    options: AdvantageOptions,
    batch_std: Tensor | None = None,
    p_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return advantages and rewards, each [P, G], and temporal, p and p_shuffled, each [P]."""
    check_values(accuracy, format, shuffled_accuracy, batch_std, options.correct_above)
    dtype = compute_dtype(accuracy, format, shuffled_accuracy)
    bar = options.correct_above
    if isinstance(bar, Tensor):
        bar = bar.to(accuracy.dtype)[:, None]
    correct = accuracy > bar  # [P, G]; in the accuracy's own dtype, so that 0.1 does not exceed 0.1
    # In fp64 equal accuracies have equal means whatever the sizes of the two groups, and a bonus that all completions
    # of a group get does not change their advantages.
    accuracy, format = accuracy.double(), format.double()
    p = (accuracy if p_mask is None else accuracy.masked_fill(~p_mask, torch.nan)).nanmean(1).to(dtype)
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

    if options.normalize == "gdpo":
        parts = [
            normalised(accuracy, options.eps, dtype),
            normalised(format, options.eps, dtype),
            options.length_bonus * normalised(brief.double(), options.eps, dtype),
        ]
        if options.apply == "reward":
            parts.append(temporal[:, None].double() * normalised(correct.double(), options.eps, dtype))
        advantages = sum(parts, torch.zeros_like(rewards))
        equal = equal_values(advantages, sum((part.abs() for part in parts), torch.zeros_like(rewards)), dtype)
    else:
        advantages = rewards - rewards.mean(1, keepdim=True)
        # Sums that are equal may differ in their last bits, as 0.1 + 0.2 and 0.3 do. Such a difference is no
        # preference.
        equal = equal_values(rewards, accuracy.abs() + format.abs() + length.abs(), dtype)
        if options.normalize == "std":
            advantages = advantages / (deviation(advantages) + options.eps)
        elif options.normalize == "batch":
            std = deviation((rewards - rewards.mean()).reshape(1, -1)) if batch_std is None else batch_std[:, None]
            advantages = advantages / (std.double() + options.eps)
    advantages = advantages.masked_fill(equal[:, None], 0.0)
    size = accuracy.shape[1]
    if options.baseline == "leave_one_out":
        advantages = advantages * size / max(size - 1, 1)  # (r - the mean of the others) is this times (r - mean)
    if options.apply == "advantage":
        advantages = advantages + bonus
    return advantages.to(dtype), rewards.to(dtype), temporal, p, p_shuffled


def deviation(centred: Tensor) -> Tensor:
    """The standard deviation, ddof 1, of each row of centred values; 0 of a single one."""
    return (centred.square().sum(1, keepdim=True) / max(centred.shape[1] - 1, 1)).sqrt()


def equal_values(values: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether all of a row's values are equal, to within the rounding of sums whose terms have this ``magnitude``."""
    return values.amax(1) - values.amin(1) <= 4 * torch.finfo(dtype).eps * magnitude.amax(1)


def normalised(values: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """One reward of a group, centred and divided by its standard deviation; 0 where it is the same for all."""
    centred = values - values.mean(1, keepdim=True)
    equal = equal_values(values, values.abs(), dtype)
    return (centred / (deviation(centred) + eps)).masked_fill(equal[:, None], 0.0)


def temporal_bonus(p: Tensor, p_shuffled: Tensor, options: AdvantageOptions) -> Tensor:
    """The temporal bonus [P] of p and p_shuffled [P]; 0 if p_shuffled is NaN, for want of a shuffled branch."""
    if options.rule == "margin":
        return torch.where(p > p_shuffled, options.alpha * (p - p_shuffled), 0.0)
    bar = options.mu * p_shuffled
    passed = p > bar if options.rule == "threshold" else p >= bar
    return passed.to(p.dtype) * options.alpha
