"""Qwen2.5-VL: windows in the tower, a video as one run of tokens whose positions in time are seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from videor1.model import vision
from videor1.model.families.foreign import QWEN3_TOKENS, qwen3_template
from videor1.model.families.record import Family
from videor1.model.positions import MediaRun
from videor1.types import Media
from videor1.video import QWEN2_RULES

_TOKENS_PER_SECOND = 2  # tokens_per_second of every Qwen2.5-VL's vision config


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


def _server_video(media: Media) -> dict[str, Any]:
    """vLLM spaces a video's positions in time by 2 / fps seconds."""
    return {"fps": 2 / _sixteen_bit_seconds(media.second_per_grid, media.grid_thw[0])}


def _sixteen_bit_seconds(seconds: float, T: int) -> float:
    """Return a bfloat16 number close to ``seconds`` that puts the T temporal patches at the same integer positions.

    vLLM rounds the seconds per temporal patch to the model's dtype: 7/12 s becomes 0.582 s, and patch 6 is then at
    position 6 instead of 7. Where none of the three closest numbers keeps all positions (only beyond T = 8 or 4 s), the
    closest one is returned, and positions are off by about 1.
    """

    def times(x: Tensor) -> list[int]:
        return (torch.arange(T) * (_TOKENS_PER_SECOND * x.float())).long().tolist()

    closest = torch.tensor(seconds, dtype=torch.bfloat16)
    candidates = [closest, *(torch.nextafter(closest, torch.tensor(side).bfloat16()) for side in (torch.inf, 0.0))]
    exact = times(torch.tensor(seconds))
    return float(next((x for x in candidates if times(x) == exact), closest))


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    model_class="Qwen2_5_VLForConditionalGeneration",
    frames=QWEN2_RULES,
    tower_inputs=_tower_inputs,
    runs=_runs,
    recipes=("qwen2_5_vl_3b", "qwen2_5_vl_7b", "video_r1", "sft"),
    server_video=_server_video,
    foreign_tokens=QWEN3_TOKENS,
    foreign_template=qwen3_template,
)
