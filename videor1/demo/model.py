"""Create a tiny model of a family with random weights, saved as a Hugging Face folder like a published model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2Tokenizer, Qwen3_5Config, Qwen3VLConfig
from transformers.utils import logging as transformers_logging

from videor1.model.families import FAMILIES
from videor1.model.prompts import special_ids

HIDDEN = 128

_PIXELS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "merge_size": 2,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "min_pixels": 56 * 56,
    "max_pixels": 16384 * 28 * 28,
    "processor_class": "Qwen2_5_VLProcessor",
}
PROCESSOR_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": _PIXELS | {"image_processor_type": "Qwen2VLImageProcessor"},
    "video_preprocessor_config.json": _PIXELS | {"video_processor_type": "Qwen2VLVideoProcessor"},
}


_QWEN3_PIXELS = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "processor_class": "Qwen3VLProcessor",
}
_QWEN3_PROCESSOR_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": _QWEN3_PIXELS
    | {"image_processor_type": "Qwen2VLImageProcessor", "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    "video_preprocessor_config.json": _QWEN3_PIXELS
    | {"video_processor_type": "Qwen3VLVideoProcessor", "size": {"shortest_edge": 4096, "longest_edge": 25165824}},
}


def save_model(folder: Path, tokenizer: Qwen2Tokenizer, seed: int, family: str = "qwen2_5_vl") -> None:
    """Write the model (1.1 to 1.2 M parameters, fp32), the tokenizer with its chat template, and the processor's files.

    Args:
        folder: where to.
        tokenizer: the family's, of :func:`~videor1.demo.tokenizer.make_tokenizer`.
        seed: determines the weights.
        family: a key of ``DEMO_MODELS``.
    """
    config = make_config(tokenizer, family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family].transformers_class()(config)
    ids = special_ids(tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True, bos_token_id=ids.pad, eos_token_id=[ids.eos, ids.pad], pad_token_id=ids.pad
    )
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in DEMO_MODELS[family].processor_files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_config(tokenizer: Qwen2Tokenizer, family: str = "qwen2_5_vl") -> Any:
    """Return the configuration of a family's tiny model, whose language model has 4 layers.

    The initial weights are larger than those of a large model, so that such a small model learns within a few hundred
    steps.
    """
    ids = special_ids(tokenizer)
    made = DEMO_MODELS[family]
    return made.config_class(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 3 * HIDDEN,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "initializer_range": 0.08,
            "bos_token_id": ids.pad,
            "eos_token_id": ids.eos,
            "pad_token_id": ids.pad,
            **made.text,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": HIDDEN,
            "initializer_range": 0.1,
            **made.vision,
        },
        image_token_id=ids.image_pad,
        video_token_id=ids.video_pad,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class DemoModel:
    """What the tiny model of one family has that another's has not."""

    config_class: Callable[..., Any]
    text: dict[str, Any]  # of the language model's configuration
    vision: dict[str, Any]  # of the tower's
    processor_files: dict[str, dict[str, Any]]


# By the family's model type, which is the value of the option ``demo``.
DEMO_MODELS = {
    # 2 vision layers, one of them with full attention.
    "qwen2_5_vl": DemoModel(
        Qwen2_5_VLConfig,
        {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}},
        {"depth": 2, "fullatt_block_indexes": [1], "window_size": 112, "tokens_per_second": 2},
        PROCESSOR_FILES,
    ),
    # 2 vision layers, the first of which also gives the features that are added to the first text layer.
    "qwen3_vl": DemoModel(
        Qwen3VLConfig,
        {
            "head_dim": HIDDEN // 4,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
                "rope_theta": 10000.0,
            },
        },
        {"depth": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        _QWEN3_PROCESSOR_FILES,
    ),
    # 3 text layers of linear attention and one of full attention.
    "qwen3_5": DemoModel(
        Qwen3_5Config,
        {
            "head_dim": HIDDEN // 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": HIDDEN // 4,
            "linear_value_head_dim": HIDDEN // 4,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
        {"depth": 2, "num_position_embeddings": 64},
        _QWEN3_PROCESSOR_FILES,
    ),
}
