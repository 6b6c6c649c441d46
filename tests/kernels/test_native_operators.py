"""The native operators refuse what they cannot read, whoever calls them; a child process tells if they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from videor1_kernels import extension


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
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
        "patch": 14,
        "quarter_turns": 0,
        "mirrored": False,
        "levels": torch.zeros(3, 256),
        "slots": None,
        "ordered": torch.zeros(4, 1176),
        "permuted": None,
    }


def bytes_(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def test_the_native_operator_runs_on_right_arguments() -> None:
    torch.ops.videor1_csrc.frames_to_patches(**arguments())


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
        {"patch": 0},
        {"patch": 7},
        {"patch": 16},  # whose blocks 28 rows are no multiple of
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


@pytest.mark.parametrize("sizes", [(0, 28, 1), (8, 0, 1), (8, 28, 0), (-8, 28, 1), (8, 2**40, 1), (2**40, 28, 1)])
def test_a_table_of_no_or_endless_size_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(RuntimeError, match="resample_table: expected"):
        torch.ops.videor1_csrc.resample_table(torch.empty(0), *sizes)
