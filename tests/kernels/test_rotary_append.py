"""rotary_append on every backend against a loop over rows and heads in fp64, and against transformers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb as apply_partial_rotary
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm
from triton_cases import DEVICE, DTYPES, for_threads

from videor1_kernels import extension, last_backend, rotary_append
from videor1_kernels.rotary_append import native
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

OP = "rotary_append"
BACKENDS = ["reference", *(["native"] if any(map(shutil.which, ("c++", "g++", "clang++"))) else []), "triton"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TAKEN = {"reference": FLOATS, "native": [torch.float32, torch.bfloat16], "triton": DTYPES}

needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="there is no C++ compiler")
# Of NumPy, in the interpreter: the padding of a head is multiplied with the NaN that stands for no position.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@dataclass
class Call:
    """One call; what no row may touch in the cache is NaN."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    suffix_k: Tensor
    suffix_v: Tensor
    positions: Tensor
    suffix_lengths: Tensor
    suffix_slots: Tensor | None
    backend: str
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-3  # so large that it shows
    unit_offset: bool = False

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, and copies of the cache after the call; the call's own cache stays as it was."""
        caches = [x.clone() for x in (self.suffix_k, self.suffix_v)]
        assert all(a.stride() == b.stride() for a, b in zip(caches, (self.suffix_k, self.suffix_v), strict=True))
        index = {name: getattr(self, name) for name in ("positions", "suffix_lengths", "suffix_slots")}
        norms: dict[str, Any] = (
            {} if self.q_norm is None else {n: getattr(self, n) for n in ("q_norm", "k_norm", "eps", "unit_offset")}
        )
        q = rotary_append(self.qkv, self.cos, self.sin, *caches, **index, **norms, backend=self.backend)
        return q, *caches

    def exact(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """The same by a loop, computed in ``dtype``."""
        rows, _, kv_heads, dim = len(self.qkv), *self.suffix_k.shape[1:]
        heads = self.qkv.to(dtype).reshape(rows, self.qkv.shape[1] // dim, dim)
        q_heads = heads.shape[1] - 2 * kv_heads
        q = heads.new_empty(rows, q_heads, dim)
        k, v = self.suffix_k.to(dtype), self.suffix_v.to(dtype)
        turning = self.cos.shape[1]
        half = turning // 2
        for row in range(rows):
            at = int(self.positions[row])
            slot = row if self.suffix_slots is None else int(self.suffix_slots[row])
            token = int(self.suffix_lengths[row]) - 1
            cos, sin = self.cos[at].to(dtype), self.sin[at].to(dtype)
            for head, x in enumerate(heads[row]):
                norm = self.q_norm if head < q_heads else self.k_norm
                if norm is not None and head < q_heads + kv_heads:
                    normed = x / (x.square().mean() + self.eps).sqrt()
                    if self.unit_offset:
                        x = (normed * (1 + norm.to(dtype))).to(self.qkv.dtype).to(dtype)
                    else:
                        x = normed.to(self.qkv.dtype).to(dtype) * norm.to(dtype)
                turned = torch.cat([-x[half:turning], x[:half]])
                rotated = torch.cat([x[:turning] * cos + turned * sin, x[turning:]])
                if head < q_heads:
                    q[row, head] = rotated
                elif head < q_heads + kv_heads:
                    k[slot, token, head - q_heads] = rotated
                else:
                    v[slot, token, head - q_heads - kv_heads] = x
        return q, k, v


def make(
    backend: str,
    rows: int = 5,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    table: torch.dtype = torch.float32,
    *,
    slots: bool = True,
    heads_first: bool = False,
    index: torch.dtype = torch.int64,
    norm: torch.dtype | None = None,
    unit_offset: bool = False,
    part: float = 1.0,
) -> Call:
    """``part``: of a head the entries that are rotated."""
    device = DEVICE if backend == "triton" else "cpu"
    generator = torch.Generator().manual_seed(rows + dim)
    positions, count, capacity = 40, rows + 2, 7

    def cache() -> Tensor:
        if heads_first:
            return torch.full((heads[1], count, capacity, dim), torch.nan, dtype=dtype, device=device).movedim(0, -2)
        return torch.full((count, capacity, heads[1], dim), torch.nan, dtype=dtype, device=device)

    def integers(values: Tensor) -> Tensor:
        return values.to(device, index)

    angles = 3 * torch.randn(positions, max(2, int(part * dim) // 2 * 2), generator=generator, dtype=torch.float64)
    return Call(
        torch.randn(rows, (heads[0] + 2 * heads[1]) * dim, generator=generator, dtype=torch.float64).to(device, dtype),
        angles.cos().to(device, table),
        angles.sin().to(device, table),
        cache(),
        cache(),
        integers(torch.randint(positions, (rows,), generator=generator)),
        integers(torch.randint(1, capacity + 1, (rows,), generator=generator)),
        integers(torch.randperm(count, generator=generator)[:rows]) if slots else None,
        backend,
        *(
            None if norm is None else (1 - unit_offset + torch.randn(dim, generator=generator)).to(device, norm)
            for _ in ("q_norm", "k_norm")
        ),
        unit_offset=unit_offset,
    )


def assert_equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.fits(lambda backend, dtype, table, **_: {dtype, table} <= set(TAKEN[backend]))
@pytest.mark.grid(
    backend=BACKENDS,
    dtype=FLOATS,
    table=FLOATS,
    shape=[(1, (1, 1), 2), (5, (4, 2), 16), (3, (7, 1), 20), (2, (3, 3), 80), (12, (4, 2), 32), (0, (4, 2), 8)],
    slots=[True, False],
    heads_first=[True, False],
    index=[torch.int64, torch.int32],
    part=[1.0, 0.25],
)
def test_equals_the_loop(
    backend: str,
    dtype: torch.dtype,
    table: torch.dtype,
    shape: tuple[int, tuple[int, int], int],
    slots: bool,
    heads_first: bool,
    index: torch.dtype,
    part: float,
) -> None:
    call = make(backend, *shape, dtype, table, slots=slots, heads_first=heads_first, index=index, part=part)
    with poisoned_memory():
        out = call()
    assert last_backend(OP) == backend
    exact = call.exact()
    assert out[0].shape == (shape[0], shape[1][0], shape[2])
    plain = call.exact(torch.float32)
    for name, ours, oracle, theirs in zip(("q", "suffix_k", "suffix_v"), out, exact, plain, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours.isnan(), oracle.isnan()), f"{name} was written where it must not be"
        assert_matches(ours.nan_to_num(), oracle.nan_to_num(), name=name)
        if torch.float64 not in (dtype, table):
            baseline = theirs.to(dtype).nan_to_num()  # rounded once
            assert_no_worse(ours.nan_to_num(), baseline, oracle.nan_to_num(), terms=2, scale=8.0, name=name)
    torch.testing.assert_close(out[2].double(), exact[2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.fits(lambda backend, dtype, norm, **_: {dtype, norm} <= set(TAKEN[backend]))
@pytest.mark.grid(
    backend=BACKENDS,
    dtype=FLOATS,
    norm=FLOATS,
    shape=[(1, (1, 1), 2), (5, (4, 2), 16), (3, (7, 1), 20), (2, (3, 3), 80), (0, (4, 2), 8)],
    heads_first=[True, False],
    unit_offset=[False, True],
    part=[1.0, 0.25],
)
def test_heads_are_normalised_first(
    backend: str,
    dtype: torch.dtype,
    norm: torch.dtype,
    shape: tuple[int, tuple[int, int], int],
    heads_first: bool,
    unit_offset: bool,
    part: float,
) -> None:
    """As transformers' Qwen3 layers do, in whose own dtype a norm is rounded before its weight, or Qwen3.5's behind."""
    native_norm = norm if backend == "reference" or norm != torch.float16 else torch.float32
    call = make(backend, *shape, dtype, heads_first=heads_first, norm=native_norm, unit_offset=unit_offset, part=part)
    with poisoned_memory():
        out = call()
    assert last_backend(OP) == backend
    exact = call.exact()
    for name, ours, oracle in zip(("q", "suffix_k", "suffix_v"), out, exact, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours.isnan(), oracle.isnan()), f"{name} was written where it must not be"
        if dtype in (torch.bfloat16, torch.float16):  # a normalised entry near a tie is rounded to either side
            error, eps = (ours.double() - oracle).abs().nan_to_num(), torch.finfo(dtype).eps
            assert bool((error <= 32 * eps).all()), "of two products of a normalised entry and a weight, below 4 each"
            assert not error.numel() or error.mean() <= eps
        else:
            assert_matches(ours.nan_to_num(), oracle.nan_to_num(), name=name)
    torch.testing.assert_close(out[2].double(), exact[2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_equal_transformers(backend: str) -> None:
    call = make(backend, 6, (4, 2), 32, norm=torch.float32)
    heads = call.qkv.view(6, -1, 32)
    modules = []
    for weight in (call.q_norm, call.k_norm):
        module = Qwen3VLTextRMSNorm(32, eps=call.eps).to(call.qkv.device)
        module.weight.data.copy_(weight)
        modules.append(module)
    with torch.no_grad():
        normed = torch.cat([modules[0](heads[:, :4]), modules[1](heads[:, 4:6]), heads[:, 6:]], 1).flatten(1)
    expected = replace(call, qkv=normed, q_norm=None, k_norm=None)()
    for ours, theirs in zip(call(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.fits(lambda backend, dtype: dtype in TAKEN[backend])
@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_norms_and_partial_rotary_of_qwen3_5(backend: str, dtype: torch.dtype) -> None:
    """Weights and tables in fp32, as in a model whose norms are."""
    call = make(backend, 6, (4, 2), 32, dtype, norm=torch.float32, unit_offset=True, part=0.25)
    cos, sin = (x[:, :4].repeat(1, 2) for x in (call.cos, call.sin))
    call = replace(call, cos=cos, sin=sin)
    q, k, _ = call()
    heads, modules = call.qkv.view(6, -1, 32), []
    for weight in (call.q_norm, call.k_norm):
        modules.append(Qwen3_5RMSNorm(32, eps=call.eps).to(call.qkv.device))
        modules[-1].weight = torch.nn.Parameter(weight, requires_grad=False)
    normed = [module(x) for module, x in zip(modules, (heads[:, :4], heads[:, 4:6]), strict=True)]
    theirs = apply_partial_rotary(*normed, *(x[call.positions] for x in (cos, sin)))
    written = k[call.suffix_slots, call.suffix_lengths - 1]
    for ours, expected in zip((q, written), theirs, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        else:  # one in hundreds may lie on the other side of a tie, of the norm or of the sum
            assert (ours != expected.to(dtype)).double().mean() < 0.02
            assert_matches(ours, expected.double())


@pytest.mark.fits(lambda backend, dtype: dtype in TAKEN[backend])
@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_transformers(backend: str, dtype: torch.dtype) -> None:
    """Tables in fp32 give fp32 products, as in the model under autocast."""
    call = make(backend, 6, (4, 2), 32, dtype)
    cos, sin = (x[:, :16].repeat(1, 2) for x in (call.cos, call.sin))
    call = replace(call, cos=cos, sin=sin)
    q, k, _ = call()
    heads = call.qkv.view(1, 6, -1, 32).transpose(1, 2)  # [1, heads, R, D]
    tables = (x[call.positions][None] for x in (cos, sin))
    theirs_q, theirs_k = apply_rotary_pos_emb(heads[:, :4], heads[:, 4:6], *tables)
    written = k[call.suffix_slots, call.suffix_lengths - 1]
    for ours, theirs in ((q, theirs_q), (written, theirs_k)):
        expected = theirs[0].transpose(0, 1).to(dtype)
        if dtype == torch.float32:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        else:  # one in hundreds may lie on the other side of a tie
            assert (ours != expected).double().mean() < 0.01
            assert_matches(ours, expected.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_autocast_and_the_same_bits(backend: str) -> None:
    call = make(backend)
    out = call()
    assert_equal(call(), out)

    def cut(x: Tensor) -> Tensor:  # columns of something wider
        return torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]]

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 1)[:, ::2]

    for view in (cut, spread):
        assert_equal(replace(call, **{name: view(getattr(call, name)) for name in ("qkv", "cos", "sin")})(), out)
    pairs = {
        name: torch.stack([x, x * 0], 1)[:, 0]
        for name in ("positions", "suffix_lengths", "suffix_slots")
        for x in [getattr(call, name)]
    }
    assert_equal(replace(call, **pairs)(), out)
    with torch.autocast(call.qkv.device.type, torch.bfloat16):
        assert_equal(call(), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_several_in_one_memory(backend: str) -> None:
    """The cache changes in place, in the strides that it has, and nothing beside it."""
    call = make(backend)
    _, k, v = call()
    layers = torch.zeros(2, 3, *k.shape, device=k.device)
    index = {name: getattr(call, name) for name in ("positions", "suffix_lengths", "suffix_slots")}
    rotary_append(call.qkv, call.cos, call.sin, layers[0, 1], layers[1, 1], **index, backend=backend)
    assert_equal((layers[0, 1], layers[1, 1]), (k.nan_to_num(), v.nan_to_num()))
    assert not layers[:, ::2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_a_row_may_share_a_place(backend: str) -> None:
    """As the padding of a batch does whose step is a CUDA graph."""
    call = make(backend)
    out = call()
    order = [0, 1, 2, 3, 4, 0, 0]
    rows = {name: getattr(call, name)[order] for name in ("qkv", "positions", "suffix_lengths", "suffix_slots")}
    padded = replace(call, **rows)()
    assert_equal((padded[0][:5], *padded[1:]), out)


PLACES = [("positions", -1), ("positions", 40), ("suffix_lengths", 0), ("suffix_lengths", 8), ("suffix_slots", 7)]


@pytest.mark.parametrize(("name", "value"), [*PLACES, ("suffix_slots", -1), ("positions", 2**62)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_place_that_does_not_exist(backend: str, name: str, value: int) -> None:
    """An error, and nothing is written; but for Triton, which does not wait, and writes nothing for that row."""
    call = make(backend, part=0.5)
    good, changed = call(), getattr(call, name).clone()
    changed[2] = value
    bad = replace(call, **{name: changed})
    if backend != "triton":
        with pytest.raises(ValueError, match=f"^rotary_append: {name}: expected values"):
            bad()
        index = {n: getattr(bad, n) for n in ("positions", "suffix_lengths", "suffix_slots")}
        with pytest.raises(ValueError, match=f"{name}: expected values"):
            rotary_append(bad.qkv, bad.cos, bad.sin, bad.suffix_k, bad.suffix_v, **index, backend=backend)
        assert bad.suffix_k.isnan().all()
        assert bad.suffix_v.isnan().all()
        return
    q, k, v = bad()
    assert q[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(q[others], good[0][others])
    unwritten = (call.suffix_slots[2], call.suffix_lengths[2] - 1)
    for ours, whole in ((k, good[1]), (v, good[2])):
        expected = whole.clone()
        expected[unwritten] = torch.nan
        assert_equal((ours,), (expected,))


@needs_native
@pytest.mark.parametrize("dtype", TAKEN["native"])
def test_native_has_the_same_bits_for_any_threads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "GRAIN", 1)
    call = make("native", 13, dtype=dtype)
    results = for_threads(call, 1, 2, 3)
    monkeypatch.setattr(extension, "torch_parallel_for", lambda: None)
    results.append(call())
    for result in results:
        assert_equal(result, results[0])


@needs_native
def test_native_with_tables_of_two_dtypes() -> None:
    call = make("native", table=torch.bfloat16)
    assert_equal(replace(call, sin=call.sin.float())(), call())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_auto_takes_the_reference_where_the_native_cannot_run(dtype: torch.dtype) -> None:
    for dtypes in ((dtype, torch.float32), (torch.float32, dtype)):
        replace(make("reference", 5, (4, 2), 16, *dtypes), backend="auto")()
        assert last_backend(OP) == "reference"
    replace(make("native"), backend="auto")()
    assert last_backend(OP) == "native"
