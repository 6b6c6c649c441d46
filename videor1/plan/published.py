"""Configurations of published models, which a plan knows by name, so that it reads nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen3_5Config, Qwen3VLConfig


@dataclass(frozen=True)
class Text:
    """Sizes of a language model."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int
    tied: bool  # whether the head is the embedding

    def config(self, **more: Any) -> dict[str, Any]:
        """Return the text_config."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "tie_word_embeddings": self.tied,
            **more,
        }


def _qwen2_5(text: Text) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0}
    return Qwen2_5_VLConfig(
        text_config=text.config(max_position_embeddings=128000, rope_parameters=rope),
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": text.hidden,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        tie_word_embeddings=text.tied,
    )


def _qwen3(text: Text, *, large_tower: bool) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5000000.0}
    depth, hidden, intermediate = (27, 1152, 4304) if large_tower else (24, 1024, 4096)
    return Qwen3VLConfig(
        text_config=text.config(max_position_embeddings=262144, rope_parameters=rope, head_dim=128),
        vision_config={
            "depth": depth,
            "hidden_size": hidden,
            "num_heads": 16,
            "intermediate_size": intermediate,
            "out_hidden_size": text.hidden,
            "num_position_embeddings": 48 * 48,
            "deepstack_visual_indexes": [8, 16, 24] if large_tower else [5, 11, 17],
        },
        tie_word_embeddings=text.tied,
    )


def _qwen3_5_9b() -> Qwen3_5Config:
    """transformers' defaults, which it says are those of the 9B."""
    return Qwen3_5Config(vision_config={"out_hidden_size": 4096})


# A name for the command line, which is also found in a published name such as Qwen/Qwen3-VL-4B-Instruct.
PUBLISHED: dict[str, Callable[[], Any]] = {
    "qwen2.5-vl-3b": lambda: _qwen2_5(Text(2048, 36, 16, 2, 11008, 151936, True)),
    "qwen2.5-vl-7b": lambda: _qwen2_5(Text(3584, 28, 28, 4, 18944, 152064, False)),
    "qwen3-vl-2b": lambda: _qwen3(Text(2048, 28, 16, 8, 6144, 151936, True), large_tower=False),
    "qwen3-vl-4b": lambda: _qwen3(Text(2560, 36, 32, 8, 9728, 151936, True), large_tower=False),
    "qwen3-vl-8b": lambda: _qwen3(Text(4096, 36, 32, 8, 12288, 151936, False), large_tower=True),
    "qwen3.5-9b": _qwen3_5_9b,
    "qwen3-vl-32b": lambda: _qwen3(Text(5120, 64, 64, 8, 25600, 151936, False), large_tower=True),
}
_SHORT = {"3b": "qwen2.5-vl-3b", "7b": "qwen2.5-vl-7b"}
_KINDS = ("-instruct", "-thinking")  # with the same shapes


def published(name: str) -> Any:
    """Return the configuration of a published model by its name, or None.

    Args:
        name: a key of ``PUBLISHED``, ``3b`` or ``7b`` (of Qwen2.5-VL), or a name of Qwen's at the hub.
    """
    key = name.lower().removeprefix("qwen/")
    for kind in _KINDS:
        key = key.removesuffix(kind)
    made = PUBLISHED.get(_SHORT.get(key, key))
    return made and made()
