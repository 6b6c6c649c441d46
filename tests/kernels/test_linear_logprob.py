"""linear_logprob against a dense implementation written apart from it, in fp64, forward and gradients."""

import math

import pytest
import torch
from bounds import BY_HAND
from same_bits import assert_same_bits

from videor1_kernels import linear_logprob
from videor1_kernels.linear_logprob import reference, tiles
from videor1_kernels.linear_logprob.inputs import HeadInputs
from videor1_kernels.testing import LargestTensor, assert_matches, assert_no_worse, oracle_inputs, rounding


def dense(hidden, weight, labels, bias=None, temperature=1.0):
    """All logits at once; autograd does the rest."""
    logits = torch.einsum("...h,vh->...v", hidden, weight)
    if bias is not None:
        logits = logits + bias
    logits = logits / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)
    top = logits.amax(-1, keepdim=True)
    log_z = top + (logits - top).exp().sum(-1, keepdim=True).log()
    scores = logits - log_z
    keep = labels != -100
    logp = torch.gather(scores, -1, labels.clamp(min=0)[..., None])[..., 0]
    probs = scores.exp()
    entropy = -torch.where(probs > 0, probs * torch.where(probs > 0, scores, 0.0), 0.0).sum(-1)
    return torch.where(keep, logp, 0.0), torch.where(keep, entropy, 0.0)


def make(shape, hidden_size, vocab, dtype=torch.float64, seed=0, ignored=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    labels = torch.randint(vocab, shape, generator=generator)
    if ignored:
        labels.reshape(-1)[1::3] = -100
    return normal(*shape, hidden_size), normal(vocab, hidden_size), labels, normal(vocab)


def gradients(outputs, inputs, seed=1):
    """Gradients of a random combination of logp and entropy."""
    generator = torch.Generator().manual_seed(seed)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in outputs)
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize(
    ("shape", "hidden_size", "vocab"),
    [
        ((1,), 1, 1),
        ((1,), 3, 2),
        ((17,), 5, 33),
        ((65,), 16, 129),
        ((2, 3), 4, 7),
        ((), 4, 9),
        ((0,), 4, 7),
        ((2, 0), 4, 7),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_dense_fp64(shape, hidden_size, vocab, with_bias):
    hidden, weight, labels, bias = make(shape, hidden_size, vocab)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    bias = bias if with_bias else None
    ours = linear_logprob(hidden, weight, labels, bias=bias, temperature=0.7)
    theirs = dense(hidden, weight, labels, bias, 0.7)
    for name, a, b in zip(("logp", "entropy"), ours, theirs, strict=True):
        assert a.dtype == torch.float64
        assert a.shape == labels.shape
        assert_matches(a, b, name=name)
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert_matches(a, b, name="gradient")


def test_gradcheck():
    hidden, weight, labels, bias = make((6,), 3, 5)
    temperature = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, labels, bias=b, temperature=temperature), (hidden, weight, bias)
    )


@pytest.mark.parametrize("used", ["logp", "entropy"])
def test_gradient_through_one_output(used):
    hidden, weight, labels, bias = make((7,), 4, 9)
    pick = 0 if used == "logp" else 1
    ours, theirs = linear_logprob(hidden, weight, labels, bias=bias)[pick], dense(hidden, weight, labels, bias)[pick]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), (hidden, weight, bias)),
        torch.autograd.grad(theirs.square().sum(), (hidden, weight, bias)),
        strict=True,
    ):
        assert_matches(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_against_the_oracle(dtype):
    hidden, weight, labels, _ = make((33,), 24, 201, dtype)
    exact_hidden, exact_weight, _ = oracle_inputs(hidden, weight, labels)
    ours = linear_logprob(hidden, weight, labels)
    oracle = dense(exact_hidden, exact_weight, labels)
    plain = dense(hidden, weight, labels)
    for name, a, b, o in zip(("logp", "entropy"), ours, plain, oracle, strict=True):
        assert a.dtype == torch.float32
        assert_matches(a, o, name=name)  # fp32's bounds, whatever the inputs: logits are never rounded to 16 bits
        assert_no_worse(a, b, o, terms=24 + 201, name=name)
    ours_grad = gradients(ours, (hidden, weight))
    oracle_grad = gradients(oracle, (exact_hidden, exact_weight))
    plain_grad = gradients(plain, (hidden, weight))
    for name, a, b, o in zip(("hidden", "weight"), ours_grad, plain_grad, oracle_grad, strict=True):
        assert a.dtype == dtype
        assert_matches(a, o, name=f"gradient of {name}")
        assert_no_worse(a, b, o, terms=24 + 201 + 201, name=f"gradient of {name}")


def test_weight_may_have_another_dtype():
    hidden, weight, labels, _ = make((9,), 8, 20, torch.float32)
    half = hidden.detach().to(torch.bfloat16).requires_grad_()
    logp, _ = linear_logprob(half, weight, labels)
    d_hidden, d_weight = torch.autograd.grad(logp.sum(), (half, weight))
    assert (logp.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    exact = linear_logprob(half.float(), weight, labels)[0]
    assert torch.equal(logp, exact)


def test_known_values():
    # Logits 0, ln 2, ln 5 -> probabilities 1/8, 2/8, 5/8.
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    hidden = torch.ones(4, 1, dtype=torch.float64)
    logp, entropy = linear_logprob(hidden, weight, torch.tensor([0, 1, 2, -100]))
    expected = [math.log(1 / 8), math.log(2 / 8), math.log(5 / 8), 0.0]
    assert logp.tolist() == pytest.approx(expected, abs=BY_HAND)
    spread = math.log(8) - (2 * math.log(2) + 5 * math.log(5)) / 8  # -sum p ln p
    assert entropy.tolist() == pytest.approx([spread] * 3 + [0.0], abs=BY_HAND)


def test_temperature_forms_agree():
    hidden, weight, labels, _ = make((2, 5), 4, 9)
    scalar = linear_logprob(hidden, weight, labels, temperature=0.5)
    for temperature in (torch.tensor(0.5), torch.full((2, 5), 0.5)):
        for a, b in zip(scalar, linear_logprob(hidden, weight, labels, temperature=temperature), strict=True):
            assert torch.equal(a, b)
    rows = torch.linspace(0.3, 3, 10, dtype=torch.float64).reshape(2, 5)
    for a, b in zip(
        linear_logprob(hidden, weight, labels, temperature=rows), dense(hidden, weight, labels, None, rows), strict=True
    ):
        assert_matches(a, b)


def test_large_logits_keep_their_precision():
    hidden, weight, labels, _ = make((8,), 4, 50, torch.float32, ignored=False)
    big = (hidden.detach() * 3000).requires_grad_()
    logp, entropy = linear_logprob(big, weight, labels)
    oracle = dense(big.double(), weight.double(), labels)
    largest = (big.double() @ weight.double().T).abs().max().item()  # 20,000: what fp32 rounds
    torch.testing.assert_close(logp.double(), oracle[0], rtol=0, atol=rounding(4 + 50, largest))
    assert entropy.isfinite().all()
    top = (big.double() @ weight.double().T).argmax(1)
    certain, _ = linear_logprob(big, weight, top)
    assert certain.max() <= 0


def test_logits_of_ten_thousand_keep_exact_probabilities():
    """lse is about 1e4, where fp32 is spaced by 1e-3: that must not show in probabilities or gradients."""
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4, 9999.5], [-1e4, -1e4, -10001.0, -10002.0]])  # exact in fp32
    labels = torch.tensor([1, 2])
    weight, hidden = torch.eye(4, requires_grad=True), logits.clone().requires_grad_()
    logp, entropy = linear_logprob(hidden, weight, labels)
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    oracle = dense(exact_hidden, exact_weight, labels)
    for a, b in zip((logp, entropy), oracle, strict=True):
        assert_matches(a, b)
    ours = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    theirs = torch.autograd.grad(oracle[0].sum() + oracle[1].sum(), (exact_hidden, exact_weight))
    assert_matches(ours[0], theirs[0], name="gradient of hidden")
    assert_matches(ours[1] / 1e4, theirs[1] / 1e4, name="gradient of weight")


@pytest.mark.parametrize("far", [1e5, 1e9, 1e30])
def test_a_far_maximum_leaves_everything_finite(far, monkeypatch):
    small_tiles(monkeypatch, 2, 2)
    logits = torch.tensor([[-far, 0.0, 1.0, 2.0, far, -far], [far, 0.0, 1.0, 2.0, -far, far]])
    hidden, weight = logits.clone().requires_grad_(), torch.eye(6, requires_grad=True)
    logp, entropy = linear_logprob(hidden, weight, torch.tensor([4, 0]), backend="reference")
    assert logp.tolist() == pytest.approx([0.0, -math.log(2)])
    assert entropy.tolist() == pytest.approx([0.0, math.log(2)])
    (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), hidden)
    assert grad.isfinite().all()
    if far < 1e15:  # beyond, fp64 has no room beside the maximum for the log of the sum
        torch.testing.assert_close(grad, torch.tensor([[0.0] * 6, [0.5, 0, 0, 0, 0, -0.5]]))


def test_the_reference_keeps_the_normaliser():
    hidden, weight, labels, bias = (x.detach() for x in make((8,), 4, 50, torch.float32))
    *_, lse = reference.forward(HeadInputs(hidden, weight, labels, bias, 0.5))
    exact = ((hidden.double() @ weight.double().T + bias.double()) / 0.5).logsumexp(1)
    assert lse.dtype == torch.float64
    bound = rounding(4 + 50, exact.max().item())
    torch.testing.assert_close(lse, exact.masked_fill(labels == -100, 0.0), rtol=0, atol=bound)


def test_ignored_rows_are_never_read():
    hidden, weight, labels, bias = make((12,), 4, 9)
    garbage = hidden.detach().clone()
    garbage[labels == -100] = torch.nan
    garbage.requires_grad_()
    logp, entropy = linear_logprob(garbage, weight, labels, bias=bias)
    assert (logp[labels == -100] == 0).all()
    assert (entropy[labels == -100] == 0).all()
    clean = linear_logprob(hidden, weight, labels, bias=bias)
    assert torch.equal(logp, clean[0])
    for a, b in zip(
        gradients((logp, entropy), (garbage, weight, bias)), gradients(clean, (hidden, weight, bias)), strict=True
    ):
        assert torch.equal(a, b)


def test_all_rows_ignored():
    hidden, weight, _, bias = make((4,), 3, 5)
    outputs = linear_logprob(hidden, weight, torch.full((4,), -100), bias=bias)
    for grad in gradients(outputs, (hidden, weight, bias)):
        assert (grad == 0).all()


def test_rows_with_zero_gradient_are_left_out():
    hidden, weight, labels, _ = make((10,), 4, 9, ignored=False)
    dead = torch.tensor([0, 3, 4, 9])
    live = torch.tensor([1, 2, 5, 6, 7, 8])
    poisoned = hidden.detach().clone()
    poisoned[dead] = torch.nan  # any arithmetic on these rows in the backward pass would spread
    poisoned.requires_grad_()
    logp, entropy = linear_logprob(poisoned, weight, labels)
    grad_logp = torch.ones(10, dtype=torch.float64).index_fill(0, dead, 0.0)
    d_hidden, d_weight = torch.autograd.grad((logp, entropy), (poisoned, weight), (grad_logp, 0.5 * grad_logp))
    few = linear_logprob(hidden[live], weight, labels[live])
    want_hidden, want_weight = torch.autograd.grad(few[0].sum() + 0.5 * few[1].sum(), (hidden, weight))
    assert (d_hidden[dead] == 0).all()
    assert torch.equal(d_hidden, want_hidden)
    assert torch.equal(d_weight, want_weight)


@pytest.mark.parametrize(("trained", "products"), [("both", 3), ("hidden", 2), ("weight", 2), ("bias", 1)])
def test_a_frozen_input_costs_no_product(trained, products, monkeypatch):
    hidden, weight, labels, bias = make((10,), 4, 9)
    hidden.requires_grad_(trained in ("both", "hidden"))
    weight.requires_grad_(trained in ("both", "weight"))
    bias.requires_grad_(trained == "bias")
    logp, _ = linear_logprob(hidden, weight, labels, bias=bias, backend="reference")
    calls = []
    monkeypatch.setattr(reference, "product", lambda a, b: (calls.append(a.shape), tiles.product(a, b))[1])
    logp.sum().backward()
    assert len(calls) == products  # the recomputed logits, and one per trained input
    for tensor in (hidden, weight, bias):
        assert (tensor.grad is not None) == tensor.requires_grad


def small_tiles(monkeypatch, rows, columns, dtype=torch.float32):
    """Tiles of at most so many rows and vocabulary entries."""
    monkeypatch.setitem(tiles.CHUNK_ROWS, "cpu", rows)
    monkeypatch.setitem(tiles.CHUNK_BYTES, "cpu", rows * columns * dtype.itemsize)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 31), (2, 5), (7, 30), (27, 1), (1000, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiling_changes_nothing_beyond_rounding(rows, columns, dtype, monkeypatch):
    hidden, weight, labels, bias = make((40,), 6, 31, dtype)
    temperature = torch.linspace(0.3, 2, 40)

    def run():
        outputs = linear_logprob(hidden, weight, labels, bias=bias, temperature=temperature, backend="reference")
        return *outputs, *gradients(outputs, (hidden, weight, bias))

    whole = run()
    small_tiles(monkeypatch, rows, columns, torch.float64 if dtype == torch.float64 else torch.float32)
    for a, b in zip(run(), whole, strict=True):
        assert_matches(a, b)


def test_gradients_of_16_bits_are_rounded_once(monkeypatch):
    hidden, weight, labels, bias = make((40,), 6, 31, torch.bfloat16)
    full = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    small_tiles(monkeypatch, 7, 5)  # many tiles to add up
    ours = gradients(linear_logprob(hidden, weight, labels, bias=bias, backend="reference"), (hidden, weight, bias))
    exact = gradients(linear_logprob(*full[:2], labels, bias=full[2], backend="reference"), full)
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a, b.to(torch.bfloat16))


def test_full_logits_are_never_made(monkeypatch):
    rows, vocab = 300, 512
    hidden, weight, labels, bias = make((rows,), 8, vocab, torch.float32)
    with LargestTensor() as naive:
        sum(x.sum() for x in dense(hidden, weight, labels, bias)).backward()
    assert naive.numel == rows * vocab  # the instrument sees it
    monkeypatch.setitem(tiles.CHUNK_BYTES, "cpu", 64 * 1024)
    inputs = HeadInputs(*(x.detach() for x in (hidden, weight, labels, bias)), 1.0)
    ones = torch.ones(rows)
    # Below the torch operator, whose inside the instrument does not see.
    with LargestTensor() as seen:
        _, entropy, lse = reference.forward(inputs)
        reference.backward(inputs, (ones, ones), entropy, lse, (True, True, True))
    assert 60 * 1024 // 4 <= seen.numel <= 64 * 1024 // 4, seen.operation


@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (4096, (32768, 1024), torch.float32),
        (16384, (152064, 3584), torch.float32),
        (4096, (152064, 3584), torch.float64),
        (1, (152064, 3584), torch.float32),
        (0, (7, 3), torch.float32),
        (5, (1, 10**9), torch.float32),
    ],
)
def test_tiles_are_bounded(rows, shape, dtype):
    n, m = tiles.tile_sizes(rows, torch.empty(shape, device="meta", dtype=torch.bfloat16), dtype)
    assert 1 <= n <= max(1, rows)
    assert 1 <= m <= shape[0]
    assert n * m * dtype.itemsize <= 4 * 2**20
    assert m == 1 or m * shape[1] * dtype.itemsize <= 8 * 2**20


def test_banned_tokens():
    hidden, weight, labels, bias = make((9,), 4, 8, ignored=False)
    labels = labels % 6
    with torch.no_grad():
        bias[6:] = -torch.inf
    outputs = linear_logprob(hidden, weight, labels, bias=bias)
    short = dense(hidden, weight[:6], labels, bias[:6])
    for a, b in zip(outputs, short, strict=True):
        assert_matches(a, b)
    ours = gradients(outputs, (hidden, weight, bias))
    theirs = gradients(short, (hidden, weight, bias))
    for a, b in zip(ours, theirs, strict=True):
        assert_matches(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("banned", [slice(0, 4), slice(4, 8), slice(8, 11)])
def test_a_tile_may_be_banned_whole(banned, dtype, monkeypatch):
    hidden, weight, labels, bias = make((9,), 4, 11, dtype, ignored=False)
    allowed = torch.ones(11, dtype=torch.bool)
    allowed[banned] = False
    labels = allowed.nonzero()[:, 0][labels % int(allowed.sum())]
    with torch.no_grad():
        bias[~allowed] = -torch.inf
    small_tiles(monkeypatch, 3, 4, dtype)
    ours = linear_logprob(hidden, weight, labels, bias=bias, backend="reference")
    theirs = dense(hidden.double(), weight.double()[allowed], allowed.cumsum(0)[labels] - 1, bias.double()[allowed])
    for a, b in zip(ours, theirs, strict=True):
        assert_matches(a, b)
    grad = gradients(ours, (hidden, weight, bias))
    for a, b in zip(grad, gradients(theirs, (hidden, weight, bias)), strict=True):
        assert_matches(a, b)
    assert (grad[1][~allowed] == 0).all()


def test_a_banned_label_has_no_probability():
    hidden, weight, labels, bias = make((5,), 4, 8, torch.float32, ignored=False)
    with torch.no_grad():
        bias[labels[2]] = -torch.inf
    logp, entropy = linear_logprob(hidden, weight, labels, bias=bias)
    assert logp[2] == -torch.inf
    assert entropy.isfinite().all()


@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "expanded"])
def test_product(layout, monkeypatch):
    a, b = torch.randn(17, 40), torch.randn(9, 40)
    if layout == "transposed":
        a, b = a.T.contiguous().T, b.T.contiguous().T
    elif layout == "strided":
        a, b = a.repeat_interleave(3, 1)[:, ::3], b.repeat_interleave(2, 0)[::2]
    elif layout == "expanded":
        a, b = a[:1].expand(17, 40), b[:, :1].expand(9, 40)
    exact = a.double() @ b.double().T
    with torch.autocast("cpu", torch.bfloat16):
        assert_matches(tiles.product(a, b), exact)
        assert_matches(tiles.product(a.double(), b.double()), exact)
        monkeypatch.setattr(tiles, "_onednn", lambda: False)
        assert_matches(tiles.product(a, b), exact)


def test_autocast_does_not_lower_the_precision():
    hidden, weight, labels, _ = make((9,), 8, 20, torch.float32)
    outside = linear_logprob(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logprob(hidden, weight, labels)
        inside_grad = gradients(inside, (hidden, weight))
    for a, b in zip((*inside, *inside_grad), (*outside, *gradients(outside, (hidden, weight))), strict=True):
        assert torch.equal(a, b)


def test_same_bits_every_time_and_in_poisoned_memory():
    hidden, weight, labels, bias = make((50,), 8, 33, torch.float32)

    def once():
        outputs = linear_logprob(hidden, weight, labels, bias=bias)
        return *outputs, *gradients(outputs, (hidden, weight, bias))

    assert_same_bits(once)


def test_threads_change_nothing_beyond_rounding():
    hidden, weight, labels, bias = make((600,), 16, 700, torch.float32)  # several tiles, split among threads

    def once(threads):
        torch.set_num_threads(threads)
        outputs = linear_logprob(hidden, weight, labels, bias=bias, backend="reference")
        return *outputs, *gradients(outputs, (hidden, weight, bias))

    try:
        for a, b in zip(once(1), once(2), strict=True):
            assert_matches(a, b)
        for a, b in zip(once(2), once(2), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)


def test_non_contiguous_inputs():
    hidden, weight, labels, _ = make((6,), 4, 9)
    strided_hidden = hidden.detach().T.contiguous().T.requires_grad_()
    strided_weight = weight.detach().repeat_interleave(2, 0)[::2].requires_grad_()
    ours = linear_logprob(strided_hidden, strided_weight, labels)
    plain = linear_logprob(hidden, weight, labels)
    for a, b in zip(
        (*ours, *gradients(ours, (strided_hidden, strided_weight))),
        (*plain, *gradients(plain, (hidden, weight))),
        strict=True,
    ):
        assert_matches(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(13).long()}, r"linear_logprob: labels: expected shape \[12\], got \[13\]"),
        ({"labels": torch.zeros(12)}, "linear_logprob: labels: expected dtype int64, got torch.float32"),
        ({"labels": torch.full((12,), 9)}, r"labels: expected values in \[0, 9\), or -100 \(ignored\), got 12 outside"),
        ({"labels": torch.tensor([0] * 11 + [-1])}, "got 1 outside, the first of them -1"),
        ({"weight": torch.zeros(9, 5)}, r"weight: expected shape \[V, 4\], got \[9, 5\]"),
        ({"weight": torch.zeros(9)}, r"weight: expected shape \[V, 4\], got \[9\]"),
        ({"weight": torch.zeros(0, 4)}, "weight: expected V of 1 or more"),
        ({"weight": torch.zeros(9, 4).long()}, "weight: expected dtype float64, float32, bfloat16 or float16"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "weight: expected device cpu"),
        ({"bias": torch.zeros(8)}, r"bias: expected shape \[9\], got \[8\]"),
        ({"hidden": torch.zeros(12, 0)}, r"hidden: expected shape \[\.\.\., H\] with H of 1 or more"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number above 0, got nan"),
        ({"temperature": torch.ones(11)}, r"temperature: expected shape \[12\], got \[11\]"),
        ({"temperature": torch.zeros(12)}, "temperature: expected finite values above 0"),
        ({"temperature": torch.ones(12, requires_grad=True)}, "without gradient"),
        ({"backend": "native"}, "linear_logprob: backend 'native' cannot run on cpu"),
        ({"backend": "refrence"}, "did you mean 'reference'"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"hidden": torch.zeros(12, 4), "weight": torch.zeros(9, 4), "labels": torch.zeros(12).long()} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("labels"), **arguments)


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"linear_logprob: hidden: expected a torch.Tensor, got list"):
        linear_logprob([[1.0]], torch.zeros(3, 1), torch.zeros(1, dtype=torch.int64))
