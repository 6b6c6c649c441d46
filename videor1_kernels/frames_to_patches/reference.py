"""frames_to_patches in plain torch: the oracle of the tests, which runs on any device.

F frames, T temporal patches of 2 frames each, h x w patches of p x p pixels in an output of H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from videor1_kernels.checks import check_choice, check_tensor, fail

PATCH_SIZES = (14, 16)  # pixels, the sides that a patch may have
# The defaults, which are Qwen2-VL's and Qwen2.5-VL's.
PATCH = 14
FACTOR = 2 * PATCH  # pixels, the side of a merged 2x2 block of patches
PATCH_COLUMNS = 3 * 2 * PATCH * PATCH
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of pixels scaled to 0..1
STD = (0.26862954, 0.26130258, 0.27577711)

_LUMA_WEIGHTS = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}  # kr, kb
_GROUP_PIXELS = 1 << 21  # source pixels in floating point at once: 24 MiB of fp32 RGB, at least one frame
_GROUP_ROWS = 4096  # patches in fp32 at once: 18 MiB


@dataclass(frozen=True)
class YuvFrames:
    """Frames as a decoder leaves them: 4:2:0 planes, each chroma sample standing for a 2 x 2 block of pixels.

    Args:
        planes: (Y, U, V), Y [F, H, W] and U, V [F, ceil(H/2), ceil(W/2)] (YUV420P), or (Y, UV), UV
            [F, ceil(H/2), ceil(W/2), 2] (NV12); uint8. NV12 planes of uint16 are P010: 10 bits, in the high bits.
        matrix: BT.601, BT.709 or BT.2020 (non-constant luminance). Unspecified in a file means 601.
        range: "limited" (Y 16..235, U and V 16..240) or "full".

    Raises:
        ValueError: planes of other shapes or dtypes, another matrix or range.
    """

    planes: tuple[Tensor, ...]
    matrix: Literal["601", "709", "2020"] = "601"
    range: Literal["limited", "full"] = "limited"

    def __post_init__(self) -> None:
        check_choice("YuvFrames", "matrix", self.matrix, tuple(_LUMA_WEIGHTS))
        check_choice("YuvFrames", "range", self.range, ("limited", "full"))
        got = ", ".join(f"{plane.dtype} {list(plane.shape)}" for plane in self.planes)
        dtypes = {plane.dtype for plane in self.planes}
        if len(self.planes) not in (2, 3) or self.planes[0].ndim != 3 or self.planes[0].numel() == 0:
            raise fail("YuvFrames", "planes", "(Y, U, V) or (Y, UV) with a non-empty Y [F, H, W]", got)
        if dtypes != {torch.uint8} and not (dtypes == {torch.uint16} and len(self.planes) == 2):
            raise fail("YuvFrames", "planes", "all uint8, or (Y, UV) both uint16 for P010", got)
        frames, height, width = self.planes[0].shape
        chroma = (frames, -(-height // 2), -(-width // 2)) + ((2,) if len(self.planes) == 2 else ())
        if any(tuple(plane.shape) != chroma for plane in self.planes[1:]):
            raise fail("YuvFrames", "planes", f"chroma planes {list(chroma)} beside this Y", got)

    def __len__(self) -> int:
        return self.planes[0].shape[0]

    def to_rgb(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Frames start..stop as RGB [n, 3, H, W] in ``dtype``, levels 0..255, clamped but not rounded."""
        Y, *rest = (self._levels(plane[start:stop], dtype) for plane in self.planes)
        U, V = rest if len(rest) == 2 else rest[0].unbind(-1)
        H, W = Y.shape[-2:]
        U, V = (c.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :H, :W] for c in (U, V))
        kr, kb = _LUMA_WEIGHTS[self.matrix]
        kg = 1 - kr - kb
        luma, chroma = (255 / 219, 255 / 224) if self.range == "limited" else (1.0, 1.0)
        y = (Y - 16) * luma if self.range == "limited" else Y
        u, v = (U - 128) * chroma, (V - 128) * chroma
        red = y + 2 * (1 - kr) * v
        green = y - (2 * kb * (1 - kb) / kg) * u - (2 * kr * (1 - kr) / kg) * v
        blue = y + 2 * (1 - kb) * u
        return torch.stack((red, green, blue), 1).clamp_(0, 255)

    def _levels(self, plane: Tensor, dtype: torch.dtype) -> Tensor:
        """Samples on the 8-bit scale; P010 keeps its two extra bits as quarters (limited range)."""
        if plane.dtype == torch.uint8:
            return plane.to(dtype)
        ten_bits = plane.to(torch.int32) >> 6
        if self.range == "limited":
            return ten_bits.to(dtype) / 4
        full = ten_bits.to(dtype)
        # Full range maps 0..1023 to 0..255; chroma is centred on 512, which must land on 128.
        return full * (255 / 1023) if plane.ndim == 3 else (full - 512) * (255 / 1023) + 128


def frames_to_patches_reference(
    frames: Tensor | YuvFrames,
    *,
    size: tuple[int, int],
    permutation: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    rotation: int = 0,
    mirrored: bool = False,
    both: bool = False,
    patch_size: int = PATCH,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    compute_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``frames_to_patches`` for checked arguments.

    The resize and the normalisation run in ``compute_dtype``, by default fp64 if ``dtype`` is fp64, else fp32.
    """
    compute_dtype = compute_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    stored = size if rotation % 180 == 0 else size[::-1]  # turned after the resize, whose filter is symmetric
    levels = torch.cat([_resized(group, stored) for group in _float_groups(frames, stored, compute_dtype)])
    levels = torch.rot90(levels.flip(3) if mirrored else levels, rotation // 90, (2, 3))  # [F, 3, H, W]
    permuted = levels if permutation is None else levels[torch.as_tensor(permutation, device=levels.device)]
    made = tuple(_patches(x, dtype, patch_size, mean, std) for x in ((levels, permuted) if both else (permuted,)))
    return made if len(made) == 2 else made[0]


def patch_columns(patch_size: int) -> int:
    """Return the number of entries of a patch: 3 channels, 2 frames, patch_size x patch_size pixels."""
    return 3 * 2 * patch_size * patch_size


def _patches(
    levels: Tensor, dtype: torch.dtype, patch_size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    if len(levels) % 2:
        levels = torch.cat([levels, levels[-1:]])
    patches = _cut(levels, patch_size)
    return patches if dtype == torch.uint8 else normalize_patches(patches, dtype, mean=mean, std=std)


def normalize_patches(
    patches: Tensor, dtype: torch.dtype = torch.bfloat16, *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> Tensor:
    """Normalise 8-bit patches: ``(x - 255 mean) / (255 std)`` per channel, computed in fp32, rounded once to ``dtype``.

    Args:
        patches: uint8 [rows, 1176] (patches of 14 pixels) or [rows, 1536] (of 16), from
            ``frames_to_patches(dtype=torch.uint8)``; a third of a row's columns is a channel.
        dtype: a floating dtype; float64 computes in fp64.
        mean, std: three each, of the channels' pixels scaled to 0..1; std above 0.

    Returns:
        [rows, columns] in ``dtype``, on the patches' device; equal bit for bit to asking for ``dtype`` at once.

    Raises:
        ValueError, TypeError: for patches, a dtype, a mean or a std outside of the above.
    """
    op = "normalize_patches"
    check_tensor(op, "patches", patches, ("rows", "columns"), (torch.uint8,))
    if patches.shape[1] not in map(patch_columns, PATCH_SIZES):
        known = " or ".join(str(patch_columns(size)) for size in PATCH_SIZES)
        raise fail(op, "patches", f"[rows, {known}]", list(patches.shape))
    if not dtype.is_floating_point:
        raise fail(op, "dtype", "a floating dtype", dtype)
    check_constants(op, mean, std)
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shift = 255 * torch.tensor(mean, dtype=torch.float64, device=patches.device)
    scale = 255 * torch.tensor(std, dtype=torch.float64, device=patches.device)
    shift, scale = (x.to(compute_dtype)[:, None] for x in (shift, scale))  # [3, 1]
    out = torch.empty(patches.shape, dtype=dtype, device=patches.device)
    for start in range(0, len(patches), _GROUP_ROWS):
        rows = patches[start : start + _GROUP_ROWS].unflatten(1, (3, -1)).to(compute_dtype)  # [rows, 3, columns / 3]
        out[start : start + _GROUP_ROWS] = rows.sub_(shift).div_(scale).flatten(1)
    return out


def check_constants(op: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Check the constants of a normalisation. Raises ValueError."""
    if len(mean) != 3 or not all(map(math.isfinite, mean)):
        raise fail(op, "mean", "three finite numbers, of the red, green and blue channel", mean)
    if len(std) != 3 or not all(math.isfinite(x) and x > 0 for x in std):
        raise fail(op, "std", "three finite numbers above 0, of the red, green and blue channel", std)


def _float_groups(frames: Tensor | YuvFrames, size: tuple[int, int], dtype: torch.dtype) -> Iterator[Tensor]:
    """Frames as [n, 3, height, width], a few at a time: all of them in floating point would take gigabytes."""
    height, width = frames.planes[0].shape[1:] if isinstance(frames, YuvFrames) else frames.shape[1:3]
    step = max(1, _GROUP_PIXELS // (height * width))
    for start in range(0, len(frames), step):
        if isinstance(frames, YuvFrames):
            yield frames.to_rgb(start, min(start + step, len(frames)), dtype)
        else:
            group = frames[start : start + step].permute(0, 3, 1, 2)
            yield group if (height, width) == size else group.to(dtype)


def _resized(group: Tensor, size: tuple[int, int]) -> Tensor:
    """[n, 3, height, width] to uint8 [n, 3, H, W]."""
    if group.dtype == torch.uint8:
        return group
    if tuple(group.shape[-2:]) != size:
        group = F.interpolate(group, size=size, mode="bicubic", antialias=True, align_corners=False)
    return group.clamp(0, 255).round_().to(torch.uint8)


def _cut(levels: Tensor, p: int) -> Tensor:
    """uint8 [2T, 3, H, W] to patches [T * h * w, 3 * 2 * p * p]."""
    F_, C, H, W = levels.shape
    blocks = levels.reshape(F_ // 2, 2, C, H // (2 * p), 2, p, W // (2 * p), 2, p)  # t tp c hb hm py wb wm px
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, patch_columns(p))
