"""linear_logprob and selective_log_softmax on Triton against the reference in fp64, forward and backward."""

import math

import pytest
import torch
from triton_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    HALF,
    QUIET,
    Counter,
    Head,
    assert_all_match,
    error_of,
    leaf,
    make_head,
    upstream,
)

from videor1_kernels import last_backend, linear_logprob, selective_log_softmax
from videor1_kernels.linear_logprob import products, triton, triton_rows
from videor1_kernels.linear_logprob.triton_forward import TILES, Tile, product_statistics, tile_for
from videor1_kernels.linear_logprob.triton_rows import row_gradient, row_statistics
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

NAMES = ("logp", "entropy", "d_hidden", "d_weight", "d_bias")


def evaluate(head: Head, backend="triton", temperature=1.0, g=None, e=None):
    """[logp, entropy, gradients of the leaves] for incoming gradients g of logp and e of entropy."""
    out = linear_logprob(
        head.hidden, head.weight, head.labels, bias=head.bias, temperature=temperature, backend=backend
    )
    assert last_backend("linear_logprob") == backend
    used = [(x, grad.to(x.dtype)) for x, grad in zip(out, (g, e), strict=True) if grad is not None]
    grads = torch.autograd.grad([x for x, _ in used], head.leaves, [grad for _, grad in used]) if used else ()
    return [*out, *grads]


def check(head: Head, temperature=1.0, g="random", e="random"):
    """Against fp64: log-probs and entropies to fp32's rounding whatever the inputs' dtype, gradients to their own."""
    g, e = (upstream(*head.labels.shape, seed=i) if x == "random" else x for i, x in enumerate((g, e)))
    exact_temperature = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    ours = evaluate(head, temperature=temperature, g=g, e=e)
    exact = evaluate(head.oracle(), "reference", exact_temperature, g, e)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert [x.dtype for x in ours[2:]] == [x.dtype for x in head.leaves]
    assert_all_match(ours, exact, NAMES[: len(ours)], [None] * len(ours))
    return ours


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
        (1, 1, 1, True, 1.0), (1, 131, 8, False, 0.3), (2, 2, 3, False, 1.0), (5, 64, 32, True, 2.0),
        (33, 257, 40, False, 1.0), (40, 300, 17, True, 0.3), (32, 128, 48, False, 2.0),
    ],
)  # fmt: skip
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
        assert_no_worse(a, b, o, name=name)


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
        leaf(hidden.to(DEVICE, dtype)), leaf(weight.to(DEVICE, dtype)),
        torch.tensor([0, 149] * 6, device=DEVICE),
    )  # fmt: skip
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
    where = {"some": slice(1, None, 3), "first tiles": slice(0, 200), "last tiles": slice(60, None),
             "all but one": slice(0, None)}[banned]  # fmt: skip
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
        (torch.float16, torch.float32, torch.float16), (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
)  # fmt: skip
def test_mixed_dtypes(hidden, weight, bias):
    head = make_head(9, 70, 16, bias=True)
    head = Head(leaf(head.hidden.to(hidden)), leaf(head.weight.to(weight)), head.labels, leaf(head.bias.to(bias)))
    g, e = upstream(9, seed=0), upstream(9, seed=1)
    ours, exact = evaluate(head, g=g, e=e), evaluate(head.oracle(), "reference", g=g, e=e)
    assert [x.dtype for x in ours[2:]] == [hidden, weight, bias]
    # The logits' gradient is of the head's dtype: a wider bias' gradient is a sum of those.
    product = hidden if hidden == weight else torch.float32
    assert_all_match(ours, exact, NAMES, (None, None, None, None, bias if bias.itemsize == 2 else product))


def strided(values):
    """The same values, every second element of a wider tensor whose others are large."""
    return torch.stack([values, torch.full_like(values, 77)], -1)[..., 0]


def shifted(values):
    """The same values and strides, one element past an aligned address."""
    memory = torch.empty(values.numel() + 8, dtype=values.dtype, device=values.device)
    view = memory[1 : 1 + values.numel()].view(values.shape)
    return view.copy_(values)


LAYOUTS = {
    "shifted": shifted,
    "strided": strided,
    "column-major": lambda x: x.T.contiguous().T,
    "rows of a wider matrix": lambda x: torch.cat([torch.full_like(x, 77), x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every second row": lambda x: torch.stack([x, torch.full_like(x, 77)], 1)[:, 0],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["hidden", "weight"])
def test_layouts_of_the_operands(dtype, layout, operand):
    head = make_head(9, 70, 16, dtype)
    moved = LAYOUTS[layout](getattr(head, operand).detach())
    assert torch.equal(moved, getattr(head, operand))
    changed = Head(**{"hidden": head.hidden, "weight": head.weight, "labels": head.labels, operand: leaf(moved)})
    check(changed)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_have_the_strides_that_compiled_code_expects(backend):
    """Those of the fake kernels, also where an input is column-major."""
    head = make_head(6, 9, 4)
    hidden, weight = (leaf(LAYOUTS["column-major"](x.detach())) for x in (head.hidden, head.weight))
    cu = torch.tensor([0, 2, 6], device=DEVICE)
    loss = (hidden, weight, head.labels, torch.ones(2, device=DEVICE), cu, None, None, None, None, 1.0, "grpo", 0.0,
            None, None, 10.0, "token", None, None, [True, True, False], backend)  # fmt: skip
    torch.library.opcheck(torch.ops.videor1.linear_grpo_loss, loss, test_utils="test_faketensor")
    ones = torch.ones(6, device=DEVICE)
    gradient = (ones, ones, hidden.detach(), weight.detach(), head.labels, None, None, 1.0, ones, ones.double(),
                [True, True, False], backend)  # fmt: skip
    torch.library.opcheck(torch.ops.videor1.linear_logprob_backward, gradient, test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_labels_and_bias(dtype):
    head = make_head(9, 70, 16, dtype, bias=True)
    check(Head(head.hidden, head.weight, strided(head.labels), leaf(strided(head.bias.detach()))))
    ignored = strided(head.labels)
    ignored[3] = -100
    check(Head(head.hidden, head.weight, ignored, leaf(strided(head.bias.detach()))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_rows_and_expanded_gradients(dtype):
    head = make_head(9, 70, 16, dtype)
    row = leaf(head.hidden[:1])
    check(Head(leaf(head.hidden[:1].detach().expand(9, 16)), head.weight, head.labels))
    logp, _ = linear_logprob(row.expand(9, 16), head.weight, head.labels, backend="triton")
    logp.sum().backward()
    exact = row.detach().double().requires_grad_()
    linear_logprob(exact.expand(9, 16), head.weight.double(), head.labels)[0].sum().backward()
    assert_matches(row.grad, exact.grad)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1, 8, 15, 16])
def test_descriptors_are_taken_only_where_they_can_address(dtype, size):
    hidden, weight = (torch.randn(n, size, device=DEVICE).to(dtype) for n in (9, 70))
    whole = size % 8 == 0
    major, minor = torch.cuda.get_device_capability() if CUDA else (9, 0)
    has_them = TILES[max(known for known in TILES if known <= 10 * major + minor)].descriptors
    assert tile_for(hidden, weight).descriptors == (whole and has_them)
    for layout in ("shifted", "strided", "column-major"):
        moved = LAYOUTS[layout](hidden)
        if size > 1 or layout == "shifted":
            assert not tile_for(moved, weight).descriptors
            assert not tile_for(hidden, LAYOUTS[layout](weight)).descriptors
    assert not tile_for(hidden[:1].expand(9, size), weight).descriptors
    one = torch.randn(9, 8, device=DEVICE).to(dtype)[:, ::8]  # [9, 1] with strides (8, 8): aligned rows, no unit stride
    check(Head(leaf(one), leaf(weight[:, :1]), torch.arange(9, device=DEVICE)))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 rows at most, and row kernels that take a row in several steps."""
    monkeypatch.setattr(products, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(products, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_rows, "BLOCK", 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(4, 64), (13, 300)])
def test_chunks(dtype, rows, vocab, small_chunks, monkeypatch):
    head = make_head(rows, vocab, 16, dtype, bias=True, ignored=True)
    counted = Counter(triton.product)
    monkeypatch.setattr(triton, "product", counted)
    g, e = upstream(rows, seed=0), upstream(rows, seed=1)
    ours = check(head, 0.7)
    live = int(((head.labels != -100) & ((g != 0) | (e != 0))).sum())
    forward = -(-int((head.labels != -100).sum()) // 4) if dtype == torch.float32 else 0  # 16 bits: one kernel
    assert counted.calls == forward + -(-live // 4)
    monkeypatch.undo()
    whole = evaluate(head, temperature=0.7, g=g, e=e)
    assert_all_match(ours, whole, NAMES, [None] * 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_the_rows_changes_nothing(dtype):
    head = make_head(33, 90, 16, dtype, ignored=True)
    g, e = upstream(33, seed=0), upstream(33, seed=1)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours = evaluate(Head(leaf(head.hidden[order]), head.weight, head.labels[order]), g=g[order], e=e[order])
    as_given = evaluate(head, g=g, e=e)
    for i, (a, b) in enumerate(zip(ours, as_given, strict=True)):
        assert_matches(a, b[order] if i < 3 else b, name=NAMES[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_from_poisoned_memory(dtype, small_chunks):
    head = make_head(13, 200, 20, dtype, bias=True, ignored=True)
    g, e = upstream(13, seed=0), upstream(13, seed=1)
    first = evaluate(head, temperature=2.0, g=g, e=e)
    with poisoned_memory():
        second = evaluate(head, temperature=2.0, g=g, e=e)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert a.isfinite().all(), name
        assert torch.equal(a, b), name


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
        {"labels": torch.tensor([0] * 11 + [9])}, {"labels": torch.tensor([0] * 11 + [-1])},
        {"labels": torch.tensor([0] * 11 + [2**40])}, {"labels": torch.zeros(12).int()},
        {"labels": torch.zeros(11).long()}, {"labels": torch.zeros(12, 1).long()},
        {"weight": torch.zeros(9, 5)}, {"weight": torch.zeros(0, 4)}, {"weight": torch.zeros(9, 4).long()},
        {"weight": torch.zeros(9, 4, device="meta")}, {"hidden": torch.zeros(12, 0)}, {"hidden": [[0.0]]},
        {"bias": torch.zeros(8)}, {"bias": torch.zeros(9).int()}, {"temperature": 0.0}, {"temperature": -1.0},
        {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": torch.ones(11)},
        {"temperature": torch.linspace(-1, 1, 12)}, {"temperature": torch.full((12,), math.nan)},
        {"temperature": torch.ones(12, requires_grad=True)},
    ],
    ids=lambda change: "-".join(f"{k} {getattr(v, 'shape', v)}" for k, v in change.items()),
)  # fmt: skip
def test_errors_are_the_references(change):
    given = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
        for name, x in (GOOD | change).items()
    }
    messages = [error_of(lambda b=b: linear_logprob(**given, backend=b)) for b in ("triton", "reference")]
    assert messages[0] == messages[1]
    assert next(iter(change)) in messages[0]


def test_fp64_is_refused():
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run .* its kernels compute in fp32"):
        linear_logprob(*(x.double() if x.is_floating_point() else x for x in GOOD.values()), backend="triton")


SHAPES = [
    Tile(16, 16, 16, num_warps=4, num_stages=1, group_n=1),
    Tile(16, 64, 32, num_warps=4, num_stages=2, group_n=3),
    Tile(64, 16, 16, num_warps=4, num_stages=1, group_n=2),
    Tile(32, 128, 64, num_warps=4, num_stages=2, group_n=16, flatten=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(
    ("tile", "rows", "vocab", "size", "bias"),
    [
        (SHAPES[0], 37, 33, 24, True), (SHAPES[1], 37, 130, 40, True), (SHAPES[2], 70, 50, 40, False),
        (SHAPES[3], 37, 130, 72, False), (SHAPES[3], 1, 5, 8, True), (SHAPES[1], 16, 64, 32, False),
    ],
)  # fmt: skip
def test_product_statistics(dtype, descriptors, tile, rows, vocab, size, bias):
    head = make_head(rows, vocab, size, dtype, bias=bias)
    hidden, weight, offset = (None if x is None else x.detach() for x in (head.hidden, head.weight, head.bias))
    temperature = torch.linspace(0.5, 2, rows, device=DEVICE)
    tile = Tile(**{**vars(tile), "descriptors": descriptors})
    with poisoned_memory():
        logp, entropy, lse = product_statistics(hidden, weight, head.labels, offset, 1 / temperature, tile)
    z = hidden.double() @ weight.double().T
    z = (z if offset is None else z + offset.double()) / temperature.double()[:, None]
    scores = z.log_softmax(1)
    assert_matches(logp, scores.gather(1, head.labels[:, None])[:, 0])
    assert_matches(entropy, -(scores.exp() * scores).sum(1))
    assert_matches(lse, z.logsumexp(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_product_kernels_agree(dtype):
    """The same tiles in the same order of operations: the same bits, whatever addresses the operands."""
    head = make_head(37, 130, 40, dtype)
    results = [
        product_statistics(
            head.hidden.detach(), head.weight.detach(), head.labels, None, torch.ones(37, device=DEVICE),
            Tile(32, 64, 32, num_warps=4, num_stages=1, group_n=2, descriptors=descriptors),
        )
        for descriptors in (False, True)
    ]  # fmt: skip
    for a, b in zip(*results, strict=True):
        assert_matches(a, b.double()) if CUDA else torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(params=[128, 4096])
def step(request, monkeypatch):
    """Columns that a row kernel takes at once: a row of 270 in several steps or in one."""
    monkeypatch.setattr(triton_rows, "BLOCK", request.param)


@pytest.mark.parametrize("narrow", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("entries", [1, 3])
def test_in_place_row_gradient(step, narrow, entropy, entries):
    """Over the logits, moved and narrowed, it has the bits of one written elsewhere, and nothing else is touched."""
    rows, vocab, pitch = 9, 270, 320
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(rows + 1, pitch, generator=generator).to(DEVICE)
    logits = memory[:rows, :vocab]
    index = torch.randint(vocab, (rows, entries), generator=generator).to(DEVICE)
    index[0, 0], index[1, 0] = 0, vocab - 1
    bias = torch.randn(vocab, generator=generator).to(DEVICE)
    scale = torch.linspace(0.5, 2, rows, device=DEVICE)
    grad = upstream(rows, entries)
    grad_entropy = upstream(rows, seed=5) if entropy else None
    dead = [1, 4, 8]
    grad[dead] = 0.0
    if entropy:
        grad_entropy[dead] = 0.0
    _, spread, top, log_total = row_statistics(logits, index, bias, scale, entropy=True)
    source = torch.tensor([0, 7, 2, 3, 6, 5], device=DEVICE)  # rows 1 and 4 hold the gradients of rows 7 and 6

    def into(given, out, source=None):
        row_gradient(
            given, out, index, bias, scale, top, log_total, grad, entropy=spread if entropy else None,
            grad_entropy=grad_entropy, source=source,
        )  # fmt: skip

    apart = torch.full((rows + 2, vocab + 9), 7.0, dtype=narrow, device=DEVICE)
    into(logits, apart[1 : rows + 1, 4 : 4 + vocab])
    want = apart[1 : rows + 1, 4 : 4 + vocab]
    assert (apart[[0, -1]] == 7).all()
    assert (apart[:, :4] == 7).all()
    assert (apart[:, 4 + vocab :] == 7).all()
    assert (want[dead] == 0).all()

    z = ((logits + bias) * scale[:, None]).double()
    scores, p = z.log_softmax(1), z.softmax(1)
    exact = -grad.double().sum(1, keepdim=True) * p
    exact.scatter_add_(1, index, grad.double())
    if entropy:
        mean = -(p * scores).sum(1, keepdim=True)
        exact -= grad_entropy.double()[:, None] * p * (scores + mean)
    assert_matches(want, exact * scale.double()[:, None])

    before = memory.clone()
    same_rows = memory.clone()
    into(same_rows[:rows, :vocab], products.narrow_rows(same_rows, rows, vocab, narrow))
    assert torch.equal(products.narrow_rows(same_rows, rows, vocab, narrow), want)
    assert torch.equal(same_rows[rows], before[rows])
    assert torch.equal(same_rows[:, vocab:], before[:, vocab:])
    moved = memory.clone()
    into(moved[:rows, :vocab], products.narrow_rows(moved, len(source), vocab, narrow), source)
    assert torch.equal(products.narrow_rows(moved, len(source), vocab, narrow), want[source])
    assert torch.equal(moved[len(source) :], before[len(source) :])


def test_a_row_without_gradient_becomes_zero_unread():
    logits = torch.full((2, 40), math.nan, device=DEVICE)
    index = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    ones, zeros = torch.ones(2, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    row_gradient(logits, logits, index, None, ones, ones, ones, zeros, entropy=ones, grad_entropy=zeros[:, 0])
    assert (logits == 0).all()


def select(logits, index, temperature=1.0, backend="triton", seed=3):
    logp = selective_log_softmax(logits, index, temperature=temperature, backend=backend)
    assert last_backend("selective_log_softmax") == backend
    grad = upstream(*index.shape, seed=seed).to(logp.dtype)
    return logp, torch.autograd.grad(logp, logits, grad)[0]


def check_selective(logits, index, temperature=1.0):
    exact_temperature = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    with poisoned_memory():
        ours = select(logits, index, temperature)
    exact = select(leaf(logits.double()), index, exact_temperature, "reference")
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == logits.dtype
    assert_all_match(ours, exact, ("logp", "d_logits"), (None, None))
    for a, b in zip(ours, select(logits, index, temperature), strict=True):
        assert torch.equal(a, b)
    return ours


def make_logits(rows, vocab, entries, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator).to(DEVICE, dtype)
    index = torch.randint(vocab, (rows, entries), generator=generator).to(DEVICE)
    if entries > 1:
        index[:, 0], index[:, -1] = vocab - 1, 0
    return leaf(logits), index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "entries", "temperature"),
    [
        (1, 1, 1, 1.0), (5, 2, 5, 0.3), (4, 300, 1, 2.0), (5, 300, 3, 0.3), (3, 128, 6, 2.0), (3, 70, 0, 0.3),
        (0, 5, 2, 0.3),
    ],
)  # fmt: skip
def test_selective_equals_fp64(dtype, rows, vocab, entries, temperature, monkeypatch):
    monkeypatch.setattr(triton_rows, "BLOCK", 128)
    check_selective(*make_logits(rows, vocab, entries, dtype), temperature)


def test_selective_with_more_entries_than_a_block():
    check_selective(*make_logits(1, 40, 1030, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_selective_adds_repeated_entries(dtype):
    logits, _ = make_logits(2, 40, 1, dtype)
    index = torch.tensor([[3, 3, 5, 3], [39, 0, 39, 0]], device=DEVICE)
    check_selective(logits, index)
    logp = selective_log_softmax(logits, index, backend="triton")
    assert torch.equal(logp[:, 0], torch.stack([logp[0, 1], logp[1, 2]]))
    (grad,) = torch.autograd.grad(logp[0, :2].sum(), logits)
    assert (grad[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selective_layouts(dtype, layout):
    logits, index = make_logits(9, 70, 3, dtype)
    temperature = strided(torch.linspace(0.3, 2, 9, device=DEVICE))
    check_selective(leaf(LAYOUTS[layout](logits.detach())), strided(index), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selective_shapes_and_extremes(dtype):
    logits, index = make_logits(6, 70, 1, dtype)
    shaped = leaf(logits.detach().reshape(2, 3, 70))
    single = check_selective(shaped, index.reshape(2, 3))[0]
    assert single.shape == (2, 3)
    assert torch.equal(single, selective_log_softmax(shaped, index.reshape(2, 3, 1), backend="triton")[..., 0])
    large = torch.full((3, 70), -1e4, device=DEVICE, dtype=dtype)
    large[0, 3], large[1, [3, 5]], large[2] = 1e4, 1e4, -torch.inf
    large[2, 69] = 1e4
    large = leaf(large)
    picked = torch.tensor([[3, 69], [3, 5], [69, 69]], device=DEVICE)
    assert all(x.isfinite().all() for x in check_selective(large, picked, 0.3))
    logp = selective_log_softmax(large, picked, backend="triton")
    assert logp[2].tolist() == [0, 0]
    assert logp[0, 0].item() == 0
    assert selective_log_softmax(large, torch.zeros(3, device=DEVICE).long(), backend="triton")[2].item() == -torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_selective_rows_without_gradient_are_zero_whatever_they_hold(dtype):
    logits, index = make_logits(4, 70, 2, dtype)
    poisoned = logits.detach().clone()
    poisoned[1] = math.nan
    logits = leaf(poisoned)
    logp = selective_log_softmax(logits, index, backend="triton")
    grad = torch.ones_like(logp)
    grad[[1, 2]] = 0.0
    (got,) = torch.autograd.grad(logp, logits, grad)
    assert (got[[1, 2]] == 0).all()
    assert (got[[0, 3]] != 0).any(1).all()
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("index", "temperature"),
    [
        (torch.tensor([0, 1, 2]), 1.0), (torch.tensor([[[0]], [[1]]]), 1.0), (torch.tensor([0, 4]), 1.0),
        (torch.tensor([-100, 0]), 1.0), (torch.tensor([[0, 1], [2, -1]]), 1.0), (torch.tensor([0.0, 1.0]), 1.0),
        (torch.tensor([0, 1]), 0.0), (torch.tensor([0, 1]), torch.tensor([1.0, 0.0])), (torch.tensor(0), 1.0),
    ],
)  # fmt: skip
def test_selective_errors_are_the_references(index, temperature):
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(DEVICE)
    logits = torch.zeros(2, 4, device=DEVICE)
    messages = [
        error_of(lambda b=b: selective_log_softmax(logits, index.to(DEVICE), temperature=temperature, backend=b))
        for b in ("triton", "reference")
    ]
    assert messages[0] == messages[1]
    assert "selective_log_softmax" in messages[0]
