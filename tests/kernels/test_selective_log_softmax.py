"""selective_log_softmax on every backend against log_softmax and gather in fp64, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from loss_cases import BACKENDS, FP32, KINDS, LAYOUTS, LOW, Kind, double, strided
from torch import Tensor
from triton_cases import DEVICE, QUIET, leaf, upstream

from videor1_kernels import last_backend, selective_log_softmax
from videor1_kernels.linear_logprob import tiles, triton_rows
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def select(backend: str, logits: Tensor, index: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs, and the logits' gradient."""
    if backend in BACKENDS:
        logp = selective_log_softmax(logits, index, temperature=temperature, backend=backend)
        assert last_backend("selective_log_softmax") == backend
    else:
        at_rows = temperature[..., None] if isinstance(temperature, Tensor) else temperature
        scores = (logits / at_rows).log_softmax(-1)
        single = index.dim() < logits.dim()
        logp = scores.gather(-1, index[..., None])[..., 0] if single else scores.gather(-1, index)
    return logp, torch.autograd.grad(logp, logits, upstream(*index.shape, seed=3).to(logp.dtype))[0]


def check(backend: str, logits: Tensor, index: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    with poisoned_memory():
        ours = select(backend, logits, index, temperature)
    exact = select("exact", leaf(logits.double()), index, double(temperature))
    assert ours[0].dtype == torch.promote_types(logits.dtype, torch.float32)
    assert ours[1].dtype == logits.dtype
    for a, b, o in zip(ours, select(backend, logits, index, temperature), exact, strict=True):
        assert a.shape == o.shape
        assert_matches(a, o)
        assert torch.equal(a, b)
    return ours


def make_logits(rows: int, vocab: int, entries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator).to(DEVICE, dtype)
    index = torch.randint(vocab, (rows, entries), generator=generator).to(DEVICE)
    if entries > 1:
        index[:, 0], index[:, -1] = vocab - 1, 0
    return leaf(logits), index


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
@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_equals_fp64(
    rows: int,
    vocab: int,
    entries: int,
    temperature: float,
    backend: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_rows, "BLOCK", 128)
    check(backend, *make_logits(rows, vocab, entries, dtype), temperature)


def test_gradcheck() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    index, temperature = torch.randint(4, (2, 3, 2)), torch.rand(2, 3, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda z: selective_log_softmax(z, index, temperature=temperature), logits)


def test_more_entries_than_a_block() -> None:
    logits, index = make_logits(1, 40, 1030, torch.float32)
    for a, o in zip(select("triton", logits, index), select("exact", leaf(logits.double()), index), strict=True):
        assert_matches(a, o)


@pytest.mark.grid(kind=LOW, rows_of_a_block=[1, 4])
def test_no_worse_than_plain_torch(kind: Kind, rows_of_a_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, dtype = kind
    logits, index = make_logits(9, 300, 3, dtype)
    logits = leaf(logits.detach() * 5)
    temperature = torch.linspace(0.3, 2, 9, device=DEVICE)
    monkeypatch.setitem(tiles.CHUNK_BYTES, DEVICE, rows_of_a_block * 300 * 4 * 4)
    ours = check(backend, logits, index, temperature)
    plain = select("plain", logits, index, temperature.to(dtype))
    exact = select("exact", leaf(logits.double()), index, temperature.double())
    for a, b, o in zip(ours, plain, exact, strict=True):
        assert_no_worse(a, b, o, terms=300 + 3)  # of the softmax, and the columns


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_repeated_entries_add_up(backend: str, dtype: torch.dtype) -> None:
    logits, _ = make_logits(2, 40, 1, dtype)
    index = torch.tensor([[3, 3, 5, 3], [39, 0, 39, 0]], device=DEVICE)
    check(backend, logits, index)
    logp = selective_log_softmax(logits, index, backend=backend)
    assert torch.equal(logp[:, 0], torch.stack([logp[0, 1], logp[1, 2]]))
    (grad,) = torch.autograd.grad(logp[0, :2].sum(), logits)
    assert (grad[1] == 0).all()


@pytest.mark.grid(kind=KINDS[:2], layout=list(LAYOUTS))
def test_layouts(kind: Kind, layout: str) -> None:
    backend, dtype = kind
    logits, index = make_logits(4, 70, 3, dtype)
    temperature = strided(torch.linspace(0.3, 2, 4, device=DEVICE))
    check(backend, leaf(LAYOUTS[layout](logits.detach())), strided(index), temperature)


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_single_index_and_leading_dimensions(backend: str, dtype: torch.dtype) -> None:
    logits, index = make_logits(6, 70, 1, dtype)
    shaped, index = leaf(logits.detach().reshape(2, 3, 70)), index.reshape(2, 3)
    single = check(backend, shaped, index)[0]
    assert torch.equal(single, selective_log_softmax(shaped, index[..., None], backend=backend)[..., 0])
    assert selective_log_softmax(shaped[0, 0], index[0, 0], backend=backend).shape == ()
    assert selective_log_softmax(shaped[:0], index[:0], backend=backend).shape == (0, 3)


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_banned_entries_and_large_logits(backend: str, dtype: torch.dtype) -> None:
    large = torch.full((3, 70), -1e4, device=DEVICE, dtype=dtype)
    large[0, 3], large[1, [3, 5]], large[2] = 1e4, 1e4, -torch.inf
    large[2, 69] = 1e4
    large = leaf(large)
    picked = torch.tensor([[3, 69], [3, 5], [69, 69]], device=DEVICE)
    assert all(x.isfinite().all() for x in check(backend, large, picked, 0.3))
    logp = selective_log_softmax(large, picked, backend=backend)
    assert logp[2].tolist() == [0, 0]
    assert logp[0, 0].item() == 0
    assert logp[1, 0].item() == pytest.approx(-math.log(2))
    zeros = torch.zeros(3, device=DEVICE, dtype=torch.int64)
    assert selective_log_softmax(large, zeros, backend=backend)[2].item() == -torch.inf


@pytest.mark.parametrize(("backend", "dtype"), FP32)
def test_logits_of_ten_thousand_keep_exact_probabilities(backend: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4, 9999.5], [-1e4, -1e4, -10001.0, -10002.0]], device=DEVICE)
    check(backend, leaf(logits), torch.tensor([1, 2], device=DEVICE))


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_rows_without_gradient_are_zero_whatever_they_hold(backend: str, dtype: torch.dtype) -> None:
    logits, index = make_logits(4, 70, 2, dtype)
    poisoned = logits.detach().clone()
    poisoned[1] = math.nan
    logits = leaf(poisoned)
    logp = selective_log_softmax(logits, index, backend=backend)
    grad = torch.ones_like(logp)
    grad[[1, 2]] = 0.0
    with poisoned_memory():
        (got,) = torch.autograd.grad(logp, logits, grad)
    assert (got[[1, 2]] == 0).all()
    assert (got[[0, 3]] != 0).any(1).all()
    assert got.isfinite().all()


@pytest.mark.parametrize(("backend", "dtype"), FP32)
def test_a_slice_is_read_where_it_lies(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As trainers slice logits, all but the last position: no copy is made, and what lies between is never read."""
    whole = torch.randn(3, 6, 70, device=DEVICE, dtype=dtype)
    whole[:, 5] = torch.nan
    index = torch.randint(70, (3, 5, 2), device=DEVICE)
    results = []
    for logits in (leaf(whole[:, :-1].clone()), leaf(whole)):
        sliced = logits[:, :5]
        with monkeypatch.context() as patch:
            for name in ("contiguous", "reshape"):
                patch.setattr(Tensor, name, _without_logits(getattr(Tensor, name)))
            out = selective_log_softmax(sliced, index, temperature=0.7, backend=backend)
        results.append((out, torch.autograd.grad(out, logits, upstream(*out.shape))[0][:, :5]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def _without_logits(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(x: Tensor, *arguments: int) -> Tensor:
        assert x.dim() < 3 or x.shape[-1] != 70 or x.is_contiguous(), "a copy of the logits"
        return call(x, *arguments)

    return checked
