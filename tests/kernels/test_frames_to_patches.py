"""frames_to_patches against formulas written out independently: resize weights, normalisation, patch order.

Colours and orientations are in test_native_frames.py, on every backend.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from videor1_kernels import frames_to_patches
from videor1_kernels.frames_to_patches import YuvFrames, normalize_patches
from videor1_kernels.frames_to_patches.reference import frames_to_patches_reference
from videor1_kernels.testing import LargestTensor

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
MATRICES = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def smooth(frames: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Waves and edges, as pictures have."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [127 + 100 * np.sin(x / (5 + c) + t) * np.cos(y / (7 - c)) + 28 * (x > width / 2) for c in range(channels)]
    return torch.from_numpy(np.stack(waves, -1).clip(0, 255).astype(np.uint8))


def weights(size_in: int, size_out: int) -> np.ndarray:
    """[out, in] weights of the antialiased bicubic filter, a = -0.5, fp64."""
    table = np.zeros((size_out, size_in))
    scale = size_in / size_out
    s = max(scale, 1.0)
    for i in range(size_out):
        centre = scale * (i + 0.5)
        taps = np.arange(max(int(centre - 2 * s + 0.5), 0), min(int(centre + 2 * s + 0.5), size_in))
        d = np.abs((taps - centre + 0.5) / s)
        near = 1.5 * d**3 - 2.5 * d**2 + 1
        far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
        w = np.where(d < 1, near, np.where(d < 2, far, 0.0))
        table[i, taps] = w / w.sum()
    return table


def resized(frames: Tensor | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """fp64 levels [F, H, W, 3], clamped, not rounded."""
    x = frames.numpy().astype(np.float64) if isinstance(frames, torch.Tensor) else frames
    if x.shape[1:3] == size:
        return x
    rows, columns = weights(x.shape[1], size[0]), weights(x.shape[2], size[1])
    return np.einsum("ih,fhwc,jw->fijc", rows, x, columns, optimize=True).clip(0, 255)


def cut(levels: np.ndarray, p: int = 14) -> np.ndarray:
    """[F, H, W, 3] to [rows, 6 p^2], patch by patch as the contract numbers them."""
    if len(levels) % 2:
        levels = np.concatenate([levels, levels[-1:]])
    frames, height, width, _ = levels.shape
    T, h2, w2 = frames // 2, height // (2 * p), width // (2 * p)
    out = np.zeros((T * h2 * w2 * 4, 6 * p * p), levels.dtype)
    for t, hb, wb, hm, wm, c, tp in np.ndindex(T, h2, w2, 2, 2, 3, 2):
        row = ((t * h2 + hb) * w2 + wb) * 4 + hm * 2 + wm
        column = (c * 2 + tp) * p * p
        y, x = 2 * p * hb + p * hm, 2 * p * wb + p * wm
        out[row, column : column + p * p] = levels[2 * t + tp, y : y + p, x : x + p, c].reshape(-1)
    return out


def normalized(levels: np.ndarray, mean: np.ndarray = MEAN, std: np.ndarray = STD) -> np.ndarray:
    return (levels - 255 * mean) / (255 * std)


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_order_and_normalisation_without_resize(frames: int) -> None:
    x = noise(frames, 56, 84, 3)
    assert torch.equal(frames_to_patches(x, size=(56, 84), dtype=torch.uint8), torch.from_numpy(cut(x.numpy())))
    expected = torch.from_numpy(cut(normalized(x.numpy().astype(np.float64))))
    # A constant's rounding shows by mean / std of at most 2, beside those of the value itself, which is below 3.
    bound = 4 * torch.finfo(torch.float64).eps * 3
    torch.testing.assert_close(frames_to_patches(x, size=(56, 84), dtype=torch.float64), expected, rtol=0, atol=bound)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        patches = frames_to_patches(x, size=(56, 84), dtype=dtype)
        assert patches.dtype == dtype
        assert patches.shape == (math.ceil(frames / 2) * 24, 1176)
        # In fp32: as above. In 16 bits: that rounded once, by at most eps / 2 of itself.
        stored, computed = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        torch.testing.assert_close(patches.double(), expected, rtol=stored, atol=2 * computed)
    assert frames_to_patches(x, size=(56, 84)).dtype == torch.bfloat16


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_patches_of_16_pixels_and_other_constants(frames: int, backend: str) -> None:
    x, mean, std = noise(frames, 64, 96, 3), np.array([0.5, 0.4, 0.3]), np.array([0.5, 0.6, 0.25])
    options: dict[str, Any] = {"size": (64, 96), "patch_size": 16, "backend": backend}
    levels = frames_to_patches(x, dtype=torch.uint8, **options)
    assert torch.equal(levels, torch.from_numpy(cut(x.numpy(), 16)))
    options |= {"mean": mean.tolist(), "std": std.tolist()}
    expected = torch.from_numpy(cut(normalized(x.numpy().astype(np.float64), mean, std), 16))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        patches = frames_to_patches(x, dtype=dtype, **options)
        assert patches.shape == (math.ceil(frames / 2) * 24, 1536)
        # As above; an ordered pair of frames may be shuffled and normalised afterwards, to the same bits.
        torch.testing.assert_close(
            patches.double(), expected, rtol=torch.finfo(dtype).eps, atol=2 * torch.finfo(torch.float32).eps
        )
        assert torch.equal(normalize_patches(levels, dtype, mean=mean.tolist(), std=std.tolist()), patches)
    order = list(range(frames))[::-1]
    both = frames_to_patches(x, dtype=torch.uint8, permutation=order, both=True, **options)
    assert torch.equal(both[0], levels)
    assert torch.equal(both[1], torch.from_numpy(cut(x.numpy()[order], 16)))


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((90, 131), (56, 84)),
        ((30, 20), (56, 84)),  # both grow
        ((61, 40), (28, 112)),  # one shrinks, one grows
        ((56, 200), (56, 84)),  # one stays
        ((1, 1), (28, 28)),
        ((333, 29), (28, 28)),
    ],
)
@pytest.mark.parametrize("content", [noise, smooth])
def test_resize_is_exact_antialiased_bicubic(source: tuple[int, int], size: tuple[int, int], content: Any) -> None:
    x = content(3, *source, 3)
    exact = resized(x, size)
    expected = torch.from_numpy(cut(np.round(exact)))  # np.round: half to even
    oracle = frames_to_patches_reference(x, size=size, dtype=torch.uint8, compute_dtype=torch.float64)
    tie = torch.from_numpy(cut(np.abs(exact % 1 - 0.5) < 1e-9))  # where the last bit of fp64 decides
    assert torch.equal(oracle.double()[~tie], expected[~tie])
    assert (oracle.double() - expected).abs().max() <= 1
    fp32 = frames_to_patches(x, size=size, dtype=torch.uint8).double()
    near_tie = torch.from_numpy(cut(np.abs(exact % 1 - 0.5) < 1e-3))
    assert torch.equal(fp32[~near_tie], expected[~near_tie])
    assert (fp32 - expected).abs().max() <= 1


def test_ties_round_to_even() -> None:
    # At half the size every weight away from the border is a multiple of 1/256: ties are exact in fp32 and fp64 alike.
    x = noise(16, 112, 112, 3) & 0xF0
    exact = resized(x, (56, 56))
    inside = np.zeros(exact.shape, bool)
    inside[:, 2:-2, 2:-2] = True
    assert (inside & (exact % 2 == 0.5)).any(), "some ties must round down"
    assert (inside & (exact % 2 == 1.5)).any(), "and some up"
    patches = frames_to_patches(x, size=(56, 56), dtype=torch.uint8).numpy()
    assert np.array_equal(patches[cut(inside)], cut(np.round(exact))[cut(inside)])


def test_overshoot_is_clamped() -> None:
    x = torch.zeros(2, 60, 60, 3, dtype=torch.uint8)
    x[:, :, 30:] = 255
    assert resized(x, (56, 84)).min() == 0
    patches = frames_to_patches(x, size=(56, 84), dtype=torch.uint8)
    assert set(patches.unique().tolist()) >= {0, 255}
    assert torch.equal(patches.double(), torch.from_numpy(cut(np.round(resized(x, (56, 84))))))


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_permutation_comes_before_the_merge_of_pairs(frames: int) -> None:
    x = noise(frames, 40, 70, 3)
    order = np.random.default_rng(1).permutation(frames)
    expected = frames_to_patches(x[order], size=(28, 56))
    for given in (order.tolist(), tuple(order), torch.from_numpy(order)):
        assert torch.equal(frames_to_patches(x, size=(28, 56), permutation=given), expected)
    assert torch.equal(
        frames_to_patches(x, size=(28, 56), permutation=range(frames)), frames_to_patches(x, size=(28, 56))
    )


def test_uint8_patches_normalise_to_the_same_bits() -> None:
    x = noise(4, 50, 60, 3)
    levels = frames_to_patches(x, size=(56, 56), dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(normalize_patches(levels, dtype), frames_to_patches(x, size=(56, 56), dtype=dtype))


@pytest.mark.parametrize(
    ("matrix", "yuv", "rgb"),
    [
        ("601", (235, 128, 128), (255, 255, 255)),
        ("601", (16, 128, 128), (0, 0, 0)),
        ("601", (81, 90, 240), (255, 0, 0)),
        ("601", (145, 54, 34), (0, 255, 0)),
        ("601", (41, 240, 110), (0, 0, 255)),
        ("709", (63, 102, 240), (255, 0, 0)),
        ("709", (173, 42, 26), (0, 255, 0)),
        ("709", (32, 240, 118), (0, 0, 255)),
        ("601", (255, 128, 128), (255, 255, 255)),  # whiter than white is clamped
    ],
)
def test_yuv_of_colour_bars(matrix: str, yuv: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    """The published 8-bit values of 100% colour bars."""
    planes = tuple(torch.full((2, n, n), value, dtype=torch.uint8) for n, value in zip((28, 14, 14), yuv, strict=True))
    got = frames_to_patches(YuvFrames(planes, matrix=matrix), size=(28, 28), dtype=torch.uint8)
    got = got.unflatten(1, (3, -1))[0, :, 0].tolist()
    assert got == pytest.approx(rgb, abs=2)


def test_memory_is_bounded() -> None:
    frames = torch.zeros(6, 1080, 1920, 3, dtype=torch.uint8)
    with LargestTensor() as largest:
        frames_to_patches(frames, size=(28, 56), dtype=torch.uint8)
    assert largest.numel <= 1080 * 1920 * 3, "no more than one large frame in floating point at once"
    small = torch.zeros(64, 240, 320, 3, dtype=torch.uint8)
    with LargestTensor() as largest:
        frames_to_patches(small, size=(28, 56), dtype=torch.uint8)
    assert largest.numel <= 3 * 2**21


def test_the_input_is_left_alone() -> None:
    x = noise(3, 56, 56, 3)
    before = x.clone()
    for dtype in (torch.uint8, torch.float32):
        frames_to_patches(x, size=(56, 56), dtype=dtype).zero_()
        frames_to_patches(x, size=(28, 28), dtype=dtype).zero_()
    assert torch.equal(x, before)


Y, UV = torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, 14, 14, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments",
    [
        {"planes": (Y,)},
        {"planes": (Y, UV[..., 0])},
        {"planes": (Y[:, 1:], UV[:, 1:])},
        {"planes": (Y.float(), UV.float())},
        {"planes": (Y, UV), "matrix": "240"},
        {"planes": (Y, UV), "range": "tv"},
    ],
)
def test_bad_planes(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="YuvFrames: "):
        YuvFrames(**arguments)


@pytest.mark.parametrize(
    ("patches", "dtype", "message"),
    [
        (torch.zeros(4, 588, dtype=torch.uint8), torch.bfloat16, r"\[rows, 1176 or 1536\], got \[4, 588\]"),
        (torch.zeros(4, 1176), torch.bfloat16, "uint8"),
        (torch.zeros(4, 1176, dtype=torch.uint8), torch.uint8, "floating"),
    ],
)
def test_normalize_patches_checks(patches: Tensor, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize_patches(patches, dtype)


@pytest.mark.parametrize(
    "constants", [{"mean": (0.5, 0.5)}, {"mean": (0.5, 0.5, math.nan)}, {"std": (0.5, 0.0, 0.5)}, {"std": ()}]
)
def test_constants_of_the_normalisation_are_checked(constants: dict[str, Any]) -> None:
    name = next(iter(constants))
    for call in (
        lambda: normalize_patches(torch.zeros(4, 1536, dtype=torch.uint8), **constants),
        lambda: frames_to_patches(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), size=(28, 28), **constants),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected three finite numbers"):
            call()
