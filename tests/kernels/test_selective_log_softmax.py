"""selective_log_softmax against softmax and log written out, in fp64."""

import math

import pytest
import torch
from bounds import BY_HAND

from videor1_kernels import selective_log_softmax
from videor1_kernels.linear_logprob import reference_selective, tiles
from videor1_kernels.testing import LargestTensor, assert_matches, assert_no_worse


def naive(logits, index, temperature=1.0):
    probs = (logits / temperature).exp()
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.stack([row[i].log() for row, i in zip(probs.reshape(-1, logits.shape[-1]), index, strict=True)])


@pytest.mark.parametrize(("rows", "vocab", "picked"), [(1, 1, 1), (5, 7, 1), (17, 33, 4), (3, 5, 9)])
def test_equals_naive(rows, vocab, picked):
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab, dtype=torch.float64, requires_grad=True)
    index = torch.randint(vocab, (rows, picked))  # repeats included
    ours, theirs = selective_log_softmax(logits, index, temperature=0.6), naive(logits, index, 0.6)
    assert_matches(ours, theirs)
    weight = torch.randn(rows, picked, dtype=torch.float64)
    a, b = (torch.autograd.grad((x * weight).sum(), logits)[0] for x in (ours, theirs))
    assert_matches(a, b)


def test_single_index_and_leading_dimensions():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    index = torch.randint(5, (2, 3))
    single = selective_log_softmax(logits, index)
    assert single.shape == (2, 3)
    assert torch.equal(single, selective_log_softmax(logits, index[..., None])[..., 0])
    assert selective_log_softmax(logits[0, 0], index[0, 0]).shape == ()
    assert selective_log_softmax(logits[:0], index[:0]).shape == (0, 3)


def test_known_values():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)
    ours = selective_log_softmax(logits, torch.tensor([[2, 0]]))
    assert ours[0].tolist() == pytest.approx([math.log(5 / 8), math.log(1 / 8)], abs=BY_HAND)


def test_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    index = torch.randint(4, (2, 3, 2))
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda z: selective_log_softmax(z, index, temperature=temperature), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_are_used_exactly(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(9, 300) * 5).to(dtype)
    index = torch.randint(300, (9,))
    ours = selective_log_softmax(logits, index)
    assert ours.dtype == torch.float32
    assert_matches(ours, logits.double().log_softmax(-1).gather(-1, index[:, None])[:, 0])


def test_banned_entries_and_large_logits():
    logits = torch.tensor([[1e4, 1e4, -torch.inf]], requires_grad=True)
    logp = selective_log_softmax(logits, torch.tensor([0]))
    assert logp.item() == pytest.approx(-math.log(2))
    logp.sum().backward()
    assert logits.grad.tolist() == [[0.5, -0.5, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_of_a_block", [1, 4, 100])
def test_gradients_against_the_oracle(dtype, rows_of_a_block, monkeypatch):
    torch.manual_seed(0)
    logits = (torch.randn(9, 300) * 5).to(dtype).requires_grad_()
    index = torch.randint(300, (9, 3))
    index[:, 2] = index[:, 0]  # repeated: its gradients add up
    temperature, weight = torch.linspace(0.3, 2, 9), torch.randn(9, 3)
    exact = logits.detach().double().requires_grad_()
    item = 8 if dtype == torch.float64 else 4
    monkeypatch.setitem(tiles.CHUNK_BYTES, "cpu", rows_of_a_block * 300 * item * 4)

    def gradient(values, logp):
        return torch.autograd.grad((logp * weight.to(logp.dtype)).sum(), values)[0]

    ours = selective_log_softmax(logits, index, temperature=temperature, backend="reference")
    oracle = (exact / temperature.double()[:, None]).log_softmax(-1).gather(-1, index)
    plain = (logits / temperature[:, None].to(dtype)).log_softmax(-1).gather(-1, index)
    assert_matches(ours, oracle)
    a, b, o = gradient(logits, ours), gradient(logits, plain), gradient(exact, oracle)
    assert a.dtype == dtype
    assert_matches(a, o)
    assert_no_worse(a, b, o, terms=300 + 3)  # of the softmax, and the columns


def test_rows_without_gradient_are_exactly_zero():
    torch.manual_seed(0)
    logits = torch.randn(6, 40)
    logits[1:3] = torch.nan  # any arithmetic on these rows would show
    logits.requires_grad_()
    logp = selective_log_softmax(logits, torch.randint(40, (6, 2)), backend="reference")
    grad = torch.ones(6, 2)
    grad[1:4] = 0
    (d_logits,) = torch.autograd.grad(logp, logits, grad)
    assert (d_logits[1:4] == 0).all()
    assert (d_logits[[0, 4, 5]] != 0).all()


def test_logits_of_ten_thousand_keep_exact_probabilities():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4, 9999.5], [-1e4, -1e4, -10001.0, -10002.0]], requires_grad=True)
    index = torch.tensor([1, 2])
    exact = logits.detach().double().requires_grad_()
    ours, oracle = selective_log_softmax(logits, index), exact.log_softmax(1).gather(1, index[:, None])[:, 0]
    assert_matches(ours, oracle)
    assert_matches(*(torch.autograd.grad(y.sum(), x)[0] for x, y in ((logits, ours), (exact, oracle))))


def test_no_copy_of_the_logits_is_made(monkeypatch):
    monkeypatch.setitem(tiles.CHUNK_BYTES, "cpu", 64 * 1024)
    logits, index = torch.randn(200, 512), torch.randint(512, (200, 1))
    with LargestTensor() as seen:
        reference_selective.selective_forward(logits, index, 0.7)
    assert seen.numel == 64 * 1024 // 4 // 4, seen.operation  # fp32, a quarter of the bound


def test_non_contiguous_logits():
    torch.manual_seed(0)
    logits, index = torch.randn(40, 6), torch.randint(40, (6,))
    strided = logits.T.requires_grad_()
    plain = logits.T.contiguous().requires_grad_()
    a, b = selective_log_softmax(strided, index), selective_log_softmax(plain, index)
    assert_matches(a, b)
    assert_matches(*(torch.autograd.grad(y.sum(), x)[0] for x, y in ((strided, a), (plain, b))))


@pytest.mark.parametrize(
    ("index", "temperature", "message"),
    [
        (torch.tensor([0, 1, 2]), 1.0, r"index: expected shape \[2\] or \[2, K\], got \[3\]"),
        (torch.tensor([[[0]], [[1]]]), 1.0, r"index: expected shape \[2\] or \[2, K\], got \[2, 1, 1\]"),
        (torch.tensor([0, 4]), 1.0, r"index: expected values in \[0, 4\), got 1 outside, the first of them 4"),
        (torch.tensor([-100, 0]), 1.0, "first of them -100"),
        (torch.tensor([0.0, 1.0]), 1.0, "index: expected dtype int64"),
        (torch.tensor([0, 1]), -1.0, "temperature: expected a finite number above 0"),
    ],
)
def test_errors(index, temperature, message):
    with pytest.raises(ValueError, match=rf"selective_log_softmax: {message}|{message}"):
        selective_log_softmax(torch.zeros(2, 4), index, temperature=temperature)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_slice_is_read_where_it_lies(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As trainers slice logits: all but the last position. What lies between is never read."""
    whole = torch.randn(3, 6, 70)
    whole[:, 5] = torch.nan
    index, weights = torch.randint(70, (3, 5, 2)), torch.randn(3, 5, 2)
    results = []
    for logits in (whole[:, :-1].clone().requires_grad_(), whole.requires_grad_()):
        sliced = logits if logits.shape[1] == 5 else logits[:, :-1]
        with monkeypatch.context() as patch:
            for name in ("contiguous", "reshape"):
                original = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda x, *a, f=original: refuse_logits(f, x, *a))
            out = selective_log_softmax(sliced, index, temperature=0.7, backend=backend)
        results.append((out, torch.autograd.grad((out * weights).sum(), logits)[0][:, :5]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def refuse_logits(call, x, *arguments):
    assert x.dim() < 3 or x.shape[-1] != 70 or x.is_contiguous(), "a copy of the logits"
    return call(x, *arguments)
