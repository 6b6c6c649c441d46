"""grpo_loss and linear_grpo_loss on Triton against the reference in fp64, loss, statistics and gradients."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from triton_cases import (
    DEVICE,
    DTYPES,
    HALF,
    QUIET,
    Counter,
    Head,
    error_of,
    leaf,
    make_head,
)

from videor1_kernels import grpo_loss, last_backend, linear_grpo_loss, linear_logprob
from videor1_kernels.grpo_loss import triton
from videor1_kernels.linear_logprob import products, triton_rows
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

LENGTHS = (5, 1, 0, 9, 2)
LOSSES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "dapo", "num_tokens": 41},
]
CLIPS = [(None, None), (0.2, None), (None, 0.28), (0.2, 0.28)]
BOTH = {"clip_low": 0.2, "clip_high": 0.28}
FIELDS = ("loss", "kl", "clip_fraction", "logp")


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=DEVICE)


def make_case(lengths=LENGTHS, seed=0):
    """Log-probs [N] that require a gradient, and what goes with them; ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = -3 * torch.rand(n, generator=generator)
    case = {
        "advantages": torch.randn(len(lengths), generator=generator).abs() * torch.tensor([1, -1] * 9)[: len(lengths)],
        "cu_seqlens": cumulative(lengths),
        "old_logp": logp + 0.8 * torch.randn(n, generator=generator),
        "ref_logp": logp + 2 * torch.randn(n, generator=generator),
    }
    return leaf(logp.to(DEVICE)), {name: x.to(DEVICE) for name, x in case.items()}


def double(case):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in case.items()
    }


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
        "advantages": torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0], device=DEVICE), "cu_seqlens": cumulative([1] * 5),
        "ref_logp": torch.tensor([-2.0, -1.0, -21.0, -1.0, 0.0], device=DEVICE),
        "old_logp": torch.tensor([-12.0, -21.0, -2.0, 0.0, -200.0], device=DEVICE),
    }  # fmt: skip
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


def make_linear(dtype, lengths=LENGTHS, *, vocab=70, size=16, ignored=False, seed=0, bias=False):
    """A head [N, size] and a case whose old and reference log-probs lie around its own."""
    head = make_head(sum(lengths), vocab, size, dtype, seed=seed, ignored=ignored, bias=bias)
    _, case = make_case(lengths, seed)
    with torch.no_grad():
        exact = head.oracle()
        logp = linear_logprob(exact.hidden, exact.weight, exact.labels, bias=exact.bias, backend="reference")[0].float()
    noise = make_case(lengths, seed)[0].detach() + 1.5  # from -1.5 to 1.5
    case["old_logp"], case["ref_logp"] = logp + 0.4 * noise, logp - noise
    return head, case


def run(head, case, backend="triton", factor=1.0, **options):
    """GrpoLoss, and the gradients of factor times its loss."""
    out = linear_grpo_loss(
        head.hidden, head.weight, head.labels, **case, bias=head.bias, **options, backend=backend
    )
    assert last_backend("linear_grpo_loss") == backend
    grads = torch.autograd.grad(factor * out.loss, head.leaves) if out.loss.requires_grad else ()
    return out, grads


def check_linear(head, case, *, factor=1.0, **options):
    """linear_grpo_loss against fp64. Statistics to fp32's rounding, gradients to their dtype's."""
    ours, grads = run(head, case, factor=factor, **options)
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].double()
    exact, exact_grads = run(head.oracle(), double(case), "reference", factor, **options)
    for name in (*FIELDS, "entropy"):
        assert getattr(ours, name).dtype == torch.float32
        assert_matches(getattr(ours, name), getattr(exact, name), name=name)
    assert [x.dtype for x in grads] == [x.dtype for x in head.leaves]
    for i, (a, o) in enumerate(zip(grads, exact_grads, strict=True)):
        scale = o.abs().max().clamp(min=1) if o.numel() else 1.0
        assert_matches(a.double() / scale, o / scale, a.dtype, f"gradient {i}")
    assert ours.skipped_rows == exact.skipped_rows
    return ours, grads


# Every loss with every level, and across them every other choice.
MIXES = [
    ({**loss, "importance_level": level, "beta": beta, "clip_low": low, "clip_high": high}, old)
    for i, (loss, level) in enumerate(itertools.product(LOSSES, ("token", "sequence")))
    for beta, old, (low, high) in (
        (0.0, i % 2 == 0, CLIPS[i % 4]), (0.04, True, CLIPS[3 - i % 4]), (0.04 * (i % 2), False, CLIPS[3])
    )
]  # fmt: skip


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
        case["old_logp"] = 0.1 + linear_logprob(
            exact.hidden, exact.weight, exact.labels, temperature=value, backend="reference"
        )[0].float()  # fmt: skip
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
    a, share = (torch.repeat_interleave(v, torch.tensor(lengths, device=DEVICE)) for v in (
        case["advantages"], 1 / torch.tensor([float(4 * n) for n in lengths], device=DEVICE)
    ))  # fmt: skip
    plain = (share * (-torch.minimum(r * a, r.clamp(0.5, 1.5) * a) + 0.04 * (x.exp() - x - 1))).sum()
    plain_grads = torch.autograd.grad(plain, head.leaves)
    assert_no_worse(ours.logp, logp.detach(), exact.logp, name="logp")
    assert_no_worse(ours.loss, plain, exact.loss, name="loss")
    for i, (a, b, o) in enumerate(zip(grads, plain_grads, exact_grads, strict=True)):
        assert_no_worse(a, b, o, name=f"gradient {i}")


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
        "advantages": case["advantages"][order], "cu_seqlens": cumulative([LONG[s] for s in order]),
        "old_logp": case["old_logp"][rows], "ref_logp": case["ref_logp"][rows],
    }  # fmt: skip
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
        "advantages": case["advantages"].repeat_interleave(6)[rest], "cu_seqlens": cumulative([1] * len(rest)),
        "old_logp": case["old_logp"][rest], "ref_logp": None,
    }  # fmt: skip
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
        {"loss_type": "dapo", "num_tokens": 2e7}, {"loss_type": "dapo", "num_tokens": 1e-5},
        {"loss_type": "dr_grpo", "max_completion_length": 1e7}, {"loss_type": "dr_grpo", "max_completion_length": 1e-5},
        {"loss_type": "bnpo"}, {"loss_type": "grpo"},
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)  # fmt: skip
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


@pytest.mark.parametrize(("hidden", "weight"), [(torch.float16, torch.float32), (torch.float32, torch.float16),
                                                (torch.bfloat16, torch.float16)])  # fmt: skip
def test_mixed_dtypes(hidden, weight):
    head, case = make_linear(torch.float16, ignored=True)
    mixed = replace(head, hidden=leaf(head.hidden.to(hidden)), weight=leaf(head.weight.to(weight)))
    case |= {"old_logp": case["old_logp"].to(torch.float64), "ref_logp": case["ref_logp"].half(),
             "advantages": case["advantages"].half(), "cu_seqlens": case["cu_seqlens"].long()}  # fmt: skip
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


GOOD = {
    "hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3).long(),
    "advantages": torch.zeros(2), "cu_seqlens": torch.tensor([0, 2, 3]), "beta": 0,
}  # fmt: skip
BAD_HEAD = [
    {"hidden": torch.zeros(1, 3, 4)}, {"hidden": torch.zeros(3, 0)}, {"labels": torch.zeros(4).long()},
    {"labels": torch.tensor([0, 1, 5])}, {"labels": torch.tensor([0, 1, -1])}, {"labels": torch.zeros(3).int()},
    {"weight": torch.zeros(5, 3)}, {"weight": torch.zeros(5, 4, device="meta")}, {"bias": torch.zeros(4)},
    {"temperature": 0}, {"temperature": torch.tensor([1.0, -1.0, 1.0])}, {"temperature": torch.ones(2)},
]  # fmt: skip
BAD = [
    {"beta": 0.1}, {"beta": -1}, {"beta": math.nan}, {"advantages": torch.zeros(1)}, {"advantages": torch.zeros(2, 1)},
    {"advantages": torch.zeros(2).long()}, {"loss_type": "dapo"}, {"loss_type": "dr_grpo"}, {"loss_type": "gpo"},
    {"importance_level": "tokens"}, {"clip_low": 0.0}, {"clip_high": -1.0}, {"kl_clamp": 0.0},
    {"old_logp": torch.zeros(4)}, {"old_logp": torch.zeros(3).long()}, {"ref_logp": torch.zeros(2)},
    {"old_logp": torch.zeros(3, device="meta")}, {"loss_type": "dapo", "num_tokens": 0},
    {"loss_type": "dr_grpo", "max_completion_length": 0}, {"cu_seqlens": torch.tensor([0, 2, 4])},
    {"cu_seqlens": torch.tensor([0, 1, 2])}, {"cu_seqlens": torch.tensor([1, 2, 3])},
    {"cu_seqlens": torch.tensor([0, 4, 3])}, {"cu_seqlens": torch.tensor([0, -1, 3])},
    {"cu_seqlens": torch.tensor([0.0, 2.0, 3.0])}, {"cu_seqlens": torch.tensor([0, 3])},
    {"cu_seqlens": torch.empty(0).int()}, {"cu_seqlens": torch.tensor([[0, 2, 3]])},
]  # fmt: skip


def given(arguments):
    return {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
        for name, x in arguments.items()
    }


@pytest.mark.parametrize("change", BAD_HEAD + BAD, ids=str)
def test_fused_errors_are_the_references(change):
    arguments = given(GOOD | change)
    messages = [error_of(lambda b=b: linear_grpo_loss(**arguments, backend=b)) for b in ("triton", "reference")]
    assert messages[0] == messages[1]
    assert messages[0].startswith("ValueError: linear_grpo_loss: ")


@pytest.mark.parametrize("change", [*BAD, {"mask": torch.ones(2) > 0}, {"mask": torch.ones(3)}], ids=str)
def test_errors_are_the_references(change):
    good = {name: GOOD[name] for name in ("advantages", "cu_seqlens", "beta")}
    arguments = given({"logp": torch.zeros(3)} | good | change)
    messages = [error_of(lambda b=b: grpo_loss(**arguments, backend=b)) for b in ("triton", "reference")]
    assert messages[0] == messages[1]
    assert messages[0].startswith("ValueError: grpo_loss: ")
