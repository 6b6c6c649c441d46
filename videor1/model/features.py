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
from videor1.types import Media, Order, Orders, Prompt
from videor1.video.shuffle import features_of_each, permuted_features, shuffled_patches

PASS_PATCHES = 2**18  # most patches in one pass of the vision tower (a single video may have more)


def prompt_features(
    model: VideoLM, prompts: Sequence[Prompt], orders: Sequence[Orders | None] | None = None, *, unit: str = "frame"
) -> list[Tensor | None]:
    """Compute the vision features of prompts, with frames in the given orders: one run of the tower over all media.

    A pass of the tower takes at most ``PASS_PATCHES`` patches; gradients flow through all passes.

    Args:
        orders: one per prompt; None: all frames in order.
        unit: what the orders are permutations of, "frame" or "temporal_patch".

    Returns:
        Features [tokens, H] of each prompt's media, in their order; None for a prompt without media.
    """
    given = [None] * len(prompts) if orders is None else orders
    media = [
        pair
        for prompt, order in zip(prompts, given, strict=True)
        for pair in zip(prompt.all_media, prompt.orders(order), strict=True)
    ]
    features = iter(_encode(model, media, unit))
    return [_joined(list(itertools.islice(features, len(p.all_media)))) for p in prompts]


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Return the features of a prompt from those of its media; None without media."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0] if parts else None


def _encode(model: VideoLM, media: Sequence[tuple[Media, Order | None]], unit: str) -> list[Tensor]:
    """Return the features of each medium with its frames in an order; None: as they are."""

    def encoded(part: Sequence[tuple[Media, Order | None]]) -> list[Tensor]:
        patches = [m.patches if order is None else shuffled_patches(m, order, unit) for m, order in part]
        return model.vision_features([m for m, _ in part], patches)

    calls = [functools.partial(encoded, part) for part in _passes(model, media)]
    # A backward pass adds gradients in the order in which a thread has built the graph; between threads there is none.
    passes = [call() for call in calls] if torch.is_grad_enabled() else side_by_side(calls, model.device)
    return list(itertools.chain.from_iterable(passes))


def shuffled_features(
    model: VideoLM,
    prompts: Sequence[Prompt],
    orders: Sequence[Orders | None],
    *,
    unit: str,
    ordered: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """Compute the features of shuffled prompts as :func:`prompt_features` does; None for a prompt without an order.

    Args:
        ordered: the features of the prompts in order, if they are known. Those of media that are not shuffled, such as
            images, are taken from them, and temporal patches are shuffled after the tower, without another pass.
    """
    known = list(ordered) if ordered is not None else [None] * len(prompts)
    parts: dict[tuple[int, int], Tensor] = {}  # the features of each medium, by the numbers of its prompt and its own
    missing: dict[tuple[int, int], tuple[Media, Order | None]] = {}
    shuffled = [i for i, order in enumerate(orders) if order is not None]
    for i in shuffled:
        prompt, features = prompts[i], known[i]
        given = [None] * len(prompt.all_media) if features is None else features_of_each(features, prompt.all_media)
        for place, (media, order, own) in enumerate(
            zip(prompt.all_media, prompt.orders(orders[i]), given, strict=True)
        ):
            if own is not None and order is None:
                parts[i, place] = own
            elif own is not None and order is not None and unit == "temporal_patch":
                parts[i, place] = permuted_features(own, media, order)
            else:
                missing[i, place] = media, order
    parts |= dict(zip(missing, _encode(model, list(missing.values()), unit), strict=True))
    result: list[Tensor | None] = [None] * len(prompts)
    for i in shuffled:
        result[i] = _joined([parts[i, place] for place in range(len(prompts[i].all_media))])
    return result


def _passes(model: VideoLM, media: Sequence[tuple[Media, Order | None]]) -> list[list[tuple[Media, Order | None]]]:
    """Divide the media into passes of the tower, since the activations of many long videos do not fit in memory."""
    if torch.is_grad_enabled() and any(hasattr(p, "ds_id") for p in model.visual.parameters()):
        # ZeRO-3 gathers the tower's weights from all ranks in each pass, so that all ranks must make as many passes.
        return [list(media)] if media else []
    return even_batches(media, lambda item: len(item[0].patches), PASS_PATCHES, model.device, least=LEAST_PATCHES)
