"""Models of Qwen2.5-VL's shapes with random weights, and a group of completions to one video for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from videor1.config import TrainConfig
from videor1.demo.tokenizer import make_tokenizer
from videor1.model import VideoLM
from videor1.model.lm import set_checkpointing
from videor1.model.positions import PositionRule
from videor1.model.prompts import special_ids
from videor1.training.passes import Packed, pack
from videor1.types import Media, Prompt, Sample

# The rule of positions of the installed transformers' classes, which the library is compared with.
COMPARED_RULE: PositionRule = "transformers"


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool  # the head is the embedding
    vision_depth: int
    vision_hidden: int
    vision_heads: int
    vision_intermediate: int
    vision_full: tuple[int, ...]  # layers of the tower without windows
    dtype: torch.dtype
    checkpointing: bool  # gradient checkpointing, unless the caller says otherwise


TOWER = (32, 1280, 16, 3420, (7, 15, 23, 31))
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("3b", 2048, 36, 16, 2, 11008, 151936, True, *TOWER, torch.bfloat16, True),
        Shape("7b", 3584, 28, 28, 4, 18944, 152064, False, *TOWER, torch.bfloat16, True),
        # For a CPU. Heads of 128, an intermediate size of 5.28 times the hidden one, and a head and a tower that take
        # the shares of the forward pass that the 7B's take.
        Shape("cpu", 1024, 4, 8, 1, 5408, 6144, False, 4, 400, 5, 1068, (3,), torch.float32, False),
        Shape("toy", 128, 2, 2, 1, 160, 512, False, 2, 32, 2, 64, (1,), torch.float32, False),
    )
}


@dataclass(frozen=True)
class Group:
    """Sizes of what is trained on: one video prompt of P tokens, G completions of C tokens each."""

    prompt: int
    generations: int
    completion: int
    text: int = 200  # of the prompt's tokens; the rest are the video's
    temporal: int = 8  # temporal patches, of two frames each

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, h, w) in patches. ValueError where the prompt leaves no video of that many temporal patches."""
        tokens, rest = divmod(self.prompt - self.text, self.temporal)
        if tokens < 1 or rest:
            raise ValueError(
                f"prompt: expected {self.text} tokens of text and a multiple of {self.temporal} of video, "
                f"got {self.prompt} in all"
            )
        side = max(2**k for k in range(tokens.bit_length()) if tokens % 2**k == 0 and 4**k <= tokens)
        return self.temporal, 2 * side, 2 * (tokens // side)


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What one step works on. The model's gradients exist before the first step, as in the middle of a run."""

    shape: Shape
    group: Group
    checkpointing: bool
    model: VideoLM
    packed: Packed
    advantages: Tensor  # [G]
    ref_logp: Tensor  # [N]
    config: TrainConfig


def step_inputs(shape: Shape, group: Group, checkpointing: bool, device: torch.device) -> StepInputs:
    """Make what a step works on; the same arguments give the same."""
    model = random_model(shape, device)
    set_checkpointing(model.hf, checkpointing)
    model.hf.train()
    for parameter in model.hf.parameters():
        parameter.grad = torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, _plain(model), (group.generations, group.completion), generator=generator)
    packed = pack(model, [video_prompt(model, group)], [list(text)])
    advantages = torch.randn(group.generations, generator=generator)
    # Near the log-probs of a random model: the KL term has a gradient, and nothing is clamped.
    ref_logp = 0.2 * torch.randn(len(packed.labels), generator=generator) - torch.tensor(float(shape.vocab)).log()
    return StepInputs(
        shape, group, checkpointing, model, packed, advantages.to(device), ref_logp.to(device), TrainConfig(beta=0.04)
    )


def random_model(shape: Shape, device: torch.device) -> VideoLM:
    """Weights from transformers' own initialisation, made on the device in the shape's dtype."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        hf = Qwen2_5_VLForConditionalGeneration._from_config(
            model_config(shape, tokenizer), dtype=shape.dtype, attn_implementation="sdpa"
        )
    return VideoLM(hf, tokenizer, device=device, source=shape.name, position_rule=COMPARED_RULE)


def model_config(shape: Shape, tokenizer: Any) -> Qwen2_5_VLConfig:
    ids = special_ids(tokenizer)
    quarter = shape.hidden // shape.heads // 8
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [quarter, quarter * 3 // 2, quarter * 3 // 2],
                "rope_theta": 1000000.0,
            },
            "bos_token_id": None,
            "eos_token_id": ids.eos,
            "pad_token_id": ids.pad,
            "tie_word_embeddings": shape.tied,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "num_heads": shape.vision_heads,
            "intermediate_size": shape.vision_intermediate,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": list(shape.vision_full),
            "window_size": 112,
            "tokens_per_second": 2,
        },
        image_token_id=ids.image_pad,
        video_token_id=ids.video_pad,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
        tie_word_embeddings=shape.tied,
    )


def video_prompt(model: VideoLM, group: Group) -> Prompt:
    """Text, a video of random pixels, text."""
    grid, generator = group.grid, torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (grid[0] * grid[1] * grid[2], 1176), dtype=torch.uint8, generator=generator)
    words = torch.randint(0, _plain(model), (group.text,), generator=generator)
    before = group.text // 4
    words[before - 1], words[before] = model.special.vision_start, model.special.vision_end
    pads = torch.full((group.prompt - group.text,), model.special.video_pad)
    ids = torch.cat([words[:before], pads, words[before:]])
    sample = Sample(0, "0", "", "video", "free-form", "<answer></answer>", Path("video.mp4"))
    return Prompt(sample, ids, Media("video", patches, grid, 1.0, 0.0), 0)


def _plain(model: VideoLM) -> int:
    """Ids below this stand for text."""
    return min(model.special.eos, model.special.pad, *model.special.vision)
