"""grpo_loss against hand-computed numbers, and against a loop over completions differentiated by autograd in fp64."""

import math

import numpy as np
import pytest
import torch
from bounds import BY_HAND
from grpo_options import CLIPS, LOSSES
from same_bits import assert_same_bits

from videor1_kernels import grpo_loss
from videor1_kernels.testing import assert_matches

# Two completions, of 2 tokens with advantage 2 and of 1 token with advantage -1: token losses -2, -2, 1.
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)
CU = torch.tensor([0, 2, 3], dtype=torch.int32)


def tokens(*values):
    return torch.tensor(values, dtype=torch.float64)


def leaf(*values):
    return tokens(*values).requires_grad_()


def naive(
    logp,
    advantages,
    cu_seqlens,
    *,
    old_logp=None,
    ref_logp=None,
    mask=None,
    loss_type="grpo",
    beta=0.04,
    clip_low=None,
    clip_high=None,
    kl_clamp=10.0,
    importance_level="token",
    max_completion_length=None,
    num_tokens=None,
):
    completions, kept_tokens, kls, clipped = [], 0, [], 0
    for s in range(len(cu_seqlens) - 1):
        kept = [t for t in range(int(cu_seqlens[s]), int(cu_seqlens[s + 1])) if mask is None or mask[t]]
        kept_tokens += len(kept)
        if not kept:
            continue
        lp, a = logp[kept], advantages[s]
        log_ratio = lp - (lp.detach() if old_logp is None else old_logp[kept])
        if importance_level == "sequence":
            log_ratio = log_ratio.mean().expand(len(kept))
        r = log_ratio.exp()
        low = 0.0 if clip_low is None else 1 - clip_low
        high = math.inf if clip_high is None else 1 + clip_high
        bounded = r.clamp(low, high)
        loss = -torch.minimum(r * a, bounded * a)
        clipped += int((bounded * a < r * a).sum())
        if beta:
            x = (ref_logp[kept] - lp).clamp(-kl_clamp, kl_clamp)
            kl = x.exp() - x - 1
            loss = loss + beta * kl
            kls.append(kl.detach().sum())
        completions.append(loss)
    size = len(cu_seqlens) - 1
    if loss_type == "grpo":
        loss = sum(c.mean() for c in completions) / size
    else:
        whole = {"bnpo": kept_tokens, "dr_grpo": size * (max_completion_length or 0), "dapo": num_tokens}[loss_type]
        loss = sum(c.sum() for c in completions) / whole
    return loss, sum(kls) / kept_tokens if kls else 0.0, clipped / kept_tokens


def random_case(seed=0, lengths=(4, 1, 0, 7, 3), masked=False):
    torch.manual_seed(seed)
    n = sum(lengths)
    logp = -torch.rand(n, dtype=torch.float64) * 3
    case = {
        "advantages": torch.randn(len(lengths), dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        "old_logp": logp + torch.randn(n, dtype=torch.float64) * 0.4,
        "ref_logp": logp + torch.randn(n, dtype=torch.float64) * 2,
    }
    if masked:
        case["mask"] = torch.rand(n) > 0.3
    return logp.requires_grad_(), case


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x["loss_type"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("clip_low", "clip_high"), CLIPS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_naive(loss, level, clip_low, clip_high, beta, masked):
    logp, case = random_case(masked=masked)
    options = loss | {
        "importance_level": level,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "beta": beta,
        "kl_clamp": 2.0,
    }
    ours = grpo_loss(logp, **case, **options)
    loss_value, kl, clip_fraction = naive(logp, **case, **options)
    assert_matches(ours.loss, loss_value, name="loss")
    assert float(ours.kl) == pytest.approx(float(kl), abs=BY_HAND)
    assert float(ours.clip_fraction) == pytest.approx(clip_fraction, abs=BY_HAND)
    ours_grad, theirs_grad = (torch.autograd.grad(3 * x, logp)[0] for x in (ours.loss, loss_value))
    assert_matches(ours_grad, theirs_grad, name="gradient")
    assert ours.skipped_rows == int((theirs_grad == 0).sum())
    assert torch.equal(ours_grad == 0, theirs_grad == 0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x["loss_type"])
def test_gradcheck(level, loss):
    logp, case = random_case(masked=True)
    # old_logp None: the ratio's denominator moves with logp, which finite differences cannot hold; so it is given here.
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, **case, **loss, importance_level=level, clip_low=0.2, clip_high=0.3, beta=0.1).loss, logp
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"loss_type": "grpo"}, (-2 + 1) / 2),
        ({"loss_type": "bnpo"}, -3 / 3),
        ({"loss_type": "dr_grpo", "max_completion_length": 10}, -3 / 20),
        ({"loss_type": "dapo", "num_tokens": 6}, -3 / 6),
    ],
)
def test_loss_types_by_hand(options, expected):
    out = grpo_loss(leaf(-1, -2, -3), ADVANTAGES, CU, beta=0, **options)
    assert out.loss.item() == pytest.approx(expected, abs=BY_HAND)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"loss_type": "grpo"}, [-2 / 4, -2 / 4, 1 / 2]),
        ({"loss_type": "bnpo"}, [-2 / 3, -2 / 3, 1 / 3]),
        ({"loss_type": "dr_grpo", "max_completion_length": 10}, [-0.1, -0.1, 0.05]),
        ({"loss_type": "dapo", "num_tokens": 8}, [-0.25, -0.25, 0.125]),
    ],
)
def test_on_policy_gradient_by_hand(options, expected):
    logp = leaf(-1, -2, -3)
    grpo_loss(logp, ADVANTAGES, CU, beta=0, **options).loss.backward()
    assert logp.grad.tolist() == pytest.approx(expected, abs=BY_HAND)


def test_kl_by_hand():
    # x = -0.5, 0, 1 -> kl = e^-0.5 - 0.5, 0, e - 2
    logp, first, third = leaf(-1, -2, -3), 0.10653065971263342, 0.7182818284590452
    out = grpo_loss(logp, ADVANTAGES, CU, ref_logp=tokens(-1.5, -2, -2), beta=0.1)
    assert out.loss.item() == pytest.approx(((-2 + 0.1 * first / 2) + (1 + 0.1 * third)) / 2, abs=BY_HAND)
    assert out.kl.item() == pytest.approx((first + third) / 3, abs=BY_HAND)
    out.loss.backward()
    # weight * (-A + beta (1 - e^x))
    expected = [(-2 + 0.1 * (1 - math.exp(-0.5))) / 4, -2 / 4, (1 + 0.1 * (1 - math.e)) / 2]
    assert logp.grad.tolist() == pytest.approx(expected, abs=BY_HAND)


def test_kl_clamp_by_hand():
    # Gaps of 20 and -20 count as 10 and -10, and carry no gradient; one of exactly 10 does.
    logp, ref = leaf(-21, -1, -12), tokens(-1, -21, -2)
    out = grpo_loss(logp, torch.zeros(3).double(), torch.tensor([0, 1, 2, 3]), ref_logp=ref, beta=1.0)
    kls = [math.exp(10) - 11, math.exp(-10) + 9, math.exp(10) - 11]
    assert out.kl.item() == pytest.approx(sum(kls) / 3, rel=BY_HAND)
    assert out.loss.item() == pytest.approx(sum(kls) / 3, rel=BY_HAND)
    out.loss.backward()
    assert logp.grad.tolist() == pytest.approx([0, 0, (1 - math.exp(10)) / 3], rel=BY_HAND)
    assert out.skipped_rows == 2


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_low", "clip_high", "loss", "clipped"),
    [
        (1.5, 1.0, None, 0.2, -1.2, True),
        (1.5, 1.0, 0.2, None, -1.5, False),
        (1.5, -1.0, 0.2, 0.2, 1.5, False),
        (0.5, -1.0, 0.2, None, 0.8, True),
        (0.5, -1.0, None, 0.2, 0.5, False),
        (0.5, 1.0, 0.2, 0.2, -0.5, False),
        (1.1, 1.0, 0.2, 0.2, -1.1, False),
        (1.5, 0.0, 0.2, 0.2, 0.0, False),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clip_by_hand(ratio, advantage, clip_low, clip_high, loss, clipped, level):
    logp = leaf(-1)
    out = grpo_loss(
        logp,
        tokens(advantage),
        torch.tensor([0, 1]),
        old_logp=tokens(-1 - math.log(ratio)),
        beta=0,
        clip_low=clip_low,
        clip_high=clip_high,
        importance_level=level,
    )
    assert out.loss.item() == pytest.approx(loss, abs=BY_HAND)
    assert out.clip_fraction.item() == float(clipped)
    out.loss.backward()
    assert logp.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage, abs=BY_HAND)
    assert out.skipped_rows == int(clipped or advantage == 0)


def test_sequence_ratio_by_hand():
    # Log ratios 1.0 and 0.0: the sequence's is 0.5, shared by both tokens. A = 2, one completion.
    logp = leaf(-1, -2)
    options = {"old_logp": tokens(-2, -2), "beta": 0, "importance_level": "sequence"}
    out = grpo_loss(logp, tokens(2), torch.tensor([0, 2]), **options)
    assert out.loss.item() == pytest.approx(-2 * math.exp(0.5), abs=BY_HAND)
    out.loss.backward()
    assert logp.grad.tolist() == pytest.approx([-math.exp(0.5)] * 2, abs=BY_HAND)  # -r A / length
    clipped = grpo_loss(leaf(-1, -2), tokens(2), torch.tensor([0, 2]), clip_high=0.2, **options)
    assert clipped.loss.item() == pytest.approx(-2.4, abs=BY_HAND)
    assert clipped.clip_fraction.item() == 1.0
    assert clipped.skipped_rows == 2
    # At token level only the first token is clipped.
    options["importance_level"] = "token"
    token = grpo_loss(leaf(-1, -2), tokens(2), torch.tensor([0, 2]), clip_high=0.2, **options)
    assert token.loss.item() == pytest.approx(-(2.4 + 2) / 2, abs=BY_HAND)
    assert token.clip_fraction.item() == 0.5


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ratio_is_exactly_one_on_policy(level, dtype):
    logp, case = random_case(lengths=(4, 4, 4, 4))
    logp = logp.detach().to(dtype).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=dtype)
    options = {"beta": 0.0, "clip_low": 1e-7, "clip_high": 1e-7, "importance_level": level}
    for old in (None, logp.detach().clone()):
        out = grpo_loss(logp, advantages, case["cu_seqlens"], old_logp=old, **options)
        assert out.loss.item() == 0.125  # -(1 - 2 + 0.5 + 0) / 4, all powers of two
        assert out.clip_fraction.item() == 0
        assert out.skipped_rows == 4
        (grad,) = torch.autograd.grad(out.loss, logp)
        assert torch.equal(grad, -advantages.repeat_interleave(4) / 16)


def test_second_update_on_the_same_rollout():
    """num_iterations above 1: old log-probs are those before the first update."""
    logp, case = random_case()
    old = logp.detach().clone()
    case.pop("old_logp")
    first = grpo_loss(logp, **case, old_logp=old, clip_low=0.2, clip_high=0.2)
    on_policy = grpo_loss(logp, **case, clip_low=0.2, clip_high=0.2)
    assert torch.equal(first.loss, on_policy.loss)
    moved = (logp.detach() + 0.5).requires_grad_()  # every ratio e^0.5 = 1.65
    second = grpo_loss(moved, **case, old_logp=old, clip_low=0.2, clip_high=0.2, beta=0)
    lengths = case["cu_seqlens"].diff()
    positive = (case["advantages"] > 0).repeat_interleave(lengths)
    assert second.clip_fraction.item() == pytest.approx(positive.double().mean().item())
    (grad,) = torch.autograd.grad(second.loss, moved)
    assert torch.equal(grad == 0, positive)


def test_beta_zero_ignores_the_reference():
    logp, case = random_case()
    with_ref = grpo_loss(logp, **case, beta=0.0)
    case["ref_logp"] = torch.full_like(logp.detach(), torch.nan)
    assert torch.equal(grpo_loss(logp, **case, beta=0.0).loss, with_ref.loss)
    case.pop("ref_logp")
    without = grpo_loss(logp, **case, beta=0.0)
    assert torch.equal(without.loss, with_ref.loss)
    assert without.kl.item() == 0


def test_zero_advantage_rows_are_skipped_only_without_kl():
    logp, ref = leaf(-1, -2, -3), tokens(-1.5, -2, -2)
    zero = torch.zeros(2, dtype=torch.float64)
    assert grpo_loss(logp, zero, CU, ref_logp=ref, beta=0).skipped_rows == 3
    out = grpo_loss(logp, zero, CU, ref_logp=ref, beta=0.04)
    assert out.skipped_rows == 1  # the second token alone: there the reference agrees, 1 - exp(0) = 0
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert (grad == 0).tolist() == [False, True, False]


def test_empty_completions_count_in_the_mean_over_completions():
    logp = leaf(-1, -2, -3)
    advantages = tokens(5, 2, 7, -1, 9)
    cu = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32)
    assert grpo_loss(logp, advantages, cu, beta=0).loss.item() == pytest.approx((-2 + 1) / 5)
    assert grpo_loss(logp, advantages, cu, beta=0, loss_type="bnpo").loss.item() == pytest.approx(-1)
    dr = grpo_loss(logp, advantages, cu, beta=0, loss_type="dr_grpo", max_completion_length=10)
    assert dr.loss.item() == pytest.approx(-3 / 50)
    sequence = grpo_loss(logp, advantages, cu, beta=0, importance_level="sequence", old_logp=logp.detach())
    assert sequence.loss.item() == pytest.approx(-1 / 5)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x["loss_type"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("completions", [0, 1, 3])
def test_no_tokens(loss, level, completions):
    logp = torch.empty(0, requires_grad=True)
    nothing = torch.empty(0)
    out = grpo_loss(
        logp,
        torch.ones(completions),
        torch.zeros(completions + 1, dtype=torch.int32),
        old_logp=nothing,
        ref_logp=nothing,
        clip_low=0.2,
        importance_level=level,
        **loss,
    )
    assert out.loss.item() == out.kl.item() == out.clip_fraction.item() == out.skipped_rows == 0
    out.loss.backward()
    assert logp.grad.shape == (0,)


def test_masked_tokens_are_as_if_absent():
    logp, case = random_case(masked=True)
    keep = case["mask"]
    poison = {k: case[k].masked_fill(~keep, torch.nan) for k in ("old_logp", "ref_logp")}
    dirty = logp.detach().masked_fill(~keep, torch.nan).requires_grad_()
    counts = torch.cat([torch.zeros(1).long(), keep.long().cumsum(0)])
    for level in ("token", "sequence"):
        options = {"clip_low": 0.2, "clip_high": 0.2, "importance_level": level}
        masked = grpo_loss(dirty, **(case | poison), **options)
        short = grpo_loss(
            logp[keep],
            case["advantages"],
            counts[case["cu_seqlens"].long()],
            old_logp=case["old_logp"][keep],
            ref_logp=case["ref_logp"][keep],
            **options,
        )
        assert_matches(masked.loss, short.loss)
        assert masked.kl.item() == pytest.approx(short.kl.item())
        assert masked.clip_fraction.item() == pytest.approx(short.clip_fraction.item())
        assert masked.skipped_rows == short.skipped_rows + int((~keep).sum())
        assert (masked.logp[~keep] == 0).all()
        (grad,) = torch.autograd.grad(masked.loss, dirty)
        assert (grad[~keep] == 0).all()
        assert grad.isfinite().all()


def test_masked_tokens_of_a_clipped_sequence_are_not_counted():
    # Of 3 tokens one is masked; the other two form a sequence of ratio e^0.5, clipped.
    out = grpo_loss(
        leaf(-1, -9, -2),
        tokens(2),
        torch.tensor([0, 3]),
        old_logp=tokens(-2, -1, -2),
        beta=0,
        clip_high=0.2,
        importance_level="sequence",
        mask=torch.tensor([True, False, True]),
    )
    assert out.clip_fraction.item() == 1.0
    assert out.loss.item() == pytest.approx(-2.4)
    assert out.skipped_rows == 3


def test_everything_masked():
    logp = leaf(-1, -2, -3)
    out = grpo_loss(logp, ADVANTAGES, CU, beta=0, mask=torch.zeros(3, dtype=torch.bool))
    out.loss.backward()
    assert out.loss.item() == 0
    assert logp.grad.tolist() == [0, 0, 0]
    assert out.skipped_rows == 3


def test_completion_order_does_not_matter():
    logp, case = random_case()
    lengths = case["cu_seqlens"].diff().tolist()
    order = [3, 0, 4, 2, 1]
    starts = case["cu_seqlens"].tolist()
    index = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in order])
    cu = torch.tensor([0, *torch.tensor([lengths[s] for s in order]).cumsum(0).tolist()])
    options = {"clip_low": 0.2, "clip_high": 0.2}
    for level in ("token", "sequence"):
        first = grpo_loss(logp, **case, **options, importance_level=level)
        other = grpo_loss(
            logp[index],
            case["advantages"][order],
            cu,
            old_logp=case["old_logp"][index],
            ref_logp=case["ref_logp"][index],
            **options,
            importance_level=level,
        )
        assert_matches(first.loss, other.loss)
        assert_matches(*(torch.autograd.grad(x.loss, logp)[0] for x in (first, other)))


def test_an_overflowing_ratio_that_is_clipped_stays_finite():
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    out = grpo_loss(
        logp,
        torch.tensor([1.0, 0.0]),
        torch.tensor([0, 1, 2]),
        old_logp=torch.tensor([-200.0, -200.0]),
        beta=0,
        clip_high=0.2,
    )
    assert out.loss.item() == pytest.approx(-0.6)
    out.loss.backward()
    assert logp.grad.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_compute_in_fp32(dtype):
    logp, case = random_case()
    low = logp.detach().to(dtype).requires_grad_()
    low_case = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.items()}
    ours = grpo_loss(low, **low_case)
    exact = low.detach().double().requires_grad_()
    oracle = naive(exact, **{k: v.double() if v.is_floating_point() else v for k, v in low_case.items()})
    assert ours.loss.dtype == ours.logp.dtype == torch.float32
    assert_matches(ours.loss, oracle[0])
    (grad,) = torch.autograd.grad(ours.loss, low)
    assert grad.dtype == dtype
    assert_matches(grad, torch.autograd.grad(oracle[0], exact)[0])


def test_what_is_returned():
    logp, case = random_case()
    out = grpo_loss(logp, **case)
    assert out.entropy is None
    assert torch.equal(out.logp, logp)
    assert out.loss.shape == out.kl.shape == out.clip_fraction.shape == ()
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.logp, out.kl, out.clip_fraction))
    assert isinstance(out.skipped_rows, int)
    with pytest.raises(AttributeError):
        out.loss = None
    assert not grpo_loss(logp.detach(), **case).loss.requires_grad


def test_same_bits_in_poisoned_memory():
    logp, case = random_case(masked=True)

    def once():
        out = grpo_loss(logp, **case, clip_low=0.2, importance_level="sequence")
        return out.loss, out.kl, out.clip_fraction, *torch.autograd.grad(out.loss, logp)

    assert_same_bits(once)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp": torch.zeros(3, 1)}, r"logp: expected shape \[N\], got \[3, 1\]"),
        ({"logp": torch.zeros(3).long()}, "logp: expected dtype float64, float32, bfloat16 or float16, got"),
        ({"advantages": torch.zeros(3)}, r"advantages: expected shape \[2\], got \[3\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "cu_seqlens: expected the first entry 0 and the last 3, got 0 and 4"),
        ({"cu_seqlens": torch.tensor([1, 2, 3])}, "cu_seqlens: expected the first entry 0 and the last 3, got 1 and 3"),
        ({"cu_seqlens": torch.tensor([0, 4, 3])}, "cu_seqlens: expected non-decreasing entries, got 4 then 3"),
        ({"cu_seqlens": torch.tensor([0.0, 2.0, 3.0])}, "cu_seqlens: expected dtype int64 or int32"),
        ({"cu_seqlens": torch.tensor([[0, 2, 3]])}, r"cu_seqlens: expected shape \[S\+1\]"),
        ({"cu_seqlens": torch.tensor([]).long()}, "cu_seqlens: expected at least one entry"),
        ({"old_logp": torch.zeros(2)}, r"old_logp: expected shape \[3\], got \[2\]"),
        ({"ref_logp": torch.zeros(4)}, r"ref_logp: expected shape \[3\], got \[4\]"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask: expected shape \[3\], got \[2\]"),
        ({"mask": torch.ones(3)}, "mask: expected dtype bool"),
        ({"beta": 0.04}, r"ref_logp: expected a tensor \[3\], as beta is 0.04 \(pass it, or beta=0\), got None"),
        ({"beta": -1}, "beta: expected a finite number of 0 or more, got -1"),
        ({"loss_type": "dr_grpo"}, "max_completion_length: expected a number of tokens, as loss_type is 'dr_grpo'"),
        ({"loss_type": "dapo"}, "num_tokens: expected the tokens of the whole accumulated batch"),
        ({"loss_type": "dapo", "num_tokens": 0}, "num_tokens: expected a finite number above 0, got 0"),
        ({"loss_type": "gropo"}, r"loss_type: expected one of .* got 'gropo' \(did you mean 'grpo'\?\)"),
        ({"importance_level": "word"}, "importance_level: expected one of 'token', 'sequence', got 'word'"),
        ({"clip_low": 0}, "clip_low: expected a finite number above 0, got 0"),
        ({"clip_high": -0.1}, "clip_high: expected a finite number above 0, got -0.1"),
        ({"kl_clamp": 0}, "kl_clamp: expected a finite number above 0, got 0"),
        ({"backend": "native"}, "backend 'native' cannot run on cpu"),
    ],
)
def test_errors(change, message):
    arguments = {"logp": torch.zeros(3), "advantages": torch.zeros(2), "cu_seqlens": CU, "beta": 0.0} | change
    with pytest.raises(ValueError, match=f"grpo_loss: {message}"):
        grpo_loss(**arguments)


@pytest.mark.parametrize("count", [torch.tensor(8), torch.tensor(8.0), np.int64(8)])
def test_num_tokens_may_be_a_scalar_of_any_library(count: object) -> None:
    logp, cu = torch.randn(6, dtype=torch.float64), torch.tensor([0, 2, 6])
    options = {"loss_type": "dapo", "beta": 0.0}
    expected = grpo_loss(logp, torch.ones(2, dtype=torch.float64), cu, num_tokens=8, **options).loss
    assert grpo_loss(logp, torch.ones(2, dtype=torch.float64), cu, num_tokens=count, **options).loss == expected
