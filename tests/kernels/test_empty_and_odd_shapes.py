"""Shapes that native code cannot work on are refused before it is reached; a child process tells if it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import videor1_kernels as vk
from videor1_kernels import extension


def cpu(*shape: int) -> Tensor:
    return torch.zeros(shape)


NO_HEADS = [((4, 0, 16), (4, 0, 16)), ((4, 0, 16), (4, 1, 16)), ((4, 2, 16), (4, 0, 16)), ((4, 2, 0), (4, 2, 0))]
ODD = [((4, 3, 16), (4, 2, 16)), ((4, 2, 16), (4, 2, 8)), ((3, 2, 16), (3, 2, 16)), ((4, 2), (4, 2))]


@pytest.mark.parametrize(("q", "k"), [*NO_HEADS, *ODD])
def test_attention_without_heads_or_entries_is_refused(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^prefix_attention: [qkv]: expected "):
        vk.prefix_attention(cpu(*q), cpu(*k), cpu(*k), vk.PrefixLayout([2], [[2]]))


def decode(
    q=(2, 2, 16), prefix=(3, 1, 16), suffix=(2, 4, 1, 16), lengths=(1, 4), cu=(0, 1, 3), groups=(0, 1), **options
):
    return vk.prefix_decode_attention(
        cpu(*q),
        cpu(*prefix),
        cpu(*prefix),
        cpu(*suffix),
        cpu(*suffix),
        suffix_lengths=torch.tensor(lengths, dtype=torch.int64),
        cu_prefix=torch.tensor(cu),
        row_group=torch.tensor(groups, dtype=torch.int64),
        **options,
    )


@pytest.mark.parametrize("backend", ["native", "reference", "auto"])
@pytest.mark.parametrize(
    "changes",
    [
        {"q": (2, 0, 16)},
        {"q": (2, 0, 16), "prefix": (3, 0, 16), "suffix": (2, 4, 0, 16)},
        {"prefix": (3, 0, 16), "suffix": (2, 4, 0, 16)},
        {"q": (2, 2, 0), "prefix": (3, 1, 0), "suffix": (2, 4, 1, 0)},
        {"q": (2, 3, 16), "prefix": (3, 2, 16), "suffix": (2, 4, 2, 16)},
        {"lengths": (0, 4)},
        {"lengths": (1, 5)},
        {"lengths": (-1, 4)},
        {"suffix": (2, 0, 1, 16)},
        {"cu": (0, 1, 4)},
        {"cu": (0, 2, 1)},
        {"cu": (0, -1, 3)},
        {"cu": (1, 2, 3)},
        {"cu": (0, 0, 3)},
        {"cu": (0, 2**62, 2**63 - 1)},
        {"groups": (0, 2)},
        {"groups": (-1, 1)},
    ],
)
def test_decode_refuses_what_it_cannot_read(changes: dict, backend: str) -> None:
    if backend == "native" and (reason := vk.backends("prefix_decode_attention")["native"]):
        pytest.skip(reason)
    with pytest.raises(ValueError, match=r"^prefix_decode_attention: "):
        decode(backend=backend, **changes)


def test_decode_of_no_row_is_empty() -> None:
    out = decode(q=(0, 2, 16), suffix=(0, 4, 1, 16), lengths=(), groups=())
    assert out.shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"prefix_starts": torch.tensor([2**62])}, r"at least the \d+ tokens of the layout"),
        ({"prefix_starts": torch.tensor([3])}, "at least the 4 tokens of the layout"),
        ({"prefix_starts": torch.tensor([-1])}, "prefix_starts: expected 0 or more"),
        ({"suffix_slots": torch.tensor([0, 2])}, "at least the 3 slots of the layout"),
        ({"suffix_slots": torch.tensor([0, 2**40])}, r"at least the \d+ slots of the layout"),
        ({"suffix_slots": torch.tensor([0, -1])}, "suffix_slots: expected 0 or more"),
    ],
)
def test_layouts_beyond_the_memory_are_refused(places: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vk.prefix_decode_attention(
            cpu(2, 2, 16),
            *[cpu(3 if "prefix_starts" in places else 1, 1, 16)] * 2,
            *[cpu(2, 4, 1, 16)] * 2,
            suffix_lengths=torch.ones(2, dtype=torch.int64),
            layout=vk.DecodeLayout(torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64), **places),
        )


@pytest.mark.parametrize("size", [(0, 28), (28, 0), (-28, 28), (27, 28), (28, 28 * 2**40), (2**63, 28)])
def test_frames_of_no_or_endless_size_are_refused(size: tuple[int, int]) -> None:
    frames = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^frames_to_patches: size: expected"):
        vk.frames_to_patches(frames, size=size)
    for shape in ((0, 8, 8, 3), (2, 0, 8, 3), (2, 8, 0, 3), (2, 8, 8, 4), (2, 8, 3)):
        with pytest.raises(ValueError, match=r"^frames_to_patches: frames: expected"):
            vk.frames_to_patches(torch.zeros(shape, dtype=torch.uint8), size=(28, 28))


@pytest.fixture(scope="module")
def operators() -> None:
    try:
        extension.load_operators("cpu")
    except extension.Unavailable as reason:
        pytest.skip(str(reason))


def arguments() -> dict[str, object]:
    first, weights, taps = torch.ops.videor1_csrc.resample_table(torch.empty(0), 8, 28, 1)
    return {
        "planes": [torch.zeros(2, 8, 8, 3, dtype=torch.uint8)],
        "matrix": 0,
        "full_range": False,
        "row_first": first,
        "row_weights": weights,
        "row_taps": taps,
        "column_first": first,
        "column_weights": weights,
        "column_taps": taps,
        "quarter_turns": 0,
        "mirrored": False,
        "levels": torch.zeros(3, 256),
        "slots": None,
        "ordered": torch.zeros(4, 1176),
        "permuted": None,
    }


def bytes_(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.usefixtures("operators")
def test_the_native_operator_runs_on_right_arguments() -> None:
    torch.ops.videor1_csrc.frames_to_patches(**arguments())


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    "changes",
    [
        {"planes": []},
        {"planes": [bytes_(2, 8, 8, 3)] * 4},
        {"planes": [bytes_(2, 8, 8)]},
        {"planes": [bytes_(2, 8, 8, 4)]},
        {"planes": [bytes_(0, 8, 8, 3)]},
        {"planes": [torch.zeros(2, 8, 8, 3)]},
        {"planes": [torch.zeros(2, 8, 8, 3, dtype=torch.uint16)]},
        {"planes": [bytes_(2, 8, 8), bytes_(2, 4, 4, 1)]},
        {"planes": [bytes_(2, 8, 8), bytes_(1, 4, 4, 2)]},
        {"planes": [bytes_(2, 8, 8), bytes_(2, 4, 4), bytes_(2, 4, 3)]},
        {"planes": [bytes_(2, 8, 8), bytes_(2, 3, 4), bytes_(2, 3, 4)]},
        {"planes": [bytes_(2, 3, 8, 8).permute(0, 2, 3, 1)]},
        {"matrix": 3},
        {"matrix": -1},
        {"quarter_turns": 4},
        {"row_taps": 0},
        {"row_taps": 10**6},
        {"row_first": torch.full((28,), 8, dtype=torch.int32)},
        {"column_first": torch.full((28,), -1, dtype=torch.int32)},
        {"row_first": torch.zeros(28)},
        {"row_first": torch.zeros(0, dtype=torch.int32), "row_weights": torch.zeros(0, 16)},
        {"column_weights": torch.zeros(28, 15)},
        {"column_weights": torch.zeros(27, 16)},
        {"levels": torch.zeros(3, 255)},
        {"levels": torch.zeros(256, 3).T},
        {"levels": torch.zeros(3, 256, dtype=torch.float64)},
        {"ordered": torch.zeros(4, 1175)},
        {"ordered": torch.zeros(4, 1176, dtype=torch.float16)},
        {"slots": torch.tensor([0, 1], dtype=torch.int32)},
        {"slots": torch.tensor([0, 2], dtype=torch.int32), "permuted": torch.zeros(4, 1176)},
        {"slots": torch.tensor([0, -1], dtype=torch.int32), "permuted": torch.zeros(4, 1176)},
        {"slots": torch.tensor([0], dtype=torch.int32), "permuted": torch.zeros(4, 1176)},
        {"slots": torch.tensor([0, 1]), "permuted": torch.zeros(4, 1176)},
    ],
)
def test_the_native_operator_refuses_what_it_cannot_read(changes: dict[str, object]) -> None:
    with pytest.raises(RuntimeError, match="frames_to_patches: "):
        torch.ops.videor1_csrc.frames_to_patches(**arguments() | changes)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("sizes", [(0, 28, 1), (8, 0, 1), (8, 28, 0), (-8, 28, 1), (8, 2**40, 1), (2**40, 28, 1)])
def test_a_table_of_no_or_endless_size_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(RuntimeError, match="resample_table: expected"):
        torch.ops.videor1_csrc.resample_table(torch.empty(0), *sizes)
