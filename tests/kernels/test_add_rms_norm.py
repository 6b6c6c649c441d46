"""add_rms_norm on every backend against its formula in fp64, and against transformers' modules to the bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from native_cases import check_turned_off
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
from triton_cases import DEVICE, DTYPES, for_threads

from videor1_kernels import add_rms_norm, extension, last_backend
from videor1_kernels.add_rms_norm import native
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

OP = "add_rms_norm"
BACKENDS = ["reference", *(["native"] if any(map(shutil.which, ("c++", "g++", "clang++"))) else []), "triton"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TAKEN = {"reference": FLOATS, "native": [torch.float32, torch.bfloat16], "triton": DTYPES}

QUIET = "ignore:overflow encountered in multiply:RuntimeWarning"  # of NumPy, in the interpreter

needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="there is no C++ compiler")


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def inputs(
    rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], device: str, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and residual, of these dtypes."""
    generator = torch.Generator().manual_seed(rows + width)
    shapes = ((rows, width), (width,), (rows, width))
    x, weight, residual = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return x * scale, weight, residual * scale


def exact(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    summed = x.double() + (0 if residual is None else residual.double())
    factor = weight.double() + unit_offset
    return factor * summed / (summed.pow(2).sum(-1, keepdim=True) / x.shape[1] + eps).sqrt(), summed


def of_transformers(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float = 1e-6, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """A decoder layer's addition and norm."""
    module = (Qwen3_5RMSNorm if unit_offset else Qwen2_5_VLRMSNorm)(x.shape[1], eps).to(weight.device)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    summed = x if residual is None else residual + x
    return module(summed), summed


@pytest.mark.fits(lambda backend, dtype, **_: dtype in TAKEN[backend])
@pytest.mark.grid(
    backend=BACKENDS,
    dtype=FLOATS,
    size=[(1, 1), (3, 16), (12, 128), (5, 70), (2, 1000), (0, 64)],
    added=[True, False],
    eps=[1e-6, 0.5],
    unit_offset=[False, True],
)
def test_equals_its_formula(
    backend: str, dtype: torch.dtype, size: tuple[int, int], added: bool, eps: float, unit_offset: bool
) -> None:
    x, weight, residual = inputs(*size, (dtype,) * 3, device_of(backend))
    given = residual if added else None
    with poisoned_memory():
        out = add_rms_norm(x, weight, residual=given, eps=eps, unit_offset=unit_offset, backend=backend)
    assert last_backend(OP) == backend
    plain = of_transformers(x, weight, given, eps, unit_offset)
    for ours, theirs, oracle in zip(out, plain, exact(x, weight, given, eps, unit_offset), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == size
        assert_matches(ours, oracle)
        if dtype != torch.float64:  # in which transformers' norm is still fp32
            assert_no_worse(ours, theirs, oracle, terms=size[1])
    assert (out[1] is x) == (not added)


MIXED = [  # as under autocast; and a stream wider or narrower than the rest
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32, torch.float32),
    (torch.float32, torch.float16, torch.float16),
    (torch.float16, torch.float16, torch.float16),
]


@pytest.mark.fits(lambda backend, dtypes, **_: set(dtypes) <= set(TAKEN[backend]))
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rounds_where_transformers_does(backend: str, dtypes: tuple[torch.dtype, ...], unit_offset: bool) -> None:
    """The sum to the bit. Of the norm, which is rounded twice, one in hundreds may lie on the other side of a tie."""
    x, weight, residual = inputs(6, 300, dtypes, device_of(backend))  # type: ignore[arg-type]
    normed, summed = add_rms_norm(x, weight, residual=residual, unit_offset=unit_offset, backend=backend)
    assert torch.equal(summed, (residual + x).to(residual.dtype))
    expected, _ = of_transformers(summed, weight, None, unit_offset=unit_offset)
    assert normed.dtype == expected.dtype
    if summed.dtype == torch.float32:
        torch.testing.assert_close(normed, expected, rtol=1e-6 if normed.dtype == torch.float32 else 1e-2, atol=0)
        return
    assert (normed != expected).double().mean() < 0.01
    assert_matches(normed, expected.double())


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_itself_alone(backend: str) -> None:
    x, weight, residual = inputs(4, 70, (torch.float32,) * 3, device_of(backend))
    out = add_rms_norm(x, weight, residual=residual, backend=backend)
    changed = x.clone()
    changed[1], changed[3] = torch.nan, 1e30
    again = add_rms_norm(changed, weight, residual=residual, backend=backend)
    for a, b in zip(out, again, strict=True):
        assert torch.equal(a[::2], b[::2])
        assert b[1].isnan().all()
    single = add_rms_norm(x[2:3], weight, residual=residual[2:3], backend=backend)
    assert all(torch.equal(a[2:3], b) for a, b in zip(out, single, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 300.0])
def test_tiny_and_large_values(backend: str, scale: float) -> None:
    """Squares are summed in fp32: those of fp16 would overflow."""
    dtype = torch.bfloat16 if backend == "native" else torch.float16
    x, weight, residual = inputs(3, 200, (dtype,) * 3, device_of(backend), scale)
    out = add_rms_norm(x, weight, residual=residual, backend=backend)
    for ours, oracle in zip(out, exact(*(x, weight), residual, 1e-6), strict=True):
        bound = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), oracle, rtol=3 * bound, atol=bound * max(scale, oracle.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_autocast_and_the_same_bits(backend: str) -> None:
    x, weight, residual = inputs(5, 48, (torch.float32,) * 3, device_of(backend))
    out = add_rms_norm(x, weight, residual=residual, backend=backend)

    def cut(t: Tensor) -> Tensor:  # columns of something wider
        return torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]]

    def columns_first(t: Tensor) -> Tensor:
        return t.movedim(0, -1).contiguous().movedim(-1, 0)

    def spread(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, -1)[..., ::2]

    def unaligned(t: Tensor) -> Tensor:
        return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape)

    for view in (cut, columns_first, spread, unaligned):
        kept = x.clone(), residual.clone()
        again = add_rms_norm(view(x), view(weight), residual=view(residual), backend=backend)
        alone = add_rms_norm(view(x), weight, backend=backend)[0], add_rms_norm(x, weight, backend=backend)[0]
        for a, b in (*zip(out, again, strict=True), alone):
            if backend == "reference":  # torch sums columns in another order
                assert_matches(a, b.double())
            else:
                assert torch.equal(a, b), view.__name__
        assert torch.equal(x, kept[0])
        assert torch.equal(residual, kept[1])
    with torch.autocast(x.device.type, torch.bfloat16):
        again = add_rms_norm(x, weight, residual=residual, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", TAKEN["native"])
def test_native_has_the_same_bits_for_any_threads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "GRAIN", 1)
    x, weight, residual = inputs(13, 70, (dtype,) * 3, "cpu")
    results = for_threads(lambda: add_rms_norm(x, weight, residual=residual, backend="native"), 1, 2, 3)
    monkeypatch.setattr(extension, "torch_parallel_for", lambda: None)
    results.append(add_rms_norm(x, weight, residual=residual, backend="native"))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@needs_native
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, "native"), (torch.bfloat16, "native"), (torch.float16, "reference"), (torch.float64, "reference")],
)
def test_auto_takes_the_reference_where_the_native_cannot_run(dtype: torch.dtype, expected: str) -> None:
    for i in range(3):
        mixed = [torch.float32] * 3
        mixed[i] = dtype
        x, weight, residual = inputs(2, 8, tuple(mixed), "cpu")  # type: ignore[arg-type]
        add_rms_norm(x, weight, residual=residual)
        assert last_backend(OP) == expected


@needs_native
def test_native_turned_off_says_so_and_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_turned_off(
        OP, native, lambda backend: add_rms_norm(torch.ones(2, 4), torch.ones(4), backend=backend), monkeypatch, caplog
    )
