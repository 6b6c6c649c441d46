"""Create a tiny Qwen2.5-VL with random weights, saved as a Hugging Face folder like a published model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

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


def save_model(folder: Path, tokenizer: Qwen2Tokenizer, seed: int) -> None:
    """Write the model (1.1 M parameters, fp32), the tokenizer with its chat template, and the processor's files."""
    config = make_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    ids = special_ids(tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True, bos_token_id=ids.pad, eos_token_id=[ids.eos, ids.pad], pad_token_id=ids.pad
    )
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in PROCESSOR_FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Return the configuration of the tiny model.

    It has 2 vision layers, one of them with full attention, and 4 text layers. The initial weights are larger than
    those of a large model, so that such a small model learns within a few hundred steps.
    """
    ids = special_ids(tokenizer)
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 3 * HIDDEN,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "initializer_range": 0.08,
            "bos_token_id": ids.pad,
            "eos_token_id": ids.eos,
            "pad_token_id": ids.pad,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1],
            "window_size": 112,
            "tokens_per_second": 2,
            "initializer_range": 0.1,
        },
        image_token_id=ids.image_pad,
        video_token_id=ids.video_pad,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
        tie_word_embeddings=True,
    )
