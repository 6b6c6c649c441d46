"""T-GRPO's rewards and advantages: accuracy, format, length and temporal rewards, normalised per prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import FLOATS, INTEGERS, check_choice, check_number, check_tensor, fail
from videor1_kernels.group_advantage import reference
from videor1_kernels.group_advantage.ops import tgrpo_advantages_op
from videor1_kernels.group_advantage.reference import APPLY, BASELINES, NORMALIZE, RULES

__all__ = ["Advantages", "tgrpo_advantages"]

dispatch.register_triton("tgrpo_advantages", "videor1_kernels.group_advantage.triton")
dispatch.register("tgrpo_advantages", "reference", reference)


@dataclass(frozen=True)
class Advantages:
    """What :func:`tgrpo_advantages` returns. P prompts, G completions each."""

    advantages: Tensor  # [P, G]
    rewards: Tensor  # [P, G]: accuracy + format + length bonus, + the temporal bonus where it is applied to the reward
    temporal: Tensor  # [P]: the temporal bonus of the prompt; 0 where its rule fails or it has no shuffled branch
    p: Tensor  # [P]: mean accuracy over the ordered completions that count in it; NaN where none does
    p_shuffled: Tensor  # [P]: mean accuracy over the shuffled completions; NaN without a shuffled branch


def tgrpo_advantages(
    accuracy: Tensor,
    format: Tensor,
    lengths: Tensor,
    shuffled_accuracy: Tensor | None = None,
    *,
    rule: str = "margin",
    alpha: float = 0.3,
    mu: float = 0.8,
    correct_above: float | Tensor = 0.1,
    length_bonus: float = 0.2,
    length_range: tuple[float, float] = (320, 512),
    normalize: str = "std",
    eps: float = 1e-4,
    apply: str = "reward",
    baseline: str = "mean",
    batch_std: Tensor | None = None,
    p_mask: Tensor | None = None,
    backend: str = "auto",
) -> Advantages:
    """Rewards and group-relative advantages of T-GRPO.

    With p and p~ the mean accuracy of a prompt's ordered and shuffled completions, its temporal bonus is, by ``rule``:

        margin     alpha (p - p~) if p > p~, else 0
        threshold  alpha if p > mu p~, else 0
        reference  alpha if p >= mu p~, else 0   (p = p~ = 0 passes)

    A completion is correct if its accuracy exceeds ``correct_above``. Its reward is

        accuracy + format
        + length_bonus  if it is correct, low <= length <= high, and more than one completion of the group is correct
        + temporal bonus  if it is correct and ``apply`` is "reward"

    and its advantage, with means and standard deviations (ddof 1) of its group unless said otherwise, by ``normalize``:

        std    (reward - mean) / (std + eps)
        none   reward - mean
        batch  (reward - mean) / (std of all P G rewards + eps); with ``batch_std``: that of the prompt in its place
        gdpo   z(accuracy) + z(format) + length_bonus z(gets the length bonus) + temporal bonus z(is correct)

    z(x) = (x - mean) / (std + eps) of one reward, 0 where it is the same in the whole group. In ``gdpo`` the bonuses
    are weights, so that normalisation leaves them their size: the last term is alpha (p - p~) z or alpha z by the rule,
    and is left out unless ``apply`` is "reward".

    ``apply="advantage"`` adds the temporal bonus of correct completions to the normalised advantage instead, also in
    groups whose rewards are all equal. ``baseline="leave_one_out"`` takes the mean of the group's other completions in
    place of the group's: before that addition, advantages are multiplied by G / (G - 1).

    Before that addition, a group whose rewards are all equal (to within the rounding of their sums; in ``gdpo``: whose
    sums of normalised rewards are), or that has one completion only, gets advantages of exactly 0.

    Args:
        accuracy, format: [P, G]; fp64, fp32, bf16 or fp16. The results are fp32, or fp64 if any is fp64; sums are fp64.
        lengths: [P, G], tokens; int64, int32 or a float dtype.
        shuffled_accuracy: [P, Gs] of a float dtype, or None. NaN is a missing completion: p~ is the mean over the
            others, and a row of NaN is a prompt without shuffled branch (no bonus, p~ NaN).
        rule: "margin", "threshold" or "reference", as above.
        alpha: size of the temporal bonus, 0 or more.
        mu: factor on p~ in the rules ``threshold`` and ``reference``, 0 or more.
        correct_above: a completion is correct whose accuracy exceeds this, or that of its prompt: a number, or [P] of a
            float dtype. Both are compared in the accuracy's dtype.
        length_bonus: size of the length bonus.
        length_range: (low, high), tokens, both included.
        normalize: "std", "none", "batch" or "gdpo", as above.
        eps: added to the standard deviation, 0 or more.
        apply: "reward" or "advantage": what the temporal bonus is added to.
        baseline: "mean" or "leave_one_out" (RLOO's; with ``normalize="none"`` it is RLOO).
        batch_std: [P] of a float dtype, 0 or more, with ``normalize="batch"`` only: what to divide the rewards of each
            prompt by, where that is known from elsewhere (from all processes, or as a moving average).
        p_mask: bool [P, G], the ordered completions that p is the mean of: those that the policy wrote itself, where
            others are in the group too. The others are rewarded alike. A prompt without any has no bonus. None: all.
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        :class:`Advantages`: advantages and rewards [P, G], temporal bonus and the two means [P]; no gradient.

    Raises:
        ValueError: a wrong shape, dtype, device or option; an accuracy or format that is NaN or infinite; a
            ``batch_std`` that is negative, NaN or infinite, or comes with another ``normalize``; a ``correct_above``
            that is NaN or infinite.
        TypeError: an argument that is no tensor.

    Source:
        Video-R1 (arXiv 2503.21776), whose paper has the rule ``threshold`` and whose code ``reference``; ``margin`` and
        ``apply="advantage"`` are this library's. ``none``: Dr. GRPO (arXiv 2503.20783). ``batch``: a deviation of the
        batch as in REINFORCE++ (arXiv 2501.03262), here of the rewards, as TRL's ``scale_rewards="batch"`` has it.
        ``gdpo``: GDPO (arXiv 2601.05242) without its second normalisation of the sum over the batch. RLOO: arXiv
        2402.14740.
    """
    op = "tgrpo_advantages"
    check_tensor(op, "accuracy", accuracy, ("P", "G"))
    if accuracy.shape[1] < 1:
        raise fail(op, "accuracy", "at least one completion per prompt", f"shape {list(accuracy.shape)}")
    device = accuracy.device
    check_tensor(op, "format", format, accuracy.shape, device=device)
    check_tensor(op, "lengths", lengths, accuracy.shape, INTEGERS + FLOATS, device)
    if shuffled_accuracy is not None:
        check_tensor(op, "shuffled_accuracy", shuffled_accuracy, (len(accuracy), "Gs"), device=device)
        shuffled_accuracy = shuffled_accuracy.detach()
    check_choice(op, "rule", rule, RULES)
    check_choice(op, "normalize", normalize, NORMALIZE)
    check_choice(op, "apply", apply, APPLY)
    check_choice(op, "baseline", baseline, BASELINES)
    check_number(op, "alpha", alpha, at_least=0)
    check_number(op, "mu", mu, at_least=0)
    bars = None
    if isinstance(correct_above, Tensor):
        check_tensor(op, "correct_above", correct_above, (len(accuracy),), device=device)
        bars, correct_above = correct_above.detach(), 0.0
    check_number(op, "correct_above", correct_above)
    check_number(op, "length_bonus", length_bonus)
    check_number(op, "eps", eps, at_least=0)
    if len(length_range) != 2 or not length_range[0] <= length_range[1]:
        raise fail(op, "length_range", "(low, high) with low <= high", tuple(length_range))
    if batch_std is not None:
        if normalize != "batch":
            raise fail(op, "batch_std", 'None unless normalize is "batch"', f'a tensor with normalize "{normalize}"')
        check_tensor(op, "batch_std", batch_std, (len(accuracy),), device=device)
        batch_std = batch_std.detach()
    if p_mask is not None:
        check_tensor(op, "p_mask", p_mask, accuracy.shape, (torch.bool,), device)
    options = (rule, alpha, mu, correct_above, length_bonus, *length_range, normalize, eps, apply, baseline)
    inputs = (accuracy.detach(), format.detach(), lengths, shuffled_accuracy)
    made = tgrpo_advantages_op(*inputs, *options, batch_std, backend, bars, p_mask)
    return Advantages(*made)
