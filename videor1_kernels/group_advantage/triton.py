"""tgrpo_advantages on Triton, in one launch. P prompts, each with G ordered and Gs shuffled completions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.checks import capturing
from videor1_kernels.group_advantage.reference import RULES, AdvantageOptions, check_values

ELEMENTS = 512  # in a program: its prompts times the padded size of a group


@triton.jit
def advantage_kernel(
    accuracy,
    format,
    lengths,
    shuffled,
    advantages,
    rewards_out,
    temporal_out,
    p_out,
    p_shuffled_out,
    unusable,
    P,
    G,
    Gs,
    alpha,
    mu,
    correct_above,
    length_bonus,
    low,
    high,
    eps,
    RULE: tl.constexpr,
    STD: tl.constexpr,
    IN_REWARD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write advantages and rewards [P, G] and the other results [P], from [P, G] inputs and shuffled [P, Gs].

    RULE is the index in RULES. unusable [P] becomes 1 where an input is NaN or infinite and must not be.
    """
    prompts = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    here = prompts < P
    members = tl.arange(0, BLOCK_G)
    inside = here[:, None] & (members < G)[None, :]  # [BLOCK_P, BLOCK_G]
    at = prompts.to(tl.int64)[:, None] * G + members[None, :]
    acc = tl.load(accuracy + at, mask=inside, other=0.0).to(tl.float32)
    form = tl.load(format + at, mask=inside, other=0.0).to(tl.float32)
    length = tl.load(lengths + at, mask=inside, other=0).to(tl.float32)
    correct = inside & (acc > correct_above)
    infinite = float("inf")
    bad = tl.max((~((tl.abs(acc) < infinite) & (tl.abs(form) < infinite))).to(tl.int32), 1)
    # In fp64 equal accuracies have equal means whatever the sizes of the two groups, and a bonus that all completions
    # of a group get does not change their advantages.
    acc, form = acc.to(tl.float64), form.to(tl.float64)
    p = (tl.sum(acc, 1) / G).to(tl.float32)  # [BLOCK_P]

    others = tl.arange(0, BLOCK_S)
    present = here[:, None] & (others < Gs)[None, :]
    second = tl.load(shuffled + prompts.to(tl.int64)[:, None] * Gs + others[None, :], mask=present, other=0.0)
    second = second.to(tl.float32)  # [BLOCK_P, BLOCK_S]
    bad = tl.maximum(bad, tl.max((tl.abs(second) == infinite).to(tl.int32), 1))
    counted = present & (second == second)  # NaN marks a missing completion
    number = tl.sum(counted.to(tl.float64), 1)
    total = tl.sum(tl.where(counted, second, 0.0).to(tl.float64), 1)
    p_shuffled = tl.where(number > 0, total / tl.maximum(number, 1.0), float("nan")).to(tl.float32)

    if RULE == 0:
        temporal = tl.where(p > p_shuffled, alpha * (p - p_shuffled), 0.0)
    elif RULE == 1:
        temporal = tl.where(p > mu * p_shuffled, alpha, 0.0)
    else:
        temporal = tl.where(p >= mu * p_shuffled, alpha, 0.0)
    several = tl.sum(correct.to(tl.int32), 1) > 1
    brief = correct & (length >= low) & (length <= high) & several[:, None]
    extra = tl.where(brief, length_bonus, 0.0).to(tl.float64)
    bonus = tl.where(correct, temporal[:, None], 0.0).to(tl.float64)
    rewards = acc + form + extra
    if IN_REWARD:
        rewards += bonus

    mean = tl.sum(rewards, 1) / G
    centred = tl.where(inside, rewards - mean[:, None], 0.0)
    # Sums that are equal may differ in their last bits, as 0.1 + 0.2 and 0.3 do. Such a difference is no preference.
    magnitude = tl.max(tl.abs(acc) + tl.abs(form) + tl.abs(extra), 1)
    top = tl.max(tl.where(inside, rewards, float("-inf")), 1)
    bottom = tl.min(tl.where(inside, rewards, float("inf")), 1)
    equal = top - bottom <= 4 * 1.1920928955078125e-07 * magnitude
    result = centred
    if STD:
        std = tl.sqrt(tl.sum(centred * centred, 1) / tl.maximum(G - 1, 1))
        result = centred / (std + eps)[:, None]
    result = tl.where(equal[:, None], 0.0, result)
    if not IN_REWARD:
        result += bonus
    tl.store(advantages + at, result, mask=inside)
    tl.store(rewards_out + at, rewards, mask=inside)
    tl.store(temporal_out + prompts, temporal, mask=here)
    tl.store(p_out + prompts, p, mask=here)
    tl.store(p_shuffled_out + prompts, p_shuffled, mask=here)
    tl.store(unusable + prompts, bad, mask=here)


def tgrpo_advantages(
    accuracy: Tensor, format: Tensor, lengths: Tensor, shuffled_accuracy: Tensor | None, options: AdvantageOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return advantages and rewards, each fp32 [P, G], and temporal, p and p_shuffled, each fp32 [P].

    The same launch checks the inputs. The host waits only for the result of the checks, and not in a CUDA graph.
    """
    prompts, size = accuracy.shape
    others = 0 if shuffled_accuracy is None else shuffled_accuracy.shape[1]
    advantages, rewards = (accuracy.new_empty((prompts, size), dtype=torch.float32) for _ in range(2))
    temporal, p, p_shuffled = (accuracy.new_empty(prompts, dtype=torch.float32) for _ in range(3))
    unusable = torch.empty(prompts, dtype=torch.int32, device=accuracy.device)
    block_g = triton.next_power_of_2(size)
    block_s = triton.next_power_of_2(max(others, 1))
    block_p = max(1, ELEMENTS // max(block_g, block_s))
    if prompts:
        low, high = (_rounded(bound, lengths.dtype) for bound in options.length_range)
        advantage_kernel[(triton.cdiv(prompts, block_p),)](
            accuracy.contiguous(),
            format.contiguous(),
            lengths.contiguous(),
            accuracy if shuffled_accuracy is None else shuffled_accuracy.contiguous(),
            advantages,
            rewards,
            temporal,
            p,
            p_shuffled,
            unusable,
            prompts,
            size,
            others,
            options.alpha,
            options.mu,
            _rounded(options.correct_above, accuracy.dtype),
            options.length_bonus,
            low,
            high,
            options.eps,
            RULE=RULES.index(options.rule),
            STD=options.normalize == "std",
            IN_REWARD=options.apply == "reward",
            BLOCK_P=block_p,
            BLOCK_G=block_g,
            BLOCK_S=block_s,
            num_warps=4,
        )
        if not capturing(accuracy) and bool(unusable.any()):
            check_values(accuracy, format, shuffled_accuracy)
    return advantages, rewards, temporal, p, p_shuffled


def _rounded(bound: float, dtype: torch.dtype) -> float:
    """The bound as a comparison in ``dtype`` sees it, so that an accuracy of 0.1 does not exceed 0.1."""
    return torch.tensor(float(bound), dtype=dtype if dtype.is_floating_point else torch.float32).item()
