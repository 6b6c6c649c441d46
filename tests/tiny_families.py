"""Tiny random models of every family, with prompts whose media are of the family's patches."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, installed_seconds, make_model, make_tokenizer
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from videor1.model import VideoLM
from videor1.model.families import FAMILIES
from videor1.model.prompts import build_input_ids
from videor1.types import Media, Prompt, Sample
from videor1.video.patches import normalize_patches
from videor1_kernels.frames_to_patches import patch_columns

WEIGHTS = 0.1  # so that log-probs stay below 8, where the last bit of fp32 is 5e-7
# Of a hybrid. Its norms of heads magnify what rounding leaves of sums that nearly cancel; with these weights few do.
HYBRID_WEIGHTS, HYBRID_CONVOLUTION = 0.06, 6.0

# Shapes of a Qwen3-VL: which layers of the tower are deepstack's, heads of q and k, entries of a head.
SHAPES: dict[str, tuple[list[int], tuple[int, int], int]] = {
    "one deepstack layer, GQA 2": ([1], (4, 2), 16),
    "three, GQA 7, heads wider than the model": ([0, 2, 3], (7, 1), 24),
    "three, GQA 2": ([1, 2, 3], (4, 2), 32),
}


@functools.cache
def make_qwen3_tokenizer() -> Any:
    """With a template that adds no system turn, as Qwen3-VL's."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = "{% for message in messages %}" + CHAT_TEMPLATE.partition("{% endif %}")[2]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    return tokenizer


def opening(tokenizer: Any, text: str) -> Any:
    """A copy whose chat template opens an answer with a text, as those of thinking models do."""
    tokenizer = copy.deepcopy(tokenizer)
    head, found, end = tokenizer.chat_template.rpartition("{% endif %}")
    assert found
    tokenizer.chat_template = f"{head}{{{{ {text!r} }}}}{found}{end}"
    return tokenizer


def tokenizer_of(model_type: str) -> Any:
    return make_qwen3_tokenizer() if model_type.startswith("qwen3") else make_tokenizer()


def _ids(tokenizer: Any) -> dict[str, int]:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: ids[token] for name, token in names.items()}


def qwen3_config(tokenizer: Any, shape: str = "three, GQA 2") -> Qwen3VLConfig:
    deepstack, (heads, key_heads), width = SHAPES[shape]
    sections = [width // 2 - 2 * (width // 6), width // 6, width // 6]
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": width,
            "max_position_embeddings": 4096, "initializer_range": WEIGHTS, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": sections, "mrope_interleaved": True, "rope_theta": 10000.0,
            },
        },
        vision_config={
            "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "num_position_embeddings": 36, "deepstack_visual_indexes": deepstack, "initializer_range": 0.15,
        },
        tie_word_embeddings=True,
        **_ids(tokenizer),
    )  # fmt: skip


def make_qwen3(shape: str = "three, GQA 2", seed: int = 0, tokenizer: Any = None) -> nn.Module:
    torch.manual_seed(seed)
    return _varied(Qwen3VLForConditionalGeneration(qwen3_config(tokenizer or make_qwen3_tokenizer(), shape)).eval())


def _varied(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # which begin as 1 and 0: what they do would not show
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


# Layers of a Qwen3.5, l: linear attention, f: full attention; its heads of k and v (linear), of q and k (full).
HYBRIDS: dict[str, tuple[str, tuple[int, int], tuple[int, int]]] = {
    "lllf, two heads of v to one of k": ("lllf", (2, 4), (4, 2)),
    "flfl, GQA 4": ("flfl", (3, 3), (4, 1)),
}


def make_qwen3_5(shape: str, seed: int = 0, tokenizer: Any = None) -> nn.Module:
    """With linear layers that keep much of their state: half of it over some tens of tokens."""
    tokenizer = tokenizer or make_qwen3_tokenizer()
    layers, (key_heads, value_heads), (heads, kv_heads) = HYBRIDS[shape]
    config = Qwen3_5Config(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": len(layers),
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 32,
            "layer_types": ["linear_attention" if kind == "l" else "full_attention" for kind in layers],
            "linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads,
            "linear_key_head_dim": 16, "linear_value_head_dim": 24,
            "max_position_embeddings": 4096, "initializer_range": HYBRID_WEIGHTS, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "num_position_embeddings": 36, "initializer_range": 0.15,
        },
        tie_word_embeddings=True,
        **_ids(tokenizer),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = _varied(Qwen3_5ForConditionalGeneration(config).eval())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-4, 0)
            elif name.endswith("conv1d.weight"):
                parameter.normal_(std=HYBRID_CONVOLUTION)
    return model


def make_qwen2(seed: int = 0) -> nn.Module:
    tokenizer = make_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "initializer_range": WEIGHTS, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "initializer_range": 0.15}
    torch.manual_seed(seed)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_ids(tokenizer))
    return Qwen2VLForConditionalGeneration(config).eval()


def make_family_lm(model_type: str, shape: str = "") -> VideoLM:
    """A fresh tiny model of a family, in fp32, with transformers' own positions."""
    if model_type == "qwen2_5_vl":
        hf = make_model(initializer_range=WEIGHTS)
        return VideoLM(hf, make_tokenizer(), source="tiny", position_rule="transformers")
    hf: nn.Module
    if model_type == "qwen2_vl":
        hf = make_qwen2()
    elif model_type == "qwen3_vl":
        hf = make_qwen3(shape or "three, GQA 2")
    else:
        hf = make_qwen3_5(shape or next(iter(HYBRIDS)))
    return VideoLM(hf, tokenizer_of(model_type), source="tiny", position_rule="transformers")


def family_media(
    model_type: str, kind: str = "video", grid: tuple[int, int, int] = (2, 4, 4), *, fps: float = 2.0, seed: int = 0
) -> Media:
    """Random patches; temporal patch t of a video is 2 (t + 0.25) / fps seconds after its beginning."""
    count, columns = grid[0] * grid[1] * grid[2], patch_columns(FAMILIES[model_type].frames.patch_size)
    patches = torch.randint(0, 256, (count, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    video = kind == "video"
    times = tuple(2 * (t + 0.25) / fps for t in range(grid[0])) if video else ()
    seconds = installed_seconds(2 / fps) if video else 0.0
    return Media(kind, patches, grid, seconds, 0.0, times=times)  # type: ignore[arg-type]


def family_prompt(model: VideoLM, media: Media | None, problem: str = "Which comes first?", draw: int = 0) -> Prompt:
    kind = media.kind if media else "text"
    sample = Sample(draw, str(draw), problem, kind, "free-form", "<answer>red</answer>", Path("clip.mp4"))
    ids = build_input_ids(model.tokenizer, sample, media, max_prompt_length=4096, family=model.family)
    return Prompt(sample, ids, media, draw)


def family_prompts(model: VideoLM) -> list[Prompt]:
    """Prompts of every kind: several grids, an image and text."""
    kind = model.family.model_type
    media = [
        family_media(kind, "video", (3, 4, 8), seed=1),
        family_media(kind, "video", (4, 4, 4), fps=0.3, seed=2),
        family_media(kind, "video", (1, 12, 4), fps=7.0, seed=3),
        family_media(kind, "image", (1, 8, 4), seed=4),
        None,
    ]
    return [family_prompt(model, one, f"And number {draw}?", draw) for draw, one in enumerate(media)]


def family_inputs(model: VideoLM, prompt: Prompt, answer: Tensor | None = None) -> dict[str, Tensor]:
    """What transformers' own forward takes for a prompt, with an answer appended."""
    ids = prompt.input_ids if answer is None else torch.cat([prompt.input_ids, answer])
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    media, special = prompt.media, model.special
    if media is not None:
        kinds = (ids == special.image_pad).long() + 2 * (ids == special.video_pad)
        pixels = normalize_patches(media.patches, torch.float32, model.family.frames)
        name = "pixel_values" if media.kind == "image" else "pixel_values_videos"
        inputs |= {
            name: pixels,
            f"{media.kind}_grid_thw": torch.tensor([media.grid_thw]),
            "mm_token_type_ids": kinds[None],
        }
        if media.kind == "video" and model.family.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([media.second_per_grid])
    return inputs
