"""What a rollout benchmark works on: a model with random weights behind both ways, and prompts with their frames."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.step_inputs import COMPARED_RULE, SHAPES, Group, random_model, video_prompt
from videor1.demo.model import make_config
from videor1.demo.tokenizer import make_tokenizer
from videor1.model import VideoLM
from videor1.rollout import Branch, Request
from videor1.types import Media, Prompt
from videor1.video.patches import normalize_patches
from videor1.video.shuffle import draw_permutation, shuffled_patches

MODELS = ("tiny", "3b", "7b")  # tiny: the demonstration's
ORDERED, SHUFFLED = 8, 4  # completions to a prompt
SEED = 4  # with it the two likeliest tokens of a greedy completion of tiny are never within 1e-3: rounding changes none


@dataclass(frozen=True)
class Rollouts:
    """The sizes of a rollout. All prompts have one length, all completions ``new_tokens`` tokens."""

    model: str  # of MODELS
    prompts: int
    new_tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def group(self) -> Group:
        """One prompt: tiny's is of a video of 4 temporal patches of 4 x 4 patches, and of 60 tokens of text."""
        if self.model == "tiny":
            return Group(76, ORDERED, self.new_tokens, text=60, temporal=4)
        return Group(1224, ORDERED, self.new_tokens)

    @property
    def sequences(self) -> int:
        return self.prompts * (ORDERED + SHUFFLED)


@dataclass(frozen=True, eq=False)
class RolloutInputs:
    """What a rollout works on. No token ends a completion of ``model``."""

    sizes: Rollouts
    model: VideoLM
    plain: Any  # transformers' own model on the same parameters, with the attention sdpa
    prompts: tuple[Prompt, ...]
    orders: tuple[tuple[int, ...], ...]  # of each prompt's shuffled frames


def rollout_inputs(sizes: Rollouts, device: torch.device) -> RolloutInputs:
    """Make what a rollout works on; the same arguments give the same."""
    model = demo_model(sizes.dtype, device) if sizes.model == "tiny" else random_model(_shape(sizes), device)
    model.hf.eval().requires_grad_(False)
    first = video_prompt(model, sizes.group)
    prompts = tuple(_another(first, number) for number in range(sizes.prompts))
    orders = [draw_permutation(prompt, "frame", SEED) for prompt in prompts]
    plain = plain_copy(model)
    model.special = dataclasses.replace(model.special, eos=-1, pad=-1)
    return RolloutInputs(sizes, model, plain, prompts, tuple(order for order in orders if order is not None))


def demo_model(dtype: torch.dtype, device: torch.device) -> VideoLM:
    """The demonstration's model with random weights."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        hf = Qwen2_5_VLForConditionalGeneration(make_config(tokenizer)).to(dtype)
    return VideoLM(hf, tokenizer, device=device, source="tiny", position_rule=COMPARED_RULE)


def plain_copy(model: VideoLM) -> Any:
    """A copy of transformers' modules that shares their parameters. Its completions do not end either."""
    plain: Any = copy.deepcopy(model.hf, {id(parameter): parameter for parameter in model.hf.parameters()})
    plain.set_attn_implementation("sdpa")
    plain.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=model.special.pad)
    return plain


def requests(inputs: RolloutInputs) -> list[Request]:
    """Make the engine's requests by two passes of the vision tower, as the trainer does: one over all ordered frames,
    one over all shuffled ones."""
    media = [_media(prompt) for prompt in inputs.prompts]
    moved = [shuffled_patches(m, order, "frame") for m, order in zip(media, inputs.orders, strict=True)]
    with inputs.model.inference():
        ordered, shuffled = inputs.model.vision_features(media), inputs.model.vision_features(media, moved)
    return [
        Request(
            prompt,
            SEED,
            Branch(ORDERED, ("ordered", prompt.draw), one),
            Branch(SHUFFLED, ("shuffled", prompt.draw), other, order),
        )
        for prompt, one, other, order in zip(inputs.prompts, ordered, shuffled, inputs.orders, strict=True)
    ]


def branches(inputs: RolloutInputs) -> Iterator[tuple[Prompt, Tensor, int]]:
    """Yield (prompt, 8-bit patches in the branch's order, number of completions), of each prompt first the ordered
    branch, then the shuffled one."""
    for prompt, order in zip(inputs.prompts, inputs.orders, strict=True):
        media = _media(prompt)
        yield prompt, media.patches, ORDERED
        yield prompt, shuffled_patches(media, order, "frame"), SHUFFLED


def generate_inputs(inputs: RolloutInputs, prompt: Prompt, patches: Tensor) -> dict[str, Tensor]:
    """What transformers' ``generate`` takes for one prompt, pixels included."""
    model, media = inputs.model, _media(prompt)
    ids = prompt.input_ids[None].to(model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == model.special.video_pad).long(),
        "pixel_values_videos": normalize_patches(patches.to(model.device), model.compute_dtype),
        "video_grid_thw": torch.tensor([media.grid_thw], device=model.device),
        "second_per_grid_ts": torch.tensor([media.second_per_grid]),
    }


def weight_bytes(model: VideoLM) -> int:
    """What each decode step has to read: the language model's layers, its last norm and the head, in the compute dtype.
    Of the embedding it reads a row per token."""
    language = model.hf.model.language_model
    weights = [*language.layers.parameters(), *language.norm.parameters(), model.hf.lm_head.weight]
    return sum(weight.numel() for weight in weights) * model.compute_dtype.itemsize


def _shape(sizes: Rollouts) -> Any:
    return dataclasses.replace(SHAPES[sizes.model], dtype=sizes.dtype)


def _another(prompt: Prompt, number: int) -> Prompt:
    """The prompt with other pixels, as a draw of its own."""
    media, generator = _media(prompt), torch.Generator().manual_seed(number)
    patches = torch.randint(0, 256, media.patches.shape, dtype=torch.uint8, generator=generator)
    return dataclasses.replace(prompt, media=dataclasses.replace(media, patches=patches), draw=number)


def _media(prompt: Prompt) -> Media:
    assert prompt.media is not None
    return prompt.media
