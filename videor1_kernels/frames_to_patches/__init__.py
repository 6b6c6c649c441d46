"""Video frames to a vision tower's patches: antialiased bicubic resize, normalisation and patch order in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from videor1_kernels.checks import check_tensor, fail
from videor1_kernels.dispatch import register
from videor1_kernels.frames_to_patches import native, ops
from videor1_kernels.frames_to_patches.reference import (
    FACTOR,
    MEAN,
    PATCH,
    PATCH_COLUMNS,
    PATCH_SIZES,
    STD,
    YuvFrames,
    check_constants,
    frames_to_patches_reference,
    normalize_patches,
    patch_columns,
)

__all__ = [
    "FACTOR",
    "MEAN",
    "PATCH",
    "PATCH_COLUMNS",
    "PATCH_SIZES",
    "STD",
    "YuvFrames",
    "frames_to_patches",
    "normalize_patches",
    "patch_columns",
]

OP = ops.OP
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)

register(OP, "native", native.frames_to_patches, unavailable=native.unavailable)
register(OP, "reference", frames_to_patches_reference)


@overload
def frames_to_patches(
    frames: Tensor | YuvFrames,
    *,
    both: Literal[False] = False,
    size: tuple[int, int],
    permutation: Sequence[int] | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    rotation: int = 0,
    mirrored: bool = False,
    patch_size: int = PATCH,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    backend: str = "auto",
) -> Tensor: ...
@overload
def frames_to_patches(
    frames: Tensor | YuvFrames,
    *,
    both: Literal[True],
    size: tuple[int, int],
    permutation: Sequence[int] | Tensor,
    dtype: torch.dtype = torch.bfloat16,
    rotation: int = 0,
    mirrored: bool = False,
    patch_size: int = PATCH,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def frames_to_patches(
    frames: Tensor | YuvFrames,
    *,
    size: tuple[int, int],
    permutation: Sequence[int] | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    rotation: int = 0,
    mirrored: bool = False,
    both: bool = False,
    patch_size: int = PATCH,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Resize frames, normalise them and cut them into a vision tower's patches, by default Qwen2.5-VL's.

    Per frame: RGB of planes, clamped to 0..255 and not rounded (``YuvFrames``); bicubic resize (a = -0.5, widened by
    the scale where it shrinks: antialiased) to ``size``, clamp to 0..255, round half to even; then
    ``(x - 255 mean) / (255 std)`` in fp32, per channel. An RGB frame that already has ``size``
    is not resized: its levels come through unchanged. Two frames make a temporal patch, after the permutation; an odd
    number of frames repeats the last one (of the permuted order).

    With p = patch_size, T = ceil(F / 2), h = size[0] / p, w = size[1] / p, frame 2t + tp, channel c and pixel
    (2p hb + p hm + py, 2p wb + p wm + px) go to::

        row    = ((t * h/2 + hb) * w/2 + wb) * 4 + hm * 2 + wm
        column = ((c * 2 + tp) * p + py) * p + px

    Args:
        frames: uint8 RGB [F, height, width, 3], or ``YuvFrames``, of any strides.
        size: (height, width) of the output in pixels, upright, each a positive multiple of 2 * patch_size.
        permutation: a permutation of 0..F-1; output frame i is input frame ``permutation[i]``. None: in order.
        dtype: of the patches: float32, bfloat16 or float16; uint8 for the rounded levels 0..255 before normalisation;
            float64 computes every stage in fp64 (the oracle of tests).
        rotation: degrees anticlockwise that bring the frames upright, a multiple of 90; the output is upright.
        mirrored: whether the frames are mirrored left to right before they are turned. With ``rotation`` these are the
            eight orientations that a video or a photograph can be stored in.
        both: return the patches in order and those of the permuted frames, made in the same pass.
        patch_size: 14 (Qwen2-VL, Qwen2.5-VL) or 16 (Qwen3-VL).
        mean, std: three each, of the channels' pixels scaled to 0..1; std above 0. Default: CLIP's, which Qwen2-VL and
            Qwen2.5-VL use; Qwen3-VL's are all 0.5.
        backend: "auto"; "native": one pass in fp32, in C++ on a CPU and CUDA on a card (csrc/, compiled at its first
            use); "reference": in torch. Between them a level may differ by 1 where a sum is within fp32's error of a
            half.

    Returns:
        patches [T * h * w, 6 * p * p] in ``dtype``, on the frames' device; with ``both``, (in order, permuted).

    Raises:
        ValueError, TypeError: for frames, a size, a permutation, a dtype, constants or a backend outside of the above.

    Source:
        Qwen2-VL's image processor (https://github.com/huggingface/transformers); the resize equals
        ``F.interpolate(mode="bicubic", antialias=True)`` on float pixels. The pass that does it all is this library's.
    """
    _check_frames(frames)
    if dtype not in DTYPES:
        raise fail(OP, "dtype", "float32, bfloat16, float16, float64 or uint8", dtype)
    if patch_size not in PATCH_SIZES:
        raise fail(OP, "patch_size", " or ".join(map(str, PATCH_SIZES)), patch_size)
    check_constants(OP, mean, std)
    if len(size) != 2 or any(int(side) != side or side <= 0 or side % (2 * patch_size) for side in size):
        raise fail(OP, "size", f"(height, width), positive multiples of {2 * patch_size}", tuple(size))
    if max(size) >= 2**30:
        raise fail(OP, "size", "sides below 2^30 pixels", tuple(size))
    if rotation % 90:
        raise fail(OP, "rotation", "a multiple of 90 degrees", rotation)
    if both and permutation is None:
        raise fail(OP, "permutation", f"an order of the {len(frames)} frames, with both=True", None)
    out_size = int(size[0]), int(size[1])
    shape = int(rotation % 360), bool(mirrored), both, int(patch_size), tuple(mean), tuple(std)
    options = ops.PatchOptions(out_size, dtype, *shape, backend)
    call = ops.run_compiled if torch.compiler.is_compiling() else ops.run
    return call(frames, permutation, options)


def _check_frames(frames: Tensor | YuvFrames) -> None:
    if isinstance(frames, YuvFrames):
        return  # checked when it was made
    check_tensor(OP, "frames", frames, ("F", "height", "width", 3), (torch.uint8,))
    if frames.numel() == 0:
        raise fail(OP, "frames", "at least one frame of at least one pixel", list(frames.shape))
