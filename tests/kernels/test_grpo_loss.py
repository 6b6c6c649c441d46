"""grpo_loss by hand, and on every backend against a loop over completions differentiated by autograd in fp64."""

from __future__ import annotations

import math
from typing import Any

import loss_cases as cases
import numpy as np
import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, QUIET, leaf

from videor1_kernels import grpo_loss, linear_grpo_loss, linear_logprob

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

# Two completions, of 2 tokens with advantage 2 and of 1 token with advantage -1: token losses -2, -2, 1.
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)
CU = torch.tensor([0, 2, 3], dtype=torch.int32)


def tokens(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS[:2])
@pytest.mark.grid(loss=cases.LOSSES, level=cases.LEVELS, clips=cases.CLIPS, beta=[0.0, 0.04], old=[True, False])
def test_equals_naive(
    loss: dict[str, Any], level: str, clips: cases.Clips, beta: float, old: bool, backend: str, dtype: torch.dtype
) -> None:
    options = {"importance_level": level, "beta": beta, "clip_low": clips[0], "clip_high": clips[1], "kl_clamp": 2.0}
    for masked in (False, True):
        logp, case = cases.make_case(dtype=dtype, masked=masked)
        if not old:
            case["old_logp"] = None
        ours, _ = cases.check_loss(backend, logp, case, **loss, **options)
        if old and any(clips) and level == "token":
            assert ours.clip_fraction > 0


@pytest.mark.grid(
    weights=cases.WEIGHTS,
    bounds=cases.BOUNDS,
    loss=cases.LOSSES,
    level=cases.LEVELS,
    clips=cases.CLIPS,
    kind=cases.KINDS[:2],
    beta=[0.0, 0.04],
    old=[True, False],
    masked=[True, False],
)
def test_weighted_and_bounded_terms(
    weights: dict[str, Any],
    bounds: dict[str, Any],
    loss: dict[str, Any],
    level: str,
    clips: cases.Clips,
    kind: cases.Kind,
    beta: float,
    old: bool,
    masked: bool,
) -> None:
    backend, dtype = kind
    logp, case = cases.make_case((5, 1, 0, 5, 3), dtype=dtype, masked=masked)
    if not old:
        case["old_logp"] = None
    case, options = cases.weighted(case, weights)
    bounded = {"importance_level": level, "beta": beta, "clip_low": clips[0], "clip_high": clips[1], **bounds}
    ours, _ = cases.check_loss(backend, logp, case, **loss, **options, **bounded)
    if options.get("correction_mode") == "mask":
        assert ours.skipped_rows > 0


@pytest.mark.grid(
    own=cases.OWN,
    weights=[{}, *cases.WEIGHTS],
    level=cases.LEVELS,
    kind=cases.KINDS[:2],
    beta=[0.0, 0.04],
    by_ratio=[True, False],
    old=[True, False],
    masked=[True, False],
)
def test_losses_with_terms_of_their_own(
    own: dict[str, Any],
    weights: dict[str, Any],
    level: str,
    kind: cases.Kind,
    beta: float,
    by_ratio: bool,
    old: bool,
    masked: bool,
) -> None:
    backend, dtype = kind
    logp, case = cases.make_case((5, 1, 0, 5, 3), dtype=dtype, masked=masked)
    if not old:
        case["old_logp"] = None
    case, options = cases.weighted(case, weights)
    options |= {"importance_level": level, "beta": beta, "use_bias_correction_kl": by_ratio} | own
    if own["loss_type"] == "vespo":
        options["importance_level"] = "token"
        if options.get("importance_correction") == "sequence":
            options["importance_correction"] = "token"
    cases.check_loss(backend, logp, case, **options)


@pytest.mark.grid(kind=cases.KINDS[:2], loss=cases.LOSSES, level=cases.LEVELS, old=[True, False])
def test_the_kl_term_by_ratio(kind: cases.Kind, loss: dict[str, Any], level: str, old: bool) -> None:
    """Clipped tokens keep it; in a sequence the gradient goes through all tokens' ratio."""
    backend, dtype = kind
    for masked in (False, True):
        logp, case = cases.make_case(dtype=dtype, masked=masked)
        if not old:
            case["old_logp"] = None
        options = {"importance_level": level, "use_bias_correction_kl": True, "kl_clamp": 2.0}
        cases.check_loss(backend, logp, case, **loss, **cases.BOTH, **options)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_losses_with_terms_of_their_own_by_hand(backend: str) -> None:
    """One token of log-prob -2, of ratio e, and A = 3."""
    logp, case = leaf(torch.tensor([-2.0], device=DEVICE)), {"old_logp": torch.tensor([-3.0], device=DEVICE)}
    case |= {"advantages": torch.tensor([3.0], device=DEVICE), "cu_seqlens": cases.cumulative([1]), "beta": 0}
    soft = 1 / (1 + math.exp(-0.5 * (math.e - 1)))
    phi = math.exp(2 + 1.5 - 2 * math.e)
    for options, loss, slope in (
        ({"loss_type": "cispo", "num_tokens": 2, "clip_high": 0.5}, 1.5 * 3 * 2 / 2, -1.5 * 3 / 2),
        ({"loss_type": "cispo", "num_tokens": 1}, math.e * 3 * 2, -math.e * 3),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.5}, -8 * soft * 3, -4 * soft * (1 - soft) * math.e * 3),
        ({"loss_type": "vespo", "num_tokens": 1, "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0}, phi * 3 * 2, -phi * 3),
        ({"loss_type": "luspo"}, -math.e * 3, -math.e * 3),
    ):
        out = grpo_loss(logp, **case, **options, backend=backend)
        assert out.loss.item() == pytest.approx(loss, rel=1e-5)
        assert torch.autograd.grad(out.loss, logp)[0].item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS[:2])
def test_weights_of_one_change_no_bit(backend: str, dtype: torch.dtype) -> None:
    """Neither a sampler that is the old policy, nor weights that are 1; nor a mask that lets all through."""
    for level in cases.LEVELS:
        logp, case = cases.make_case(dtype=dtype, masked=True)
        want, want_grad = cases.check_loss(backend, logp, case, importance_level=level, **cases.BOTH)
        ones = {
            "rollout_logp": case["old_logp"],
            "token_weight": torch.ones_like(logp.detach()),
            "completion_mask": torch.ones(len(case["advantages"]), dtype=torch.bool, device=DEVICE),
        }
        for correction in ("none", "token", "sequence"):
            for mode in ("truncate", "mask"):
                options = {"importance_correction": correction, "correction_mode": mode, **cases.BOTH}
                ours = grpo_loss(logp, **case | ones, importance_level=level, backend=backend, **options)
                (grad,) = torch.autograd.grad(3 * ours.loss, logp)
                for a, b in zip(
                    (ours.loss, ours.kl, ours.clip_fraction, grad),
                    (want.loss, want.kl, want.clip_fraction, want_grad),
                    strict=True,
                ):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_correction_by_hand(backend: str) -> None:
    """Ratios of 1 and weights of 4, 1/4 and 1: A = 2, by token, by completion (all of weight 1), cut or left out."""
    logp, two = torch.tensor([-1.0, -2.0, -3.0], device=DEVICE), torch.tensor([2.0], device=DEVICE)
    apart = torch.tensor([math.log(4), -math.log(4), 0.0], device=DEVICE)
    case = {"rollout_logp": logp - apart, "ref_logp": logp - 1.0, "loss_type": "bnpo", "backend": backend}
    kl = math.exp(-1) + 1 - 1
    for options, weights, kept in (
        ({"importance_correction": "token"}, 2 + 1 / 4 + 1, 3),
        ({"importance_correction": "token", "correction_min": 0.5}, 2 + 1 / 2 + 1, 3),
        ({"importance_correction": "token", "correction_max": None}, 4 + 1 / 4 + 1, 3),
        ({"importance_correction": "token", "correction_mode": "mask"}, 1 / 4 + 1, 2),
        ({"importance_correction": "token", "correction_mode": "mask", "correction_min": 0.5}, 1, 1),
        ({"importance_correction": "sequence", "correction_mode": "mask", "correction_min": 0.9}, 3, 3),
        ({"importance_correction": "sequence", "correction_mode": "mask", "correction_max": 0.9}, 0, 0),
    ):
        out = grpo_loss(leaf(logp), two, cases.cumulative([3]), beta=0.3, **case, **options)
        assert out.loss.item() == pytest.approx((-2 * weights + 0.3 * kept * kl) / 3, rel=1e-6)
        assert out.kl.item() == pytest.approx(kl, rel=1e-6)  # of all tokens, whatever they weigh
        assert out.skipped_rows == 3 - kept


@pytest.mark.grid(backend=cases.BACKENDS, level=["token", "sequence"], old=[True, False], linear=[True, False])
def test_what_is_not_known_at_sampling_counts_as_old_log_probs(
    backend: str, level: str, old: bool, linear: bool
) -> None:
    """One completion all of NaN, one in part, one whole: as with the old log-probs in their places."""
    generator = torch.Generator().manual_seed(5)
    hidden, head = (torch.randn(n, 6, generator=generator) for n in (7, 9))
    labels, advantages = torch.arange(7), torch.tensor([1.0, -0.5, 2.0])
    logp = linear_logprob(hidden, head, labels)[0]
    was = logp + 0.3 * torch.randn(7, generator=generator) if old else None
    sampled = (logp if was is None else was) - 0.5 * torch.randn(7, generator=generator)
    unknown = torch.tensor([True, True, True, False, True, False, False])

    def run(rollout_logp: Tensor) -> list[Tensor]:
        where = [x.to(DEVICE) for x in ((hidden, head, labels) if linear else (logp,))]
        first = where[0].detach().requires_grad_()
        function = linear_grpo_loss if linear else grpo_loss
        given = None if was is None else was.to(DEVICE)
        out = function(
            first, *where[1:], advantages.to(DEVICE), cases.cumulative([3, 2, 2]), old_logp=given, beta=0.0,
            rollout_logp=rollout_logp.to(DEVICE), importance_correction=level, backend=backend,
        )  # fmt: skip
        return [out.loss, *torch.autograd.grad(out.loss, first)]

    found = run(sampled.masked_fill(unknown, torch.nan))
    expected = run(torch.where(unknown, logp if was is None else was, sampled))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[1], run(sampled)[1])


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_bounds_by_hand(backend: str) -> None:
    """A ratio of e^2 with A = -1 costs e^2; delta and the dual clip bound it, and its gradient is gone."""
    logp, minus = torch.zeros(1, device=DEVICE), -torch.ones(1, device=DEVICE)
    case = {"old_logp": logp - 2.0, "beta": 0, "backend": backend}
    for options, cost in (
        ({"clip_high": 0.2}, math.exp(2)),
        ({"clip_high": 0.2, "delta": 4.0}, 4.0),
        ({"clip_high": 0.2, "delta": 1.1}, 1.2),
        ({"delta": 4.0}, 4.0),
        ({"clip_dual": 3.0}, 3.0),
        ({"clip_high": 0.2, "delta": 4.0, "clip_dual": 3.0}, 3.0),
        ({"clip_high": 0.2, "delta": 4.0, "clip_dual": 4.5}, 4.0),
    ):
        out = grpo_loss(leaf(logp), minus, cases.cumulative([1]), **case, **options)
        assert out.loss.item() == pytest.approx(cost, rel=1e-6)
        assert out.skipped_rows == out.clip_fraction.item() == (cost < 5)
    for options, gain in (
        ({"delta": 4.0}, 4.0),
        ({"delta": 1.1, "clip_high": 0.2}, 1.1),
        ({"clip_dual": 3.0}, math.exp(2)),
    ):
        out = grpo_loss(leaf(logp), -minus, cases.cumulative([1]), **case, **options)
        assert out.loss.item() == pytest.approx(-gain, rel=1e-6)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_a_completion_that_does_not_count_is_as_if_it_were_not_there(backend: str) -> None:
    logp, case = cases.make_case((3, 4, 2))
    want = grpo_loss(
        logp[3:],
        case["advantages"][1:],
        cases.cumulative([4, 2]),
        old_logp=case["old_logp"][3:],
        ref_logp=case["ref_logp"][3:],
        backend=backend,
    )
    case["completion_mask"] = torch.tensor([False, True, True], device=DEVICE)
    case["old_logp"][:3] = math.nan
    ours, grad = cases.check_loss(backend, logp, case)
    assert torch.equal(ours.loss, want.loss)
    assert (grad[:3] == 0).all()
    none = {"completion_mask": torch.zeros(3, dtype=torch.bool, device=DEVICE)}
    for loss in cases.LOSSES:
        ours, _ = cases.check_loss(backend, logp, case | none, **loss)
        assert (ours.loss, ours.kl, ours.skipped_rows) == (0, 0, 9)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_what_weighs_nothing_may_overflow(backend: str) -> None:
    """A weight of 0 takes a term of infinity away, and one that overflows leaves an advantage of 0 alone."""
    logp = leaf(torch.zeros(3, device=DEVICE))
    case = {
        "advantages": torch.tensor([-1.0, 0.0, 1.0], device=DEVICE),
        "cu_seqlens": cases.cumulative([1, 1, 1]),
        "old_logp": torch.tensor([-200.0, 0.0, 0.0], device=DEVICE),
        "rollout_logp": torch.tensor([-200.0, -200.0, 0.0], device=DEVICE),
        "token_weight": torch.tensor([0.0, 1.0, 1.0], device=DEVICE),
    }
    options = {"beta": 0, "importance_correction": "token", "correction_max": None}
    out = grpo_loss(logp, **case, **options, backend=backend)
    assert (out.loss.item(), out.skipped_rows) == (pytest.approx(-1 / 3), 2)
    assert torch.autograd.grad(out.loss, logp)[0].tolist() == [0, 0, pytest.approx(-1 / 3)]


@pytest.mark.parametrize("level", cases.LEVELS)
def test_gradcheck(level: str) -> None:
    logp, case = cases.make_case(dtype=torch.float64)
    # old_logp None: the ratio's denominator moves with logp, which finite differences cannot hold; so it is given here.
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, **case, importance_level=level, **cases.BOTH, beta=0.1).loss, logp
    )
    for weights in cases.WEIGHTS if level == "token" else ():  # GSPO-token holds its ratio, which differences cannot
        given, options = cases.weighted(case, weights)
        bounds = options | cases.BOTH | {"delta": 1.5, "clip_dual": 3.0}
        assert torch.autograd.gradcheck(
            lambda x, given=given, bounds=bounds: grpo_loss(x, **given, **bounds).loss, logp
        )


@pytest.mark.parametrize(
    ("options", "loss", "gradient"),
    [
        ({"loss_type": "grpo"}, (-2 + 1) / 5, [-2 / 10, -2 / 10, 1 / 5]),
        ({"loss_type": "bnpo"}, -3 / 3, [-2 / 3, -2 / 3, 1 / 3]),
        ({"loss_type": "dr_grpo", "max_completion_length": 10}, -3 / 50, [-0.04, -0.04, 0.02]),
        ({"loss_type": "dapo", "num_tokens": 8}, -3 / 8, [-0.25, -0.25, 0.125]),
    ],
)
@pytest.mark.parametrize("level", cases.LEVELS)
def test_loss_types_by_hand(options: dict[str, Any], loss: float, gradient: list[float], level: str) -> None:
    """Empty completions add nothing to the sum and count in the mean over completions."""
    logp, advantages = leaf(tokens(-1, -2, -3)), tokens(5, 2, 7, -1, 9)
    cu = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32)
    out = grpo_loss(logp, advantages, cu, beta=0, importance_level=level, **options)
    assert out.loss.item() == pytest.approx(loss, abs=cases.BY_HAND)
    out.loss.backward()
    assert logp.grad.tolist() == pytest.approx(gradient, abs=cases.BY_HAND)


def test_kl_by_hand() -> None:
    # x = -0.5, 0, 1 -> kl = e^-0.5 - 0.5, 0, e - 2
    logp, first, third = leaf(tokens(-1, -2, -3)), 0.10653065971263342, 0.7182818284590452
    out = grpo_loss(logp, ADVANTAGES, CU, ref_logp=tokens(-1.5, -2, -2), beta=0.1)
    assert out.loss.item() == pytest.approx(((-2 + 0.1 * first / 2) + (1 + 0.1 * third)) / 2, abs=cases.BY_HAND)
    assert out.kl.item() == pytest.approx((first + third) / 3, abs=cases.BY_HAND)
    out.loss.backward()
    # weight * (-A + beta (1 - e^x))
    expected = [(-2 + 0.1 * (1 - math.exp(-0.5))) / 4, -2 / 4, (1 + 0.1 * (1 - math.e)) / 2]
    assert logp.grad.tolist() == pytest.approx(expected, abs=cases.BY_HAND)


def test_sequence_ratio_by_hand() -> None:
    # Log ratios 1.0 and 0.0: the sequence's is 0.5, shared by both tokens. A = 2, one completion.
    logp, advantage, cu = leaf(tokens(-1, -2)), tokens(2), torch.tensor([0, 2])
    options = {"old_logp": tokens(-2, -2), "beta": 0, "importance_level": "sequence"}
    out = grpo_loss(logp, advantage, cu, **options)
    assert out.loss.item() == pytest.approx(-2 * math.exp(0.5), abs=cases.BY_HAND)
    out.loss.backward()
    assert logp.grad.tolist() == pytest.approx([-math.exp(0.5)] * 2, abs=cases.BY_HAND)  # -r A / length
    clipped = grpo_loss(logp, advantage, cu, clip_high=0.2, **options)
    assert clipped.loss.item() == pytest.approx(-2.4, abs=cases.BY_HAND)
    assert (clipped.clip_fraction.item(), clipped.skipped_rows) == (1.0, 2)
    # At token level only the first token is clipped.
    token = grpo_loss(logp, advantage, cu, clip_high=0.2, **options | {"importance_level": "token"})
    assert token.loss.item() == pytest.approx(-(2.4 + 2) / 2, abs=cases.BY_HAND)
    assert token.clip_fraction.item() == 0.5


@pytest.mark.grid(kind=[*cases.KINDS[:2], *cases.FP32[:1]], level=cases.LEVELS)
def test_ratio_is_exactly_one_on_policy(kind: cases.Kind, level: str) -> None:
    backend, dtype = kind
    logp, case = cases.make_case((1, 2, 8, 4), dtype)
    case["advantages"] = torch.tensor([1.0, -2.0, 0.0, 4.0], dtype=dtype, device=DEVICE)
    tight = {"clip_low": 1e-7, "clip_high": 1e-7, "beta": 0, "importance_level": level, "backend": backend}
    for old in (None, logp.detach().clone()):
        out = grpo_loss(logp, **case | {"old_logp": old}, **tight)
        assert out.loss.item() == -0.75  # -(1 - 2 + 0 + 4) / 4, all powers of two
        assert (out.clip_fraction.item(), out.skipped_rows) == (0, 8)
        (grad,) = torch.autograd.grad(out.loss, logp)
        lengths = torch.tensor([1, 2, 8, 4], device=DEVICE)
        assert torch.equal(grad, (-case["advantages"] / 4 / lengths).repeat_interleave(lengths))


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS[:2])
def test_beta_zero_ignores_the_reference(backend: str, dtype: torch.dtype) -> None:
    logp, case = cases.make_case(dtype=dtype)
    for ref in (None, torch.full_like(logp, math.nan)):
        ours, _ = cases.check_loss(backend, logp, case | {"ref_logp": ref}, beta=0.0)
        assert ours.kl.item() == 0


def test_zero_advantage_rows_are_skipped_only_without_kl() -> None:
    logp, ref = leaf(tokens(-1, -2, -3)), tokens(-1.5, -2, -2)
    zero = torch.zeros(2, dtype=torch.float64)
    assert grpo_loss(logp, zero, CU, ref_logp=ref, beta=0).skipped_rows == 3
    out = grpo_loss(logp, zero, CU, ref_logp=ref, beta=0.04)
    assert out.skipped_rows == 1  # the second token alone: there the reference agrees, 1 - exp(0) = 0
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert (grad == 0).tolist() == [False, True, False]


@pytest.mark.grid(kind=cases.KINDS[:2], lengths=[(), (0,), (0, 0, 0), (1,), (0, 3, 0)], loss=cases.LOSSES)
def test_few_and_empty_completions(kind: cases.Kind, lengths: tuple[int, ...], loss: dict[str, Any]) -> None:
    backend, dtype = kind
    logp, case = cases.make_case(lengths, dtype)
    for level in cases.LEVELS:
        ours, grad = cases.check_loss(backend, logp, case, **loss, importance_level=level, clip_low=0.2)
        assert grad.shape == logp.shape
        assert ours.loss.isfinite()
        nothing = torch.zeros_like(logp, dtype=torch.bool)
        ours, grad = cases.check_loss(backend, logp, case | {"mask": nothing}, **loss, importance_level=level)
        assert (ours.loss, ours.kl, ours.clip_fraction, ours.skipped_rows) == (0, 0, 0, len(logp))


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_masked_tokens_of_a_clipped_sequence_are_not_counted(backend: str) -> None:
    # Of 3 tokens one is masked; the other two form a sequence of ratio e^0.5, clipped.
    logp = torch.tensor([-1.0, -9.0, -2.0], device=DEVICE)
    case = {
        "advantages": torch.tensor([2.0], device=DEVICE),
        "cu_seqlens": cases.cumulative([3]),
        "old_logp": torch.tensor([-2.0, -1.0, -2.0], device=DEVICE),
        "mask": torch.tensor([True, False, True], device=DEVICE),
    }
    ours, _ = cases.check_loss(backend, leaf(logp), case, beta=0, clip_high=0.2, importance_level="sequence")
    assert ours.loss.item() == pytest.approx(-2.4)
    assert (ours.clip_fraction.item(), ours.skipped_rows) == (1.0, 3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_the_ends_of_clip_and_clamp(backend: str) -> None:
    """A gap of exactly the clamp has a gradient, one beyond has not; a ratio that overflows is clipped, or nothing."""
    logp = leaf(torch.tensor([-12.0, -21.0, -1.0, -1.0, 0.0, 0.0], device=DEVICE))
    case = {
        "advantages": torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 1.0], device=DEVICE),
        "cu_seqlens": cases.cumulative([1] * 6),
        "ref_logp": torch.tensor([-2.0, -1.0, -21.0, -1.0, 0.0, 0.0], device=DEVICE),
        "old_logp": torch.tensor([-12.0, -21.0, -2.0, 0.0, -200.0, -200.0], device=DEVICE),
    }
    ours, grad = cases.check_loss(backend, logp, case, beta=1.0, **cases.BOTH)
    assert (grad != 0).tolist() == [True, False, False, False, False, False]
    assert ours.skipped_rows == 5
    assert ours.clip_fraction.item() == pytest.approx(3 / 6)
    assert ours.kl.item() == pytest.approx((2 * (math.exp(10) - 11) + math.exp(-10) + 9) / 6, rel=1e-5)
    cases.check_loss(backend, logp, case, beta=1.0, kl_clamp=1e-3, **cases.BOTH)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_small_gaps_to_the_reference_model(backend: str) -> None:
    """The KL and its gradient near 0, where exp(x) - 1 would be all rounding."""
    logp, case = cases.make_case()
    case["advantages"] = torch.zeros(len(cases.LENGTHS), device=DEVICE)
    for size in (1e-1, 1e-2, 1e-4):
        case["ref_logp"] = logp.detach() + size * torch.linspace(-1.3, 1.3, len(logp), device=DEVICE)
        ours, grad = cases.check_loss(backend, logp, case, beta=1.0)
        x = case["ref_logp"].double() - logp.detach().double()
        lengths = torch.tensor(cases.LENGTHS, device=DEVICE)
        exact = -3 * x.expm1() / len(cases.LENGTHS) / lengths.repeat_interleave(lengths)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-12)
        assert ours.kl >= 0


@pytest.mark.grid(backend=cases.BACKENDS, level=cases.LEVELS, dtype=[torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_the_inputs(backend: str, level: str, dtype: torch.dtype) -> None:
    logp, case = cases.make_case(dtype=dtype)
    cases.check_loss(backend, logp, case, importance_level=level, **cases.BOTH)
    mixed = {"advantages": dtype, "old_logp": torch.float64, "ref_logp": torch.float16, "cu_seqlens": torch.int64}
    cases.check_loss(
        backend, logp, {name: x.to(mixed[name]) for name, x in case.items()}, importance_level=level, **cases.BOTH
    )


@pytest.mark.parametrize("level", cases.LEVELS)
def test_completions_longer_than_a_block(level: str) -> None:
    logp, case = cases.make_case((1050, 3, 512, 513))
    case["mask"] = torch.arange(len(logp), device=DEVICE) % 7 != 0
    cases.check_loss("triton", logp, case, importance_level=level, **cases.BOTH)


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS[:2])
def test_strided_and_expanded_inputs(backend: str, dtype: torch.dtype) -> None:
    logp, case = cases.make_case(dtype=dtype, masked=True)
    want, want_grad = cases.check_loss(backend, logp, case)
    for integer in (torch.int32, torch.int64):
        moved = {name: cases.strided(x) for name, x in case.items()}
        moved["cu_seqlens"] = cases.strided(case["cu_seqlens"].to(integer))
        ours, grad = cases.check_loss(backend, leaf(cases.strided(logp.detach())), moved)
        assert torch.equal(ours.loss, want.loss)
        assert torch.equal(grad, want_grad)
    logp, case = cases.make_case(dtype=dtype)
    one = torch.ones((), dtype=dtype, device=DEVICE)
    case |= {"old_logp": -one.expand(len(logp)), "ref_logp": case["ref_logp"].flip(0)}
    cases.check_loss(backend, logp, case | {"advantages": one.expand(len(cases.LENGTHS))}, **cases.BOTH)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_what_is_returned(backend: str) -> None:
    logp, case = cases.make_case()
    out = grpo_loss(logp, **case, backend=backend)
    assert out.entropy is None
    assert out.loss.shape == out.kl.shape == out.clip_fraction.shape == ()
    assert isinstance(out.skipped_rows, int)
    with pytest.raises(AttributeError):
        out.loss = None
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.logp, out.kl, out.clip_fraction))
    assert not grpo_loss(logp.detach(), **case, backend=backend).loss.requires_grad
    with torch.no_grad():
        assert not grpo_loss(logp, **case, backend=backend).loss.requires_grad
    cases.assert_differentiable_once(out.loss, [logp])


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_same_bits_in_poisoned_memory(backend: str) -> None:
    logp, case = cases.make_case(masked=True)

    def once() -> tuple[Tensor, ...]:
        out = grpo_loss(logp, **case, clip_low=0.2, importance_level="sequence", backend=backend)
        return out.loss, out.kl, out.clip_fraction, *torch.autograd.grad(out.loss, logp)

    cases.assert_same_bits(once)


@pytest.mark.parametrize("count", [torch.tensor(8), torch.tensor(8.0), np.int64(8)])
def test_num_tokens_may_be_a_scalar_of_any_library(count: object) -> None:
    out = grpo_loss(tokens(-1, -2, -3), ADVANTAGES, CU, loss_type="dapo", beta=0.0, num_tokens=count)
    assert out.loss.item() == -3 / 8
