"""grpo_loss on Triton against the reference in fp64, loss, statistics and gradients; its errors are the same."""

import math

import pytest
import torch
from grpo_options import CLIPS, GOOD, LOSSES
from triton_cases import DEVICE, QUIET, leaf, shared_error
from triton_grpo_cases import BAD, BOTH, FIELDS, LENGTHS, cumulative, double, make_case

from videor1_kernels import grpo_loss, last_backend
from videor1_kernels.testing import assert_matches, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def check(logp, case, **options):
    """grpo_loss against fp64; loss and statistics are fp32, the gradient of the log-probs' dtype."""
    with poisoned_memory():
        ours = grpo_loss(logp, **case, **options, backend="triton")
        assert last_backend("grpo_loss") == "triton"
        (grad,) = torch.autograd.grad(3 * ours.loss, logp)
    exact_logp = leaf(logp.double())
    exact = grpo_loss(exact_logp, **double(case), **options, backend="reference")
    (exact_grad,) = torch.autograd.grad(3 * exact.loss, exact_logp)
    for name in FIELDS:
        assert getattr(ours, name).dtype == torch.float32
        assert_matches(getattr(ours, name), getattr(exact, name), name=name)
    assert grad.dtype == logp.dtype
    assert_matches(grad, exact_grad)
    assert ours.entropy is None
    assert ours.skipped_rows == exact.skipped_rows
    return ours, grad


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x["loss_type"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("old", [True, False])
def test_every_loss_equals_fp64(loss, level, beta, old):
    for (clip_low, clip_high), masked in zip(CLIPS, (False, True, True, False), strict=True):
        logp, case = make_case()
        if masked:
            case["mask"] = torch.arange(len(logp), device=DEVICE) % 4 != 1  # the second completion's only token too
            for name in ("old_logp", "ref_logp"):
                case[name][~case["mask"]] = math.nan
        if not old:
            case["old_logp"] = None
        ours, _ = check(
            logp, case, **loss, importance_level=level, beta=beta, clip_low=clip_low, clip_high=clip_high, kl_clamp=2.0
        )
        if old and (clip_low or clip_high) and level == "token":
            assert ours.clip_fraction > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_the_inputs(level, dtype):
    logp, case = make_case()
    check(leaf(logp.to(dtype)), case, importance_level=level, **BOTH)
    mixed = {"advantages": dtype, "old_logp": torch.float64, "ref_logp": torch.float16, "cu_seqlens": torch.int64}
    check(leaf(logp.to(dtype)), {name: x.to(mixed[name]) for name, x in case.items()}, importance_level=level, **BOTH)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_completions_longer_than_a_block(level):
    logp, case = make_case((2500, 3, 1024, 1025))
    case["mask"] = torch.arange(len(logp), device=DEVICE) % 7 != 0
    check(logp, case, importance_level=level, **BOTH)


def test_strided_and_expanded_inputs():
    logp, case = make_case()
    case["mask"] = torch.arange(len(logp), device=DEVICE) % 4 != 1

    def strided(values):
        other = ~values if values.dtype == torch.bool else torch.full_like(values, 77)
        return torch.stack([values, other], 1)[:, 0]

    want, want_grad = check(logp, case)
    for dtype in (torch.int32, torch.int64):
        moved = {name: strided(x) for name, x in case.items()}
        moved["cu_seqlens"] = strided(case["cu_seqlens"].to(dtype))
        ours, grad = check(leaf(strided(logp.detach())), moved)
        assert torch.equal(ours.loss, want.loss)
        assert torch.equal(grad, want_grad)
    case |= {"old_logp": torch.tensor([-1.0], device=DEVICE).expand(len(logp)), "ref_logp": case["ref_logp"].flip(0)}
    check(logp, case | {"advantages": torch.ones((), device=DEVICE).expand(len(LENGTHS))}, **BOTH)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (0, 3, 0)])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x["loss_type"])
def test_few_and_empty_completions(lengths, loss):
    logp, case = make_case(lengths)
    for level in ("token", "sequence"):
        ours, grad = check(logp, case, **loss, importance_level=level)
        assert grad.shape == logp.shape
        assert ours.loss.isfinite()
    if len(logp):
        ours, grad = check(logp, case | {"mask": torch.zeros_like(logp, dtype=torch.bool)}, **loss)
        assert (ours.loss, ours.kl, ours.clip_fraction) == (0, 0, 0)
        assert (grad == 0).all()
        assert ours.skipped_rows == len(logp)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_the_ends_of_clip_and_clamp():
    """A gap of exactly the clamp has a gradient, one beyond has not; an overflowing ratio of advantage 0 is nothing."""
    logp = leaf(torch.tensor([-12.0, -21.0, -1.0, -1.0, 0.0], device=DEVICE))
    case = {
        "advantages": torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0], device=DEVICE),
        "cu_seqlens": cumulative([1] * 5),
        "ref_logp": torch.tensor([-2.0, -1.0, -21.0, -1.0, 0.0], device=DEVICE),
        "old_logp": torch.tensor([-12.0, -21.0, -2.0, 0.0, -200.0], device=DEVICE),
    }
    ours, grad = check(logp, case, beta=1.0, **BOTH)
    assert (grad != 0).tolist() == [True, False, False, False, False]
    assert ours.skipped_rows == 4
    assert ours.clip_fraction.item() == pytest.approx(2 / 5)
    check(logp, case, beta=1.0, kl_clamp=1e-3)


def test_small_gaps_to_the_reference_model():
    """The KL and its gradient near 0, where exp(x) - 1 would be all rounding."""
    logp, case = make_case()
    for size in (1e-1, 1e-2, 1e-4):
        case["ref_logp"] = logp.detach() + size * torch.linspace(-1.3, 1.3, len(logp), device=DEVICE)
        case["advantages"] = torch.zeros(len(LENGTHS), device=DEVICE)
        ours, grad = check(logp, case, beta=1.0)
        exact = leaf(logp.double())
        oracle = grpo_loss(exact, **double(case), beta=1.0).loss
        (exact_grad,) = torch.autograd.grad(3 * oracle, exact)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-12)
        assert ours.kl >= 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_ratio_is_exactly_one(level):
    logp, case = make_case((1, 2, 8, 4))
    case["advantages"] = torch.tensor([1.0, -2.0, 0.0, 4.0], device=DEVICE)
    tight = {"clip_low": 1e-7, "clip_high": 1e-7, "beta": 0, "importance_level": level}
    for old in (None, logp.detach().clone()):
        ours, grad = check(logp, case | {"old_logp": old}, **tight)
        assert ours.loss.item() == -0.75
        assert ours.clip_fraction.item() == 0
        assert (grad[:1] == -0.75).all()
        assert ours.skipped_rows == 8


def test_bookkeeping():
    logp, case = make_case()
    with torch.no_grad():
        assert not grpo_loss(logp, **case, backend="triton").loss.requires_grad
    assert not grpo_loss(logp.detach(), **case, backend="triton").loss.requires_grad
    ours = grpo_loss(logp, **case, backend="triton")
    assert ours.loss.requires_grad
    assert not any(x.requires_grad for x in (ours.logp, ours.kl, ours.clip_fraction))
    (once,) = torch.autograd.grad(ours.loss, logp, retain_graph=True)
    (again,) = torch.autograd.grad(ours.loss, logp, retain_graph=True)
    (scaled,) = torch.autograd.grad(-8 * ours.loss, logp, retain_graph=True)
    assert torch.equal(once, again)
    assert torch.equal(-8 * once, scaled)
    (grad,) = torch.autograd.grad(ours.loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


@pytest.mark.parametrize("change", [*BAD, {"mask": torch.ones(2) > 0}, {"mask": torch.ones(3)}], ids=str)
def test_errors_are_the_references(change):
    good = {name: GOOD[name] for name in ("advantages", "cu_seqlens", "beta")}
    assert shared_error(grpo_loss, {"logp": torch.zeros(3)} | good | change).startswith("ValueError: grpo_loss: ")
