"""Vision features of prompts, with frames in order or shuffled: the one place where they are computed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from videor1.model.lm import VideoLM
from videor1.model.packing import LEAST_PATCHES, even_batches
from videor1.side_by_side import side_by_side
from videor1.types import Media, Prompt
from videor1.video.shuffle import permuted_features, shuffled_patches

Order = tuple[int, ...] | None  # permutation of a prompt's frames or temporal patches; None: in order

PASS_PATCHES = 2**18  # most patches in one pass of the vision tower (a single video may have more)


def prompt_features(
    model: VideoLM, prompts: Sequence[Prompt], orders: Sequence[Order] | None = None, *, unit: str = "frame"
) -> list[Tensor | None]:
    """Compute the vision features of prompts, with frames in the given orders.

    A pass of the tower takes at most ``PASS_PATCHES`` patches; gradients flow through all passes.

    Args:
        orders: one per prompt; None: all frames in order.
        unit: what the orders are permutations of, "frame" or "temporal_patch".

    Returns:
        Features [tokens, H] of each prompt's media; None for a prompt without media.
    """
    given = [None] * len(prompts) if orders is None else orders
    media = [(p.media, order) for p, order in zip(prompts, given, strict=True) if p.media is not None]

    def encoded(part: Sequence[tuple[Media, Order]]) -> list[Tensor]:
        patches = [m.patches if order is None else shuffled_patches(m, order, unit) for m, order in part]
        return model.vision_features([m for m, _ in part], patches)

    calls = [functools.partial(encoded, part) for part in _passes(model, media)]
    # A backward pass adds gradients in the order in which a thread has built the graph; between threads there is none.
    passes = [call() for call in calls] if torch.is_grad_enabled() else side_by_side(calls, model.device)
    features = itertools.chain.from_iterable(passes)
    return [None if p.media is None else next(features) for p in prompts]


def shuffled_features(
    model: VideoLM,
    prompts: Sequence[Prompt],
    orders: Sequence[Order],
    *,
    unit: str,
    ordered: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """Compute the features of shuffled prompts as :func:`prompt_features` does; None for a prompt without an order.

    Args:
        ordered: the features of the prompts in order, if they are known: temporal patches are then shuffled after the
            tower, without another pass.
    """
    result: list[Tensor | None] = [None] * len(prompts)
    shuffled = [i for i, order in enumerate(orders) if order is not None]
    if ordered is not None and unit == "temporal_patch":
        for i in shuffled:
            features, media, order = ordered[i], prompts[i].media, orders[i]
            if features is not None and media is not None and order is not None:
                result[i] = permuted_features(features, media, order)
        return result
    encoded = prompt_features(model, [prompts[i] for i in shuffled], [orders[i] for i in shuffled], unit=unit)
    for i, features in zip(shuffled, encoded, strict=True):
        result[i] = features
    return result


def _passes(model: VideoLM, media: Sequence[tuple[Media, Order]]) -> list[list[tuple[Media, Order]]]:
    """Divide the media into passes of the tower, since the activations of many long videos do not fit in memory."""
    if torch.is_grad_enabled() and any(hasattr(p, "ds_id") for p in model.visual.parameters()):
        # ZeRO-3 gathers the tower's weights from all ranks in each pass, so that all ranks must make as many passes.
        return [list(media)] if media else []
    return even_batches(media, lambda item: len(item[0].patches), PASS_PATCHES, model.device, least=LEAST_PATCHES)
