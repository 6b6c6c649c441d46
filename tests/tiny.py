"""Small stand-ins for the parts of a Qwen2.5-VL checkpoint."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from videor1.model import VideoLM
from videor1.model.positions import PositionRule
from videor1.model.prompts import build_input_ids
from videor1.types import Media, Prompt, Sample
from videor1.video.patches import normalize_patches
from videor1_kernels.testing import rounding

# Additions in a row behind a log-prob of make_model or of the demo's model. A layer of the demo's has two norms, five
# products of 128 terms, one of 384 and a softmax over some hundred keys: 1,300 terms; four of them, the tower's and the
# head's make 7,000. torch and every BLAS add in 4 parts side by side or more, the lanes of the narrowest vector
# instructions: a quarter in a row, and some.
LOG_PROB_TERMS = 2000
# Of a gradient relative to its norm: what it is made of has been through the model once and comes back through two
# products in place of each.
GRADIENT_ROUNDING = rounding(3 * LOG_PROB_TERMS)

_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
SPECIAL_TOKENS = [f"<|{name}|>" for name in _NAMES]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}{{ '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens with Qwen2.5-VL's special tokens and kind of chat template."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    corpus = ["<think>The red square comes first, then the blue one.</think>\n<answer>A</answer>", "Options:\nA. red\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    core.train_from_iterator(corpus, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(seed: int = 0, **text: Any) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of 0.2 M random parameters for :func:`make_tokenizer`, with logits large enough to matter.

    ``text`` are other sizes of its language model. It may be changed; torch's generator is left as if its parameters
    had been drawn now.
    """
    model, state = _drawn_model(seed, tuple(text.items()))
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def _drawn_model(seed: int, text: tuple[tuple[str, Any], ...]) -> tuple[Qwen2_5_VLForConditionalGeneration, Tensor]:
    tokenizer = make_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"], "tie_word_embeddings": True, **dict(text),
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "fullatt_block_indexes": [1], "tokens_per_second": 2, "window_size": 56, "initializer_range": 0.15,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config).eval(), torch.get_rng_state()


def make_lm(seed: int = 0, position_rule: PositionRule = "paper") -> VideoLM:
    """A fresh tiny :class:`VideoLM` in fp32 on the CPU. Comparisons with transformers' own positions need its rule."""
    return VideoLM(make_model(seed), make_tokenizer(), source="tiny", position_rule=position_rule)


def log_prob_rounding(logp: torch.Tensor) -> float:
    """What rounding may change in fp32 log-probs such as these, between two right ways to compute them."""
    return rounding(LOG_PROB_TERMS, max(1.0, float(logp.detach().abs().max())))


def make_media(kind: str = "video", grid: tuple[int, int, int] = (2, 4, 4), *, seconds: float = 1.0, seed: int = 0):
    count = grid[0] * grid[1] * grid[2]
    patches = torch.randint(0, 256, (count, 1176), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Media(kind, patches, grid, seconds if kind == "video" else 0.0, 0.0)  # type: ignore[arg-type]


def make_prompt(media: Media | None = None, problem: str = "Which comes first?", draw: int = 0) -> Prompt:
    kind = media.kind if media else "text"
    sample = Sample(draw, str(draw), problem, kind, "free-form", "<answer>red</answer>", Path("clip.mp4"))
    return Prompt(sample, build_input_ids(make_tokenizer(), sample, media, max_prompt_length=4096), media, draw)


def installed_seconds(seconds: float) -> float:
    """``seconds`` per temporal patch as the installed transformers takes them: 5.17 cuts the fraction off, later
    versions do not. Only for comparisons with transformers; videor1 never cuts."""
    interval = inspect.signature(Qwen2_5_VLModel.get_vision_position_ids).parameters["time_interval"].default
    return float(int(seconds)) if interval == 1 and not isinstance(interval, float) else seconds


# Makers of prompts of every kind.
PROMPTS = {
    "video": lambda: make_prompt(make_media("video", (3, 4, 8), seconds=1.0, seed=1), draw=1),
    "slow video": lambda: make_prompt(
        make_media("video", (4, 4, 4), seconds=installed_seconds(3.7), seed=2), "And last?", draw=2
    ),
    "tall video": lambda: make_prompt(make_media("video", (2, 12, 4), seconds=installed_seconds(0.3), seed=3), draw=3),
    "image": lambda: make_prompt(make_media("image", (1, 8, 4), seed=4), "What is this? Say it in full.", draw=4),
    "text": lambda: make_prompt(None, "What is two and two?", draw=5),
}


def hf_inputs(model: VideoLM, prompt: Prompt, completion: Tensor | None = None) -> dict[str, Tensor]:
    """What transformers' own forward takes for a prompt, with a completion appended."""
    ids = prompt.input_ids if completion is None else torch.cat([prompt.input_ids, completion])
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    media, special = prompt.media, model.special
    if media is not None:
        kinds = torch.zeros_like(ids)
        kinds[ids == special.image_pad] = 1
        kinds[ids == special.video_pad] = 2
        pixels, grid = normalize_patches(media.patches, torch.float32), torch.tensor([media.grid_thw])
        name = "pixel_values" if media.kind == "image" else "pixel_values_videos"
        inputs |= {name: pixels, f"{media.kind}_grid_thw": grid, "mm_token_type_ids": kinds[None]}
        if media.kind == "video":
            inputs["second_per_grid_ts"] = torch.tensor([media.second_per_grid])
    return inputs


def greedy(plain: Any, model: VideoLM, inputs: dict[str, Tensor], count: int) -> Tensor:
    """At most ``count`` tokens that transformers' ``generate`` adds, by the rules of our engine: ``inputs`` as for its
    forward, no vision token, an end at eos or pad."""
    made = plain.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        bad_words_ids=[[token] for token in model.special.vision],
        eos_token_id=[model.special.eos, model.special.pad],
        pad_token_id=model.special.pad,
    )
    return made[0, inputs["input_ids"].shape[1] :]
