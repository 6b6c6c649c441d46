"""sigmoid_mul and gated_rms_norm on every backend against their formulas in fp64, and against transformers."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from native_cases import check_turned_off
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated
from triton_cases import DEVICE, DTYPES, for_threads

from videor1_kernels import extension, gated_rms_norm, last_backend, sigmoid_mul
from videor1_kernels.output_gates import native, triton
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TAKEN = {"reference": FLOATS, "native": [torch.float32, torch.bfloat16], "triton": DTYPES}
BACKENDS = ["reference", "triton"]
NORM_BACKENDS = [*BACKENDS, *(["native"] if any(map(shutil.which, ("c++", "g++", "clang++"))) else [])]

needs_native = pytest.mark.skipif("native" not in NORM_BACKENDS, reason="there is no C++ compiler")

# Of NumPy, in the interpreter: exp(-gate) of a gate far below 0 is inf.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "BLOCK", 64)


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0, device: str = DEVICE) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def wider(x: Tensor, before: int = 3, after: int = 5) -> Tensor:
    """The same as rows of a wider product, with NaN on both sides."""
    flat = F.pad(x.flatten(1), (before, after), value=torch.nan)
    return flat[:, before : flat.shape[1] - after].unflatten(1, x.shape[1:])


def exact_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide, z = x.double(), gate.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * z / (1 + (-z).exp())


def norm_of_transformers(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    module = Qwen3_5RMSNormGated(x.shape[-1], eps)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module(x, gate)


@pytest.mark.fits(lambda backend, dtype, **_: dtype in TAKEN[backend])
@pytest.mark.grid(
    backend=BACKENDS,
    dtype=FLOATS,
    size=[(1, 1), (3, 64), (2, 65), (12, 192), (4, 333), (0, 8), (3, 0)],
    scale=[2.0, 40.0],
    view=[False, True],
)
def test_sigmoid_mul(backend: str, dtype: torch.dtype, size: tuple[int, int], scale: float, view: bool) -> None:
    x, gate = randn(*size, dtype=dtype), randn(*size[::-1], dtype=dtype, scale=scale).T.contiguous()
    given = [wider(x), wider(gate)] if view else [x, gate]
    with poisoned_memory():
        out = sigmoid_mul(*given, backend=backend)
    assert last_backend("sigmoid_mul") == backend
    assert (out.dtype, out.shape) == (dtype, size)
    oracle = x.double() / (1 + (-gate.double()).exp())
    assert_matches(out, oracle)
    assert_no_worse(out, x * gate.sigmoid(), oracle, terms=2)
    assert torch.equal(given[0], x)
    assert torch.equal(given[1], gate)


@pytest.mark.fits(lambda backend, dtype, gates, weights, **_: {dtype, gates, weights} <= set(TAKEN[backend]))
@pytest.mark.grid(
    backend=NORM_BACKENDS,
    dtype=FLOATS,
    gates=FLOATS,
    weights=FLOATS,
    size=[(1, 1, 1), (3, 4, 16), (2, 5, 70), (3, 9, 128), (0, 2, 8), (2, 0, 8)],
    view=[False, True],
    eps=[1e-6, 0.5],
)
def test_gated_rms_norm(
    backend: str,
    dtype: torch.dtype,
    gates: torch.dtype,
    weights: torch.dtype,
    size: tuple[int, int, int],
    view: bool,
    eps: float,
) -> None:
    x, gate, weight = (
        randn(*size, dtype=dtype),
        randn(*size, dtype=gates, scale=3.0).flip(-1),
        randn(size[2], dtype=weights),
    )
    given = [wider(x), wider(gate)] if view and x.numel() else [x, gate]
    with poisoned_memory():
        out = gated_rms_norm(*given, weight, eps=eps, backend=backend)
    assert last_backend("gated_rms_norm") == backend
    assert (out.dtype, out.shape) == (dtype, size)
    oracle = exact_norm(x, gate, weight, eps)
    assert_matches(out, oracle)
    if torch.float64 not in (dtype, gates, weights):  # in which transformers' is still fp32
        assert_no_worse(out, norm_of_transformers(x, gate, weight, eps), oracle, terms=size[2] + 3)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32])
def test_sigmoid_mul_rounds_where_torch_does(dtype: torch.dtype) -> None:
    """One in hundreds may lie on the other side of a tie; more would if a rounding were left out."""
    x, gate = randn(8, 300, dtype=dtype), randn(300, 8, dtype=dtype).T
    assert (sigmoid_mul(x, gate, backend="triton") != x * gate.sigmoid()).double().mean() < 0.01
    once = (x.float() * gate.float().sigmoid()).to(dtype)
    assert (once != x * gate.sigmoid()).double().mean() > 0.05


@pytest.mark.fits(lambda backend, dtype, weights: {dtype, weights} <= set(TAKEN[backend]))
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", NORM_BACKENDS)
def test_gated_rms_norm_rounds_where_transformers_does(backend: str, dtype: torch.dtype, weights: torch.dtype) -> None:
    device = "cpu" if backend == "native" else DEVICE
    x, gate = (randn(*size, dtype=dtype, device=device) for size in ((8, 3, 100), (100, 3, 8)))
    gate, weight = gate.permute(2, 1, 0), randn(100, dtype=weights, device=device)
    expected = norm_of_transformers(x, gate, weight, 1e-6)
    assert (gated_rms_norm(x, gate, weight, backend=backend) != expected).double().mean() < 0.02
    assert (exact_norm(x, gate, weight, 1e-6).to(dtype) != expected).double().mean() > 0.05


@pytest.mark.parametrize("backend", NORM_BACKENDS)
def test_gates_at_the_ends(backend: str) -> None:
    gates = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 100.0, 1e4, torch.inf, -torch.inf, torch.nan])
    gates = gates if backend == "native" else gates.to(DEVICE)
    ones = torch.ones_like(gates)
    out = gated_rms_norm(ones[None, None], gates[None, None], ones, backend=backend)[0, 0]
    torch.testing.assert_close(out, F.silu(gates), equal_nan=True, rtol=1e-5, atol=1e-30)
    if backend != "native":
        out = sigmoid_mul(ones[None], gates[None], backend=backend)[0]
        torch.testing.assert_close(out, gates.sigmoid(), equal_nan=True, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("backend", NORM_BACKENDS)
def test_columns_apart_autocast_and_a_head_of_itself_alone(backend: str) -> None:
    device = "cpu" if backend == "native" else DEVICE
    x, gate, weight = (randn(*size, dtype=torch.float32, device=device) for size in ((5, 6, 20), (6, 5, 20), (20,)))
    gate = gate.transpose(0, 1)  # heads first
    out = gated_rms_norm(x, gate, weight, backend=backend)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, gate, weight)]
    with torch.autocast(device, torch.bfloat16):
        assert_matches(gated_rms_norm(*spread, backend=backend), out.double())
    changed = x.clone()
    changed[1], changed[3, 2] = torch.nan, 7.0
    again = gated_rms_norm(changed, gate, weight, backend=backend)
    assert torch.equal(again[::2], out[::2])
    assert torch.equal(again[3, :2], out[3, :2])
    assert torch.equal(again[3, 3:], out[3, 3:])
    assert again[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigmoid_mul_of_columns_apart_and_autocast(backend: str) -> None:
    flat = randn(5, 120, dtype=torch.float32), randn(120, 5, dtype=torch.float32).T
    out = sigmoid_mul(*flat, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        again = sigmoid_mul(*(t.repeat_interleave(2, -1)[..., ::2] for t in flat), backend=backend)
    assert_matches(again, out.double())


@needs_native
@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("dtype", TAKEN["native"])
def test_native_has_the_same_bits_for_any_threads(
    dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor without vectors of that many bits takes its widest."""
    monkeypatch.setattr(native, "GRAIN", 1)
    monkeypatch.setattr(native, "vector_bits", lambda: bits)
    x, gate, weight = (randn(*size, dtype=dtype, device="cpu") for size in ((7, 3, 70), (7, 3, 70), (70,)))
    results = for_threads(lambda: gated_rms_norm(x, gate, weight, backend="native"), 1, 2, 3)
    monkeypatch.setattr(extension, "torch_parallel_for", lambda: None)
    results.append(gated_rms_norm(x, gate, weight, backend="native"))
    assert all(torch.equal(result, results[0]) for result in results)
    assert_matches(results[0], exact_norm(x, gate, weight, 1e-6))


@needs_native
@pytest.mark.parametrize("dtype", FLOATS)
def test_auto_takes_the_reference_where_the_native_cannot_run(dtype: torch.dtype) -> None:
    for i in range(3):
        given = [torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(8)]
        given[i] = given[i].to(dtype)
        gated_rms_norm(*given)
        assert last_backend("gated_rms_norm") == ("native" if dtype in TAKEN["native"] else "reference")


@needs_native
def test_native_turned_off_says_so_and_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ones = torch.ones(2, 3, 4)
    check_turned_off(
        "gated_rms_norm",
        native,
        lambda backend: gated_rms_norm(ones, ones, ones[0, 0], backend=backend),
        monkeypatch,
        caplog,
    )
