"""frames_to_patches of csrc/: one pass from planes to patches, in C++ on a CPU and in CUDA on a GPU."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from videor1_kernels import extension
from videor1_kernels.frames_to_patches.reference import MEAN, PATCH, STD, YuvFrames, normalize_patches, patch_columns

MATRICES = {"601": 0, "709": 1, "2020": 2}  # csrc/include/videor1/color.h

_lock = threading.Lock()


def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why it cannot run there, or None if it can. Compiles the library when the answer first depends on that."""
    if device.type not in ("cpu", "cuda"):
        return f"it runs on CPUs and CUDA devices, not on {device.type}"
    if dtype == torch.float64:
        return "it computes in fp32, and fp64 was asked for"
    with _lock:
        return _failure("cpu") or (_failure("cuda") if device.type == "cuda" else None)


@functools.cache
def _failure(device_type: str) -> str | None:
    try:
        extension.load_operators(device_type)  # "cpu" has the schemas too
        if device_type == "cuda":
            _launch(torch.device(device_type))
    except extension.Unavailable as reason:
        where = "CPU" if device_type == "cpu" else "card"
        extension.log.warning(
            "videor1_kernels: frames become patches in plain torch on the %s, slower: %s", where, reason
        )
        return str(reason)
    return None


def _launch(device: torch.device) -> None:
    """Make patches once. Code that a compiler newer than the driver has made loads, and fails only when it is launched.

    Raises:
        Unavailable: it does not run there.
    """
    side = 2 * PATCH  # of the least size
    frame = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device)
    try:
        made = frames_to_patches(frame, size=(side, side), dtype=torch.uint8)
        right = not bool(made.any())  # type: ignore[union-attr]  # waits for the device, which is when some errors are told
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"its code does not run on {device} ({first}); is nvcc newer than the driver?"
        raise extension.Unavailable(what) from error
    if not right:
        raise extension.Unavailable(f"its code runs on {device}, but a black frame does not stay black")


def frames_to_patches(
    frames: Tensor | YuvFrames,
    *,
    size: tuple[int, int],
    dtype: torch.dtype,
    permutation: Sequence[int] | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    both: bool = False,
    patch_size: int = PATCH,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor | tuple[Tensor, Tensor]:
    """``frames_to_patches`` for checked arguments. Planes are not copied, whatever the strides of their rows."""
    if isinstance(frames, YuvFrames):
        planes, matrix, full_range = list(frames.planes), MATRICES[frames.matrix], frames.range == "full"
    else:
        planes, matrix, full_range = [frames], 0, False
    planes = [_dense_rows(plane) for plane in planes]
    device = planes[0].device
    count, height, width = planes[0].shape[:3]
    out_height, out_width = size if rotation % 180 == 0 else size[::-1]  # as stored: turned on the way out
    shape = (-(-count // 2) * (size[0] // patch_size) * (size[1] // patch_size), patch_columns(patch_size))
    ordered = torch.empty(shape, dtype=dtype, device=device) if permutation is None or both else None
    permuted = torch.empty(shape, dtype=dtype, device=device) if permutation is not None else None
    torch.ops.videor1_csrc.frames_to_patches(
        planes,
        matrix,
        full_range,
        *_table(height, out_height, device),
        *_table(width, out_width, device),
        patch_size,
        rotation // 90,
        mirrored,
        _levels(dtype, device, tuple(mean), tuple(std)),
        None if permutation is None else _slots(permutation, device),
        ordered,
        permuted,
    )
    if ordered is not None and permuted is not None:
        return ordered, permuted
    made = permuted if ordered is None else ordered
    assert made is not None
    return made


def _dense_rows(plane: Tensor) -> Tensor:
    """The plane with the samples of a row next to each other, which is all that the kernels require of strides."""
    dense = plane.stride(-1) == 1 and (plane.dim() == 3 or plane.stride(2) == plane.shape[3])
    return plane if dense else plane.contiguous()


@functools.lru_cache(maxsize=256)
def _table(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The first taps and the weights of the resize; on a GPU, windows begin at multiples of 4 samples."""
    align = 1 if device.type == "cpu" else 4
    first, weights, taps = torch.ops.videor1_csrc.resample_table(torch.empty(0), size_in, size_out, align)
    return first.to(device), weights.to(device), taps


@functools.lru_cache(maxsize=64)
def _levels(
    dtype: torch.dtype, device: torch.device, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Tensor:
    """The stored value of each channel and level, [3, 256]: exactly the values of ``normalize_patches``."""
    columns = patch_columns(PATCH)
    levels = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, columns)
    stored = levels if dtype == torch.uint8 else normalize_patches(levels.contiguous(), dtype, mean=mean, std=std)
    return stored[:, :: columns // 3].T.contiguous().to(device)


def _slots(permutation: Sequence[int], device: torch.device) -> Tensor:
    """Where each frame goes: the inverse permutation."""
    slots = torch.empty(len(permutation), dtype=torch.int32)
    slots[torch.tensor(permutation)] = torch.arange(len(permutation), dtype=torch.int32)
    return slots.to(device)
