"""Decode attention in C++ on a CPU: against the loop in fp64, on any number of threads, and what takes its place."""

import shutil

import pytest
import torch
from test_prefix_decode_attention import CASES, make, naive, scattered

from videor1_kernels import extension, last_backend, prefix_decode_attention
from videor1_kernels.prefix_attention import native_decode
from videor1_kernels.testing import assert_no_worse, poison_padding, poisoned_memory, rounding

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
FALLBACK = "decode attention on the CPU runs in plain torch"

pytestmark = pytest.mark.usefixtures("_fresh")


@pytest.fixture
def _fresh():
    native_decode._library.cache_clear()
    yield
    native_decode._library.cache_clear()


@pytest.fixture
def native():
    """Calls that must have taken the library, or, where no compiler can make one, the reference."""

    def call(*tensors, **options):
        with torch.no_grad():
            out = prefix_decode_attention(*tensors, **options)
        assert last_backend("prefix_decode_attention") == ("native" if COMPILER else "reference")
        return out

    return call


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 16), ((3, 3), 32), ((7, 1), 128), ((8, 4), 80)])
def test_equals_naive_fp64(native, name, heads, dim):
    tensors, index = make(*CASES[name], heads=heads, dim=dim, dtype=torch.float32)
    oracle = naive(*(x.double() for x in tensors), **index)
    with torch.no_grad():
        plain = prefix_decode_attention(*tensors, **index, backend="reference")
    out = native(*tensors, **index)
    keys = int(index["cu_prefix"].diff().max() + index["suffix_lengths"].max())
    assert_no_worse(out, plain, oracle, terms=dim + keys)


def test_long_prefixes_and_many_rows(native):
    tensors, index = make(
        [700, 333, 1], [0] * 9 + [1] * 5 + [2, 0], [1 + 7 * i for i in range(16)], 120, dim=64, dtype=torch.float32
    )
    oracle = naive(*(x.double() for x in tensors), **index)
    bound = rounding(64 + 700 + 1 + 7 * 15)  # of a score, and keys of the longest row; values are of order 1
    torch.testing.assert_close(native(*tensors, **index).double(), oracle, rtol=bound, atol=bound)


def test_large_and_equal_scores(native):
    (q, pk, pv, sk, sv), index = make(*CASES["rows in order"], dim=16, dtype=torch.float32)
    for far in (pk, sk):
        keys = [x * 300 if x is far else x for x in (pk, sk)]
        ours = native(q, keys[0], pv, keys[1], sv, **index)
        oracle = naive(*(x.double() for x in (q, keys[0], pv, keys[1], sv)), **index)
        # A score errs by its own size, and its probability by as much relative to itself.
        scores = max(x.abs().max().item() for x in keys) * q.abs().sum(-1).max().item() / 16**0.5
        bound = rounding(16, scores)
        torch.testing.assert_close(ours.double(), oracle, rtol=bound, atol=bound * oracle.abs().max().item())
    zero = torch.zeros_like(q)
    torch.testing.assert_close(
        native(zero, pk, pv, sk, sv, **index).double(),
        naive(*(x.double() for x in (zero, pk, pv, sk, sv)), **index),
        rtol=0,
        atol=rounding(5 + 4),
    )


def test_same_bits_for_any_threads_and_memory(native, monkeypatch):
    monkeypatch.setattr(native_decode, "GRAIN", 1)
    tensors, index = make([90, 40], [0] * 8 + [1] * 4, list(range(1, 13)), 13, dim=32, dtype=torch.float32)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native(*tensors, **index))
    finally:
        torch.set_num_threads(threads)
    with poisoned_memory():
        results.append(native(*tensors, **index))
    monkeypatch.setattr(extension, "torch_parallel_for", lambda: None)
    results.append(native(*tensors, **index))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_a_rows_own_never_leaks(native, poison):
    tensors, index = make(*CASES["rows scattered"], dim=16, dtype=torch.float32)
    clean = native(*tensors, **index)
    q, pk, pv, sk, sv = tensors
    dirty = (q, pk, pv, *(poison_padding(x, index["suffix_lengths"], poison) for x in (sk, sv)))
    assert torch.equal(native(*dirty, **index), clean)
    moved, layout = scattered(tensors, index, [14, 0, 3], [7, 0, 2, 5, 4, 1], gap=poison)
    assert torch.equal(native(*moved, suffix_lengths=index["suffix_lengths"].int(), layout=layout), clean)


def test_a_row_of_nan_is_nan_alone(native):
    (q, *rest), index = make(*CASES["rows scattered"], dim=16, dtype=torch.float32)
    clean = native(q, *rest, **index)
    q[2] = float("nan")
    out = native(q, *rest, **index)
    assert out[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(out[others], clean[others])


def test_no_rows(native):
    tensors, index = make([3, 2], [], [], 4, dim=16, dtype=torch.float32)
    assert native(*tensors, **index).shape == (0, 4, 16)


def test_wrong_lengths(native):
    tensors, index = make(*CASES["rows in order"], dim=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="suffix_lengths: expected values from 1 to C = 6, got 0 to 7"):
        native(*tensors, **(index | {"suffix_lengths": torch.tensor([0, 1, 2, 7])}))


def test_the_reference_takes_what_it_cannot(native):
    tensors, index = make(*CASES["rows in order"], dim=16, dtype=torch.float64)
    prefix_decode_attention(*tensors, **index)
    assert last_backend("prefix_decode_attention") == "reference"
    tensors = [x.float() for x in tensors]
    tensors[0].requires_grad_()
    prefix_decode_attention(*tensors, **index).sum().backward()
    assert tensors[0].grad is not None
    with pytest.raises(ValueError, match="none that requires a gradient for the native backend"):
        prefix_decode_attention(*tensors, **index, backend="native")


def test_turned_off_it_says_so_once_and_the_reference_serves(monkeypatch, caplog):
    monkeypatch.setenv("VIDEOR1_NATIVE", "0")
    tensors, index = make(*CASES["rows in order"], dim=16, dtype=torch.float32)
    for _ in range(2):
        out = prefix_decode_attention(*tensors, **index)
    assert last_backend("prefix_decode_attention") == "reference"
    exact = naive(*(x.double() for x in tensors), **index)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=rounding(16 + 9))
    said = [record.getMessage() for record in caplog.records if FALLBACK in record.getMessage()]
    assert len(said) == 1
    assert "VIDEOR1_NATIVE=0 turns it off" in said[0]
    with pytest.raises(ValueError, match="backend 'native' cannot run on cpu: VIDEOR1_NATIVE=0"):
        prefix_decode_attention(*tensors, **index, backend="native")
