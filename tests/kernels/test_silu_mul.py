"""silu_mul on every backend against its formula in fp64, and against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_cases import DEVICE, DTYPES

from videor1_kernels import last_backend, silu_mul
from videor1_kernels.silu_mul import triton
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TAKEN = {"reference": FLOATS, "triton": DTYPES}
BACKENDS = list(TAKEN)

# Of NumPy, in the interpreter: exp(-gate) of a gate far below 0 is inf.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "BLOCK", 64)
    monkeypatch.setattr(triton, "ADAPTED_BLOCK", 32)
    monkeypatch.setattr(triton, "RANK_BLOCK", 16)


def values(rows: int, width: int, dtype: torch.dtype, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows + width)
    return (torch.randn(rows, 2 * width, generator=generator) * scale).to(DEVICE, dtype)


def exact(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, 1)
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.fits(lambda backend, dtype, **_: dtype in TAKEN[backend])
@pytest.mark.grid(
    backend=BACKENDS,
    dtype=FLOATS,
    size=[(1, 1), (3, 64), (2, 65), (12, 192), (4, 333), (0, 8), (3, 0)],
    scale=[2.0, 40.0],
)
def test_equals_its_formula(backend: str, dtype: torch.dtype, size: tuple[int, int], scale: float) -> None:
    gate_up = values(*size, dtype, scale)
    kept = gate_up.clone()
    with poisoned_memory():
        out = silu_mul(gate_up, backend=backend)
    assert last_backend("silu_mul") == backend
    assert out.dtype == dtype
    assert out.shape == size
    assert torch.equal(gate_up, kept)
    gate, up = gate_up.chunk(2, 1)
    assert_matches(out, exact(gate_up))
    assert_no_worse(out, F.silu(gate) * up, exact(gate_up), terms=2)


def adapted(gate_up: Tensor, inner: Tensor, b: Tensor) -> Tensor:
    """[R, 2 I] with what the adapters of gate and up give."""
    halves = zip(gate_up.chunk(2, 1), inner.chunk(2, 1), b.chunk(2, 0), strict=True)
    return torch.cat([half + of @ factors.T for half, of, factors in halves], 1)


@pytest.mark.fits(lambda backend, dtype, **_: dtype in TAKEN[backend])
@pytest.mark.grid(
    backend=BACKENDS,
    dtype=FLOATS,
    size=[(1, 1, 1), (3, 64, 16), (12, 65, 7), (67, 130, 40), (0, 8, 4), (3, 0, 2), (2, 9, 0)],
)
def test_adapters_are_added_before_the_activation(backend: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """From views with NaN beside what is read."""
    rows, width, rank = size
    generator = torch.Generator().manual_seed(rank)
    draws = torch.randn(rows, 2 * rank, generator=generator), torch.randn(2 * width, rank, generator=generator) / 4
    given = [values(rows, width, dtype), *(x.to(DEVICE, dtype) for x in draws)]
    views = [F.pad(x, (0, 3), value=torch.nan)[:, : x.shape[1]] for x in given]
    with poisoned_memory():
        out = silu_mul(*views, backend=backend)
    assert (out.dtype, out.shape) == (dtype, (rows, width))
    assert all(torch.equal(view, x) for view, x in zip(views, given, strict=True))
    sums = adapted(*(x.double() for x in given))
    gate, up = adapted(*given).chunk(2, 1)
    assert_matches(out, exact(sums))
    largest = float(sums.abs().max()) if sums.numel() else 1.0
    assert_no_worse(out, F.silu(gate) * up, exact(sums), terms=rank + 2, scale=largest**2)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32])
def test_rounds_where_torch_does(dtype: torch.dtype) -> None:
    """One in hundreds may lie on the other side of a tie."""
    gate_up = values(8, 300, dtype)
    gate, up = gate_up.chunk(2, 1)
    expected = F.silu(gate) * up
    assert (silu_mul(gate_up, backend="triton") != expected).double().mean() < 0.01
    once = (F.silu(gate.float()) * up.float()).to(dtype)  # without the rounding between
    assert (once != expected).double().mean() > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_at_the_ends(backend: str) -> None:
    gates = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 100.0, 1e4, torch.inf, torch.nan], device=DEVICE)
    out = silu_mul(torch.cat([gates, torch.ones_like(gates)])[None], backend=backend)[0]
    torch.testing.assert_close(out, F.silu(gates), equal_nan=True, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_autocast_and_the_same_bits(backend: str) -> None:
    gate_up = values(5, 70, torch.float32)
    out = silu_mul(gate_up, backend=backend)
    wide = torch.cat([gate_up, torch.full_like(gate_up, torch.nan)], 1)
    for view in (wide[:, :140], gate_up.T.contiguous().T, gate_up.repeat_interleave(2, 1)[:, ::2], wide[:, :140][1:]):
        again = silu_mul(view, backend=backend)
        if backend == "reference":  # of what is not contiguous torch computes one number at a time
            assert_matches(again, out[5 - len(view) :].double())
        else:
            assert torch.equal(again, out[5 - len(view) :])
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(silu_mul(gate_up, backend=backend), out)
