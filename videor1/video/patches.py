"""Turning decoded frames into 8-bit patches, and shuffling and normalising patches without decoding again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from videor1.types import Clip, Media
from videor1.video.rules import QWEN2_RULES, FrameRules
from videor1_kernels.frames_to_patches import PATCH_SIZES, frames_to_patches, patch_columns
from videor1_kernels.frames_to_patches import normalize_patches as _normalize_patches

Grid = tuple[int, int, int]


def media_from_clip(
    clip: Clip, kind: Literal["video", "image"], *, seconds: float = 0.0, rules: FrameRules = QWEN2_RULES
) -> Media:
    """Resize a clip's frames to ``clip.size`` and cut them into 8-bit patches.

    Args:
        clip: decoded frames, RGB or planes; they are brought upright by ``clip.rotation`` and ``clip.mirrored``. Where
            their number is odd, the last frame is repeated (an image becomes one temporal patch).
        kind: "video" or "image"; a video must have ``clip.fps`` above 0.
        seconds: time in seconds that decoding took; the time of the resize is added to it.
        rules: the family's, of which the size of a patch is used.

    Raises:
        ValueError: a video whose ``clip.fps`` is not above 0.
    """
    started = time.perf_counter()
    if kind == "video" and not clip.fps > 0:
        raise ValueError(f"media_from_clip: a video needs the sampled frames per second, got clip.fps={clip.fps}")
    patches = frames_to_patches(
        clip.frames,
        size=clip.size,
        rotation=clip.rotation,
        mirrored=clip.mirrored,
        dtype=torch.uint8,
        patch_size=rules.patch_size,
    )
    grid = (-(-len(clip.frames) // 2), clip.size[0] // rules.patch_size, clip.size[1] // rules.patch_size)
    return Media(
        kind=kind,
        patches=patches,
        grid_thw=grid,
        second_per_grid=2 / clip.fps if kind == "video" else 0.0,
        seconds=seconds + time.perf_counter() - started,
        backend=clip.backend,
        times=_times(clip) if kind == "video" else (),
        decoded_bytes=clip.decoded_bytes,
    )


def _times(clip: Clip) -> tuple[float, ...]:
    """Return the seconds of each temporal patch: the mean of its first and last frame's. An odd clip repeats its last.

    A frame's are its number divided by the file's frames per second, as the processors of transformers take them: what
    a model has been told in training does not follow a variable frame rate. Times that the data give are taken as
    they are.
    """
    frames = list(clip.given_times) or [number / clip.source_fps for number in clip.numbers]
    frames += frames[-1:] if len(frames) % 2 else []
    return tuple((first + last) / 2 for first, last in zip(frames[::2], frames[1::2], strict=True))


def num_media_tokens(grid_thw: Grid) -> int:
    """Return the number of tokens that the language model sees: T * h * w / 4, one per 2 x 2 block of patches."""
    T, h, w = grid_thw
    assert T * h * w % 4 == 0, grid_thw
    return T * h * w // 4


def permute_frames(patches: Tensor, grid_thw: Grid, permutation: Sequence[int] | Tensor) -> Tensor:
    """Rearrange ordered patches as if the frames had been shuffled before they were merged in pairs.

    This only re-indexes the patches; the result is bit-equal to ``frames_to_patches(frames, permutation=permutation)``.

    Args:
        patches: [T * h * w, columns], any dtype, made from frames in order.
        grid_thw: (T, h, w).
        permutation: of 0..2T-1, or of 0..2T-2 where the clip had an odd number of frames. In the latter case the last
            frame of the permuted order is repeated, as it would be for a clip in that order.

    Returns:
        Patches of the same shape and dtype.

    Raises:
        ValueError: if the patches do not fit the grid or ``permutation`` is no permutation of the frames.
    """
    T, _, _ = check_grid(patches, grid_thw)
    order = [int(i) for i in permutation]
    if len(order) not in (2 * T, 2 * T - 1) or sorted(order) != list(range(len(order))):
        raise ValueError(f"permute_frames: expected a permutation of {2 * T} frames (grid {grid_thw}), got {order}")
    if len(order) % 2:
        order.append(order[-1])
    frames = patches.view(T, -1, 3, 2, patches.shape[1] // 6).permute(0, 3, 1, 2, 4).flatten(0, 1)  # [2T, h*w, 3, p*p]
    shuffled = frames[torch.tensor(order, device=patches.device)].unflatten(0, (T, 2))
    return shuffled.permute(0, 2, 3, 1, 4).reshape(patches.shape)


def permute_temporal_patches(patches: Tensor, grid_thw: Grid, permutation: Sequence[int] | Tensor) -> Tensor:
    """Rearrange ordered patches by temporal patch (pair of frames), which only re-indexes them.

    Args:
        patches: [T * h * w, columns], any dtype.
        grid_thw: (T, h, w).
        permutation: of 0..T-1; output temporal patch i is input ``permutation[i]``.

    Raises:
        ValueError: if the patches do not fit the grid or ``permutation`` is no permutation of 0..T-1.
    """
    T, _, _ = check_grid(patches, grid_thw)
    order = [int(i) for i in permutation]
    if sorted(order) != list(range(T)):
        raise ValueError(
            f"permute_temporal_patches: expected a permutation of the {T} temporal patches of grid {grid_thw}, "
            f"got {order}"
        )
    return patches.unflatten(0, (T, -1))[torch.tensor(order, device=patches.device)].flatten(0, 1)


def normalize_patches(patches: Tensor, dtype: torch.dtype = torch.bfloat16, rules: FrameRules = QWEN2_RULES) -> Tensor:
    """Normalise 8-bit patches [rows, columns] to ``(x - 255 mean) / (255 std)`` in fp32; see ``videor1_kernels``."""
    return _normalize_patches(patches, dtype, mean=rules.mean, std=rules.std)


def check_grid(patches: Tensor, grid_thw: Grid) -> Grid:
    """Return the grid. Raises ValueError where the patches do not fit it."""
    T, h, w = grid_thw
    columns = [patch_columns(size) for size in PATCH_SIZES]
    if patches.ndim != 2 or len(patches) != T * h * w or patches.shape[1] not in columns:
        expected = f"[{T * h * w}, {' or '.join(map(str, columns))}]"
        raise ValueError(f"expected patches {expected} for grid {grid_thw}, got {list(patches.shape)}")
    return grid_thw
