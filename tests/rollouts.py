"""Rollout requests on the tiny model, and their answers."""

from __future__ import annotations

from collections.abc import Sequence

from videor1.model import VideoLM
from videor1.rollout import Branch, LocalEngine, Request, SamplingOptions
from videor1.types import Completion, Prompt


def ask(
    model: VideoLM, prompt: Prompt, count: int = 4, seed: int = 0, names: tuple[str | int, ...] | None = None
) -> Request:
    """``count`` answers to the prompt, its frames in order."""
    with model.inference():
        features = model.vision_features([prompt.media])[0] if prompt.media else None
    return Request(prompt, seed, Branch(count, names or ("ordered", prompt.draw), features))


def answer(
    model: VideoLM, requests: Sequence[Request], options: SamplingOptions, **engine: object
) -> list[list[Completion]]:
    """The ordered answers of each request."""
    groups = LocalEngine(model, options, **engine).generate(requests).groups  # type: ignore[arg-type]
    return [list(group.ordered) for group in groups if group is not None]
