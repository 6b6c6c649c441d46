"""Vision features of prompts, their frames in order or in another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from videor1.config import EvalOptions
from videor1.model.lm import VideoLM
from videor1.types import Media, Prompt
from videor1.video.shuffle import shuffled_patches

_PATCHES = 2**18  # in one pass of the vision tower, at most (a single video may have more)


def prompt_features(
    model: VideoLM, prompts: Sequence[Prompt], orders: Sequence[tuple[int, ...] | None], config: EvalOptions
) -> list[Tensor | None]:
    """Vision features of each prompt, its frames in the given order; None without media."""
    media = [(p.media, order) for p, order in zip(prompts, orders, strict=True) if p.media is not None]
    unit = config.temporal.shuffle_unit
    encoded: list[Tensor] = []
    for part in _passes(media):
        patches = [m.patches if order is None else shuffled_patches(m, order, unit) for m, order in part]
        encoded += model.vision_features([m for m, _ in part], patches)
    features = iter(encoded)
    return [None if p.media is None else next(features) for p in prompts]


def _passes(media: list[tuple[Media, tuple[int, ...] | None]]) -> Iterator[list[tuple[Media, tuple[int, ...] | None]]]:
    """What the vision tower takes at a time: long videos at many frames do not fit together."""
    part: list[tuple[Media, tuple[int, ...] | None]] = []
    for item in media:
        if part and sum(len(m.patches) for m, _ in part) + len(item[0].patches) > _PATCHES:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def media_features(model: VideoLM, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Vision features of the prompts that have media, in order; one pass of the tower for all of them."""
    return model.vision_features([p.media for p in prompts if p.media is not None])
