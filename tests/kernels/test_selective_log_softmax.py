"""selective_log_softmax against softmax and log written out, in fp64."""

import math

import pytest
import torch

from videor1_kernels import selective_log_softmax
from videor1_kernels.testing import assert_matches


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
    assert ours[0].tolist() == pytest.approx([math.log(5 / 8), math.log(1 / 8)], abs=1e-15)


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
