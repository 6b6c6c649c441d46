"""Rows of linear_grpo_loss on Triton: in chunks, in any order, and left out of the work where nothing needs them."""

import math
from dataclasses import replace

import pytest
import torch
from triton_cases import DEVICE, DTYPES, QUIET, Counter, leaf
from triton_grpo_cases import BOTH, LENGTHS, check_linear, cumulative, make_linear, run

from videor1_kernels.grpo_loss import triton
from videor1_kernels.linear_logprob import products, triton_rows
from videor1_kernels.testing import assert_matches, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 rows at most: completions of 5 and 9 tokens are longer than one; a row is taken in several steps."""
    monkeypatch.setattr(products, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(products, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_rows, "BLOCK", 128)


LONG = (5, 1, 0, 9, 2, 1, 1, 4, 3)  # 26 tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("level", "beta", "old"),
    [("token", 0, True), ("token", 0, False), ("token", 0.04, True), ("sequence", 0, True), ("sequence", 0.04, True)],
)
def test_chunks_change_nothing(dtype, level, beta, old, small_chunks, monkeypatch):
    head, case = make_linear(dtype, LONG, vocab=140, ignored=True, bias=True, seed=2)
    case["advantages"][[1, 4]] = 0.0
    if not old:
        case["old_logp"] = None
    options = {"importance_level": level, "beta": beta, "temperature": 0.7, **BOTH}
    moved = []
    in_place = triton.row_gradient

    def watch(logits, out, *rest, source=None, **named):
        assert len(logits) <= 4
        assert out.data_ptr() == logits.data_ptr() or not len(out)
        if source is not None:
            moved.append(bool((source != torch.arange(len(source), device=DEVICE)).any()))
            assert torch.equal(source.sort()[0].unique(), source.sort()[0])
        in_place(logits, out, *rest, source=source, **named)

    monkeypatch.setattr(triton, "row_gradient", watch)
    counted = Counter(triton.product)
    monkeypatch.setattr(triton, "product", counted)
    with poisoned_memory():
        ours, grads = check_linear(head, case, **options)
    assert counted.calls >= 4
    if old and level == "token" and beta == 0:  # clipped tokens leave gaps that later rows fill
        assert any(moved)
    again, again_grads = run(head, case, **options)
    for a, b in zip((*again_grads, again.loss, again.logp), (*grads, ours.loss, ours.logp), strict=True):
        assert torch.equal(a, b)


def test_live_rows_come_first_and_keep_their_places():
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 2, 3, 17, 64):
        for share in (0.0, 0.2, 0.5, 0.9, 1.0):
            alive = torch.rand(size, generator=generator) < share
            source = triton._live_first(torch.where(alive, -1.5, 0.0).to(DEVICE)).cpu()
            assert sorted(source.tolist()) == alive.nonzero()[:, 0].tolist()
            for target, row in enumerate(source.tolist()):
                assert row == target or (row >= len(source) and not alive[target])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_packing_order_changes_nothing(dtype, level):
    head, case = make_linear(dtype, LONG, ignored=True)
    order = [6, 3, 8, 0, 2, 7, 1, 5, 4]
    first = cumulative(LONG).tolist()
    rows = torch.tensor([t for s in order for t in range(first[s], first[s + 1])], device=DEVICE)
    shuffled = replace(head, hidden=leaf(head.hidden[rows]), labels=head.labels[rows])
    moved = {
        "advantages": case["advantages"][order],
        "cu_seqlens": cumulative([LONG[s] for s in order]),
        "old_logp": case["old_logp"][rows],
        "ref_logp": case["ref_logp"][rows],
    }
    a, (a_hidden, a_weight) = run(head, case, importance_level=level, **BOTH)
    b, (b_hidden, b_weight) = run(shuffled, moved, importance_level=level, **BOTH)
    assert_matches(b.loss, a.loss)
    assert_matches(b.kl, a.kl)
    assert_matches(b.logp, a.logp[rows])
    assert_matches(b_hidden, a_hidden[rows])
    assert_matches(b_weight, a_weight)
    assert a.skipped_rows == b.skipped_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_loss_is_the_mean_over_completions_called_one_by_one(dtype, level):
    head, case = make_linear(dtype, ignored=True)
    ours, grads = run(head, case, importance_level=level, **BOTH)
    first, parts = cumulative(LENGTHS).tolist(), []
    for s, length in enumerate(LENGTHS):
        rows = slice(first[s], first[s + 1])
        one = replace(head, hidden=leaf(head.hidden[rows]), labels=head.labels[rows])
        alone = {"advantages": case["advantages"][s : s + 1], "cu_seqlens": cumulative([length])}
        alone |= {name: case[name][rows] for name in ("old_logp", "ref_logp")}
        parts.append(run(one, alone, importance_level=level, **BOTH))
    assert_matches(sum(out.loss for out, _ in parts) / len(LENGTHS), ours.loss)
    assert_matches(torch.cat([g[0] for _, g in parts]) / len(LENGTHS), grads[0])
    assert_matches(sum(g[1].double() for _, g in parts) / len(LENGTHS), grads[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_skipped_rows_are_never_read(dtype, chunked, request):
    """Ignored rows and completions of advantage 0 may hold NaN: every other result keeps its bits."""
    if chunked:
        request.getfixturevalue("small_chunks")
    head, case = make_linear(dtype, LONG, bias=True)
    case["advantages"][[0, 7]] = 0.0  # rows 0 to 4 and 19 to 22
    head.labels[[6, 13]] = -100
    idle = torch.tensor([*range(5), *range(19, 23)], device=DEVICE)
    ignored = torch.tensor([6, 13], device=DEVICE)
    case["ref_logp"] = None
    options = {"beta": 0, **BOTH}
    want, want_grads = check_linear(head, case, **options)
    case["old_logp"][ignored] = math.nan
    poisoned = head.hidden.detach().clone()
    poisoned[idle], poisoned[ignored] = math.nan, math.nan
    ours, grads = run(replace(head, hidden=leaf(poisoned)), case, **options)
    assert torch.equal(ours.loss, want.loss)
    assert ours.skipped_rows == want.skipped_rows >= 11
    assert ours.logp[idle].isnan().all()
    keep = torch.ones_like(head.labels, dtype=torch.bool)
    keep[idle] = False
    assert torch.equal(ours.logp[keep], want.logp[keep])
    assert (ours.logp[ignored] == 0).all()
    assert (ours.entropy[ignored] == 0).all()
    for a, b in zip(grads, want_grads, strict=True):
        assert torch.equal(a, b)
    assert (grads[0][~keep] == 0).all()
    assert (grads[0][ignored] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_rows_take_no_part(dtype):
    """Gradients are those of the rows left, and the product for the weight sees only them."""
    head, case = make_linear(dtype, (6, 6))
    case["advantages"] = torch.tensor([1.0, -1.0], device=DEVICE)
    ours, grads = run(head, case, beta=0, clip_low=0.05, clip_high=0.05)
    dead = (grads[0] == 0).all(1)
    assert ours.skipped_rows == int(dead.sum()) == round(12 * ours.clip_fraction.item())
    assert 2 < dead.sum() < 10
    rest = (~dead).nonzero()[:, 0]
    left = replace(head, hidden=leaf(head.hidden[rest]), labels=head.labels[rest])
    per_token = {
        "advantages": case["advantages"].repeat_interleave(6)[rest],
        "cu_seqlens": cumulative([1] * len(rest)),
        "old_logp": case["old_logp"][rest],
        "ref_logp": None,
    }
    _, alone = run(left, per_token, beta=0, loss_type="dapo", num_tokens=12)
    assert_matches(grads[0][rest], alone[0])
    assert_matches(grads[1], alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("why", ["advantages", "labels", "clipped", "far from the reference model"])
def test_all_coefficients_zero(dtype, why, monkeypatch):
    head, case = make_linear(dtype, bias=True)
    options = {"beta": 0, **BOTH}
    if why == "advantages":
        case["advantages"].zero_()
    elif why == "labels":
        head.labels.fill_(-100)
    elif why == "clipped":
        case["advantages"] = torch.ones(len(LENGTHS), device=DEVICE)
        case["old_logp"] -= 5.0
    else:  # every gap is clamped
        case["advantages"].zero_()
        case |= {"old_logp": None, "ref_logp": case["ref_logp"] - 50.0}
        options["beta"] = 0.04
    into_weight = Counter(products.add_product)
    monkeypatch.setattr(products, "add_product", into_weight)
    with poisoned_memory():
        ours, grads = run(head, case, **options)
    assert ours.skipped_rows == sum(LENGTHS)
    assert all((x == 0).all() for x in grads)
    assert [x.shape for x in grads] == [x.shape for x in head.leaves]
    assert ours.loss.isfinite()
    assert into_weight.calls == 0
    check_linear(head, case, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", ["hidden", "weight bias", "hidden weight", "hidden weight bias"])
def test_only_what_needs_a_gradient_is_worked_for(dtype, frozen, monkeypatch):
    head, case = make_linear(dtype, bias=True)
    full, grads = run(head, case)
    kept = [g for g, name in zip(grads, ("hidden", "weight", "bias"), strict=True) if name not in frozen]
    for name in frozen.split():
        getattr(head, name).requires_grad_(False)
    into_weight, sums, made = Counter(products.add_product), [], triton.HeadGradients
    monkeypatch.setattr(products, "add_product", into_weight)
    monkeypatch.setattr(triton, "HeadGradients", lambda *args: sums.append(made(*args)) or sums[-1])
    row_work = Counter(triton.row_gradient)
    monkeypatch.setattr(triton, "row_gradient", row_work)
    ours, part = run(head, case)
    assert_matches(ours.loss, full.loss)
    for a, b in zip(part, kept, strict=True):
        assert torch.equal(a, b)
    assert into_weight.calls == ("weight" not in frozen)
    assert row_work.calls == (frozen != "hidden weight bias")
    assert [x is None for x in (sums[0].d_hidden, sums[0].d_weight, sums[0].d_bias)] == [
        name in frozen.split() for name in ("hidden", "weight", "bias")
    ]
    assert ours.loss.requires_grad == (frozen != "hidden weight bias")
    assert ours.skipped_rows == full.skipped_rows


def test_no_grad_does_no_gradient_work(monkeypatch):
    head, case = make_linear(torch.float32, ignored=True)
    want, _ = run(head, case)

    def fail(*args, **options):
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(triton, "row_gradient", fail)
    with torch.no_grad():
        ours, _ = run(head, case)
    with torch.inference_mode():
        run(head, case)
    assert not ours.loss.requires_grad
    assert_matches(ours.loss, want.loss)
    assert_matches(ours.entropy, want.entropy)
    with pytest.raises(AssertionError, match="a gradient was formed"):
        run(head, case)
