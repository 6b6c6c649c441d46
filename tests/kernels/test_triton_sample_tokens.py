"""The Triton kernel of sample_tokens: how a row is cut into tiles and segments, and how often it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling_cases import KINDS, Sampler, check, set_tile
from torch import Tensor
from triton_cases import CUDA, Launches, count_calls

from videor1_kernels.sampling import triton, triton_list

pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered in (subtract|multiply|add|cast|log):RuntimeWarning"
)
TILES = {"shipped": (64, 32), "small": (4, 8)}  # 2048 candidates are listed, or 32
sample = Sampler("triton")


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the size of a tile."""

    def use(name: str) -> None:
        set_tile(monkeypatch, *TILES[name])

    return use


@pytest.mark.grid(
    vocabulary=[1, 2, 8, 31, 32, 33, 64, 97, 2048, 2049, 4100],
    options=[{}, {"temperature": 0}, {"top_k": 17, "top_p": 0.9}, {"top_p": 0.95}],
    name=["shipped", "small"],
)
def test_sizes(vocabulary: int, options: dict[str, Any], name: str, tile: Callable[[str], None]) -> None:
    """Below, at and above a tile's run, a tile and a row of segments."""
    tile("shipped" if vocabulary > 2000 else name)
    generator = torch.Generator().manual_seed(vocabulary)
    logits, uniform = 2 * torch.randn(2, vocabulary, generator=generator), torch.rand(2, generator=generator)
    banned = None if vocabulary == 1 else torch.tensor([vocabulary - 1])
    assert check(logits, uniform, *sample(logits, uniform, banned, **options), banned=banned, **options) == 0


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_tile_changes_nothing(options: dict[str, Any], tile: Callable[[str], None]) -> None:
    """Sums are of integers: whatever their order, the same bits; of ties too, and where all candidates are listed."""
    logits = 2 * torch.randn(3, 131, generator=torch.Generator().manual_seed(0))
    logits[0] = logits[0].round()
    results = []
    for name in TILES:
        tile(name)
        results.append(sample(logits, torch.tensor([0.2, 0.7, 0.9999]), torch.tensor([130, 5]), **options))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_many_banned_tokens(tile: Callable[[str], None]) -> None:
    """In more tiles than a word has bits."""
    tile("small")
    logits = torch.randn(1, 2100, generator=torch.Generator().manual_seed(0))
    late = torch.arange(512, 1600, 528)  # in tiles 64 and 65 of segments of 528 tokens
    logits[0, late + 3], logits[0, late + 11] = 9.0, 8.0
    banned = logits[0].sort(descending=True).indices[:40]
    for options in ({}, {"top_k": 20}):
        tokens, logp = sample(logits, torch.tensor([0.6]), banned, **options)
        assert check(logits, torch.tensor([0.6]), tokens, logp, banned=banned, **options) == 0


def passes(monkeypatch: pytest.MonkeyPatch, logits: Tensor, **options: Any) -> tuple[int, int]:
    """How often tiles of a row are read: (in full passes, bisections of bounds)."""
    names = ("count_above", "append", "segment_sums")
    counters = [count_calls(monkeypatch, triton_list, name) for name in names]
    monkeypatch.setattr(triton, "splits_for", lambda *_: 1)
    sample(logits[None], torch.tensor([0.4]), **options)
    bisections, listings, sums = (counter.calls for counter in counters)
    return 2 + bisections + listings + sums, bisections


if not CUDA:  # calls inside a kernel can be counted where it is interpreted

    def test_passes(monkeypatch: pytest.MonkeyPatch, tile: Callable[[str], None]) -> None:
        """As many as the docstring says."""
        tile("shipped")
        peaked = 6 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
        for options, want in (
            ({}, 2),
            ({"temperature": 0}, 2),
            ({"top_k": 5000}, 2),
            ({"top_k": 50}, 3),
            ({"top_p": 0.95}, 3),
            ({"top_k": 50, "top_p": 0.9}, 3),
            ({"temperature": 0, "top_k": 50, "top_p": 0.9}, 2),
        ):
            assert passes(monkeypatch, peaked, **options) == (want, 0), options
        tile("small")
        for logits in (torch.randn(400, generator=torch.Generator().manual_seed(0)), torch.zeros(400)):
            for options in ({"top_k": 120}, {"top_p": 0.7}):
                full, bisections = passes(monkeypatch, logits, **options)
                assert bisections <= 12
                assert full <= bisections + 6
        alike = 1 + torch.arange(400) * 2.0**-23  # too near for halves of the interval of logits to part them
        assert passes(monkeypatch, alike, top_k=120)[1] <= 44


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_number_of_programs_changes_nothing(
    options: dict[str, Any], tile: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: with ties, with rows that have no distribution, and with more programs than tiles."""
    tile("small")
    logits = 2 * torch.randn(5, 131, generator=torch.Generator().manual_seed(0))
    logits[1].round_()
    logits[2, 99], logits[3], logits[4, 40], logits[4, 64:] = torch.nan, -torch.inf, torch.inf, -torch.inf
    results = []
    for splits in (1, 2, 3, 8):
        monkeypatch.setattr(triton, "splits_for", lambda *_, splits=splits: splits)
        tokens, logp = sample(logits, torch.tensor([0.2, 0.7, 0.9999, 0.5, 0.3]), torch.tensor([130, 5]), **options)
        assert logp[2:].isnan().all()
        results.append((tokens.tolist(), logp.view(torch.int32).tolist()))
    assert results.count(results[0]) == 4


def test_programs_fill_the_device() -> None:
    """One for each row where rows are many; else about as many as multiprocessors, with shares as even as can be."""
    found = {rows: triton.splits_for(rows, 75, 132) for rows in (1, 8, 12, 48, 66, 67, 132, 1000)}
    assert found == {1: 15, 8: 15, 12: 11, 48: 2, 66: 2, 67: 1, 132: 1, 1000: 1}
    assert [triton.splits_for(1, tiles, 132) for tiles in (1, 2, 15, 17, 33)] == [1, 2, 15, 9, 11]


@pytest.mark.parametrize(("splits", "launched"), [(1, (1, 1)), (3, (2, 3))])
def test_launches(splits: int, launched: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the docstring says, without and with truncation."""
    monkeypatch.setattr(triton, "splits_for", lambda *_: splits)
    grids: list[tuple[int, ...]] = []
    for name in ("sample_kernel", "peak_kernel", "weigh_kernel", "list_kernel"):
        launches = Launches(getattr(triton, name))
        launches.grids = grids
        monkeypatch.setattr(triton, name, launches)
    for options in KINDS:
        grids.clear()
        sample(torch.randn(2, 40), torch.rand(2), torch.tensor([4]), **options)
        truncated = "top_k" in options or "top_p" in options
        assert grids == [(2 * splits,)] * launched[truncated]
