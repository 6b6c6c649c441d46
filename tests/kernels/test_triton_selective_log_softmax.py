"""selective_log_softmax on Triton against the reference in fp64, forward and backward; its errors are the same."""

import math

import pytest
import torch
from triton_cases import DEVICE, DTYPES, QUIET, assert_all_match, leaf, shared_error, upstream
from triton_logprob_cases import LAYOUTS, strided

from videor1_kernels import last_backend, selective_log_softmax
from videor1_kernels.linear_logprob import triton_rows
from videor1_kernels.testing import poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


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
        (1, 1, 1, 1.0),
        (5, 2, 5, 0.3),
        (4, 300, 1, 2.0),
        (5, 300, 3, 0.3),
        (3, 128, 6, 2.0),
        (3, 70, 0, 0.3),
        (0, 5, 2, 0.3),
    ],
)
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
        (torch.tensor([0, 1, 2]), 1.0),
        (torch.tensor([[[0]], [[1]]]), 1.0),
        (torch.tensor([0, 4]), 1.0),
        (torch.tensor([-100, 0]), 1.0),
        (torch.tensor([[0, 1], [2, -1]]), 1.0),
        (torch.tensor([0.0, 1.0]), 1.0),
        (torch.tensor([0, 1]), 0.0),
        (torch.tensor([0, 1]), torch.tensor([1.0, 0.0])),
        (torch.tensor(0), 1.0),
    ],
)
def test_selective_errors_are_the_references(index, temperature):
    arguments = {"logits": torch.zeros(2, 4), "index": index, "temperature": temperature}
    assert "selective_log_softmax" in shared_error(selective_log_softmax, arguments)
