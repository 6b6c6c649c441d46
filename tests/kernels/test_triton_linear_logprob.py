"""linear_logprob on Triton against the reference in fp64, forward and backward; its errors are the same."""

import math

import pytest
import torch
from triton_cases import (
    DEVICE,
    DTYPES,
    HALF,
    QUIET,
    Counter,
    Head,
    assert_all_match,
    leaf,
    make_head,
    shared_error,
    upstream,
)
from triton_logprob_cases import NAMES, check, evaluate

from videor1_kernels import linear_logprob
from videor1_kernels.linear_logprob import products, triton
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def plain(head: Head, temperature=1.0):
    """What one writes in torch, in the inputs' dtype."""
    logits = head.hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    scores = (logits.float() / temperature).log_softmax(-1)
    return scores.gather(-1, head.labels[:, None])[:, 0], -(scores.exp() * scores).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "size", "bias", "temperature"),
    [
        (1, 1, 1, True, 1.0),
        (1, 131, 8, False, 0.3),
        (2, 2, 3, False, 1.0),
        (5, 64, 32, True, 2.0),
        (33, 257, 40, False, 1.0),
        (40, 300, 17, True, 0.3),
        (32, 128, 48, False, 2.0),
    ],
)
def test_equals_fp64(dtype, rows, vocab, size, bias, temperature):
    check(make_head(rows, vocab, size, dtype, bias=bias), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", ["logp", "entropy"])
def test_either_output_alone(dtype, used):
    check(make_head(9, 70, 16, dtype), g="random" if used == "logp" else None, e=None if used == "logp" else "random")


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_plain_torch(dtype):
    head = make_head(33, 300, 48, dtype, bias=True)
    ours = plain_results = exact = None
    for backend in ("triton", "plain", "reference"):
        which = head.oracle() if backend == "reference" else head
        if backend == "plain":
            out = plain(which)
            grads = torch.autograd.grad(out, which.leaves, [upstream(33, seed=i) for i in range(2)])
            plain_results = [*out, *grads]
        elif backend == "triton":
            ours = evaluate(which, g=upstream(33, seed=0), e=upstream(33, seed=1))
        else:
            exact = evaluate(which, backend, g=upstream(33, seed=0), e=upstream(33, seed=1))
    for a, b, o, name in zip(ours, plain_results, exact, NAMES, strict=True):
        assert_no_worse(a, b, o, terms=48 + 300 + 300, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, "strided", "scalar", "ignored"])
def test_temperature_per_row(dtype, kind):
    head = make_head(11, 90, 16, dtype, ignored=kind == "ignored")
    temperature = torch.linspace(0.3, 2, 11, device=DEVICE)
    if kind == "strided":
        temperature = torch.stack([temperature, temperature.flip(0)], 1)[:, 0]
    elif kind == "scalar":
        temperature = temperature[3]
    elif isinstance(kind, torch.dtype):
        temperature = temperature.to(kind)
    check(head, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_ten_thousand(dtype):
    """Whole numbers, so that every dtype holds the logits' terms exactly; some rows have a near tie at the top."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (150, 8), generator=generator).double()
    hidden = torch.randint(-3, 4, (12, 8), generator=generator).double()
    weight[:, 0], hidden[:, 0] = 100.0, torch.tensor([100.0, -100.0]).repeat(6)
    weight[75:, 0] = -100.0
    head = Head(
        leaf(hidden.to(DEVICE, dtype)), leaf(weight.to(DEVICE, dtype)), torch.tensor([0, 149] * 6, device=DEVICE)
    )
    logits = hidden @ weight.T
    assert logits.max() > 9990
    assert logits.min() < -9990
    g, e = upstream(12, seed=0), upstream(12, seed=1)
    for temperature in (0.3, 1.0, 2.0):
        ours = evaluate(head, temperature=temperature, g=g, e=e)
        exact = evaluate(head.oracle(), "reference", temperature, g, e)
        assert_all_match(ours[:2], exact[:2], NAMES[:2], (None, None))
        assert ours[0].isfinite().all()
        assert (ours[1] >= 0).all()
        # Sums of terms of 100 that cancel: as good as the rounding of one term.
        term = 100 / temperature * torch.finfo(dtype).eps
        for a, o in zip(ours[2:], exact[2:], strict=True):
            assert (a - o).abs().max() <= 8 * term
    improbable = Head(head.hidden, head.weight, head.labels.flip(0))  # a probability that is 0 in fp32
    assert (evaluate(improbable)[0] < -1e4).all()
    assert_matches(evaluate(improbable)[0], evaluate(improbable.oracle(), "reference")[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_ignored(dtype):
    head = make_head(6, 40, 8, dtype, bias=True)
    head.labels.fill_(-100)
    with poisoned_memory():
        results = check(head)
    assert all((x == 0).all() for x in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_leading_dimensions(dtype, shape):
    flat = make_head(math.prod(shape), 40, 8, dtype)
    head = Head(leaf(flat.hidden.reshape(*shape, 8)), flat.weight, flat.labels.reshape(shape))
    assert check(head)[0].shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_ignored_rows_and_rows_without_gradient_are_never_read(dtype):
    """Their hidden states are NaN: every other result keeps its bits."""
    head = make_head(16, 90, 16, dtype, bias=True, ignored=True)
    g, e = upstream(16, seed=1), upstream(16, seed=2)
    ignored, idle = head.labels == -100, (g == 0) & (e == 0)
    dead = ignored | idle
    assert idle.any()
    assert not dead.all()
    clean = evaluate(head, g=g, e=e)
    poisoned = head.hidden.detach().clone()
    poisoned[dead] = math.nan
    for x in evaluate(Head(leaf(poisoned[~ignored]), head.weight, head.labels[~ignored]))[:2]:
        assert torch.equal(x.isnan(), idle[~ignored])
    again = evaluate(Head(leaf(poisoned), head.weight, head.labels, head.bias), g=g, e=e)
    for name, a, b in zip(NAMES, again, clean, strict=True):
        keep = ~idle if name in ("logp", "entropy") else slice(None)
        assert torch.equal(a[keep], b[keep]), name
    assert (again[0][ignored] == 0).all()
    assert (again[1][ignored] == 0).all()
    assert (again[2][dead] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_gradient_take_no_part(dtype):
    """The gradients are those of the live rows alone, to the bit, and only those are multiplied."""
    head = make_head(16, 90, 16, dtype)
    g = torch.zeros(16, device=DEVICE)
    live = [2, 3, 9, 15]
    g[live] = upstream(4, zeros=False)
    whole = evaluate(head, g=g)
    part = evaluate(Head(leaf(head.hidden[live]), head.weight, head.labels[live]), g=g[live])
    assert torch.equal(whole[2][live], part[2])
    assert torch.equal(whole[3], part[3])
    assert (whole[2].abs().sum(1) > 0).nonzero()[:, 0].tolist() == live
    assert all((x == 0).all() for x in evaluate(head, g=torch.zeros(16, device=DEVICE))[2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "hidden and bias"])
def test_only_what_needs_a_gradient_is_worked_for(dtype, frozen, monkeypatch):
    head = make_head(9, 70, 16, dtype, bias=True)
    full = evaluate(head, g=upstream(9), e=upstream(9, seed=2))
    kept = [full[0], full[1], *(x for x, name in zip(full[2:], NAMES[2:], strict=True) if name[2:] not in frozen)]
    for name in ("hidden", "weight", "bias"):
        if name in frozen:
            getattr(head, name).requires_grad_(False)
    into_weight = Counter(products.add_product)
    monkeypatch.setattr(products, "add_product", into_weight)
    sums = []
    made = triton.HeadGradients
    monkeypatch.setattr(triton, "HeadGradients", lambda *args: sums.append(made(*args)) or sums[-1])
    ours = evaluate(head, g=upstream(9), e=upstream(9, seed=2))
    for a, b in zip(ours, kept, strict=True):
        assert torch.equal(a, b)
    assert into_weight.calls == ("weight" not in frozen)
    assert [x is None for x in (sums[0].d_hidden, sums[0].d_weight, sums[0].d_bias)] == [
        name in frozen for name in ("hidden", "weight", "bias")
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("banned", ["some", "first tiles", "last tiles", "all but one"])
def test_banned_tokens(dtype, banned):
    """A bias of -inf: whole tiles of it too, at either end."""
    head = make_head(7, 300, 16, dtype, bias=True)
    bias = head.bias.detach().clone()
    where = {
        "some": slice(1, None, 3),
        "first tiles": slice(0, 200),
        "last tiles": slice(60, None),
        "all but one": slice(0, None),
    }[banned]
    bias[where] = -torch.inf
    head.labels.fill_(0)
    if banned == "all but one":
        bias[130] = 0.25
        head.labels.fill_(130)
    if banned == "first tiles":
        head.labels.fill_(299)
    results = check(Head(head.hidden, head.weight, head.labels, leaf(bias)), 0.7)
    assert all(x.isfinite().all() for x in results)
    assert (results[4][bias == -torch.inf] == 0).all()
    if banned == "all but one":
        assert (results[0] == 0).all()
        assert (results[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
def test_a_banned_label_has_no_probability(dtype):
    head = make_head(5, 130, 16, dtype, bias=True)
    bias = head.bias.detach().clone()
    bias[[0, 129]] = -torch.inf
    logp, entropy = evaluate(Head(head.hidden, head.weight, head.labels, bias))[:2]
    assert (logp[:2] == -torch.inf).all()
    assert logp[2:].isfinite().all()
    assert entropy.isfinite().all()
    nothing = evaluate(Head(head.hidden, head.weight, head.labels, torch.full_like(bias, -torch.inf)))
    assert all(x.isnan().all() for x in nothing[:2])


@pytest.mark.parametrize(
    ("hidden", "weight", "bias"),
    [
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_mixed_dtypes(hidden, weight, bias):
    head = make_head(9, 70, 16, bias=True)
    head = Head(leaf(head.hidden.to(hidden)), leaf(head.weight.to(weight)), head.labels, leaf(head.bias.to(bias)))
    g, e = upstream(9, seed=0), upstream(9, seed=1)
    ours, exact = evaluate(head, g=g, e=e), evaluate(head.oracle(), "reference", g=g, e=e)
    assert [x.dtype for x in ours[2:]] == [hidden, weight, bias]
    # The logits' gradient is of the head's dtype: a wider bias' gradient is a sum of those.
    product = hidden if hidden == weight else torch.float32
    assert_all_match(ours, exact, NAMES, (None, None, None, None, bias if bias.itemsize == 2 else product))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [2.0**-16, 2.0**10])
def test_incoming_gradients_of_any_size(dtype, size):
    """2^-16 times a probability is nearly 0 in fp16, and with hidden states of 4096 a weight gradient that is not."""
    head = make_head(9, 70, 16)
    factor = 2.0**12 if size < 1 else 2.0**-12
    scaled = Head(leaf((head.hidden * factor).to(dtype)), leaf((head.weight / factor).to(dtype)), head.labels)
    g, e = upstream(9, seed=0) * size, upstream(9, seed=1) * size
    ours = evaluate(scaled, g=g, e=e)[3]
    exact = evaluate(scaled.oracle(), "reference", g=g, e=e)[3]
    assert 0.01 < exact.abs().max() < 2
    assert_matches(ours / exact.abs().max(), exact / exact.abs().max(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_bookkeeping(dtype):
    head = make_head(9, 70, 16, dtype)

    def call():
        return linear_logprob(head.hidden, head.weight, head.labels, backend="triton")

    with torch.no_grad():
        assert not any(x.requires_grad for x in call())
    assert not any(
        x.requires_grad
        for x in linear_logprob(head.hidden.detach(), head.weight.detach(), head.labels, backend="triton")
    )
    logp, entropy = call()
    total = logp.sum() + entropy.sum()
    once = torch.autograd.grad(total, head.leaves, retain_graph=True)
    twice = torch.autograd.grad(total, head.leaves, retain_graph=True)
    eightfold = torch.autograd.grad(8 * total, head.leaves)
    for a, b, c in zip(once, twice, eightfold, strict=True):
        assert torch.equal(a, b)
        assert_matches(c / 8, a)
    logp, _ = call()
    (grad,) = torch.autograd.grad(logp.sum(), head.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_and_default_dtype_change_nothing(dtype):
    head = make_head(9, 70, 16, dtype, bias=True)
    g, e = upstream(9, seed=0), upstream(9, seed=1)
    plainly = evaluate(head, temperature=0.3, g=g, e=e)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = evaluate(head, temperature=0.3, g=g, e=e)
    results = [inside]
    for default in (torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(default)
        try:
            results.append(evaluate(head, temperature=0.3, g=g, e=e))
        finally:
            torch.set_default_dtype(torch.float32)
    for other in results:
        for a, b in zip(plainly, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


GOOD = {"hidden": torch.zeros(12, 4), "weight": torch.zeros(9, 4), "labels": torch.zeros(12).long()}


@pytest.mark.parametrize(
    "change",
    [
        {"labels": torch.tensor([0] * 11 + [9])},
        {"labels": torch.tensor([0] * 11 + [-1])},
        {"labels": torch.tensor([0] * 11 + [2**40])},
        {"labels": torch.zeros(12).int()},
        {"labels": torch.zeros(11).long()},
        {"labels": torch.zeros(12, 1).long()},
        {"weight": torch.zeros(9, 5)},
        {"weight": torch.zeros(0, 4)},
        {"weight": torch.zeros(9, 4).long()},
        {"weight": torch.zeros(9, 4, device="meta")},
        {"hidden": torch.zeros(12, 0)},
        {"hidden": [[0.0]]},
        {"bias": torch.zeros(8)},
        {"bias": torch.zeros(9).int()},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": torch.ones(11)},
        {"temperature": torch.linspace(-1, 1, 12)},
        {"temperature": torch.full((12,), math.nan)},
        {"temperature": torch.ones(12, requires_grad=True)},
    ],
    ids=lambda change: "-".join(f"{k} {getattr(v, 'shape', v)}" for k, v in change.items()),
)
def test_errors_are_the_references(change):
    assert next(iter(change)) in shared_error(linear_logprob, GOOD | change)


def test_fp64_is_refused():
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run .* its kernels compute in fp32"):
        linear_logprob(*(x.double() if x.is_floating_point() else x for x in GOOD.values()), backend="triton")
