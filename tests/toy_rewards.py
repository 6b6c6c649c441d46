"""Reward functions for tests: an untrained model earns nothing, so that its updates would all be zero."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from videor1.types import Sample


def uneven(completions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """A number in [0, 1) that depends on every letter of an answer."""
    return [zlib.crc32(text.encode()) % 97 / 97 for text in completions]


def not_finite(completions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """What a reward must not return."""
    return [float("nan")] * len(completions)


def brief(completions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """The fewer letters the better."""
    return [max(0.0, 1 - len(text) / 20) for text in completions]


def nothing(completions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """All answers alike: nothing can be learned from them."""
    return [0.0] * len(completions)


def sometimes(completions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """Of every other question, all answers alike."""
    return [
        zlib.crc32(text.encode()) % 97 / 97 if sample.index % 2 else 0.0
        for text, sample in zip(completions, samples, strict=True)
    ]
