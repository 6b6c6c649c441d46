"""Rollout requests on the tiny model, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import make_lm, make_media, make_prompt
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout import Branch, LocalEngine, Request, SamplingOptions
from videor1.types import Completion, Prompt

VIDEO = make_prompt(make_media("video", (3, 4, 4), seed=1), draw=1)
IMAGE = make_prompt(make_media("image", (1, 4, 8), seed=2), "What is this?", draw=2)
TEXT = make_prompt(None, "Two and two?", draw=3)


class Judge:
    """Needs the shuffled answers as ``verdicts[n]`` says once n answers are done; the last holds on."""

    def __init__(self, *verdicts: bool | None) -> None:
        self.verdicts = verdicts
        self.ordered: list[Completion] = []
        self.shuffled: list[Completion] = []

    def ordered_done(self, answer: Completion) -> None:
        self.ordered.append(answer)

    def shuffled_done(self, answer: Completion) -> None:
        self.shuffled.append(answer)

    @property
    def needed(self) -> bool | None:
        return self.verdicts[min(len(self.ordered) + len(self.shuffled), len(self.verdicts) - 1)]


def ask(
    model: VideoLM, prompt: Prompt, count: int = 4, seed: int = 0, names: tuple[str | int, ...] | None = None
) -> Request:
    """``count`` answers to the prompt, its frames in order."""
    with model.inference():
        features = model.vision_features([prompt.media])[0] if prompt.media else None
    return Request(prompt, seed, Branch(count, names or ("ordered", prompt.draw), features))


def answer(
    model: VideoLM, requests: Sequence[Request], options: SamplingOptions, **engine: Any
) -> list[list[Completion]]:
    """The ordered answers of each request."""
    groups = LocalEngine(model, options, **engine).generate(requests).groups
    return [list(group.ordered) for group in groups if group is not None]


def tokens(answers: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids.tolist() for c in group] for group in answers]


def rig(model: VideoLM, token: int, gain: float) -> VideoLM:
    """Raise a token's logit by about ``gain``, whatever the text before it.

    The last norm's output has a constant component after this: its weight is 0 in one dimension for all tokens but
    ``token``, and a hook sets that dimension to 1.
    """
    head = model.hf.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied from the embeddings
    with torch.no_grad():
        head.weight[:, 0] = 0.0
        head.weight[token, 0] = gain

    def constant(_module: object, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., 0] = 1.0
        return output

    model.hf.model.language_model.norm.register_forward_hook(constant)
    return model


def ending(gain: float = 5.0) -> VideoLM:
    """A tiny model whose answers end at many lengths."""
    model = make_lm()
    return rig(model, model.special.eos, gain)
