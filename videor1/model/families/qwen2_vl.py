"""Qwen2-VL: no windows in the tower, a video as one run of tokens whose positions in time count temporal patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from videor1.model import vision
from videor1.model.families.foreign import QWEN3_TOKENS, qwen3_template
from videor1.model.families.record import Family
from videor1.model.positions import MediaRun
from videor1.types import Media
from videor1.video import QWEN2_RULES


def _tower_inputs(grid_thw: Tensor, config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    moved = {"position_ids": get_vision_position_ids(grid_thw, config.spatial_merge_size)}
    return vision.tower_inputs(moved, {"cu_seqlens": get_vision_cu_seqlens(grid_thw)}, config, device, dtype)


def _runs(media: Media, config: Any) -> list[MediaRun]:
    T, h, w = media.grid_thw
    return [MediaRun(torch.arange(T), h // config.spatial_merge_size, w // config.spatial_merge_size)]


QWEN2_VL = Family(
    model_type="qwen2_vl",
    name="Qwen2-VL",
    model_class="Qwen2VLForConditionalGeneration",
    frames=QWEN2_RULES,
    tower_inputs=_tower_inputs,
    runs=_runs,
    foreign_tokens=QWEN3_TOKENS,
    foreign_template=qwen3_template,
)
