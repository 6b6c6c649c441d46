"""Qwen2.5-VL: windows in the tower, a video as one run of tokens whose positions in time are seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from videor1.model import vision
from videor1.model.families.record import Family
from videor1.model.positions import MediaRun
from videor1.types import Media
from videor1.video import QWEN2_RULES


def _tower_inputs(grid_thw: Tensor, config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    merge = config.spatial_merge_size
    index, windows = get_vision_window_index(grid_thw, merge, config.window_size, config.patch_size)
    moved = {"position_ids": get_vision_position_ids(grid_thw, merge), "window_index": index}
    frames = get_vision_cu_seqlens(grid_thw)
    bounds = {"cu_window_seqlens": windows, "cu_seqlens": frames}
    return vision.tower_inputs(moved, bounds, config, device, dtype)


def _runs(media: Media, config: Any) -> list[MediaRun]:
    """One run; a video's time is int(t * tokens_per_second * second_per_grid)."""
    # In fp32, as transformers computes it: the truncation to int must agree.
    seconds = torch.tensor(media.second_per_grid)
    interval = config.tokens_per_second * seconds if media.kind == "video" else torch.tensor(0.0)
    T, h, w = media.grid_thw
    merge = config.spatial_merge_size
    return [MediaRun((torch.arange(T) * interval).long(), h // merge, w // merge)]


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    model_class="Qwen2_5_VLForConditionalGeneration",
    frames=QWEN2_RULES,
    tower_inputs=_tower_inputs,
    runs=_runs,
    recipes=("qwen2_5_vl_3b", "qwen2_5_vl_7b", "video_r1", "sft"),
    served=True,
)
