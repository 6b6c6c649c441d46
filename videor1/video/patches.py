"""Turning decoded frames into 8-bit patches, and shuffling and normalising patches without decoding again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from videor1.types import Clip, Media
from videor1_kernels.frames_to_patches import PATCH, PATCH_COLUMNS, frames_to_patches
from videor1_kernels.frames_to_patches import normalize_patches as _normalize_patches

Grid = tuple[int, int, int]


def media_from_clip(clip: Clip, kind: Literal["video", "image"], *, seconds: float = 0.0) -> Media:
    """Resize a clip's frames to ``clip.size`` and cut them into 8-bit patches.

    Args:
        clip: decoded frames, RGB or planes; they are brought upright by ``clip.rotation`` and ``clip.mirrored``. Where
            their number is odd, the last frame is repeated (an image becomes one temporal patch).
        kind: "video" or "image"; a video must have ``clip.fps`` above 0.
        seconds: time in seconds that decoding took; the time of the resize is added to it.

    Raises:
        ValueError: a video whose ``clip.fps`` is not above 0.
    """
    started = time.perf_counter()
    if kind == "video" and not clip.fps > 0:
        raise ValueError(f"media_from_clip: a video needs the sampled frames per second, got clip.fps={clip.fps}")
    patches = frames_to_patches(
        clip.frames, size=clip.size, rotation=clip.rotation, mirrored=clip.mirrored, dtype=torch.uint8
    )
    grid = (-(-len(clip.frames) // 2), clip.size[0] // PATCH, clip.size[1] // PATCH)
    return Media(
        kind=kind,
        patches=patches,
        grid_thw=grid,
        second_per_grid=2 / clip.fps if kind == "video" else 0.0,
        seconds=seconds + time.perf_counter() - started,
        backend=clip.backend,
    )


def num_media_tokens(grid_thw: Grid) -> int:
    """Return the number of tokens that the language model sees: T * h * w / 4, one per 2 x 2 block of patches."""
    T, h, w = grid_thw
    assert T * h * w % 4 == 0, grid_thw
    return T * h * w // 4


def permute_frames(patches: Tensor, grid_thw: Grid, permutation: Sequence[int] | Tensor) -> Tensor:
    """Rearrange ordered patches as if the frames had been shuffled before they were merged in pairs.

    This only re-indexes the patches; the result is bit-equal to ``frames_to_patches(frames, permutation=permutation)``.

    Args:
        patches: [T * h * w, 1176], any dtype, made from frames in order.
        grid_thw: (T, h, w).
        permutation: of 0..2T-1, or of 0..2T-2 where the clip had an odd number of frames. In the latter case the last
            frame of the permuted order is repeated, as it would be for a clip in that order.

    Returns:
        Patches of the same shape and dtype.

    Raises:
        ValueError: if the patches do not fit the grid or ``permutation`` is no permutation of the frames.
    """
    T, _, _ = _check(patches, grid_thw)
    order = [int(i) for i in permutation]
    if len(order) not in (2 * T, 2 * T - 1) or sorted(order) != list(range(len(order))):
        raise ValueError(f"permute_frames: expected a permutation of {2 * T} frames (grid {grid_thw}), got {order}")
    if len(order) % 2:
        order.append(order[-1])
    frames = patches.view(T, -1, 3, 2, PATCH * PATCH).permute(0, 3, 1, 2, 4).flatten(0, 1)  # [2T, h*w, 3, 196]
    shuffled = frames[torch.tensor(order, device=patches.device)].unflatten(0, (T, 2))
    return shuffled.permute(0, 2, 3, 1, 4).reshape(patches.shape)


def permute_temporal_patches(patches: Tensor, grid_thw: Grid, permutation: Sequence[int] | Tensor) -> Tensor:
    """Rearrange ordered patches by temporal patch (pair of frames), which only re-indexes them.

    Args:
        patches: [T * h * w, 1176], any dtype.
        grid_thw: (T, h, w).
        permutation: of 0..T-1; output temporal patch i is input ``permutation[i]``.

    Raises:
        ValueError: if the patches do not fit the grid or ``permutation`` is no permutation of 0..T-1.
    """
    T, _, _ = _check(patches, grid_thw)
    order = [int(i) for i in permutation]
    if sorted(order) != list(range(T)):
        raise ValueError(
            f"permute_temporal_patches: expected a permutation of the {T} temporal patches of grid {grid_thw}, "
            f"got {order}"
        )
    return patches.unflatten(0, (T, -1))[torch.tensor(order, device=patches.device)].flatten(0, 1)


def normalize_patches(patches: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normalise 8-bit patches [rows, 1176] to ``(x - 255 mean) / (255 std)`` in fp32; see ``videor1_kernels``."""
    return _normalize_patches(patches, dtype)


def _check(patches: Tensor, grid_thw: Grid) -> Grid:
    """Return the grid. Raises ValueError where the patches do not fit it."""
    T, h, w = grid_thw
    if tuple(patches.shape) != (T * h * w, PATCH_COLUMNS):
        raise ValueError(
            f"expected patches [{T * h * w}, {PATCH_COLUMNS}] for grid {grid_thw}, got {list(patches.shape)}"
        )
    return grid_thw
