"""Media from clips, equal to transformers' own image processor, and the orders in which their frames are shuffled."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_lm, make_media, make_model, make_prompt, make_tokenizer
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from videor1.config import VIDEO_MAX_PIXELS
from videor1.model import VideoLM
from videor1.types import Clip, Media
from videor1.video import read_image
from videor1.video.patches import (
    media_from_clip,
    normalize_patches,
    num_media_tokens,
    permute_frames,
    permute_temporal_patches,
)
from videor1.video.shuffle import draw_permutation, permuted_features, shuffled_patches
from videor1_kernels.frames_to_patches import frames_to_patches

GRID = (4, 4, 4)
LEVEL = 1 / (255 * 0.26130258)  # one of 255 levels after normalisation, in the channel where it is largest


def noise(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def scenes(count: int, height: int, width: int) -> np.ndarray:
    """Waves and speckles of middle levels: Pillow's resize in 8 bits would clip what overshoots in its first pass."""
    t, y, x = np.mgrid[:count, :height, :width]
    waves = np.stack([127 + 60 * np.sin((x + 5 * t) / (3 + c)) * np.cos(y / (9 - c)) for c in range(3)], -1)
    speckled = np.where((x // 16 + y // 16 + t)[..., None] % 5 == 0, 40 + noise(count, height, width, 3) % 176, waves)
    return speckled.astype(np.uint8)


def clip_of(frames: Tensor, size: tuple[int, int], fps: float = 2.0) -> Clip:
    count = len(frames)
    return Clip(frames, size, fps, tuple(range(count)), count, fps, "made", "made")  # type: ignore[arg-type]


def processor_patches(images: list[Any], min_pixels: int, max_pixels: int) -> tuple[Tensor, Tensor]:
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})
    out = processor(images=images, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def assert_within_a_level(media: Media, expected: Tensor) -> None:
    difference = (normalize_patches(media.patches, torch.float32) - expected).abs()
    assert difference.max() <= 1.01 * LEVEL
    assert difference.mean() < 0.3 * LEVEL


@pytest.mark.parametrize("size", [(120, 200), (333, 77), (48, 64), (700, 500)])
def test_image_equals_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(scenes(1, *size)[0]).save(path)
    media = media_from_clip(read_image(path), "image")
    expected, grid = processor_patches([Image.open(path)], 4 * 784, 256 * 784)
    assert media.grid_thw == tuple(grid[0].tolist())
    assert_within_a_level(media, expected)
    # Of the target size: to the bit of its levels.
    pixels = noise(56, 84, 3)
    media = media_from_clip(clip_of(pixels[None], (56, 84), fps=0.0), "image")
    expected, _ = processor_patches([Image.fromarray(pixels.numpy())], 784, 10**6)
    rounded = 4 * torch.finfo(torch.float32).eps * 3  # of two constants, a difference and a quotient, below 3
    torch.testing.assert_close(normalize_patches(media.patches, torch.float32), expected, rtol=0, atol=rounded)
    assert (media.second_per_grid, media.kind) == (0.0, "image")


def test_videos() -> None:
    clip = clip_of(torch.from_numpy(scenes(4, 240, 426)), (224, 420), fps=3.0)
    media = media_from_clip(clip, "video")
    assert media.grid_thw == (2, 16, 30)
    assert media.patches.dtype == torch.uint8
    # Each frame as an image is repeated in its pair.
    expected, _ = processor_patches([Image.fromarray(frame) for frame in clip.frames.numpy()], VIDEO_MAX_PIXELS, 105369)
    expected = expected.view(2, 2, 16 * 30, 3, 2, 196)  # t, frame of the pair, row, channel, tp, pixel
    expected = torch.stack((expected[:, 0, :, :, 0], expected[:, 1, :, :, 1]), 3).reshape(media.patches.shape)
    assert_within_a_level(media, expected)
    media = media_from_clip(clip_of(noise(5, 60, 90, 3), (56, 84), fps=4.0), "video", seconds=10.0)
    assert (media.grid_thw, media.patches.shape) == ((3, 4, 6), (3 * 4 * 6, 1176))
    assert media.second_per_grid == 0.5
    assert media.seconds > 10.0
    assert num_media_tokens(media.grid_thw) == 3 * 2 * 3
    with pytest.raises(ValueError, match="frames per second"):
        media_from_clip(clip_of(noise(2, 28, 28, 3), (28, 28), fps=0.0), "video")


@pytest.mark.parametrize("frames", [2, 5, 8])
def test_permute_frames_equals_decoding_in_that_order(frames: int) -> None:
    x, grid = noise(frames, 50, 80, 3), (-(-frames // 2), 4, 6)
    ordered = frames_to_patches(x, size=(56, 84), dtype=torch.uint8)
    before = ordered.clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        order = torch.randperm(frames, generator=generator)
        expected = frames_to_patches(x, size=(56, 84), dtype=torch.uint8, permutation=order)
        assert torch.equal(permute_frames(ordered, grid, order), expected)
        assert torch.equal(permute_frames(ordered, grid, order.tolist()), expected)
        bf16 = frames_to_patches(x, size=(56, 84), permutation=order)
        assert torch.equal(permute_frames(normalize_patches(ordered), grid, order), bf16)
    assert torch.equal(ordered, before)
    assert torch.equal(permute_frames(ordered, grid, range(frames)), ordered)


def test_other_permutations() -> None:
    x = noise(6, 56, 56, 3)
    ordered = frames_to_patches(x, size=(56, 56), dtype=torch.uint8)
    expected = frames_to_patches(x[[4, 5, 0, 1, 2, 3]], size=(56, 56), dtype=torch.uint8)
    assert torch.equal(permute_temporal_patches(ordered, (3, 4, 4), [2, 0, 1]), expected)
    assert torch.equal(permute_temporal_patches(ordered, (3, 4, 4), torch.arange(3)), ordered)
    media = make_media(grid=GRID)
    for permute in (permute_frames, permute_temporal_patches):
        for order in ([0, 1], [0] * 8, list(range(1, 9)), list(range(9)), [0, 1, 2, 2]):
            with pytest.raises(ValueError, match="permutation"):
                permute(media.patches, GRID, order)
        with pytest.raises(ValueError, match="for grid"):
            permute(media.patches, (3, 4, 4), [0, 1, 2])
    with pytest.raises(ValueError, match="permutation of 8 frames"):
        shuffled_patches(media, (1, 0, 2, 3), "frame")
    with pytest.raises(ValueError, match="permutation of the 4 temporal patches"):
        shuffled_patches(media, tuple(range(8)), "temporal_patch")


@pytest.mark.parametrize(("unit", "count"), [("frame", 8), ("temporal_patch", 4)])
def test_only_the_seed_and_the_draw_decide_an_order(unit: str, count: int) -> None:
    one = draw_permutation(make_prompt(make_media(grid=GRID, seed=1), "A?", draw=7), unit, 5)
    assert sorted(one) == list(range(count))
    torch.manual_seed(123)
    torch.rand(10)
    state = torch.get_rng_state()
    other = draw_permutation(make_prompt(make_media(grid=(4, 8, 4), seed=2, seconds=9.0), "B?", draw=7), unit, 5)
    assert one == other
    assert torch.equal(torch.get_rng_state(), state)
    media = make_media(grid=(8, 4, 4))
    orders = [draw_permutation(make_prompt(media, draw=d), unit, s) for d in range(6) for s in range(6)]
    assert len(set(orders)) == 36
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(2 * count))}
    assert draw_permutation(make_prompt(make_media("image", (1, 4, 4))), unit, 0) is None
    assert draw_permutation(make_prompt(None), unit, 0) is None
    # Every order of four frames is as likely, the identity included.
    prompt, count = make_prompt(make_media(grid=(2, 4, 4))), 2400
    drawn = Counter(draw_permutation(replace(prompt, draw=draw), "frame", 0) for draw in range(count))
    assert set(drawn) == set(itertools.permutations(range(4)))
    chi2 = sum((n - count / 24) ** 2 / (count / 24) for n in drawn.values())
    assert chi2 < 49.7  # the 0.999 quantile for 23 degrees of freedom


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reordered_features_are_bit_equal_to_encoding_again(dtype: torch.dtype) -> None:
    model = VideoLM(make_model().to(dtype), make_tokenizer()) if dtype != torch.float32 else make_lm()
    # Two windows of 4 x 4 patches in height and three in width, the last one narrow; both kinds of attention layers.
    media = make_media(grid=(4, 8, 10), seed=5)
    order = (2, 3, 1, 0)
    with model.inference():
        (ordered,) = model.vision_features([media])
        (encoded,) = model.vision_features([media], [shuffled_patches(media, order, "temporal_patch")])
    assert ordered.dtype == dtype
    assert torch.equal(permuted_features(ordered, media, order), encoded)
    assert not torch.equal(ordered, encoded)
    # Shuffled frames make other features.
    media = make_media(grid=(2, 4, 4))
    with model.inference():
        (ordered,) = model.vision_features([media])
        (shuffled,) = model.vision_features([media], [shuffled_patches(media, (2, 1, 0, 3), "frame")])
        (again,) = model.vision_features([media], [permute_frames(media.patches, media.grid_thw, (0, 1, 2, 3))])
    assert torch.equal(ordered, again)
    per_patch = ordered.unflatten(0, (2, -1))
    assert not any(torch.equal(row, other) for row in shuffled.unflatten(0, (2, -1)) for other in per_patch)
