"""The shuffled branch of a prompt: drawing the order of its frames, and its patches and features in that order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from videor1.seeding import generator
from videor1.types import Media, Order, Orders, Prompt
from videor1.video.patches import num_media_tokens, permute_frames, permute_temporal_patches


def draw_permutation(prompt: Prompt, unit: str, seed: int) -> Orders | None:
    """Draw uniformly random orders of the frames or temporal patches inside each clip of the prompt.

    The result is None where the prompt has no video, or has several media of which no clip has two frames (or temporal
    patches) to exchange. Images have no order, and nothing moves from one clip to another.

    The generator is used for this draw of the prompt alone, for one clip after the other:
    ``generator(seed, "permutation", draw)``.

    Args:
        prompt: the prompt.
        unit: "frame" or "temporal_patch", as ``temporal.shuffle_unit``.
        seed: the run's seed.
    """
    source = generator(seed, "permutation", prompt.draw)
    factor = 2 if unit == "frame" else 1

    def drawn(media: Media) -> Order | None:
        if media.kind != "video":
            return None
        return tuple(torch.randperm(factor * media.grid_thw[0], generator=source).tolist())

    orders = tuple(map(drawn, prompt.all_media))
    if not isinstance(prompt.media, tuple):
        return orders[0] if orders else None
    return orders if any(order is not None and len(order) > 1 for order in orders) else None


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


def features_of_each(features: Tensor, media: Sequence[Media]) -> list[Tensor]:
    """Divide the features [tokens, H] of a prompt's media into those of each."""
    return list(features.split([num_media_tokens(one.grid_thw) for one in media]))
