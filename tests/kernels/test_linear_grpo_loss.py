"""linear_grpo_loss against full logits and autograd in fp64, and what it leaves out."""

import pytest
import torch
from grpo_options import GOOD
from same_bits import assert_same_bits
from torch.utils.flop_counter import FlopCounterMode

from videor1_kernels import grpo_loss, linear_grpo_loss, linear_logprob
from videor1_kernels.grpo_loss import reference
from videor1_kernels.linear_logprob import tiles
from videor1_kernels.linear_logprob.inputs import HeadInputs
from videor1_kernels.testing import LargestTensor, assert_matches, assert_no_worse

LENGTHS = (5, 1, 0, 8, 3)


def make(dtype=torch.float64, hidden_size=6, vocab=23, seed=0):
    torch.manual_seed(seed)
    n = sum(LENGTHS)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    hidden, weight, bias = (normal(*s).requires_grad_() for s in ((n, hidden_size), (vocab, hidden_size), (vocab,)))
    case = {
        "labels": torch.randint(vocab, (n,)),
        "advantages": normal(len(LENGTHS)),
        "cu_seqlens": torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32),
    }
    with torch.no_grad():
        logp = linear_logprob(hidden, weight, case["labels"], bias=bias)[0]
    case["old_logp"] = logp + torch.randn_like(logp) * 0.3
    case["ref_logp"] = logp + torch.randn_like(logp)
    return (hidden, weight, bias), case


def dense(hidden, weight, bias, labels, advantages, cu_seqlens, old_logp, ref_logp, beta, low, high, temperature):
    """Token-level GRPO with full logits; -100 tokens dropped."""
    scores = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    completions = []
    for s in range(len(cu_seqlens) - 1):
        rows = [t for t in range(int(cu_seqlens[s]), int(cu_seqlens[s + 1])) if labels[t] != -100]
        if not rows:
            continue
        logp = scores[rows, labels[rows]]
        r, a = (logp - old_logp[rows]).exp(), advantages[s]
        x = ref_logp[rows] - logp
        token = -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a) + beta * (x.exp() - x - 1)
        completions.append(token.mean())
    return sum(completions) / (len(cu_seqlens) - 1)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_dense_fp64(masked):
    inputs, case = make()
    if masked:
        case["labels"][::4] = -100
    hidden, weight, bias = inputs
    ours = linear_grpo_loss(hidden, weight, **case, bias=bias, clip_low=0.2, clip_high=0.2, temperature=0.8)
    theirs = dense(*inputs, **case, beta=0.04, low=0.2, high=0.2, temperature=0.8)
    assert_matches(ours.loss, theirs)
    for a, b in zip(torch.autograd.grad(ours.loss, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert_matches(a, b)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_equals_the_two_steps(level, loss_type):
    inputs, case = make()
    case["labels"][::5] = -100
    hidden, weight, bias = inputs
    options = {
        "loss_type": loss_type,
        "importance_level": level,
        "clip_high": 0.2,
        "num_tokens": 30,
        "beta": 0.1,
        "max_completion_length": 12,
    }
    ours = linear_grpo_loss(hidden, weight, **case, bias=bias, **options)
    labels = case.pop("labels")
    logp, entropy = linear_logprob(hidden, weight, labels, bias=bias)
    steps = grpo_loss(logp, **case, mask=labels != -100, **options)
    assert_matches(ours.loss, steps.loss)
    assert_matches(ours.logp, logp)
    assert_matches(ours.entropy, entropy)
    assert ours.skipped_rows == steps.skipped_rows
    assert (ours.kl, ours.clip_fraction) == (steps.kl, steps.clip_fraction)
    assert not ours.logp.requires_grad
    assert not ours.entropy.requires_grad
    for a, b in zip(torch.autograd.grad(ours.loss, inputs), torch.autograd.grad(steps.loss, inputs), strict=True):
        assert_matches(a, b)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(level):
    inputs, case = make(hidden_size=2, vocab=4)
    case["labels"][3] = -100
    assert torch.autograd.gradcheck(
        lambda h, w, b: (
            linear_grpo_loss(
                h, w, **case, bias=b, clip_low=0.2, clip_high=0.2, importance_level=level, temperature=1.3
            ).loss
        ),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_against_the_oracle(dtype):
    (hidden, weight, bias), case = make(dtype, hidden_size=32, vocab=101)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    exact_case = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    options = {"beta": 0.04, "low": 0.5, "high": 0.5, "temperature": 1.0}
    ours = linear_grpo_loss(hidden, weight, **case, bias=bias, clip_low=0.5, clip_high=0.5)
    plain = dense(hidden, weight, bias, **case, **options)
    oracle = dense(*exact, **exact_case, **options)
    assert_matches(ours.loss, oracle)
    terms = 32 + 101 + len(case["labels"])  # of a logit, of the softmax, and of the loss or the head's gradient
    # Advantages of both signs: the loss is much smaller than the completions' terms are, |r A| on average.
    spread = case["advantages"].abs().mean().item() * 1.5
    assert_no_worse(ours.loss, plain, oracle, terms=terms, scale=spread)
    grads = (
        torch.autograd.grad(loss, inputs)
        for loss, inputs in ((ours.loss, (hidden, weight, bias)), (plain, (hidden, weight, bias)), (oracle, exact))
    )
    for a, b, o in zip(*grads, strict=True):
        assert a.dtype == dtype
        assert_matches(a, o)
        assert_no_worse(a, b, o, terms=terms)


def test_rows_without_a_coefficient_do_no_gradient_work():
    """Masked, clipped and zero-advantage rows may hold NaN in their hidden state: the other gradients stay finite."""
    (hidden, weight, _), case = make()
    case["advantages"] = torch.tensor([1.0, -1.0, 3.0, 0.0, 2.0], dtype=torch.float64)  # rows 6 to 13 have none
    case["labels"][2] = -100
    clipped = 15
    case["old_logp"] = linear_logprob(hidden, weight, case["labels"])[0].detach()
    case["old_logp"][clipped] -= 1.0  # ratio e, advantage 2
    case.pop("ref_logp")
    dead = torch.tensor([2, *range(6, 14), clipped])
    out = linear_grpo_loss(hidden, weight, **case, beta=0, clip_high=0.2)
    want_hidden, want_weight = torch.autograd.grad(out.loss, (hidden, weight))
    assert out.skipped_rows == len(dead)
    assert out.clip_fraction.item() == pytest.approx(1 / 16)
    assert (want_hidden[dead] == 0).all()
    assert ((want_hidden != 0).all(1).nonzero()[:, 0].tolist()) == [t for t in range(17) if t not in dead.tolist()]

    poisoned = hidden.detach().clone()
    poisoned[2] = torch.nan
    poisoned[6:14] = torch.nan
    poisoned.requires_grad_()
    again = linear_grpo_loss(poisoned, weight, **case, beta=0, clip_high=0.2)
    got_hidden, got_weight = torch.autograd.grad(again.loss, (poisoned, weight))
    assert torch.equal(got_hidden, want_hidden)
    assert torch.equal(got_weight, want_weight)


def below_the_operator(hidden, weight, labels, advantages, cu_seqlens):
    """The reference itself, with gradients: what runs inside an operator is hidden from a dispatch mode."""
    options = reference.GrpoLossOptions("grpo", 0.0, None, None, 10.0, "token", None, None)
    inputs = HeadInputs(hidden.detach(), weight.detach(), labels, None, 1.0)
    completions = reference.Completions(advantages, cu_seqlens, None, None)
    return reference.linear_grpo_loss(inputs, completions, options, [True, True, False])


def test_gradients_multiply_only_the_live_rows():
    (hidden, weight, _), case = make()
    advantages = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # 1 live row of 17
    with FlopCounterMode(display=False) as counted:
        result = below_the_operator(hidden, weight, case["labels"], advantages, case["cu_seqlens"])
    assert result.skipped_rows == 16
    # The logits of all rows; of the live one the logits again, d_hidden and d_weight.
    assert counted.get_total_flops() == (2 * 17 + 6 * 1) * 6 * 23


def test_full_logits_are_never_made(monkeypatch):
    torch.manual_seed(0)
    rows, vocab = 256, 512
    hidden, weight = torch.randn(rows, 8), torch.randn(vocab, 8)
    monkeypatch.setitem(tiles.CHUNK_BYTES, "cpu", 64 * 1024)
    with LargestTensor() as seen:
        below_the_operator(hidden, weight, torch.randint(vocab, (rows,)), torch.randn(2), torch.tensor([0, 100, rows]))
    assert seen.numel == 64 * 1024 // 4, seen.operation


def test_on_policy_loss_is_exact():
    (hidden, weight, bias), case = make(torch.float32)
    case |= {"old_logp": None, "ref_logp": None, "cu_seqlens": torch.tensor([0, 1, 3, 9, 17])}
    case["advantages"] = torch.tensor([1.0, -2.0, 0.0, 4.0])
    out = linear_grpo_loss(hidden, weight, **case, bias=bias, beta=0, clip_low=1e-7, clip_high=1e-7)
    assert out.loss.item() == -0.75
    assert out.clip_fraction.item() == 0


def test_no_tokens_and_no_completions():
    weight = torch.randn(5, 4, requires_grad=True)
    for completions in (0, 2):
        hidden = torch.empty(0, 4, requires_grad=True)
        out = linear_grpo_loss(
            hidden, weight, torch.empty(0).long(), torch.ones(completions), torch.zeros(completions + 1).int(), beta=0
        )
        out.loss.backward()
        assert out.loss.item() == 0
        assert hidden.grad.shape == (0, 4)
        assert (weight.grad == 0).all()


def test_frozen_head_and_same_bits():
    (hidden, weight, bias), case = make(torch.float32)
    weight.requires_grad_(False)
    bias.requires_grad_(False)

    def once():
        out = linear_grpo_loss(hidden, weight, **case, bias=bias)
        return out.loss, out.logp, out.entropy, *torch.autograd.grad(out.loss, hidden)

    assert_same_bits(once)


def test_row_temperature():
    (hidden, weight, _), case = make()
    temperature = torch.linspace(0.5, 2, 17, dtype=torch.float64)
    out = linear_grpo_loss(hidden, weight, **case, temperature=temperature)
    assert_matches(out.logp, linear_logprob(hidden / temperature[:, None], weight, case["labels"])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 4)}, r"hidden: expected shape \[N, H\], got \[1, 3, 4\]"),
        ({"labels": torch.zeros(4).long()}, r"labels: expected shape \[3\], got \[4\]"),
        ({"labels": torch.tensor([0, 1, 5])}, "labels: expected values in .* got 1 outside, the first of them 5"),
        ({"temperature": 0}, "temperature: expected a finite number above 0"),
        ({"beta": 0.1}, "ref_logp: expected a tensor"),
        ({"advantages": torch.zeros(1)}, r"advantages: expected shape \[2\], got \[1\]"),
        ({"loss_type": "dapo"}, "num_tokens: expected"),
        ({"backend": "native"}, "backend 'native' cannot run on cpu"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=f"linear_grpo_loss: {message}"):
        linear_grpo_loss(**GOOD | change)
