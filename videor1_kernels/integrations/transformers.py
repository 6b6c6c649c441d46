"""Shared-prefix attention inside an unmodified transformers model, through its attention registry.

    register()
    model.set_attn_implementation(NAME)             # of the language model only
    model(inputs_embeds=..., position_ids=..., use_cache=False, videor1_context=PackedRow(layout))

transformers gives a registered name that it has no mask for ``attention_mask=None`` and hands every keyword argument
of ``forward`` to the attention function, so no class is patched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from videor1_kernels.prefix_attention import PrefixLayout, prefix_attention

NAME = "videor1_prefix"


class AttentionContext(Protocol):
    """The attention of one forward pass; ``attend`` is called once per layer."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Return the output [T, Hq, D] for q [T, Hq, D] and k, v [T, Hkv, D], which have rotary positions applied."""
        ...


@dataclass(frozen=True)
class PackedRow:
    """Training and prefill: one packed row of shared-prefix groups."""

    layout: PrefixLayout  # of the row
    backend: str = "auto"  # of prefix_attention

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return prefix_attention(q, k, v, self.layout, scale=scale, backend=self.backend)


def register() -> str:
    """Make :data:`NAME` known to transformers as an attention. A second call does no harm.

    Returns:
        ``"videor1_prefix"``, for ``attn_implementation`` or ``set_attn_implementation``. The forward pass then takes
        one row, [1, T], and the keyword argument ``videor1_context``: a :class:`PackedRow`, or another
        :class:`AttentionContext`.

    Raises:
        ImportError: transformers is not installed.

    Source:
        This library, on transformers' attention registry (https://github.com/huggingface/transformers).
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    return NAME


def _attention(
    module: Any,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    videor1_context: AttentionContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if videor1_context is None:
        raise ValueError(
            f"attention {NAME!r} needs the keyword argument videor1_context (a PackedRow, say) in the model's forward; "
            "load the model with attn_implementation='sdpa' for a plain forward or generate"
        )
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(
            f"attention {NAME!r} takes one packed row without a mask, got batch {query.shape[0]}, "
            f"mask {None if attention_mask is None else tuple(attention_mask.shape)}"
        )
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # As autocast does before torch's own attention: fp32 rotary tables have made query and key fp32.
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return videor1_context.attend(module.layer_idx, q, k, v, scaling)[None], None
