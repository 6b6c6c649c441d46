"""linear_grpo_loss on Triton against the reference in fp64, loss, statistics and gradients; its errors are the same."""

import itertools
from dataclasses import replace

import pytest
import torch
from grpo_options import CLIPS, GOOD, LOSSES
from triton_cases import DEVICE, DTYPES, HALF, QUIET, Head, leaf, make_head, shared_error
from triton_grpo_cases import BAD, BOTH, LENGTHS, check_linear, cumulative, double, make_linear, run

from videor1_kernels import linear_grpo_loss, linear_logprob
from videor1_kernels.testing import assert_matches, assert_no_worse

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

# Every loss with every level, and across them every other choice.
MIXES = [
    ({**loss, "importance_level": level, "beta": beta, "clip_low": low, "clip_high": high}, old)
    for i, (loss, level) in enumerate(itertools.product(LOSSES, ("token", "sequence")))
    for beta, old, (low, high) in (
        (0.0, i % 2 == 0, CLIPS[i % 4]),
        (0.04, True, CLIPS[3 - i % 4]),
        (0.04 * (i % 2), False, CLIPS[3]),
    )
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("options", "old"), MIXES)
def test_every_fused_loss_equals_fp64(dtype, options, old):
    head, case = make_linear(dtype, ignored=True, bias=not old)
    if not old:
        case["old_logp"] = None
    check_linear(head, case, temperature=1.0, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.3, 2.0, "row"])
@pytest.mark.parametrize(("rows", "vocab", "size"), [(1, 1, 1), (33, 257, 17), (32, 128, 32)])
def test_shapes_and_temperatures(dtype, temperature, rows, vocab, size):
    head, case = make_linear(dtype, (rows - rows // 3, 0, rows // 3), vocab=vocab, size=size)
    value = torch.linspace(0.3, 2, rows, device=DEVICE) if temperature == "row" else temperature
    with torch.no_grad():
        exact = head.oracle()
        case["old_logp"] = (
            0.1
            + linear_logprob(exact.hidden, exact.weight, exact.labels, temperature=value, backend="reference")[
                0
            ].float()
        )
    check_linear(head, case, temperature=value, **BOTH)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_plain_torch(dtype):
    lengths = (12, 1, 16, 4)
    head, case = make_linear(dtype, lengths, vocab=300, size=48)
    ours, grads = run(head, case, clip_low=0.5, clip_high=0.5)
    exact, exact_grads = run(head.oracle(), double(case), "reference", clip_low=0.5, clip_high=0.5)
    logp = (head.hidden @ head.weight.T).float().log_softmax(-1).gather(-1, head.labels[:, None])[:, 0]
    r = (logp - case["old_logp"]).exp()
    x = case["ref_logp"] - logp
    a, share = (
        torch.repeat_interleave(v, torch.tensor(lengths, device=DEVICE))
        for v in (case["advantages"], 1 / torch.tensor([float(4 * n) for n in lengths], device=DEVICE))
    )
    plain = (share * (-torch.minimum(r * a, r.clamp(0.5, 1.5) * a) + 0.04 * (x.exp() - x - 1))).sum()
    plain_grads = torch.autograd.grad(plain, head.leaves)
    terms = 48 + 300 + sum(lengths)
    assert_no_worse(ours.logp, logp.detach(), exact.logp, terms=terms, name="logp")
    scale = (share * r * a).abs().sum().item()  # what the advantages' signs cancel
    assert_no_worse(ours.loss, plain, exact.loss, terms=terms, scale=scale, name="loss")
    for i, (a, b, o) in enumerate(zip(grads, plain_grads, exact_grads, strict=True)):
        assert_no_worse(a, b, o, terms=terms, name=f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_fused_on_policy_ratio_is_exactly_one(dtype, level):
    head, case = make_linear(dtype, (1, 2, 8, 4))
    case["advantages"] = torch.tensor([1.0, -2.0, 0.0, 4.0], device=DEVICE)
    case["ref_logp"] = None
    tight = {"clip_low": 1e-7, "clip_high": 1e-7, "beta": 0, "importance_level": level}
    first, grads = run(head, case | {"old_logp": None}, **tight)
    assert first.loss.item() == -0.75
    assert first.clip_fraction.item() == 0
    assert first.skipped_rows == 8
    known, known_grads = run(head, case | {"old_logp": first.logp}, **tight)
    assert known.loss.item() == -0.75
    assert known.clip_fraction.item() == 0
    assert torch.equal(known.logp, first.logp)
    for a, b in zip(grads, known_grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "dapo", "num_tokens": 2e7},
        {"loss_type": "dapo", "num_tokens": 1e-5},
        {"loss_type": "dr_grpo", "max_completion_length": 1e7},
        {"loss_type": "dr_grpo", "max_completion_length": 1e-5},
        {"loss_type": "bnpo"},
        {"loss_type": "grpo"},
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_coefficients_outside_the_range_of_fp16(dtype, loss):
    """Of 1e-8 or 1e5: gradients are right where the incoming gradient brings them back into the range."""
    head, case = make_linear(dtype, (9, 0, 7))
    size = next((value for name, value in loss.items() if name != "loss_type"), 1.0)
    check_linear(head, case, factor=size, **loss, **BOTH)


@pytest.mark.parametrize("dtype", HALF)
def test_an_empty_completion_does_not_cost_precision(dtype):
    """The scale of fp16's coefficients follows the completions that have tokens."""
    head = make_head(33, 70, 16, dtype)
    grads = []
    for lengths in ((33,), (33, 0)):
        case = {"advantages": torch.ones(len(lengths), device=DEVICE), "cu_seqlens": cumulative(lengths)}
        grads.append(run(head, case, factor=len(lengths), beta=0)[1])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_bookkeeping(dtype):
    head, case = make_linear(dtype)
    out = linear_grpo_loss(head.hidden, head.weight, head.labels, **case, backend="triton")
    assert not any(x.requires_grad for x in (out.logp, out.entropy, out.kl, out.clip_fraction))
    once = torch.autograd.grad(out.loss, head.leaves, retain_graph=True)
    again = torch.autograd.grad(out.loss, head.leaves, retain_graph=True)
    scaled = torch.autograd.grad(out.loss * -8, head.leaves, retain_graph=True)
    third = torch.autograd.grad(out.loss / 3, head.leaves, retain_graph=True)
    for a, b, c, d in zip(once, again, scaled, third, strict=True):
        assert torch.equal(a, b)
        assert_matches(c / -8, a)
        # One factor, rounded once per element: a factor rounded to 16 bits would be wrong for all alike.
        precision = 4e-4 if dtype.itemsize == 2 else 1e-6
        assert d.double().norm().item() == pytest.approx(a.double().norm().item() / 3, rel=precision)
    (grad,) = torch.autograd.grad(out.loss, head.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()
    out.loss.backward()
    linear_grpo_loss(head.hidden, head.weight, head.labels, **case, backend="triton").loss.backward()
    assert_matches(head.weight.grad / 2, once[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_and_default_dtype_change_nothing(dtype):
    head, case = make_linear(dtype, ignored=True, bias=True)

    def results(default):
        torch.set_default_dtype(default)
        try:
            out, grads = run(head, case, **BOTH)
        finally:
            torch.set_default_dtype(torch.float32)
        return [out.loss, out.logp, out.entropy, out.kl, out.clip_fraction, *grads]

    plainly = results(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        others = [results(torch.float32)]
    others += [results(default) for default in (torch.bfloat16, torch.float16, torch.float64)]
    for other in others:
        for a, b in zip(plainly, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)],
)
def test_mixed_dtypes(hidden, weight):
    head, case = make_linear(torch.float16, ignored=True)
    mixed = replace(head, hidden=leaf(head.hidden.to(hidden)), weight=leaf(head.weight.to(weight)))
    case |= {
        "old_logp": case["old_logp"].to(torch.float64),
        "ref_logp": case["ref_logp"].half(),
        "advantages": case["advantages"].half(),
        "cu_seqlens": case["cu_seqlens"].long(),
    }
    check_linear(mixed, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    """Strided labels, cu_seqlens, bias and token values; hidden states out of a wider matrix, unaligned; odd H."""
    head, case = make_linear(dtype, size=15, bias=True)

    def strided(values):
        return torch.stack([values.detach(), torch.full_like(values, 3)], -1)[..., 0]

    wide = torch.cat([head.hidden.detach(), torch.full_like(head.hidden, 77)], 1)
    moved = Head(
        leaf(wide[:, :15]), leaf(head.weight.detach().T.contiguous().T), strided(head.labels), leaf(strided(head.bias))
    )
    for ignored in (False, True):
        if ignored:
            moved.labels[4] = -100
        for cu in (case["cu_seqlens"], case["cu_seqlens"].long()):
            spread = {name: strided(x) for name, x in case.items()} | {"cu_seqlens": strided(cu)}
            temperature = strided(torch.linspace(0.5, 2, sum(LENGTHS), device=DEVICE))
            check_linear(moved, spread, temperature=temperature, **BOTH)
    check_linear(replace(head, hidden=leaf(head.hidden[:1].detach().expand(sum(LENGTHS), 15))), case, **BOTH)


@pytest.mark.parametrize("dtype", DTYPES)
def test_banned_tokens(dtype):
    head, case = make_linear(dtype, vocab=200, bias=True)
    bias = head.bias.detach().clone()
    bias[:130], bias[150::2] = -torch.inf, -torch.inf
    banned = replace(head, labels=(131 + 2 * (head.labels % 5)), bias=leaf(bias))
    ours, grads = check_linear(banned, case | {"old_logp": None}, temperature=0.7)
    assert ours.entropy.isfinite().all()
    assert (grads[2][bias == -torch.inf] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(), (0, 0)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_tokens(dtype, lengths, level):
    head = make_head(0, 40, 8, dtype, bias=True)
    case = {"advantages": torch.ones(len(lengths), device=DEVICE), "cu_seqlens": cumulative(lengths)}
    for old in (None, torch.empty(0, device=DEVICE)):
        ours, grads = check_linear(head, case | {"old_logp": old}, beta=0, importance_level=level)
        assert ours.loss == 0
        assert ours.loss.requires_grad
        assert ours.skipped_rows == 0
        assert (grads[1] == 0).all()


BAD_HEAD = [
    {"hidden": torch.zeros(1, 3, 4)},
    {"hidden": torch.zeros(3, 0)},
    {"labels": torch.zeros(4).long()},
    {"labels": torch.tensor([0, 1, 5])},
    {"labels": torch.tensor([0, 1, -1])},
    {"labels": torch.zeros(3).int()},
    {"weight": torch.zeros(5, 3)},
    {"weight": torch.zeros(5, 4, device="meta")},
    {"bias": torch.zeros(4)},
    {"temperature": 0},
    {"temperature": torch.tensor([1.0, -1.0, 1.0])},
    {"temperature": torch.ones(2)},
]


@pytest.mark.parametrize("change", BAD_HEAD + BAD, ids=str)
def test_fused_errors_are_the_references(change):
    assert shared_error(linear_grpo_loss, GOOD | change).startswith("ValueError: linear_grpo_loss: ")
