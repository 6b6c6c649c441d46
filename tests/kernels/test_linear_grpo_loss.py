"""linear_grpo_loss on every backend against all logits and a loop over completions in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import loss_cases as cases
import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, DTYPES, HALF, QUIET, Head, count_calls, leaf, make_head

from videor1_kernels import linear_grpo_loss
from videor1_kernels.grpo_loss import triton
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
ROWS = sum(cases.LENGTHS)
LONG = (5, 1, 0, 6, 2, 1, 1)


@pytest.mark.grid(
    kind=cases.KINDS, loss=cases.LOSSES, level=cases.LEVELS, clips=cases.CLIPS, beta=[0.0, 0.04], old=[True, False]
)
def test_equals_both_oracles(
    kind: cases.Kind, loss: dict[str, Any], level: str, clips: cases.Clips, beta: float, old: bool
) -> None:
    backend, dtype = kind
    head, case = cases.make_linear(dtype, ignored=True, bias=not old)
    if not old:
        case["old_logp"] = None
    options = {"importance_level": level, "beta": beta, "clip_low": clips[0], "clip_high": clips[1]}
    cases.check_linear(backend, head, case, **loss, **options)


@pytest.mark.grid(
    weights=cases.WEIGHTS,
    bounds=cases.BOUNDS,
    kind=cases.KINDS,
    loss=cases.LOSSES,
    level=cases.LEVELS,
    beta=[0.0, 0.04],
    old=[True, False],
    chunked=[True, False],
)
def test_weighted_and_bounded_terms(
    weights: dict[str, Any],
    bounds: dict[str, Any],
    kind: cases.Kind,
    loss: dict[str, Any],
    level: str,
    beta: float,
    old: bool,
    chunked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a completion of advantage 0 and ignored rows; in chunks, the first completion is longer than one."""
    backend, dtype = kind
    if chunked:
        cases.cut_small(monkeypatch)
    head, case = cases.make_linear(dtype, LONG, ignored=True, bias=not old)
    case["advantages"][[1, 4]] = 0.0
    if not old:
        case["old_logp"] = None
    case, options = cases.weighted(case, weights)
    options |= {"importance_level": level, "beta": beta, **cases.BOTH, **bounds}
    cases.check_linear(backend, head, case, **loss, **options)


@pytest.mark.grid(
    own=cases.OWN,
    kind=cases.KINDS,
    weights=[{}, *cases.WEIGHTS[:2], *cases.WEIGHTS[4:]],
    by_ratio=[True, False],
    beta=[0.0, 0.04],
    old=[True, False],
    chunked=[True, False],
)
def test_losses_with_terms_of_their_own(
    own: dict[str, Any],
    kind: cases.Kind,
    weights: dict[str, Any],
    by_ratio: bool,
    beta: float,
    old: bool,
    chunked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, dtype = kind
    if chunked:
        cases.cut_small(monkeypatch)
    head, case = cases.make_linear(dtype, LONG, ignored=True, bias=not old)
    case["advantages"][[1, 4]] = 0.0
    if not old:
        case["old_logp"] = None
    case, options = cases.weighted(case, weights)
    level = "sequence" if own["loss_type"] in ("luspo", "sapo") else "token"
    options |= {"importance_level": level, "beta": beta, "use_bias_correction_kl": by_ratio, **own}
    cases.check_linear(backend, head, case, **options)


@pytest.mark.grid(
    kind=cases.KINDS,
    loss=[*cases.LOSSES, *cases.OWN[::2]],
    weights=[{}, *cases.WEIGHTS],
    beta=[0.0, 0.04],
    clipped=[True, False],
    chunked=[True, False],
)
def test_entropy_in_the_loss(
    kind: cases.Kind,
    loss: dict[str, Any],
    weights: dict[str, Any],
    beta: float,
    clipped: bool,
    chunked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A completion of advantage 0 and clipped tokens have a gradient by their entropy; what weighs 0 has none."""
    backend, dtype = kind
    if chunked:
        cases.cut_small(monkeypatch)
    head, case = cases.make_linear(dtype, LONG, ignored=True, bias=True)
    case["advantages"][[1, 4]] = 0.0
    case, options = cases.weighted(case, weights)
    if loss in cases.LOSSES and clipped:
        options |= cases.BOTH
    if loss["loss_type"] == "vespo" and options.get("importance_correction") == "sequence":
        options["importance_correction"] = "token"
    options |= {"beta": beta, "entropy_coef": 0.3, "temperature": 0.7}
    ours, _ = cases.check_linear(backend, head, case, **options, **loss)
    if not weights:
        assert ours.skipped_rows == int((head.labels == -100).sum())


@pytest.mark.grid(kind=cases.KINDS[::2], correction=["token", "sequence"], old=[True, False])
def test_masked_tokens_are_not_multiplied(kind: cases.Kind, correction: str, old: bool) -> None:
    """Rows that the correction leaves out cost nothing, with a KL term too; what is left keeps its bits."""
    backend, dtype = kind
    head, case = cases.make_linear(dtype, (4, 3, 6), bias=True)
    case["rollout_logp"] = case["old_logp"].clone()
    case["rollout_logp"][:4] -= 3.0  # the first completion's weight is e^3
    if not old:
        case["rollout_logp"] = case["rollout_logp"] - 5.0 * (torch.arange(13, device=DEVICE) < 4)
        case["old_logp"] = None
    options = {"beta": 0.1, "importance_correction": correction, "correction_mode": "mask", "correction_max": 5.0}
    ours, grads = cases.check_linear(backend, head, case, **options)
    assert ours.skipped_rows == 4
    assert (grads[0][:4] == 0).all()
    backward = 2 + (backend == "reference")
    product = 70 * 16
    assert (
        cases.multiplications(lambda: cases.run_linear(backend, head, case, **options)) == (13 + backward * 9) * product
    )
    given = {name: x for name, x in case.items() if name != "rollout_logp"} | {
        "token_weight": (torch.arange(13, device=DEVICE) >= 4).float()
    }
    same, same_grads = cases.run_linear(backend, head, given, beta=0.1)
    if correction == "sequence" or not old:
        return
    # The other tokens' weights are exactly 1.
    for a, b in zip((ours.loss, *grads), (same.loss, *same_grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS[:2])
def test_completions_that_do_not_count_never_reach_the_head(backend: str, dtype: torch.dtype) -> None:
    head, case = cases.make_linear(dtype, (4, 3, 6), bias=True)
    case["completion_mask"] = torch.tensor([True, False, True], device=DEVICE)
    want, want_grads = cases.check_linear(backend, head, case, **cases.BOTH)
    poisoned = head.hidden.detach().clone()
    poisoned[4:7] = math.nan
    head.labels[4:7] = 999
    ours, grads = cases.run_linear(backend, replace(head, hidden=leaf(poisoned)), case, **cases.BOTH)
    for a, b in zip((ours.loss, ours.logp, *grads), (want.loss, want.logp, *want_grads), strict=True):
        assert torch.equal(a, b)
    assert (ours.logp[4:7] == 0).all()


@pytest.mark.grid(kind=cases.KINDS, temperature=[0.3, 2.0, "row"], shape=[(1, 1, 1), (33, 140, 17), (8, 128, 32)])
def test_shapes_and_temperatures(kind: cases.Kind, temperature: float | str, shape: tuple[int, int, int]) -> None:
    backend, dtype = kind
    rows, vocab, size = shape
    value = torch.linspace(0.3, 2, rows, device=DEVICE) if temperature == "row" else temperature
    lengths = (rows - rows // 3, 0, rows // 3)
    head, case = cases.make_linear(dtype, lengths, vocab=vocab, size=size, temperature=value)
    cases.check_linear(backend, head, case, temperature=value, **cases.BOTH)


@pytest.mark.parametrize("level", cases.LEVELS)
def test_gradcheck(level: str) -> None:
    head, case = cases.make_linear(torch.float64, (3, 2), vocab=4, size=2, ignored=True, bias=True)
    options = case | cases.BOTH | {"importance_level": level, "temperature": 1.3}
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_grpo_loss(h, w, head.labels, bias=b, **options).loss, tuple(head.leaves)
    )


@pytest.mark.parametrize(("backend", "dtype"), cases.LOW)
def test_no_worse_than_plain_torch(backend: str, dtype: torch.dtype) -> None:
    head, case = cases.make_linear(dtype, (12, 1, 16, 4), vocab=300, size=48)
    half = {"clip_low": 0.5, "clip_high": 0.5}
    ours, grads = cases.check_linear(backend, head, case, **half)
    exact = head.oracle()
    logp, exact_logp = cases.evaluate("plain", head)[0], cases.evaluate("dense", exact)[0]
    loss, exact_loss = cases.naive(logp, **case, **half)[0], cases.naive(exact_logp, **cases.double(case), **half)[0]
    terms = 48 + 300 + 33
    # Advantages of both signs: the loss is much smaller than the completions' terms are, |r A| on average.
    spread = case["advantages"].abs().mean().item() * 1.5
    assert_no_worse(ours.logp, logp, exact_logp, terms=terms, name="logp")
    assert_no_worse(ours.loss, loss, exact_loss, terms=terms, scale=spread, name="loss")
    theirs = torch.autograd.grad(loss, head.leaves), torch.autograd.grad(exact_loss, exact.leaves)
    for a, b, o in zip(grads, *theirs, strict=True):
        assert_no_worse(a, b, o, terms=terms)


@pytest.mark.grid(kind=[*cases.KINDS[1:], *cases.FP32[:1]], level=cases.LEVELS)
def test_on_policy_ratio_is_exactly_one(kind: cases.Kind, level: str) -> None:
    backend, dtype = kind
    head, case = cases.make_linear(dtype, (1, 2, 8, 4))
    case |= {"advantages": torch.tensor([1.0, -2.0, 0.0, 4.0], device=DEVICE), "ref_logp": None, "old_logp": None}
    tight = {"clip_low": 1e-7, "clip_high": 1e-7, "beta": 0, "importance_level": level}
    first, grads = cases.run_linear(backend, head, case, **tight)
    known, known_grads = cases.run_linear(backend, head, case | {"old_logp": first.logp}, **tight)
    for out in (first, known):
        assert out.loss.item() == -0.75
        assert (out.clip_fraction.item(), out.skipped_rows) == (0, 8)
    for a, b in zip((first.logp, *grads), (known.logp, *known_grads), strict=True):
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
    ids=str,
)
def test_coefficients_outside_the_range_of_fp16(dtype: torch.dtype, loss: dict[str, Any]) -> None:
    """Of 1e-8 or 1e5: gradients are right where the incoming gradient brings them back into the range."""
    head, case = cases.make_linear(dtype, (9, 0, 7))
    size = next((value for name, value in loss.items() if name != "loss_type"), 1.0)
    cases.check_linear("triton", head, case, factor=size, **loss, **cases.BOTH)


@pytest.mark.parametrize("dtype", HALF)
def test_an_empty_completion_does_not_cost_precision(dtype: torch.dtype) -> None:
    """The scale of fp16's coefficients follows the completions that have tokens."""
    head = make_head(33, 70, 16, dtype)
    grads = []
    for lengths in ((33,), (33, 0)):
        case = {"advantages": torch.ones(len(lengths), device=DEVICE), "cu_seqlens": cases.cumulative(lengths)}
        grads.append(cases.run_linear("triton", head, case, factor=len(lengths), beta=0)[1])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("backend", "dtype"), cases.LOW)
def test_what_is_returned(backend: str, dtype: torch.dtype) -> None:
    head, case = cases.make_linear(dtype)

    def call() -> Any:
        return linear_grpo_loss(head.hidden, head.weight, head.labels, **case, backend=backend)

    out = call()
    assert not any(x.requires_grad for x in (out.logp, out.entropy, out.kl, out.clip_fraction))
    cases.assert_differentiable_once(out.loss, head.leaves)
    once, third = (torch.autograd.grad(out.loss / n, head.leaves, retain_graph=True) for n in (1, 3))
    for a, b in zip(once, third, strict=True):
        # One factor, rounded once per element: a factor rounded to 16 bits would be wrong for all alike.
        precision = 4e-4 if dtype.itemsize == 2 else 1e-6
        assert b.double().norm().item() == pytest.approx(a.double().norm().item() / 3, rel=precision)
    out.loss.backward()
    call().loss.backward()
    assert_matches(head.weight.grad / 2, once[1])


@pytest.mark.parametrize("kind", [*cases.FP32, ("triton", torch.float16)], ids=str)
def test_bits_do_not_depend_on_what_is_around(kind: cases.Kind) -> None:
    head, case = cases.make_linear(kind[1], (3, 1, 4), ignored=True, bias=True)

    def call() -> list[Tensor]:
        out, grads = cases.run_linear(kind[0], head, case, **cases.BOTH)
        return [out.loss, out.logp, out.entropy, out.kl, out.clip_fraction, *grads]

    cases.assert_same_bits(call, autocast=False)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize(
    ("hidden", "weight"),
    [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)],
)
def test_mixed_dtypes(backend: str, hidden: torch.dtype, weight: torch.dtype) -> None:
    head, case = cases.make_linear(torch.float16, ignored=True)
    mixed = replace(head, hidden=leaf(head.hidden.to(hidden)), weight=leaf(head.weight.to(weight)))
    kinds = {
        "old_logp": torch.float64,
        "ref_logp": torch.float16,
        "advantages": torch.float16,
        "cu_seqlens": torch.int64,
    }
    cases.check_linear(backend, mixed, {name: case[name].to(dtype) for name, dtype in kinds.items()})


@pytest.mark.parametrize(("backend", "dtype"), cases.KINDS[:2])
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    """Strided labels, cu_seqlens, bias and token values; hidden states out of a wider matrix, unaligned; odd H."""
    head, case = cases.make_linear(dtype, size=15, bias=True)
    wide = torch.cat([head.hidden.detach(), torch.full_like(head.hidden, 77)], 1)
    weight, bias = leaf(head.weight.detach().T.contiguous().T), leaf(cases.strided(head.bias.detach()))
    moved = Head(leaf(wide[:, :15]), weight, cases.strided(head.labels), bias)
    temperature = cases.strided(torch.linspace(0.5, 2, ROWS, device=DEVICE))
    for ignored, cu in ((False, case["cu_seqlens"]), (True, case["cu_seqlens"].long())):
        if ignored:
            moved.labels[4] = -100
        spread = {name: cases.strided(x) for name, x in (case | {"cu_seqlens": cu}).items()}
        cases.check_linear(backend, moved, spread, temperature=temperature, **cases.BOTH)
    expanded = replace(head, hidden=leaf(head.hidden[:1].detach().expand(ROWS, 15)))
    cases.check_linear(backend, expanded, case, **cases.BOTH)


@pytest.mark.grid(kind=cases.KINDS, lengths=[(), (0, 0)], level=cases.LEVELS)
def test_no_tokens(kind: cases.Kind, lengths: tuple[int, ...], level: str) -> None:
    backend, dtype = kind
    head = make_head(0, 40, 8, dtype, bias=True)
    case = {"advantages": torch.ones(len(lengths), device=DEVICE), "cu_seqlens": cases.cumulative(lengths)}
    for old in (None, torch.empty(0, device=DEVICE)):
        ours, grads = cases.check_linear(backend, head, case | {"old_logp": old}, beta=0, importance_level=level)
        assert ours.loss == 0
        assert ours.loss.requires_grad
        assert ours.skipped_rows == 0
        assert (grads[1] == 0).all()


@pytest.mark.grid(kind=cases.KINDS[:2], frozen=[(), ("hidden",), ("weight", "bias")])
def test_only_live_rows_and_what_needs_a_gradient_are_multiplied(kind: cases.Kind, frozen: tuple[str, ...]) -> None:
    backend, dtype = kind
    head, case = cases.make_linear(dtype, (4, 3, 0, 6), ignored=True, bias=True)
    case["advantages"][1] = 0.0
    options = {"beta": 0, "clip_low": 0.05, "clip_high": 0.05}

    def run() -> Any:
        return cases.run_linear(backend, head, case, **options)

    full, grads = cases.check_linear(backend, head, case, **options)
    for name in frozen:
        getattr(head, name).requires_grad_(False)
    part, kept = run()
    assert_matches(part.loss, full.loss)
    assert part.skipped_rows == full.skipped_rows
    assert part.loss.requires_grad
    wanted = [grad for name, grad in zip(cases.LEAVES, grads, strict=True) if name not in frozen]
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))
    product = 70 * 16  # of one row
    read, live = int((head.labels != -100).sum()), 13 - full.skipped_rows
    assert 1 < live < read - 2
    backward = 2 - bool(frozen) + (backend == "reference")  # which forms the logits again
    assert cases.multiplications(run) == (read + backward * live) * product
    if frozen:
        return
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert cases.multiplications(run) == read * product
            ours, _ = run()
        assert not ours.loss.requires_grad
        assert_matches(ours.loss, full.loss)
        assert_matches(ours.entropy, full.entropy)


@pytest.mark.grid(kind=cases.KINDS[::2], why=["advantages", "labels", "clipped", "far from the reference model"])
def test_all_coefficients_zero(kind: cases.Kind, why: str) -> None:
    backend, dtype = kind
    head, case = cases.make_linear(dtype, bias=True)
    options: dict[str, Any] = {"beta": 0, **cases.BOTH}
    if why == "advantages":
        case["advantages"].zero_()
    elif why == "labels":
        head.labels.fill_(-100)
    elif why == "clipped":
        case["advantages"].fill_(1.0)
        case["old_logp"] -= 5.0
    else:  # every gap is clamped
        case["advantages"].zero_()
        case |= {"old_logp": None, "ref_logp": case["ref_logp"] - 50.0}
        options["beta"] = 0.04
    ours, grads = cases.check_linear(backend, head, case, **options)
    assert ours.skipped_rows == ROWS
    assert all((x == 0).all() for x in grads)
    assert ours.loss.isfinite()
    logits = ROWS * 70 * 16  # all that may be multiplied
    assert cases.multiplications(lambda: cases.run_linear(backend, head, case, **options)) <= logits


@pytest.mark.grid(kind=cases.KINDS, chunked=[False, True])
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_skipped_rows_are_never_read(kind: cases.Kind, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored rows and completions of advantage 0 may hold NaN: every other result keeps its bits."""
    backend, dtype = kind
    if chunked:
        cases.cut_small(monkeypatch)
    head, case = cases.make_linear(dtype, bias=True)
    case["advantages"][0] = 0.0
    idle, ignored = [0, 1, 2, 3, 4], [5, 8]
    head.labels[ignored] = -100
    case["ref_logp"] = None
    options = {"beta": 0, **cases.BOTH}
    want, want_grads = cases.check_linear(backend, head, case, **options)
    case["old_logp"][ignored] = math.nan
    poisoned = head.hidden.detach().clone()
    poisoned[idle + ignored] = math.nan
    ours, grads = cases.run_linear(backend, replace(head, hidden=leaf(poisoned)), case, **options)
    assert ours.skipped_rows == want.skipped_rows >= 7
    assert ours.logp[idle].isnan().all()
    assert torch.equal(ours.logp[5:], want.logp[5:])
    assert all((x[ignored] == 0).all() for x in (ours.logp, ours.entropy))
    assert all(torch.equal(a, b) for a, b in zip((ours.loss, *grads), (want.loss, *want_grads), strict=True))
    assert (grads[0][idle + ignored] == 0).all()


# Triton's rows: in chunks, and in any order.


@pytest.mark.grid(dtype=DTYPES, level=cases.LEVELS, beta=[0.0, 0.04], old=[True, False])
def test_chunks_change_nothing(
    dtype: torch.dtype, level: str, beta: float, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions of 5 and 6 tokens are longer than a chunk of 4 rows."""
    cases.cut_small(monkeypatch)
    head, case = cases.make_linear(dtype, LONG, vocab=140, ignored=True, bias=True, seed=2)
    case["advantages"][[1, 4]] = 0.0
    if not old:
        case["old_logp"] = None
    options = {"importance_level": level, "beta": beta, "temperature": 0.7, **cases.BOTH}
    moved = []
    in_place = triton.row_gradient

    def watch(logits: Tensor, out: Tensor, *rest: Any, source: Tensor | None = None, **named: Any) -> None:
        assert len(logits) <= 4
        assert out.data_ptr() == logits.data_ptr() or not len(out)
        if source is not None:
            moved.append(bool((source != torch.arange(len(source), device=DEVICE)).any()))
            assert len(source.unique()) == len(source)
        in_place(logits, out, *rest, source=source, **named)

    monkeypatch.setattr(triton, "row_gradient", watch)
    counted = count_calls(monkeypatch, triton, "product")
    with poisoned_memory():
        ours, grads = cases.check_linear("triton", head, case, **options)
    assert counted.calls >= 3
    if old and level == "token" and beta == 0:  # clipped tokens leave gaps that later rows fill
        assert any(moved)
    again, again_grads = cases.run_linear("triton", head, case, **options)
    for a, b in zip((*again_grads, again.loss, again.logp), (*grads, ours.loss, ours.logp), strict=True):
        assert torch.equal(a, b)


def test_live_rows_come_first_and_keep_their_places() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 2, 3, 17, 64):
        for share in (0.0, 0.2, 0.5, 0.9, 1.0):
            alive = torch.rand(size, generator=generator) < share
            source = triton._live_first(alive.to(DEVICE)).cpu()
            assert sorted(source.tolist()) == alive.nonzero()[:, 0].tolist()
            for target, row in enumerate(source.tolist()):
                assert row == target or (row >= len(source) and not alive[target])


def test_no_gradient_of_a_row_is_formed_where_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    head, case = cases.make_linear(torch.float32, (3, 1))
    formed = count_calls(monkeypatch, triton, "row_gradient")
    cases.run_linear("triton", replace(head, hidden=head.hidden.detach(), weight=head.weight.detach()), case)
    with torch.no_grad():
        cases.run_linear("triton", head, case)
    assert formed.calls == 0
    cases.run_linear("triton", head, case)
    assert formed.calls == 1
