"""The torch operator of frames_to_patches: opaque to torch.compile. Levels of 8 bits carry no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from videor1_kernels.checks import fail
from videor1_kernels.dispatch import resolve
from videor1_kernels.frames_to_patches.reference import YuvFrames, patch_columns

OP = "frames_to_patches"


class PatchOptions(NamedTuple):
    """The checked options of frames_to_patches but the permutation."""

    size: Sequence[int]  # (height, width)
    dtype: torch.dtype
    rotation: int  # 0, 90, 180 or 270
    mirrored: bool
    both: bool
    patch_size: int
    mean: Sequence[float]
    std: Sequence[float]
    backend: str


def run(
    frames: Tensor | YuvFrames, permutation: Sequence[int] | Tensor | None, options: PatchOptions
) -> Tensor | tuple[Tensor, Tensor]:
    """Check the permutation's values and run the backend on checked arguments otherwise."""
    order = _checked_permutation(permutation, len(frames))
    device = frames.planes[0].device if isinstance(frames, YuvFrames) else frames.device
    call = resolve(OP, options.backend, device, options.dtype)
    given = options._asdict() | {"size": tuple(options.size), "permutation": order}
    del given["backend"]
    return call(frames, **given)


def run_compiled(
    frames: Tensor | YuvFrames, permutation: Sequence[int] | Tensor | None, options: PatchOptions
) -> Tensor | tuple[Tensor, Tensor]:
    """The same as :func:`run`, as one node of a compiled graph."""
    planes, matrix, range_ = ([frames], "", "") if isinstance(frames, Tensor) else _parts(frames)
    numbers, order = (None, permutation) if isinstance(permutation, Tensor) else (permutation, None)
    listed = None if numbers is None else list(numbers)
    made = frames_to_patches_op(planes, matrix, range_, listed, order, *options)
    return (made[0], made[1]) if options.both else made[0]


@torch.library.custom_op("videor1::frames_to_patches", mutates_args=())
def frames_to_patches_op(
    planes: Sequence[Tensor],
    matrix: str,
    range: str,
    permutation: Sequence[int] | None,
    order: Tensor | None,
    size: Sequence[int],
    dtype: torch.dtype,
    rotation: int,
    mirrored: bool,
    both: bool,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    backend: str,
) -> list[Tensor]:
    """RGB frames (matrix ""), or planes -> one or two [T * h * w, columns]; the permutation is a list or a tensor."""
    frames = YuvFrames(tuple(planes), matrix, range) if matrix else planes[0]  # type: ignore[arg-type]
    chosen = permutation if order is None else order
    made = run(frames, chosen, PatchOptions(size, dtype, rotation, mirrored, both, patch_size, mean, std, backend))
    return list(made) if isinstance(made, tuple) else [made]


@frames_to_patches_op.register_fake
def _(planes: Sequence[Tensor], matrix: str, range: str, permutation: Any, order: Any, *options: Any) -> list[Tensor]:
    given = PatchOptions(*options)
    (height, width), p = given.size, given.patch_size
    patches = (planes[0].shape[0] + 1) // 2 * (height // p) * (width // p)
    return [planes[0].new_empty(patches, patch_columns(p), dtype=given.dtype) for _ in ((0, 1) if given.both else (0,))]


def _parts(frames: YuvFrames) -> tuple[list[Tensor], str, str]:
    return list(frames.planes), frames.matrix, frames.range


def _checked_permutation(permutation: Sequence[int] | Tensor | None, num_frames: int) -> tuple[int, ...] | None:
    if permutation is None:
        return None
    order = tuple(int(i) for i in permutation)
    if sorted(order) != list(range(num_frames)):
        raise fail(OP, "permutation", f"each of 0..{num_frames - 1} once (there are {num_frames} frames)", list(order))
    return order
