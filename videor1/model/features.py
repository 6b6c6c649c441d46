"""Vision features of prompts, their frames in order or shuffled: whoever needs some has them made here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from videor1.model.lm import VideoLM
from videor1.model.packing import greedy_batches
from videor1.types import Media, Prompt
from videor1.video.shuffle import permuted_features, shuffled_patches

Order = tuple[int, ...] | None  # of a prompt's frames or temporal patches; None: as they are

PASS_PATCHES = 2**18  # in one pass of the vision tower, at most (a single video may have more)


def prompt_features(
    model: VideoLM, prompts: Sequence[Prompt], orders: Sequence[Order] | None = None, *, unit: str = "frame"
) -> list[Tensor | None]:
    """Features [tokens, H] of each prompt's media, frames in the given order; None without media.

    The tower takes no more than ``PASS_PATCHES`` at a time; gradients flow through all its passes.

    Args:
        orders: one per prompt; None: every prompt as it is.
        unit: what the orders are of, "frame" or "temporal_patch".
    """
    given = [None] * len(prompts) if orders is None else orders
    media = [(p.media, order) for p, order in zip(prompts, given, strict=True) if p.media is not None]
    encoded: list[Tensor] = []
    for part in _passes(model, media):
        patches = [m.patches if order is None else shuffled_patches(m, order, unit) for m, order in part]
        encoded += model.vision_features([m for m, _ in part], patches)
    features = iter(encoded)
    return [None if p.media is None else next(features) for p in prompts]


def shuffled_features(
    model: VideoLM,
    prompts: Sequence[Prompt],
    orders: Sequence[Order],
    *,
    unit: str,
    ordered: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """As :func:`prompt_features`, but None for a prompt without an order.

    ``ordered``: the prompts' features as they are, where they are known: temporal patches are then shuffled after the
    tower, without another pass.
    """
    found: list[Tensor | None] = [None] * len(prompts)
    moved = [i for i, order in enumerate(orders) if order is not None]
    if ordered is not None and unit == "temporal_patch":
        for i in moved:
            features, media, order = ordered[i], prompts[i].media, orders[i]
            if features is not None and media is not None and order is not None:
                found[i] = permuted_features(features, media, order)
        return found
    encoded = prompt_features(model, [prompts[i] for i in moved], [orders[i] for i in moved], unit=unit)
    for i, features in zip(moved, encoded, strict=True):
        found[i] = features
    return found


def _passes(model: VideoLM, media: Sequence[tuple[Media, Order]]) -> list[list[tuple[Media, Order]]]:
    """What the tower takes at a time: the activations of many long videos do not fit together."""
    if torch.is_grad_enabled() and any(hasattr(p, "ds_id") for p in model.visual.parameters()):
        # ZeRO-3 gathers the tower's weights from all ranks in each pass: none may make more passes than another.
        return [list(media)] if media else []
    return greedy_batches(media, lambda item: len(item[0].patches), PASS_PATCHES)
