"""linear_logprob by hand, and on every backend against all logits at once in fp64, forward and gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import loss_cases as cases
import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, HALF, QUIET, Head, leaf, make_head, upstream

from videor1_kernels import linear_logprob
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
NOT_A_NUMBER = pytest.mark.filterwarnings(
    "ignore:All-NaN slice encountered:RuntimeWarning", "ignore:invalid value encountered in subtract:RuntimeWarning"
)


@pytest.mark.parametrize(
    ("rows", "vocab", "size", "bias", "temperature"),
    [
        (1, 1, 1, True, 1.0),
        (1, 131, 8, False, 0.3),
        (2, 2, 3, False, 1.0),
        (5, 64, 32, True, 2.0),
        (33, 257, 17, True, 0.3),
    ],
)
@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS)
def test_equals_dense(
    rows: int, vocab: int, size: int, bias: bool, temperature: float, backend: str, dtype: torch.dtype
) -> None:
    cases.check_head(backend, make_head(rows, vocab, size, dtype, bias=bias), temperature)


@pytest.mark.grid(kind=cases.KINDS, shape=[(), (0,), (2, 0), (2, 3)])
def test_leading_dimensions(kind: cases.Kind, shape: tuple[int, ...]) -> None:
    flat = make_head(math.prod(shape), 40, 8, kind[1], bias=True)
    cases.check_head(kind[0], replace(flat, hidden=leaf(flat.hidden.view(*shape, 8)), labels=flat.labels.view(shape)))


@pytest.mark.grid(kind=cases.KINDS, used=["logp", "entropy"])
def test_either_output_alone(kind: cases.Kind, used: str) -> None:
    unused = {"e" if used == "logp" else "g": None}
    cases.check_head(kind[0], make_head(5, 70, 16, kind[1], bias=True, ignored=True), 0.7, **unused)


def test_gradcheck() -> None:
    head = make_head(4, 5, 3, torch.float64, bias=True, ignored=True)
    temperature = torch.linspace(0.5, 2, 4, dtype=torch.float64, device=DEVICE)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, head.labels, bias=b, temperature=temperature), tuple(head.leaves)
    )


@pytest.mark.parametrize(("backend", "dtype"), cases.LOW)
def test_no_worse_than_plain_torch(backend: str, dtype: torch.dtype) -> None:
    head = make_head(33, 300, 48, dtype, bias=True)
    incoming = {"g": upstream(33, seed=0), "e": upstream(33, seed=1)}
    ours, baseline = cases.evaluate(backend, head, **incoming), cases.evaluate("plain", head, **incoming)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for i, (a, b, o) in enumerate(zip(ours, baseline, cases.evaluate("dense", head.oracle(), **incoming), strict=True)):
        assert_matches(a, o)  # logits are never rounded to 16 bits: fp32's bounds for logp and entropy
        assert_no_worse(a, b, o, terms=48 + 300 + 300, name=f"result {i}")


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
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_mixed_dtypes(backend: str, hidden: torch.dtype, weight: torch.dtype, bias: torch.dtype) -> None:
    head = make_head(9, 70, 16, bias=True)
    head = Head(leaf(head.hidden.to(hidden)), leaf(head.weight.to(weight)), head.labels, leaf(head.bias.to(bias)))
    incoming = {"g": upstream(9, seed=0), "e": upstream(9, seed=1)}
    ours, exact = cases.evaluate(backend, head, **incoming), cases.evaluate("dense", head.oracle(), **incoming)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, hidden, weight, bias]
    # On Triton the logits' gradient is of the head's dtype: a wider bias' gradient is a sum of those.
    product = hidden if hidden == weight else torch.float32
    bounds = [None, None, None, None, bias if bias.itemsize == 2 else product]
    for a, o, bound in zip(ours, exact, bounds, strict=True):
        assert_matches(a, o, bound)


def test_known_values() -> None:
    # Logits 0, ln 2, ln 5 -> probabilities 1/8, 2/8, 5/8.
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    hidden = torch.ones(4, 1, dtype=torch.float64)
    logp, entropy = linear_logprob(hidden, weight, torch.tensor([0, 1, 2, -100]))
    expected = [math.log(1 / 8), math.log(2 / 8), math.log(5 / 8), 0.0]
    assert logp.tolist() == pytest.approx(expected, abs=cases.BY_HAND)
    spread = math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8  # -sum p ln p
    assert entropy.tolist() == pytest.approx([spread] * 3 + [0.0], abs=cases.BY_HAND)


@pytest.mark.grid(kind=cases.KINDS, form=["rows", "fp16", "strided", "scalar", "ignored"])
def test_temperature_per_row(kind: cases.Kind, form: str) -> None:
    backend, dtype = kind
    head = make_head(5, 90, 16, dtype, ignored=form == "ignored")
    temperature = torch.linspace(0.3, 2, 5, device=DEVICE)
    given = {"fp16": temperature.half(), "strided": cases.strided(temperature), "scalar": temperature[3]}
    cases.check_head(backend, head, given.get(form, temperature))


@pytest.mark.parametrize(("backend", "dtype"), [*cases.FP32, *[("triton", dtype) for dtype in HALF]])
def test_logits_of_ten_thousand_keep_exact_probabilities(backend: str, dtype: torch.dtype) -> None:
    """lse is about 1e4, where fp32 is spaced by 1e-3: that must not show in probabilities or gradients."""
    hidden = torch.tensor([[100.0, 99.9375, -100.0, 100.0], [-100.0, -100.0, -100.0625, -99.9375]])  # exact in fp16
    temperature = 0.01
    if dtype == torch.float32:
        hidden, temperature = 100 * hidden, 1.0
    ones = {"g": torch.ones(2, device=DEVICE), "e": torch.ones(2, device=DEVICE)}
    for labels in ([1, 2], [0, 3], [2, 0]):
        weight = torch.eye(4).to(DEVICE, dtype)
        head = Head(leaf(hidden.to(DEVICE, dtype)), leaf(weight), torch.tensor(labels, device=DEVICE))
        ours = cases.evaluate(backend, head, temperature, **ones)
        exact = cases.evaluate("dense", head.oracle(), temperature, **ones)
        for a, o, scale in zip(ours, exact, (1, 1, 1 / temperature, 1e4), strict=True):
            assert_matches(a.double() / scale, o / scale, a.dtype)
        assert (ours[0] <= 0).all()
        assert (ours[1] >= 0).all()


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS)
@NOT_A_NUMBER
def test_ignored_rows_and_rows_without_gradient_are_never_read(backend: str, dtype: torch.dtype) -> None:
    """Their hidden states are NaN: every other result keeps its bits."""
    head = make_head(16, 90, 16, dtype, bias=True, ignored=True)
    incoming = {"g": upstream(16, seed=1), "e": upstream(16, seed=2)}
    ignored, idle = head.labels == -100, (incoming["g"] == 0) & (incoming["e"] == 0)
    dead = ignored | idle
    assert idle.any()
    assert not dead.all()
    clean = cases.evaluate(backend, head, **incoming)
    poisoned = replace(head, hidden=leaf(head.hidden.detach().masked_fill(dead[:, None], math.nan)))
    again = cases.evaluate(backend, poisoned, **incoming)
    for name, a, b in zip(("logp", "entropy", *cases.LEAVES), again, clean, strict=True):
        keep = ~idle if name in ("logp", "entropy") else slice(None)
        assert torch.equal(a[keep], b[keep]), name
    assert all((x[ignored] == 0).all() for x in again[:2])
    assert all(x[idle & ~ignored].isnan().all() for x in again[:2])
    assert (again[2][dead] == 0).all()


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS)
def test_all_rows_ignored_or_without_gradient(backend: str, dtype: torch.dtype) -> None:
    head = make_head(6, 40, 8, dtype, bias=True)
    head.labels.fill_(-100)
    with poisoned_memory():
        results = cases.check_head(backend, head)
    assert all((x == 0).all() for x in results)
    head.labels.fill_(3)
    assert all((x == 0).all() for x in cases.evaluate(backend, head, g=torch.zeros(6, device=DEVICE))[2:])


@pytest.mark.grid(kind=cases.KINDS[:2], frozen=[(), ("hidden",), ("weight", "bias")])
def test_only_live_rows_and_what_needs_a_gradient_are_multiplied(kind: cases.Kind, frozen: tuple[str, ...]) -> None:
    backend, dtype = kind
    head = make_head(9, 70, 16, dtype, bias=True, ignored=True)
    incoming = {"g": upstream(9), "e": upstream(9, seed=2)}
    full = dict(zip(("logp", "entropy", *cases.LEAVES), cases.evaluate(backend, head, **incoming), strict=True))
    for name in frozen:
        getattr(head, name).requires_grad_(False)
    ours = cases.evaluate(backend, head, **incoming)
    for a, b in zip(ours, [x for name, x in full.items() if name not in frozen], strict=True):
        assert torch.equal(a, b)
    kept = head.labels != -100
    live = kept & ((incoming["g"] != 0) | (incoming["e"] != 0))
    assert 0 < live.sum() < kept.sum()
    products = 3 - bool(frozen)  # the logits again, and one for each trained matrix
    expected = int(kept.sum() + products * live.sum()) * 70 * 16
    assert cases.multiplications(lambda: cases.evaluate(backend, head, **incoming)) == expected


@pytest.mark.grid(kind=cases.KINDS, banned=["some", "the first", "the last", "all but one"])
def test_banned_tokens(kind: cases.Kind, banned: str) -> None:
    """A bias of -inf: whole tiles of it too, at either end."""
    backend, dtype = kind
    head = make_head(3, 300, 16, dtype, bias=True)
    where = {"some": slice(1, None, 3), "the first": slice(0, 200), "the last": slice(60, None)}
    bias = head.bias.detach().clone()
    bias[where.get(banned, slice(None))] = -torch.inf
    label = {"the first": 299, "all but one": 130}.get(banned, 0)
    if banned == "all but one":
        bias[label] = 0.25
    head.labels.fill_(label)
    results = cases.check_head(backend, replace(head, bias=leaf(bias)), 0.7)
    assert all(x.isfinite().all() for x in results)
    assert (results[4][bias == -torch.inf] == 0).all()
    if banned == "all but one":
        assert all((x == 0).all() for x in results[:2])


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS)
@NOT_A_NUMBER
def test_a_banned_label_has_no_probability(backend: str, dtype: torch.dtype) -> None:
    head = make_head(5, 130, 16, dtype, bias=True)
    bias = head.bias.detach().clone()
    bias[[0, 129]] = -torch.inf
    logp, entropy = cases.evaluate(backend, replace(head, bias=bias))
    assert (logp[:2] == -torch.inf).all()
    assert logp[2:].isfinite().all()
    assert entropy.isfinite().all()
    if backend == "triton":
        assert all(
            x.isnan().all() for x in cases.evaluate(backend, replace(head, bias=torch.full_like(bias, -torch.inf)))
        )


@pytest.mark.grid(kind=cases.KINDS, layout=list(cases.LAYOUTS), operand=["hidden", "weight"])
def test_layouts_of_the_operands(kind: cases.Kind, layout: str, operand: str) -> None:
    head = make_head(5, 70, 16, kind[1])
    moved = cases.LAYOUTS[layout](getattr(head, operand).detach())
    assert torch.equal(moved, getattr(head, operand))
    cases.check_head(kind[0], replace(head, **{operand: leaf(moved)}))


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS)
def test_strided_labels_and_bias_and_expanded_rows(backend: str, dtype: torch.dtype) -> None:
    head = make_head(4, 70, 16, dtype, bias=True)
    spread = replace(head, labels=cases.strided(head.labels), bias=leaf(cases.strided(head.bias.detach())))
    cases.check_head(backend, spread)
    spread.labels[3] = -100
    cases.check_head(backend, spread)
    row = leaf(head.hidden[:1])
    cases.check_head(backend, replace(head, hidden=leaf(row.detach().expand(4, 16))))
    linear_logprob(row.expand(4, 16), head.weight, head.labels, backend=backend)[0].sum().backward()
    exact = leaf(row.double())
    cases.evaluate("dense", Head(exact.expand(4, 16), head.weight.double(), head.labels))[0].sum().backward()
    assert_matches(row.grad, exact.grad)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [2.0**-16, 2.0**10])
def test_incoming_gradients_of_any_size(dtype: torch.dtype, size: float) -> None:
    """2^-16 times a probability is nearly 0 in fp16, and with hidden states of 4096 a weight gradient that is not."""
    head = make_head(9, 70, 16)
    factor = 2.0**12 if size < 1 else 2.0**-12
    scaled = Head(leaf((head.hidden * factor).to(dtype)), leaf((head.weight / factor).to(dtype)), head.labels)
    incoming = {"g": upstream(9, seed=0) * size, "e": upstream(9, seed=1) * size}
    ours, exact = (
        cases.evaluate("triton", scaled, **incoming)[3],
        cases.evaluate("dense", scaled.oracle(), **incoming)[3],
    )
    assert 0.01 < exact.abs().max() < 2
    assert_matches(ours / exact.abs().max(), exact / exact.abs().max(), dtype)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_what_is_returned(backend: str) -> None:
    head = make_head(3, 70, 16)
    rest = {"labels": head.labels, "backend": backend}
    with torch.no_grad():
        assert not any(x.requires_grad for x in linear_logprob(head.hidden, head.weight, **rest))
    assert not any(x.requires_grad for x in linear_logprob(head.hidden.detach(), head.weight.detach(), **rest))
    logp, entropy = linear_logprob(head.hidden, head.weight, **rest)
    cases.assert_differentiable_once(logp.sum() + entropy.sum(), head.leaves)
    cases.assert_differentiable_once(linear_logprob(head.hidden, head.weight, **rest)[0].sum(), head.leaves)


@pytest.mark.parametrize("kind", [*cases.FP32, ("triton", torch.float16)], ids=str)
def test_bits_do_not_depend_on_what_is_around(kind: cases.Kind) -> None:
    head = make_head(4, 70, 16, kind[1], bias=True, ignored=True)
    incoming = {"g": upstream(4, seed=0), "e": upstream(4, seed=1)}

    def call() -> list[Tensor]:
        return cases.evaluate(kind[0], head, 0.3, **incoming)

    cases.assert_same_bits(call, autocast=False)
