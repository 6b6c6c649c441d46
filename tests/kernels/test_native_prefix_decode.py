"""Decode attention in C++ on a CPU: any number of threads, long prefixes, and what is said where it is turned off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from decode_cases import CASES, OP, Case

from videor1_kernels import extension, last_backend, prefix_decode_attention
from videor1_kernels.prefix_attention import native_decode
from videor1_kernels.testing import rounding

compiled = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")


@compiled
def test_long_prefixes_and_many_rows() -> None:
    lengths = [1 + 7 * i for i in range(16)]
    case = Case([(700, 9), (333, 5), (1, 2)], lengths, 120, dim=128, backend="native")
    bound = rounding(128 + 700 + 1 + 7 * 15)  # of a score, and keys of the longest row; values are of order 1
    torch.testing.assert_close(case().double(), case.exact(), rtol=bound, atol=bound)


@compiled
def test_same_bits_for_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_decode, "GRAIN", 1)
    case = Case([(90, 8), (40, 4)], list(range(1, 13)), 13, dim=32, backend="native")
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case())
    finally:
        torch.set_num_threads(threads)
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
def test_turned_off_it_says_so_once_and_the_reference_serves(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(*CASES["equal prefixes"], backend="native")
    for _ in range(2):
        out = prefix_decode_attention(*case.tensors, suffix_lengths=case.lengths, layout=case.layout)
        assert last_backend(OP) == "reference"
    torch.testing.assert_close(out.double(), case.exact(), rtol=0, atol=rounding(16 + 9))
    [said] = [r.getMessage() for r in caplog.records if "decode attention on the CPU runs in plain" in r.getMessage()]
    assert "VIDEOR1_NATIVE=0 turns it off" in said
    with pytest.raises(ValueError, match="backend 'native' cannot run on cpu: VIDEOR1_NATIVE=0"):
        case()
