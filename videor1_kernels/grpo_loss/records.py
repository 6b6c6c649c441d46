"""What every part of the losses passes on: the checked options of a call, and its completions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
# What the sum of a loss type's terms is divided by: the tokens of each completion and S, all tokens of the call,
# S * max_completion_length, num_tokens, or S.
DIVISORS = {
    "grpo": "completion",
    "sapo": "completion",
    "bnpo": "call",
    "dr_grpo": "length",
    "dapo": "num_tokens",
    "cispo": "num_tokens",
    "vespo": "num_tokens",
    "luspo": "completions",
}
LOG_WEIGHTED = ("cispo", "vespo")  # their policy term is a detached weight times the log-prob
IMPORTANCE_LEVELS = ("token", "sequence")
CORRECTIONS = ("none", "token", "sequence")
CORRECTION_MODES = ("truncate", "mask")

PackedOptions = tuple[str, list[float], float | None, float | None]

_TERMS = ("loss_type", "importance_level", "importance_correction", "correction_mode")
_NUMBERS = (
    *("beta", "clip_low", "clip_high", "kl_clamp", "correction_min", "correction_max", "delta", "clip_dual"),
    *("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    *("vespo_lambda_neg", "entropy_coef"),
)


@dataclass(frozen=True)
class GrpoLossOptions:
    """The checked options of a loss call."""

    loss_type: str
    beta: float
    clip_low: float | None
    clip_high: float | None
    kl_clamp: float
    importance_level: str
    max_completion_length: float | None
    num_tokens: float | None
    importance_correction: str = "none"
    correction_mode: str = "truncate"
    correction_min: float | None = None
    correction_max: float | None = 2.0
    delta: float | None = None
    clip_dual: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    use_bias_correction_kl: bool = False
    entropy_coef: float = 0.0

    def packed(self) -> PackedOptions:
        """All options in four arguments, since each of an operator's costs its caller time on the host."""
        terms = [getattr(self, name) for name in _TERMS] + ["by ratio" if self.use_bias_correction_kl else ""]
        numbers = [getattr(self, name) for name in _NUMBERS]
        given = [math.inf if number is None else float(number) for number in numbers]
        return "/".join(terms), given, self.max_completion_length, self.num_tokens

    @classmethod
    def unpacked(cls, terms: str, numbers: Sequence[float], *totals: float | None) -> GrpoLossOptions:
        """The options that :meth:`packed` gave."""
        return _unpacked(terms, tuple(numbers), *totals)

    @property
    def divisor(self) -> str:
        """What the terms are divided by, one of the values of DIVISORS."""
        return DIVISORS[self.loss_type]

    @property
    def kl_by_ratio(self) -> bool:
        """Whether the ratio multiplies the KL term."""
        return self.use_bias_correction_kl and self.beta > 0


@functools.lru_cache(maxsize=64)
def _unpacked(
    terms: str, numbers: tuple[float, ...], max_completion_length: float | None, num_tokens: float | None
) -> GrpoLossOptions:
    loss_type, level, correction, mode, by_ratio = terms.split("/")
    found: list[Any] = [None if number == math.inf else number for number in numbers]
    beta, clip_low, clip_high, kl_clamp, *bounds = found
    *rest, entropy_coef = bounds
    ratio = (clip_low, clip_high, kl_clamp, level, max_completion_length, num_tokens)
    values: list[Any] = [loss_type, beta, *ratio, correction, mode, *rest, bool(by_ratio), entropy_coef]
    return GrpoLossOptions(*values)


class Completions(NamedTuple):
    """S completions of N tokens in all, end to end, and what the loss knows of them beside the policy's log-probs."""

    advantages: Tensor  # [S]
    cu_seqlens: Tensor  # [S+1]: where each completion starts, and N
    old_logp: Tensor | None  # [N], under the policy that sampled; None: the policy itself
    ref_logp: Tensor | None  # [N], under the reference model
    rollout_logp: Tensor | None = None  # [N], as the sampler reported them
    token_weight: Tensor | None = None  # [N]
    importance_weight: Tensor | None = None  # [N]
    completion_mask: Tensor | None = None  # bool [S]: those that count; the tokens of the others are masked already

    def counted(self) -> int | Tensor:
        """How many completions count, at least 1 where that is known on the device alone."""
        return len(self.advantages) if self.completion_mask is None else self.completion_mask.sum().clamp(min=1)


def ceilings(options: GrpoLossOptions) -> tuple[float, float]:
    """Above which ratio a policy term has no gradient, for positive and for negative advantages.

    For A > 0 it is min(r, delta) A or the clipped one, whichever is less; for A < 0, where the smaller product has the
    larger ratio, delta bounds the ratio only above 1 + clip_high, and clip_dual bounds whatever is left.
    """
    high = math.inf if options.clip_high is None else 1 + options.clip_high
    if options.delta is None:
        positive, negative = high, math.inf
    else:
        positive = min(high, options.delta)
        least = 1 - options.clip_low if options.clip_low is not None else 0.0
        negative = max(options.delta, least if options.clip_high is None else high)
    return positive, negative if options.clip_dual is None else min(negative, options.clip_dual)
