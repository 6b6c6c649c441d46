"""The Triton kernel of prefix_decode_attention: how keys are split, how parts are merged, and what a call costs."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from decode_cases import CASES, Case, ragged, use_small_blocks
from triton_cases import CUDA, Launches, Operations, count_calls

from videor1_kernels.prefix_attention import triton_decode
from videor1_kernels.testing import assert_matches

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the padding of interpreted kernels


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


def workspaces(case: Case) -> dict[tuple[int, ...], triton_decode.Workspace]:
    """Those of its layout, by (query heads, key heads, splits, head dim)."""
    return triton_decode._workspaces[case.layout]


@pytest.mark.parametrize(
    ("heads", "dim"), [((7, 1), 20), ((3, 1), 80), ((20, 1), 3), ((1, 1), 1), ((2, 1), 192), ((1, 1), 160)]
)
def test_heads_and_head_dims(heads: tuple[int, int], dim: int) -> None:
    """Of 20 query heads a key head, a row takes two blocks of 16; of 3, four rows share one."""
    rows = 2 if heads[0] > 16 else 5
    case = Case([(20, rows), (17, 1)], [3, 20, 17, 16, 9, 1][: rows + 1], 20, heads, dim, scattered=True)
    assert_matches(case(), case.exact())


@pytest.mark.parametrize(("name", "least"), [("long", 8), ("ragged groups", 5), ("a row more than a tile", 2)])
def test_the_cases_are_split(monkeypatch: pytest.MonkeyPatch, name: str, least: int) -> None:
    """Else the tests of results would merge little: with ``least`` parts of a row."""
    case = Case(*CASES[name])
    monkeypatch.setattr(triton_decode, "prefix_decode", Launches())
    case()
    ((_, _, splits, _),) = workspaces(case)
    assert splits >= least


def test_more_parts_than_are_merged_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "INTERPRETED_PROGRAMS", 400)
    case = Case([(300, 2)], [300, 250], 300, (2, 1))
    case.pk = case.pk * 3  # parts of very different weight
    assert_matches(case(), case.exact())
    ((_, _, splits, _),) = workspaces(case)
    assert splits > 2 * triton_decode.MERGED_SPLITS


def test_splits() -> None:
    """On 132 multiprocessors: 12 rows of a 7B model fill them about twice, 192 rows need no parts."""
    assert triton_decode.splits_for(12, 4, 2 * 1224, 768, 264, 32) == (7, 5)
    assert 4 * (2 * 7 + 12 * 5) == 296
    assert triton_decode.splits_for(192, 4, 32 * 1224, 768, 264, 32) == (1, 1)
    assert triton_decode.splits_for(1, 1, 1, 1, 264, 32) == (1, 1)
    assert triton_decode.splits_for(1, 4, 10**6, 10**6, 264, 32) == (32, 32)


def test_one_workspace_serves_all_lengths() -> None:
    """What a call left behind is nothing to the next: neither parts that it no longer has, nor counters."""
    case = Case([(100, 2), (90, 1)], [100, 99, 100], 100, (2, 1))
    for lengths in ([100, 99, 100], [1, 2, 100], [17, 99, 16]):
        case.set_lengths(lengths)
        assert_matches(case(), case.exact())
        (space,) = workspaces(case).values()
        assert not space.arrived.any()


def test_a_workspace_lives_as_long_as_its_layout() -> None:
    case = Case(*CASES["one row"])
    case()
    count = len(triton_decode._workspaces)
    del case
    assert len(triton_decode._workspaces) == count - 1


def test_a_layout_that_was_copied_into() -> None:
    """As CUDA graphs use it: indices that the kernel reads are another batch's, everything else stays."""
    case = Case(*CASES["ragged groups"], scattered=True)
    held = Case([(5, 6), (9, 0)], [1] * 6, 1, scattered=True).layout.clone()
    want = case()
    held.copy_(case.layout)
    assert torch.equal(case(layout=held), want)


def test_lengths_out_of_range_stay_inside() -> None:
    case = Case(*CASES["one group"])
    case.set_lengths([1, 20, 20])
    clean = case()
    for lengths in (torch.tensor([0, 21, 2**31 - 1], dtype=torch.int32), torch.tensor([-5, 10**12, 20])):
        case.lengths = lengths.to(case.device)
        assert torch.equal(case(), clean)


def test_one_launch_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the first call of a layout, a call allocates its result and launches once: no other operation of torch's, so
    no kernel, copy or wait. Its grid does not depend on the lengths."""
    case = Case(*CASES["ragged groups"], scattered=True)
    launches = Launches()
    monkeypatch.setattr(triton_decode, "prefix_decode", launches)
    case()
    for lengths in (case.lengths, torch.ones_like(case.lengths)):
        with Operations() as operations:
            case(suffix_lengths=lengths)
        assert operations.names == ["new_empty"]
    assert len(launches.grids) == 3
    assert len(set(launches.grids)) == 1


def shuffle_programs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The interpreter runs programs one after the other: in another order, others are the last to arrive."""
    from triton.runtime.interpreter import interpreter_builder

    place, orders = interpreter_builder.set_grid_idx, {}

    def moved(*index: int) -> None:
        dims = tuple(interpreter_builder.grid_dim)
        if dims not in orders:
            programs = list(itertools.product(*map(range, dims)))
            orders[dims] = dict(zip(programs, random.Random(seed).sample(programs, len(programs)), strict=True))
        place(*orders[dims][index])

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", moved)


@pytest.mark.parametrize("seed", range(2))
def test_same_bits_whatever_the_order_of_arrival(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    case = Case([(20, 9), (33, 2)], ragged(11, 30), 30, (3, 1), scattered=True)
    want = case()
    for _ in range(50 if CUDA else 1):  # a card has an order of its own each time
        if not CUDA:
            shuffle_programs(monkeypatch, seed)
            merge = count_calls(monkeypatch, triton_decode, "_merge")
        assert torch.equal(case(), want)
        assert CUDA or merge.calls == 11  # of each row and key head once: when all its parts are there
    (space,) = workspaces(case).values()
    assert not space.arrived.any()


if CUDA:

    def test_a_graph_serves_other_lengths() -> None:
        groups, lengths, capacity = CASES["long"]
        case = Case(groups, lengths, capacity, scattered=True)
        case()
        fixed = case.sk, case.sv, case.lengths
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case()
        for changed in ([1, 2, 3], [300, 299, 1], lengths):
            case.set_lengths(changed)
            for x, new in zip(fixed, (case.sk, case.sv, case.lengths), strict=True):
                x.copy_(new)
            out.fill_(torch.nan)
            graph.replay()
            assert_matches(out, case.exact())
