"""The shuffled branch of a prompt: drawing the order of its frames, and its patches and features in that order."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1.seeding import generator
from videor1.types import Media, Prompt
from videor1.video.patches import permute_frames, permute_temporal_patches


def draw_permutation(prompt: Prompt, unit: str, seed: int) -> tuple[int, ...] | None:
    """Draw a uniformly random order of the prompt's frames or temporal patches; None where it is not a video.

    The generator is used for this draw of the prompt alone: ``generator(seed, "permutation", draw)``.

    Args:
        prompt: the prompt.
        unit: "frame" or "temporal_patch", as ``temporal.shuffle_unit``.
        seed: the run's seed.
    """
    if prompt.media is None or prompt.media.kind != "video":
        return None
    temporal_patches = prompt.media.grid_thw[0]
    count = 2 * temporal_patches if unit == "frame" else temporal_patches
    order = torch.randperm(count, generator=generator(seed, "permutation", prompt.draw))
    return tuple(order.tolist())


def shuffled_patches(media: Media, permutation: tuple[int, ...], unit: str) -> Tensor:
    """Return 8-bit patches as if the frames (or the temporal patches) had been shuffled before they were encoded."""
    permute = permute_frames if unit == "frame" else permute_temporal_patches
    return permute(media.patches, media.grid_thw, permutation)


def permuted_features(features: Tensor, media: Media, permutation: tuple[int, ...]) -> Tensor:
    """Return the vision tower's features [tokens, H] in a new order of temporal patches.

    The result is bit-equal to encoding the permuted patches, because the tower's attention stays inside a temporal
    patch and its rotary positions depend only on (h, w).
    """
    per_patch = features.unflatten(0, (media.grid_thw[0], -1))
    return per_patch[torch.tensor(permutation, device=features.device)].flatten(0, 1)
