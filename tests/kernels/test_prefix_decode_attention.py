"""prefix_decode_attention on every backend against a loop over rows and heads, in fp64."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decode_cases import CASES, DTYPES, OP, Case, use_small_blocks
from torch import Tensor
from triton_cases import CUDA, HALF, for_threads

from videor1_kernels import DecodeLayout, extension, last_backend, prefix_decode_attention
from videor1_kernels.prefix_attention import native_decode
from videor1_kernels.prefix_attention.decode_layout import DecodeInputs
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory, rounding

BACKENDS = ["reference", *(["native"] if any(map(shutil.which, ("c++", "g++", "clang++"))) else []), "triton"]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the padding of interpreted kernels


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.mark.grid(
    backend=BACKENDS,
    name=list(CASES),
    shape=[((4, 2), 16), ((3, 3), 32), ((7, 1), 48), ((8, 4), 80)],
    scattered=[True, False],
    scale=[None, 0.3],
)
def test_equals_the_loop(
    backend: str, name: str, shape: tuple[tuple[int, int], int], scattered: bool, scale: float | None
) -> None:
    groups, lengths, capacity = CASES[name]
    heads, dim = shape
    if backend == "triton":  # the interpreter is slow; test_triton_prefix_decode.py has other head dims
        heads, dim = (2, 1) if len(lengths) > 8 else heads, 16
    case = Case(groups, lengths, capacity, heads, dim, backend=backend, scattered=scattered)
    out = case(scale=scale)
    assert out.dtype == DTYPES[backend]
    assert_matches(out, case.exact(scale=scale))
    if not scattered:
        tensors = (case.q, *(x.nan_to_num() for x in case.tensors[1:]))
        index = {"cu_prefix": case.cu, "row_group": case.layout.row_group, "suffix_lengths": case.lengths.int()}
        assert torch.equal(prefix_decode_attention(*tensors, **index, scale=scale, backend=backend), out)


@pytest.mark.parametrize(("heads", "dim"), [((4, 1), 256), ((2, 2), 192), ((4, 2), 160)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_heads(backend: str, heads: tuple[int, int], dim: int) -> None:
    """Above the head dim from which on the Triton kernel has other blocks."""
    case = Case([(20, 2), (17, 1)], [3, 18, 1], 18, heads, dim, backend=backend, scattered=True)
    with poisoned_memory():
        assert_matches(case(), case.exact())


@pytest.mark.fits(
    lambda dtype, backend, **_: dtype in {"native": [torch.float32], "triton": HALF}.get(backend, [dtype])
)
@pytest.mark.grid(
    dtype=[torch.float32, torch.bfloat16, torch.float16], backend=BACKENDS, name=["ragged groups", "long"]
)
def test_no_worse_than_plain_torch_at_its_dtype(dtype: torch.dtype, backend: str, name: str) -> None:
    case = Case(*CASES[name], dim=32, backend=backend, dtype=dtype, scattered=True)
    out, exact = case(), case.exact()
    assert out.dtype == dtype
    assert_matches(out, exact)
    keys = int(case.layout.prefix_lengths.max() + case.lengths.max())
    assert_no_worse(out, case.exact(dtype), exact, terms=32 + keys)  # of a score, and keys of the longest row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("far", "factor"), [("pk", 300), ("sk", 300), ("q", 300), ("q", 0)])
def test_large_and_equal_scores(backend: str, far: str, factor: int) -> None:
    """Either part may hold the maximum, hundreds above the other."""
    case = Case(*CASES["ragged groups"], backend=backend, dtype=None if backend == "triton" else torch.float32)
    setattr(case, far, getattr(case, far) * factor)
    exact = case.exact()
    # A score errs by its own size, and its probability by as much relative to itself.
    keys = max(x.nan_to_num().abs().max().item() for x in (case.pk, case.sk))
    bound = rounding(16 + 40, 1 + keys * case.q.abs().sum(-1).max().item() / 16**0.5)
    torch.testing.assert_close(case().double(), exact, rtol=bound, atol=bound * exact.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", [7.0, torch.inf])
def test_nothing_else_is_read(backend: str, other: float) -> None:
    """The memory of every case holds NaN there; here it changes to other values, and the result to no other bit."""
    case = Case(*CASES["one group"], backend=backend, scattered=True)
    clean = case()
    for x in case.tensors[1:]:
        x[x.isnan()] = other
    assert torch.equal(case(), clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_its_own_keys_alone(backend: str) -> None:
    """The same bits for a row in another order, beside other suffixes, rows of another prefix and a row of NaN."""
    case = Case(*CASES["ragged groups"], backend=backend, scattered=True)
    out, order = case(), [4, 2, 5, 0, 3, 1]
    if backend == "reference":  # its products promise no bits
        assert_matches(case.permuted(order), out[order])
        return
    assert torch.equal(case.permuted(order), out[order])
    lengths = case.lengths.tolist()
    case.set_lengths([*lengths[:3], 20, 20, 20])
    case.q[3] = torch.nan
    changed = case()
    assert torch.equal(changed[:3], out[:3])
    assert changed[3].isnan().all()
    assert changed[4:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again_in_poisoned_memory_and_under_autocast(backend: str) -> None:
    dtype = torch.float32 if backend == "reference" else None

    def made() -> Case:
        return Case(*CASES["one group"], backend=backend, dtype=dtype, scattered=True)

    case = made()
    first = case()
    assert torch.equal(case(), first)
    with torch.autocast(case.q.device.type, torch.bfloat16):
        assert torch.equal(case(), first)
    with poisoned_memory():
        assert torch.equal(made()(), first)  # of a workspace of its own


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend: str) -> None:
    """Caches as a model may keep them: heads before tokens, a layer of several, values of every other place."""
    case = Case(*CASES["one group"], backend=backend, scattered=True)
    out, before = case(), case.tensors

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)

    def layer(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    def unaligned(x: Tensor) -> Tensor:
        return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)

    for view in (heads_first, layer, spread, unaligned):
        case.q, case.pk, case.pv, case.sk, case.sv = (view(x) for x in before)
        assert_matches(case(), out.double())
    case.lengths = torch.stack([case.lengths, case.lengths * 0], 1)[:, 0]
    assert_matches(case(), out.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    assert Case([(3, 0), (2, 0)], [], 4, backend=backend)().shape == (0, 4, 16)


def test_gradcheck() -> None:
    case = Case([(2, 2), (1, 1)], [1, 2, 2], 3, (2, 1), 2, backend="reference", scattered=True)
    inputs = [x.nan_to_num().requires_grad_() for x in case.tensors]
    index: dict[str, Any] = {"suffix_lengths": case.lengths, "layout": case.layout}
    assert torch.autograd.gradcheck(lambda *x: prefix_decode_attention(*x, **index), inputs)


@pytest.mark.parametrize(
    ("device", "dim", "dtype", "expected"),
    [
        ("native", 16, torch.float32, "native"),
        ("native", 144, torch.float32, "native"),
        ("native", 24, torch.float32, "reference"),
        ("native", 16, torch.float64, "reference"),
        *(
            [
                ("triton", 128, torch.float16, "triton"),
                ("triton", 256, torch.float16, "triton"),
                ("triton", 272, torch.float16, "reference"),
            ]
            if CUDA
            else []
        ),
    ],
)
def test_auto_takes_the_reference_where_no_other_can_run(
    device: str, dim: int, dtype: torch.dtype, expected: str
) -> None:
    """Where a gradient is wanted, or dims and dtypes are others."""
    case = Case([(3, 2)], [1, 2], 2, dim=dim, backend=device, dtype=dtype)
    inputs = [x.nan_to_num() for x in case.tensors]
    options = {"suffix_lengths": case.lengths, "layout": case.layout}
    prefix_decode_attention(inputs[0].requires_grad_(), *inputs[1:], **options).sum().backward()
    assert last_backend(OP) == "reference"
    assert inputs[0].grad.isfinite().all()
    with torch.no_grad():
        prefix_decode_attention(*inputs, **options)
    assert last_backend(OP) == (expected if expected in BACKENDS else "reference")


def test_mixed_dtypes_are_computed_in_fp32() -> None:
    mixed = Case([(17, 2)], [3, 5], 5, dtype=torch.float16)
    mixed.sk = mixed.sk.float()
    for backend in ("reference", *([] if CUDA else ["triton"])):  # on a card Triton takes 16 bits alone
        assert_matches(mixed(backend=backend), mixed.exact())


@pytest.mark.skipif("native" not in BACKENDS, reason="there is no C++ compiler")
def test_native_with_long_prefixes_and_many_rows() -> None:
    lengths = [1 + 7 * i for i in range(16)]
    case = Case([(700, 9), (333, 5), (1, 2)], lengths, 120, dim=128, backend="native")
    bound = rounding(128 + 700 + 1 + 7 * 15)  # of a score, and keys of the longest row; values are of order 1
    torch.testing.assert_close(case().double(), case.exact(), rtol=bound, atol=bound)


@pytest.mark.skipif("native" not in BACKENDS, reason="there is no C++ compiler")
@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("repeat", [1, 2, 7])
@pytest.mark.parametrize("prefix", [1, 17, 96, 97, 205])
def test_native_gives_a_row_the_same_bits_among_any_others(
    prefix: int, repeat: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, where a vector holds keys, and beside some or many of its prefix, where it holds queries."""
    monkeypatch.setattr(native_decode, "vector_bits", lambda: bits)
    make = torch.Generator().manual_seed(prefix)
    rows, heads, dim = 60, 2, 32
    q, own_k, own_v, k, v = (
        torch.randn(*shape, generator=make)
        for shape in ((rows, heads * repeat, dim), *[(rows, 5, heads, dim)] * 2, *[(prefix, heads, dim)] * 2)
    )
    lengths = torch.arange(rows) % 5 + 1

    def attended(some: Tensor) -> Tensor:
        layout = DecodeLayout(torch.tensor([0, prefix]), torch.zeros(len(some), dtype=torch.int64))
        inputs = DecodeInputs(q[some], k, v, own_k[some], own_v[some], lengths[some])
        return native_decode.prefix_decode_attention(inputs, layout, 0.2)

    together = attended(torch.arange(rows))
    for some in (torch.tensor([7]), torch.tensor([59, 3, 31]), torch.arange(7, 20)):
        assert torch.equal(attended(some), together[some])


@pytest.mark.skipif("native" not in BACKENDS, reason="there is no C++ compiler")
def test_native_has_the_same_bits_for_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_decode, "GRAIN", 1)
    case = Case([(90, 8), (40, 4)], list(range(1, 13)), 13, dim=32, backend="native")
    results = for_threads(case, 1, 2, 3)
    monkeypatch.setattr(extension, "torch_parallel_for", lambda: None)
    results.append(case())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.fixture
def _turned_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VIDEOR1_NATIVE", "0")
    native_decode._library.cache_clear()
    yield
    native_decode._library.cache_clear()


@pytest.mark.usefixtures("_turned_off")
def test_native_turned_off_says_so_once_and_the_reference_serves(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(*CASES["equal prefixes"], backend="native")
    for _ in range(2):
        out = prefix_decode_attention(*case.tensors, suffix_lengths=case.lengths, layout=case.layout)
        assert last_backend(OP) == "reference"
    torch.testing.assert_close(out.double(), case.exact(), rtol=0, atol=rounding(16 + 9))
    [said] = [r.getMessage() for r in caplog.records if "decode attention on the CPU runs in plain" in r.getMessage()]
    assert "VIDEOR1_NATIVE=0 turns it off" in said
    with pytest.raises(ValueError, match="backend 'native' cannot run on cpu: VIDEOR1_NATIVE=0"):
        case()
