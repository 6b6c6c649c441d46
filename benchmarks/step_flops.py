"""Floating-point operations of a training step of Qwen2.5-VL, by formula: a product [m, k] x [k, n] counts 2 m k n.

Counted are the linear layers, attention over the pairs of positions that see each other, and the head. Norms, rotary
positions and activations are not. A backward pass counts twice the forward pass (once for the inputs, once for the
weights), except behind the pixels, which need no gradient; gradient checkpointing adds the forward pass of the layers.
What an implementation computes twice on its own account (scores in the backward pass of attention, say) is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Grid = tuple[int, int, int]
PATCH_COLUMNS = 1176  # pixel values of a patch: 3 colours, 2 frames, 14 x 14


@dataclass(frozen=True)
class Flops:
    """The operations of one forward pass."""

    linear: float  # of the language model's layers
    attention: float
    head: float
    tower: float  # linear layers and merger of the vision tower
    tower_attention: float
    patches: float  # its patch embedding

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head + self.tower + self.tower_attention + self.patches

    def training(self, *, checkpointing: bool) -> float:
        """Forward and backward."""
        layers = self.linear + self.attention + self.tower + self.tower_attention
        return (4 if checkpointing else 3) * layers + 3 * self.head + 2 * self.patches


def forward(config: Any, *, tokens: int, pairs: int, head_positions: int, grids: Sequence[Grid]) -> Flops:
    """One forward pass.

    Args:
        config: a ``Qwen2_5_VLConfig``.
        tokens: positions that go through the language model, copies and padding included.
        pairs: (query, key) pairs that attention is over, of all rows.
        head_positions: rows of logits.
        grids: (T, h, w) in patches of every media that the tower encodes, copies included.
    """
    text, vision = config.text_config, config.vision_config
    H, layers = text.hidden_size, text.num_hidden_layers
    D = getattr(text, "head_dim", None) or H // text.num_attention_heads
    queries, keys = text.num_attention_heads * D, text.num_key_value_heads * D
    weights = 2 * H * queries + 2 * H * keys + 3 * H * text.intermediate_size
    return Flops(
        linear=2.0 * tokens * weights * layers,
        attention=4.0 * queries * pairs * layers,
        head=2.0 * head_positions * H * text.vocab_size,
        tower=_tower(vision, grids),
        tower_attention=_tower_attention(vision, grids),
        patches=2.0 * sum(T * h * w for T, h, w in grids) * PATCH_COLUMNS * vision.hidden_size,
    )


def causal_pairs(length: int) -> int:
    """Pairs of a sequence by itself, in which each position sees those up to its own."""
    return length * (length + 1) // 2


def shared_pairs(prompt: int, completions: Sequence[int]) -> int:
    """Pairs of a packed group, in which the prompt stands once and each completion sees the prompt and itself."""
    return causal_pairs(prompt) + sum(n * prompt + causal_pairs(n) for n in completions)


def _tower(vision: Any, grids: Sequence[Grid]) -> float:
    hidden, merge = vision.hidden_size, vision.spatial_merge_size
    patches = sum(T * h * w for T, h, w in grids)
    block = 4 * hidden * hidden + 3 * hidden * vision.intermediate_size
    wide = hidden * merge**2
    merger = wide * (wide + vision.out_hidden_size)
    return 2.0 * (vision.depth * patches * block + patches // merge**2 * merger)


def _tower_attention(vision: Any, grids: Sequence[Grid]) -> float:
    full = len(vision.fullatt_block_indexes)
    pairs = sum(T * (full * (h * w) ** 2 + (vision.depth - full) * _window_pairs(h, w, vision)) for T, h, w in grids)
    return 4.0 * vision.hidden_size * pairs


def _window_pairs(h: int, w: int, vision: Any) -> int:
    """Pairs within the windows of one temporal patch; those at the edge are cut."""
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
    rows, columns = ([min(side, n - i) for i in range(0, n, side)] for n in (h, w))
    return sum((a * b) ** 2 for a in rows for b in columns)
