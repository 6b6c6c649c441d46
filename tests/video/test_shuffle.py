"""Permutations of a prompt's frames, and the two ways to the shuffled branch's vision features."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny import make_lm, make_media, make_model, make_prompt, make_tokenizer

from videor1.model import VideoLM
from videor1.video.patches import permute_frames
from videor1.video.shuffle import draw_permutation, permuted_features, shuffled_patches

GRID = (4, 4, 4)


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


def test_every_order_is_as_likely() -> None:
    prompt = make_prompt(make_media(grid=(2, 4, 4)))
    count = 2400
    drawn = Counter(draw_permutation(replace(prompt, draw=draw), "frame", 0) for draw in range(count))
    assert set(drawn) == set(itertools.permutations(range(4)))  # the identity included
    chi2 = sum((n - count / 24) ** 2 / (count / 24) for n in drawn.values())
    assert chi2 < 49.7  # the 0.999 quantile for 23 degrees of freedom


def test_patches_of_both_units() -> None:
    media = make_media(grid=GRID, seed=3)
    whole = media.patches.unflatten(0, (4, 16))
    pairs = shuffled_patches(media, (2, 0, 3, 1), "temporal_patch")
    assert torch.equal(pairs.unflatten(0, (4, 16)), whole[[2, 0, 3, 1]])
    order = (5, 0, 7, 2, 1, 6, 3, 4)
    frames = media.patches.view(4, 16, 3, 2, 196)
    new = shuffled_patches(media, order, "frame").view(4, 16, 3, 2, 196)
    for place, source in enumerate(order):
        assert torch.equal(new[place // 2, :, :, place % 2], frames[source // 2, :, :, source % 2])


def test_an_order_of_the_wrong_unit_is_refused() -> None:
    media = make_media(grid=GRID)
    with pytest.raises(ValueError, match="permutation of 8 frames"):
        shuffled_patches(media, (1, 0, 2, 3), "frame")
    with pytest.raises(ValueError, match="permutation of the 4 temporal patches"):
        shuffled_patches(media, tuple(range(8)), "temporal_patch")


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


def test_shuffled_frames_make_other_features() -> None:
    model, media = make_lm(), make_media(grid=(2, 4, 4))
    with model.inference():
        (ordered,) = model.vision_features([media])
        (shuffled,) = model.vision_features([media], [shuffled_patches(media, (2, 1, 0, 3), "frame")])
        (again,) = model.vision_features([media], [permute_frames(media.patches, media.grid_thw, (0, 1, 2, 3))])
    assert torch.equal(ordered, again)
    per_patch = ordered.unflatten(0, (2, -1))
    assert not any(torch.equal(row, other) for row in shuffled.unflatten(0, (2, -1)) for other in per_patch)
