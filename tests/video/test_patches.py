"""Media from clips, equal to transformers' own image processor, and shuffles of 8-bit patches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from media import real_video
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from videor1.config import VIDEO_MAX_PIXELS
from videor1.types import Clip
from videor1.video import read_frames, read_image
from videor1.video.patches import (
    media_from_clip,
    normalize_patches,
    num_media_tokens,
    permute_frames,
    permute_temporal_patches,
)
from videor1_kernels.frames_to_patches import frames_to_patches

LEVEL = 1 / (255 * 0.26130258)  # one of 255 levels after normalisation, in the channel where it is largest


def noise(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def pillow_clips(frames, size):
    """Return bool [F, H, W, 3]: where Pillow's resize, which works in 8 bits, may clip the overshoot of its first pass.

    Torch's antialiased bicubic keeps that overshoot through the second pass and clips once, as torchvision does on
    float frames. Which of the two passes Pillow takes first depends on the sizes: either counts here.
    """
    x = frames.permute(0, 3, 1, 2).float()  # [F, 3, height, width]
    touched = [first_pass_clips(x, size).permute(0, 2, 3, 1)]
    touched.append(first_pass_clips(x.transpose(2, 3), size[::-1]).permute(0, 3, 2, 1))
    return touched[0] | touched[1]


def first_pass_clips(x, size):
    """Return bool [F, 3, *size]: pixels whose second (vertical) pass uses a value that the first pass clipped."""
    first = F.interpolate(x, size=(x.shape[2], size[1]), mode="bicubic", antialias=True)
    clipped = (first < -0.5) | (first > 255.5)
    scale = x.shape[2] / size[0]
    reach = 2 * max(scale, 1.0)
    rows = []
    for i in range(size[0]):
        centre = scale * (i + 0.5)
        rows.append(clipped[:, :, max(int(centre - reach + 0.5), 0) : int(centre + reach + 0.5)].any(2))
    return torch.stack(rows, 2)


def clip_of(frames, size, fps=2.0):
    return Clip(
        frames=frames,
        size=size,
        fps=fps,
        timestamps=tuple(range(len(frames))),
        total_frames=len(frames),
        source_fps=fps,
        path="made",
        backend="made",
    )


def processor_patches(images, min_pixels, max_pixels):
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})
    out = processor(images=images, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


@pytest.mark.parametrize("size", [(120, 200), (333, 77), (48, 64), (700, 500)])
def test_image_equals_transformers(tmp_path, size):
    y, x = np.mgrid[: size[0], : size[1]]
    waves = np.stack([127 + 60 * np.sin(x / (3 + c)) * np.cos(y / (9 - c)) for c in range(3)], -1)
    speckled = np.where((x // 16 + y // 16)[..., None] % 5 == 0, 40 + noise(*size, 3).numpy() % 176, waves)
    Image.fromarray(speckled.astype(np.uint8)).save(tmp_path / "a.png")
    clip = read_image(tmp_path / "a.png")
    assert not pillow_clips(clip.frames, clip.size).any()
    media = media_from_clip(clip, "image")
    expected, grid = processor_patches([Image.open(tmp_path / "a.png")], 4 * 784, 256 * 784)
    assert media.grid_thw == tuple(grid[0].tolist())
    difference = (normalize_patches(media.patches, torch.float32) - expected).abs()
    assert difference.max() <= 1.01 * LEVEL
    assert difference.mean() < 0.3 * LEVEL


def test_image_of_the_target_size_equals_transformers_to_the_bit_of_its_levels():
    pixels = noise(56, 84, 3)
    media = media_from_clip(clip_of(pixels[None], (56, 84), fps=0.0), "image")
    expected, _ = processor_patches([Image.fromarray(pixels.numpy())], 784, 10**6)
    rounded = 4 * torch.finfo(torch.float32).eps * 3  # of two constants, a difference and a quotient, below 3
    torch.testing.assert_close(normalize_patches(media.patches, torch.float32), expected, rtol=0, atol=rounded)
    assert media.second_per_grid == 0.0
    assert media.kind == "image"


@pytest.mark.parametrize("name", ["nasa.mp4", "pancake.mkv", "av1.mkv"])
def test_video_frames_equal_transformers(name):
    clip = read_frames(real_video(name))
    media = media_from_clip(clip, "video")
    T, h, w = media.grid_thw
    assert (T, h, w) == (len(clip.frames) // 2, clip.size[0] // 14, clip.size[1] // 14)
    assert media.patches.dtype == torch.uint8
    assert media.second_per_grid == 2 / clip.fps
    images = [Image.fromarray(frame) for frame in clip.frames.numpy()]
    expected, _ = processor_patches(images, VIDEO_MAX_PIXELS, 105369)  # each frame as an image: repeated in its pair
    expected = expected.view(T, 2, h * w, 3, 2, 196)  # t, frame of the pair, row, channel, tp, pixel
    expected = torch.stack((expected[:, 0, :, :, 0], expected[:, 1, :, :, 1]), 3).reshape(media.patches.shape)
    difference = (normalize_patches(media.patches, torch.float32) - expected).abs()
    clips = frames_to_patches(pillow_clips(clip.frames, clip.size).byte(), size=clip.size, dtype=torch.uint8).bool()
    assert clips.float().mean() < 0.1
    assert difference[~clips].max() <= 1.01 * LEVEL
    assert difference.mean() < 0.2 * LEVEL


def test_media_of_a_clip():
    clip = clip_of(noise(5, 60, 90, 3), (56, 84), fps=4.0)
    media = media_from_clip(clip, "video", seconds=10.0)
    assert media.grid_thw == (3, 4, 6)
    assert media.patches.shape == (3 * 4 * 6, 1176)
    assert media.second_per_grid == 0.5
    assert 10.0 < media.seconds < 12.0
    assert num_media_tokens(media.grid_thw) == 3 * 2 * 3
    with pytest.raises(ValueError, match="frames per second"):
        media_from_clip(clip_of(noise(2, 28, 28, 3), (28, 28), fps=0.0), "video")


@pytest.mark.parametrize("frames", [2, 5, 8])
def test_permute_frames_equals_decoding_in_that_order(frames):
    x = noise(frames, 50, 80, 3)
    grid = (-(-frames // 2), 4, 6)
    ordered = frames_to_patches(x, size=(56, 84), dtype=torch.uint8)
    before = ordered.clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        order = torch.randperm(frames, generator=generator)
        expected = frames_to_patches(x, size=(56, 84), dtype=torch.uint8, permutation=order)
        assert torch.equal(permute_frames(ordered, grid, order), expected)
        assert torch.equal(permute_frames(ordered, grid, order.tolist()), expected)
        bf16 = frames_to_patches(x, size=(56, 84), permutation=order)
        assert torch.equal(permute_frames(normalize_patches(ordered), grid, order), bf16)
    assert torch.equal(ordered, before)
    assert torch.equal(permute_frames(ordered, grid, range(frames)), ordered)


def test_permute_temporal_patches_moves_pairs():
    x = noise(6, 56, 56, 3)
    ordered = frames_to_patches(x, size=(56, 56), dtype=torch.uint8)
    expected = frames_to_patches(x[[4, 5, 0, 1, 2, 3]], size=(56, 56), dtype=torch.uint8)
    assert torch.equal(permute_temporal_patches(ordered, (3, 4, 4), [2, 0, 1]), expected)
    assert torch.equal(permute_temporal_patches(ordered, (3, 4, 4), torch.arange(3)), ordered)


@pytest.mark.parametrize("permute", [permute_frames, permute_temporal_patches])
def test_bad_permutations(permute):
    patches = torch.zeros(4 * 16, 1176, dtype=torch.uint8)
    for order in ([0, 1], [0] * 8, list(range(1, 9)), list(range(9)), [0, 1, 2, 2]):
        with pytest.raises(ValueError, match="permutation"):
            permute(patches, (4, 4, 4), order)
    with pytest.raises(ValueError, match="for grid"):
        permute(patches, (3, 4, 4), [0, 1, 2])
