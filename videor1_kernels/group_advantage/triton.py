"""tgrpo_advantages on Triton, in one launch, or in two where the deviation of the batch is computed.

P prompts, each with G ordered and Gs shuffled completions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from videor1_kernels.checks import capturing
from videor1_kernels.group_advantage.reference import NORMALIZE, RULES, AdvantageOptions, check_values, deviation

ELEMENTS = 512  # in a program: its prompts times the padded size of a group
STD, NONE, BATCH, GDPO = (tl.constexpr(NORMALIZE.index(name)) for name in ("std", "none", "batch", "gdpo"))


@triton.jit
def deviation_of(centred, G):
    """The standard deviation [BLOCK_P], ddof 1, of centred fp64 values [BLOCK_P, BLOCK_G] that are 0 outside."""
    return tl.sqrt(tl.sum(centred * centred, 1) / tl.maximum(G - 1, 1))


@triton.jit
def equal_values(values, magnitude, inside):
    """Whether all of a row's values [BLOCK_P, BLOCK_G] are equal, to within the rounding of sums of this magnitude."""
    top = tl.max(tl.where(inside, values, float("-inf")), 1)
    bottom = tl.min(tl.where(inside, values, float("inf")), 1)
    return top - bottom <= 4 * 1.1920928955078125e-07 * tl.max(magnitude, 1)


@triton.jit
def normalised(values, inside, G, eps):
    """One fp64 reward [BLOCK_P, BLOCK_G] of each group, normalised; 0 where it is the same for all."""
    mean = tl.sum(values, 1) / G
    centred = tl.where(inside, values - mean[:, None], 0.0)
    equal = equal_values(values, tl.abs(values), inside)
    return tl.where(equal[:, None], 0.0, centred / (deviation_of(centred, G) + eps)[:, None])


@triton.jit
def advantage_kernel(
    accuracy,
    format,
    lengths,
    shuffled,
    batch_std,
    bars,
    p_mask,
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
    MODE: tl.constexpr,
    BARS: tl.constexpr,
    P_MASK: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    IN_REWARD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write advantages and rewards [P, G] and the other results [P], from [P, G] inputs and shuffled [P, Gs].

    RULE and MODE are the indices in RULES and NORMALIZE; batch_std [P] is read in the mode BATCH alone. With BARS, bars
    [P], in the accuracy's dtype, stand for correct_above; with P_MASK, p is the mean where p_mask [P, G] is true.
    unusable [P] becomes 1 where an input is NaN or infinite and must not be.
    """
    prompts = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    here = prompts < P
    members = tl.arange(0, BLOCK_G)
    inside = here[:, None] & (members < G)[None, :]  # [BLOCK_P, BLOCK_G]
    at = prompts.to(tl.int64)[:, None] * G + members[None, :]
    acc = tl.load(accuracy + at, mask=inside, other=0.0).to(tl.float32)
    form = tl.load(format + at, mask=inside, other=0.0).to(tl.float32)
    length = tl.load(lengths + at, mask=inside, other=0).to(tl.float32)
    infinite = float("inf")
    bad = tl.max((~((tl.abs(acc) < infinite) & (tl.abs(form) < infinite))).to(tl.int32), 1)
    if BARS:
        bar = tl.load(bars + prompts, mask=here, other=0.0).to(tl.float32)  # [BLOCK_P]
        correct = inside & (acc > bar[:, None])
        bad = tl.maximum(bad, (~(tl.abs(bar) < infinite)).to(tl.int32))
    else:
        correct = inside & (acc > correct_above)
    # In fp64 equal accuracies have equal means whatever the sizes of the two groups, and a bonus that all completions
    # of a group get does not change their advantages.
    acc, form = acc.to(tl.float64), form.to(tl.float64)
    if P_MASK:
        in_p = inside & (tl.load(p_mask + at, mask=inside, other=0) != 0)
        members_in_p = tl.sum(in_p.to(tl.float64), 1)
        mean_p = tl.sum(tl.where(in_p, acc, 0.0), 1) / tl.maximum(members_in_p, 1.0)
        p = tl.where(members_in_p > 0, mean_p, float("nan")).to(tl.float32)
    else:
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

    if MODE == GDPO:
        z_accuracy, z_format = normalised(acc, inside, G, eps), normalised(form, inside, G, eps)
        z_length = length_bonus * normalised(brief.to(tl.float64), inside, G, eps)
        result = z_accuracy + z_format + z_length
        magnitude = tl.abs(z_accuracy) + tl.abs(z_format) + tl.abs(z_length)
        if IN_REWARD:
            z_temporal = temporal.to(tl.float64)[:, None] * normalised(correct.to(tl.float64), inside, G, eps)
            result += z_temporal
            magnitude += tl.abs(z_temporal)
        equal = equal_values(result, magnitude, inside)
    else:
        mean = tl.sum(rewards, 1) / G
        result = tl.where(inside, rewards - mean[:, None], 0.0)
        # Sums that are equal may differ in their last bits, as 0.1 + 0.2 and 0.3 do. Such a difference is no
        # preference.
        equal = equal_values(rewards, tl.abs(acc) + tl.abs(form) + tl.abs(extra), inside)
        if MODE == STD:
            result = result / (deviation_of(result, G) + eps)[:, None]
        elif MODE == BATCH:
            std = tl.load(batch_std + prompts, mask=here, other=0.0).to(tl.float64)
            bad = tl.maximum(bad, (~((std >= 0) & (std < infinite))).to(tl.int32))
            result = result / (std + eps)[:, None]
    result = tl.where(equal[:, None], 0.0, result)
    if LEAVE_ONE_OUT:
        result = result * G / tl.maximum(G - 1, 1)
    if not IN_REWARD:
        result += bonus
    tl.store(advantages + at, result, mask=inside)
    tl.store(rewards_out + at, rewards, mask=inside)
    tl.store(temporal_out + prompts, temporal, mask=here)
    tl.store(p_out + prompts, p, mask=here)
    tl.store(p_shuffled_out + prompts, p_shuffled, mask=here)
    tl.store(unusable + prompts, bad, mask=here)


def tgrpo_advantages(
    accuracy: Tensor,
    format: Tensor,
    lengths: Tensor,
    shuffled_accuracy: Tensor | None,
    options: AdvantageOptions,
    batch_std: Tensor | None = None,
    p_mask: Tensor | None = None,
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
    low, high = (_rounded(bound, lengths.dtype) for bound in options.length_range)
    inputs = [accuracy.contiguous(), format.contiguous(), lengths.contiguous()]
    inputs.append(accuracy if shuffled_accuracy is None else shuffled_accuracy.contiguous())
    bars, bar = None, 0.0
    if isinstance(options.correct_above, Tensor):
        bars = options.correct_above.to(accuracy.dtype).contiguous()
    else:
        bar = _rounded(options.correct_above, accuracy.dtype)

    def launch(normalize: str, std: Tensor | None, rewards: Tensor) -> None:
        advantage_kernel[(triton.cdiv(prompts, block_p),)](
            *inputs,
            inputs[0] if std is None else std.contiguous(),
            inputs[0] if bars is None else bars,
            inputs[0] if p_mask is None else p_mask.contiguous().view(torch.int8),
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
            bar,
            options.length_bonus,
            low,
            high,
            options.eps,
            RULE=RULES.index(options.rule),
            MODE=NORMALIZE.index(normalize),
            BARS=bars is not None,
            P_MASK=p_mask is not None,
            LEAVE_ONE_OUT=options.baseline == "leave_one_out",
            IN_REWARD=options.apply == "reward",
            BLOCK_P=block_p,
            BLOCK_G=block_g,
            BLOCK_S=block_s,
            num_warps=4,
        )

    if prompts:
        if options.normalize == "batch" and batch_std is None:
            exact = torch.empty_like(rewards, dtype=torch.float64)
            launch("none", None, exact)
            batch_std = deviation((exact - exact.mean()).view(1, -1)).view(1).expand(prompts)
        launch(options.normalize, batch_std, rewards)
        if not capturing(accuracy) and bool(unusable.any()):
            check_values(accuracy, format, shuffled_accuracy, batch_std, options.correct_above)
    return advantages, rewards, temporal, p, p_shuffled


def _rounded(bound: float, dtype: torch.dtype) -> float:
    """The bound as a comparison in ``dtype`` sees it, so that an accuracy of 0.1 does not exceed 0.1."""
    return torch.tensor(float(bound), dtype=dtype if dtype.is_floating_point else torch.float32).item()
