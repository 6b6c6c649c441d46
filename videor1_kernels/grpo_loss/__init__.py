"""The losses of the GRPO family, from log-probabilities or from hidden states through the linear head."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import IGNORED, INTEGERS, check_choice, check_number, check_tensor, fail
from videor1_kernels.grpo_loss import reference
from videor1_kernels.grpo_loss.factors import counted_tokens
from videor1_kernels.grpo_loss.ops import count_op, grpo_loss_op, linear_grpo_loss_op
from videor1_kernels.grpo_loss.records import (
    CORRECTION_MODES,
    CORRECTIONS,
    IMPORTANCE_LEVELS,
    LOSS_TYPES,
    Completions,
    GrpoLossOptions,
    PackedOptions,
)
from videor1_kernels.linear_logprob import check_head, check_softcap, linear_logprob, split_temperature
from videor1_kernels.linear_logprob.inputs import autocast_dtype

__all__ = ["GrpoLoss", "grpo_loss", "linear_grpo_loss"]

NUM_TOKENS = [field.name for field in fields(GrpoLossOptions)].index("num_tokens")
PLAIN = (str, int, float, bool, type(None))  # what an option may be; all of them can be hashed

for _op in ("grpo_loss", "linear_grpo_loss"):
    dispatch.register_triton(_op, "videor1_kernels.grpo_loss.triton")
    dispatch.register(_op, "reference", reference)


@dataclass(frozen=True)
class GrpoLoss:
    """What a loss call returns, for N tokens; all but ``loss`` are detached."""

    loss: Tensor  # scalar, differentiable
    logp: Tensor  # [N] nats; 0 at masked tokens
    entropy: Tensor | None  # [N] nats; None from grpo_loss, which sees no distribution
    kl: Tensor  # scalar: mean of the k3 estimate over the unmasked tokens; 0 where beta is 0
    clip_fraction: Tensor  # scalar: share of the unmasked tokens whose policy term is clipped away (no gradient)
    skipped: Tensor  # int64 scalar: tokens with d loss / d logp of exactly 0, and d loss / d entropy

    @property
    def skipped_rows(self) -> int:
        """The number of tokens with d loss / d logp of exactly 0, which cost nothing.

        To read it waits for the device. Under torch.compile it is a symbol.
        """
        return count_op(self.skipped)


def grpo_loss(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    importance_weight: Tensor | None = None,
    completion_mask: Tensor | None = None,
    loss_type: str = "grpo",
    beta: float = 0.04,
    clip_low: float | None = None,
    clip_high: float | None = None,
    delta: float | None = None,
    clip_dual: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
    kl_clamp: float = 10.0,
    importance_level: str = "token",
    importance_correction: str = "none",
    correction_mode: str = "truncate",
    correction_min: float | None = None,
    correction_max: float | None = 2.0,
    mask: Tensor | None = None,
    max_completion_length: int | None = None,
    num_tokens: float | None = None,
    backend: str = "auto",
) -> GrpoLoss:
    """GRPO loss of packed completions from their tokens' log-probabilities.

    Token t of completion s, with A = advantages[s]:

        l_t = -u_t (w_t min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A) - beta kl_t)
        r = exp(logp_t - old_logp_t); with importance_level "sequence" (GSPO) r = exp(mean over the completion's tokens)
        kl_t = exp(x) - x - 1,  x = clamp(ref_logp_t - logp_t, -kl_clamp, kl_clamp)

    For A < 0, ``clip_dual`` bounds r from above once more. u = ``token_weight``, and w, 1 without a correction, is the
    importance correction for what sampled (``rollout_logp``), a policy that is not quite that of ``old_logp``:

        importance_correction  "token": w_t = exp(old_logp_t - rollout_logp_t)
                               "sequence": w_t = exp(mean of old_logp - rollout_logp over the completion's tokens)
        correction_mode        "truncate": w_t is clamped to [correction_min, correction_max]
                               "mask": where w_t lies outside of these, l_t = 0, KL term included

    Neither has a gradient. No w multiplies the KL term: so it is in TRL and in verl. A token that is masked so still
    counts in whatever the loss is divided by, as in TRL; verl takes it out of there too, as ``mask`` does here. Where u
    or w differ between the tokens of a completion, the ratio of "sequence" is that of GSPO-token, whose gradient goes
    through a token's own log-prob alone.

    The loss is, by ``loss_type``:

        grpo     mean over the S completions of the mean of l over a completion's tokens
        bnpo     sum of l / number of tokens of this call
        dr_grpo  sum of l / (S * max_completion_length)
        dapo     sum of l / num_tokens
        luspo    sum of l / S: with "sequence", GSPO's term times the length of the completion

    Three more have a policy term of their own in the place of the minimum:

        cispo    sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp_t, sum of l / num_tokens; sg has no gradient
        sapo     4 / tau sigmoid(tau (r - 1)) A with tau of A > 0 or of the others, divided as grpo
        vespo    sg(e^lambda W^k e^(-lambda W)) A logp_t, W the product of a completion's r and w, k and lambda of
                 A >= 0 or of the others, sum of l / num_tokens; that weight takes the place of r and of w

    With ``use_bias_correction_kl`` the KL term is r kl_t, and r has a gradient there.

    An empty completion adds 0 to the sum and counts in S; no completions or no tokens give a loss of 0 that still has a
    gradient function. A masked token is as if it were not there: it counts in no mean and gets no gradient.

    Args:
        logp: [N], nats, the completions end to end; fp64, fp32, bf16 or fp16. The maths and the results are fp32, or
            fp64 for fp64 ``logp``.
        advantages: [S]; fp64, fp32, bf16 or fp16.
        cu_seqlens: int32 or int64 [S+1]: completion s holds tokens cu_seqlens[s] to cu_seqlens[s+1] - 1.
        old_logp: [N], nats, under the policy that sampled; fp64, fp32, bf16 or fp16. None: ``logp`` itself, detached,
            so that r is exactly 1.
        ref_logp: [N], nats, under the reference model; fp64, fp32, bf16 or fp16. Needed where ``beta`` is above 0,
            ignored where it is 0.
        rollout_logp: [N], nats, as the sampler reported them; fp64, fp32, bf16 or fp16. Needed for a correction,
            ignored without one. NaN: not known, as of an answer from elsewhere; it counts as ``old_logp``, w_t = 1.
        token_weight: [N], a factor of each token's term; fp64, fp32, bf16 or fp16. None: 1.
        importance_weight: [N], w itself, from a caller that has it; fp64, fp32, bf16 or fp16. None: 1.
        completion_mask: bool [S]; a completion with False is as if it were not there: its tokens are masked, and S does
            not count it. None: all are in.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo" or "vespo", as above.
        beta: factor on the KL term, 0 or more.
        clip_low, clip_high: above 0 (``clip_high`` above -1 for cispo); None leaves that side unclipped. sapo and vespo
            have no clip.
        delta: above 0, the bound of a ratio whose advantage is negative, as far as it lies above 1 + ``clip_high``, and
            of any other one; None: none.
        clip_dual: above 1, the bound of a ratio whose advantage is negative; None: none. It and ``delta`` are for loss
            types of the minimum.
        sapo_temperature_pos, sapo_temperature_neg: above 0, tau for A > 0 and for the others.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: above 0, for A >= 0 and for the others.
        use_bias_correction_kl: whether r multiplies the KL term, in the loss and in ``kl``.
        entropy_coef: 0, as log-probs show no entropy; :func:`linear_grpo_loss` has it.
        kl_clamp: above 0, nats.
        importance_level: "token" or "sequence".
        importance_correction: "none", "token" or "sequence".
        correction_mode: "truncate" or "mask".
        correction_min, correction_max: 0 or more and above 0; None leaves that side open.
        mask: bool [N], False leaves the token out; None: all are in.
        max_completion_length: for dr_grpo, tokens.
        num_tokens: for dapo, cispo and vespo, the tokens of the whole accumulated batch (of all processes, divided by
            their number).
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        :class:`GrpoLoss`: a scalar ``loss`` that can be differentiated (once) into ``logp``, and [N] and scalar figures
        in nats, detached; fp32 or fp64.

    Raises:
        ValueError: a wrong shape, dtype, device or option, or one that the chosen loss needs and that is missing.
        TypeError: an argument that is no tensor.

    Source:
        GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476), GSPO (arXiv 2507.18071),
        T-GRPO (arXiv 2503.21776). ``delta`` is that of INTELLECT-2 (arXiv 2505.07291), ``clip_dual`` that of dual-clip
        PPO (arXiv 1912.09729); CISPO is of MiniMax-M1 (arXiv 2506.13585), SAPO of arXiv 2511.20347, luspo and vespo are
        as TRL and Liger-Kernel define them; ``use_bias_correction_kl`` is of DeepSeek-V3.2 (arXiv 2512.02556). The
        corrections are those of TRL (``vllm_importance_sampling_mode``) and of verl (rollout correction). kl is the
        estimator k3 of http://joschu.net/blog/kl-approx.html.
    """
    op = "grpo_loss"
    check_tensor(op, "logp", logp, ("N",))
    if mask is not None:
        check_tensor(op, "mask", mask, logp.shape, (torch.bool,), logp.device)
    completions = Completions(
        advantages, cu_seqlens, old_logp, ref_logp, rollout_logp, token_weight, importance_weight, completion_mask
    )
    options = _checked(
        op,
        completions,
        len(logp),
        logp.device,
        loss_type,
        beta,
        clip_low,
        clip_high,
        kl_clamp,
        importance_level,
        max_completion_length,
        num_tokens,
        importance_correction,
        correction_mode,
        correction_min,
        correction_max,
        delta,
        clip_dual,
        sapo_temperature_pos,
        sapo_temperature_neg,
        vespo_k_pos,
        vespo_lambda_pos,
        vespo_k_neg,
        vespo_lambda_neg,
        use_bias_correction_kl,
        entropy_coef,
    )
    loss, shown, kl, clip_fraction, _, skipped = grpo_loss_op(
        logp, *map(_detached, completions), mask, *options, backend
    )
    return GrpoLoss(loss, shown.detach(), None, kl.detach(), clip_fraction.detach(), skipped)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    importance_weight: Tensor | None = None,
    completion_mask: Tensor | None = None,
    bias: Tensor | None = None,
    loss_type: str = "grpo",
    beta: float = 0.04,
    clip_low: float | None = None,
    clip_high: float | None = None,
    delta: float | None = None,
    clip_dual: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
    kl_clamp: float = 10.0,
    importance_level: str = "token",
    importance_correction: str = "none",
    correction_mode: str = "truncate",
    correction_min: float | None = None,
    correction_max: float | None = 2.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_shard: tuple[int, Any] | None = None,
    max_completion_length: int | None = None,
    num_tokens: float | None = None,
    backend: str = "auto",
) -> GrpoLoss:
    """GRPO loss of packed completions from the hidden states that predict their tokens.

    It is :func:`grpo_loss` of the log-probabilities of :func:`~videor1_kernels.linear_logprob`; see there for the
    formulas, and for what autocast does. The logits are never whole in memory.

    A token whose coefficient d loss / d logp is exactly 0 (it is masked or clipped, its weight is 0, or its advantage
    is 0 and there is no KL term) takes no part in the products of the gradient.

    With ``entropy_coef`` the loss has - u_t ``entropy_coef`` entropy_t beside each token's other terms, and its
    gradient: as in verl it is divided by what the loss type divides by. TRL takes its mean over tokens whatever the
    loss type. Then only tokens that are masked, or of weight 0, are taken out.

    This call already computes the gradients of ``hidden``, ``weight`` and ``bias``, as far as they require one and not
    under ``torch.no_grad()``; ``loss.backward()`` only scales them. If C rows have a coefficient other than 0, the
    kernels do 2NHV + 4CHV operations, or 2NHV + 2CHV for a frozen head. Between the two calls d_weight is kept in fp32.
    The loss is differentiable once.

    Args:
        hidden: [N, H], fp64, fp32, bf16 or fp16; row t predicts token t of the completions end to end.
        weight, bias: the head, [V, H] and [V] or None; fp64, fp32, bf16 or fp16.
        labels: int64 [N] in [0, V); -100 masks the token.
        advantages: [S]; fp64, fp32, bf16 or fp16.
        cu_seqlens: int32 or int64 [S+1]: completion s holds tokens cu_seqlens[s] to cu_seqlens[s+1] - 1.
        old_logp, ref_logp, rollout_logp: [N], nats, as in :func:`grpo_loss`; fp64, fp32, bf16 or fp16; or None.
        token_weight, importance_weight: [N], as there; fp64, fp32, bf16 or fp16; or None.
        completion_mask: bool [S], as there, or None. The tokens of a completion with False never reach the head.
        loss_type, beta, clip_low, clip_high, delta, clip_dual, importance_level, use_bias_correction_kl: as there.
        sapo_temperature_pos, sapo_temperature_neg: as there.
        entropy_coef: 0 or more; a token's term is less by this times its entropy, and is weighed and divided with it.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: as there.
        importance_correction, correction_mode, correction_min, correction_max: as there.
        kl_clamp: above 0, nats.
        temperature: a number, or a tensor [N] of a float dtype; above 0.
        softcap, vocab_shard: as in :func:`~videor1_kernels.linear_logprob`. With a shard the gradient is formed in the
            backward pass, from logits that are computed again: 2NHV + 6CHV operations of all ranks together.
        max_completion_length: for dr_grpo, tokens.
        num_tokens: for dapo, cispo and vespo, the tokens of the whole accumulated batch (of all processes, divided by
            their number).
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        :class:`GrpoLoss`: a scalar ``loss`` that can be differentiated (once) into ``hidden``, ``weight`` and ``bias``,
        and [N] and scalar figures in nats, detached; fp32, or fp64 where ``hidden``, ``weight`` or ``bias`` is.

    Raises:
        ValueError: a wrong shape, dtype, device, label, temperature or option, or one that the chosen loss needs and
            that is missing.
        TypeError: an argument that is no tensor.

    Source:
        That of :func:`grpo_loss`; that the gradient is formed in the forward pass, Liger Kernel (arXiv 2410.10989).
    """
    op = "linear_grpo_loss"
    check_tensor(op, "hidden", hidden, ("N", "H"))
    check_head(op, hidden, weight, labels, bias)
    temperatures, scalar = split_temperature(op, temperature, hidden, weight, bias)
    completions = Completions(
        advantages, cu_seqlens, old_logp, ref_logp, rollout_logp, token_weight, importance_weight, completion_mask
    )
    options = _checked(
        op,
        completions,
        len(hidden),
        hidden.device,
        loss_type,
        beta,
        clip_low,
        clip_high,
        kl_clamp,
        importance_level,
        max_completion_length,
        num_tokens,
        importance_correction,
        correction_mode,
        correction_min,
        correction_max,
        delta,
        clip_dual,
        sapo_temperature_pos,
        sapo_temperature_neg,
        vespo_k_pos,
        vespo_lambda_pos,
        vespo_k_neg,
        vespo_lambda_neg,
        use_bias_correction_kl,
        entropy_coef,
    )
    if vocab_shard is not None:
        if completion_mask is not None:
            labels = labels.masked_fill(~counted_tokens(completion_mask, cu_seqlens, len(labels)), IGNORED)
        logp, entropy = linear_logprob(
            hidden,
            weight,
            labels,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            vocab_shard=vocab_shard,
            backend=backend,
        )
        given = Completions._make(map(_detached, completions))
        return _of_logp(logp, entropy, given, labels != IGNORED, GrpoLossOptions.unpacked(*options), backend)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, logp, entropy, kl, clip_fraction, skipped, *_ = linear_grpo_loss_op(
        hidden,
        weight,
        labels,
        *map(_detached, completions),
        bias,
        temperatures,
        scalar,
        autocast_dtype(hidden, weight, bias),
        check_softcap(op, softcap),
        *options,
        needs,
        backend,
    )
    return GrpoLoss(loss, logp.detach(), entropy.detach(), kl.detach(), clip_fraction.detach(), skipped)


def _of_logp(
    logp: Tensor, entropy: Tensor, completions: Completions, mask: Tensor, options: GrpoLossOptions, backend: str
) -> GrpoLoss:
    """The loss, entropy bonus included, where both log-probs and entropies can be differentiated."""
    plain = replace(options, entropy_coef=0.0).packed()
    loss, shown, kl, clip_fraction, coefficient, skipped = grpo_loss_op(logp, *completions, mask, *plain, backend)
    if options.entropy_coef > 0:
        weight = reference.loss_terms(logp.detach(), completions, mask, options).weight
        loss = loss - options.entropy_coef * (weight * entropy.masked_fill(~mask, 0.0)).sum()
        skipped = ((coefficient == 0) & (weight == 0)).sum()
    return GrpoLoss(loss, shown.detach(), entropy.detach(), kl.detach(), clip_fraction.detach(), skipped)


def _checked(op: str, completions: Completions, tokens: int, device: torch.device, *values: Any) -> PackedOptions:
    """Check everything but where the log-probs come from; ``values`` are those of GrpoLossOptions, in its order."""
    advantages, cu_seqlens, *_ = completions
    check_tensor(op, "cu_seqlens", cu_seqlens, ("S+1",), INTEGERS, device)
    if not len(cu_seqlens):
        raise fail(op, "cu_seqlens", "at least one entry (the leading 0)", "an empty tensor")
    check_tensor(op, "advantages", advantages, (len(cu_seqlens) - 1,), device=device)
    for name in ("old_logp", "ref_logp", "rollout_logp", "token_weight", "importance_weight"):
        if (given := getattr(completions, name)) is not None:
            check_tensor(op, name, given, (tokens,), device=device)
    if completions.completion_mask is not None:
        check_tensor(op, "completion_mask", completions.completion_mask, advantages.shape, (torch.bool,), device)
    options, packed = _checked_options(op, values)
    correction = options.importance_correction
    if correction != "none" and completions.importance_weight is not None:
        raise fail(op, "importance_weight", f"None, as importance_correction {correction!r} forms it", "a tensor")
    if correction != "none" and completions.rollout_logp is None:
        raise fail(op, "rollout_logp", f"a tensor [{tokens}], as importance_correction is {correction!r}", None)
    if options.beta > 0 and completions.ref_logp is None:
        raise fail(op, "ref_logp", f"a tensor [{tokens}], as beta is {options.beta:g} (pass it, or beta=0)", None)
    return packed


def _checked_options(op: str, values: tuple[Any, ...]) -> tuple[GrpoLossOptions, PackedOptions]:
    """Return the checked options; a training run calls with the same ones again and again."""
    at = NUM_TOKENS
    if hasattr(values[at], "item"):  # a 0-d tensor or a NumPy number, as an all-reduce gives it
        values = (*values[:at], values[at].item(), *values[at + 1 :])
    if torch.compiler.is_compiling() or not all(isinstance(value, PLAIN) for value in values):
        return _check_options(op, *values)
    return _known_options(op, *values)


def _check_options(op: str, *values: Any) -> tuple[GrpoLossOptions, PackedOptions]:
    options = GrpoLossOptions(*values)
    check_choice(op, "loss_type", options.loss_type, LOSS_TYPES)
    check_choice(op, "importance_level", options.importance_level, IMPORTANCE_LEVELS)
    check_number(op, "beta", options.beta, at_least=0)
    check_number(op, "kl_clamp", options.kl_clamp, above=0)
    _check_policy(op, options)
    check_number(op, "entropy_coef", options.entropy_coef, at_least=0)
    if op == "grpo_loss" and options.entropy_coef != 0:
        expected = "0, as log-probs show no distribution (linear_grpo_loss has the entropy)"
        raise fail(op, "entropy_coef", expected, options.entropy_coef)
    _check_correction(op, options)
    if options.divisor == "length":
        if options.max_completion_length is None:
            raise fail(op, "max_completion_length", "a number of tokens, as loss_type is 'dr_grpo'", None)
        check_number(op, "max_completion_length", options.max_completion_length, above=0)
    if options.divisor == "num_tokens":
        if options.num_tokens is None:
            expected = f"the tokens of the whole accumulated batch, as loss_type is {options.loss_type!r}"
            raise fail(op, "num_tokens", expected, None)
        check_number(op, "num_tokens", options.num_tokens, above=0)
    return options, options.packed()


_known_options = functools.lru_cache(maxsize=64, typed=True)(_check_options)


def _check_policy(op: str, options: GrpoLossOptions) -> None:
    """Check the options of the policy term: their ranges, and that the loss type has what is given."""
    loss_type = options.loss_type
    above = {"clip_low": 0.0, "clip_high": -1.0 if loss_type == "cispo" else 0.0, "delta": 0.0, "clip_dual": 1.0}
    none = {"cispo": ("delta", "clip_dual"), "sapo": tuple(above), "vespo": tuple(above)}.get(loss_type, ())
    for name, least in above.items():
        bound = getattr(options, name)
        if bound is not None:
            check_number(op, name, bound, above=least)
            if name in none:
                raise fail(op, name, f"None, as loss_type {loss_type!r} has no such bound", bound)
    for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
        check_number(op, name, getattr(options, name), above=0)
    for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
        check_number(op, name, getattr(options, name), above=0)
    if not isinstance(options.use_bias_correction_kl, bool):
        raise fail(op, "use_bias_correction_kl", "True or False", options.use_bias_correction_kl)
    if loss_type == "vespo":
        for name in ("importance_level", "importance_correction"):
            if getattr(options, name) == "sequence":
                expected = "'token' (or no correction), as vespo's weight is that of a whole completion already"
                raise fail(op, name, expected, "'sequence'")


def _check_correction(op: str, options: GrpoLossOptions) -> None:
    low, high = options.correction_min, options.correction_max
    check_choice(op, "importance_correction", options.importance_correction, CORRECTIONS)
    check_choice(op, "correction_mode", options.correction_mode, CORRECTION_MODES)
    if low is not None:
        check_number(op, "correction_min", low, at_least=0)
    if high is not None:
        check_number(op, "correction_max", high, above=0)
    if low is not None and high is not None and low > high:
        raise fail(op, "correction_min", f"at most correction_max, {high:g}", low)


def _detached(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach()
