"""Qwen3-VL, dense: times as text before each temporal patch of a video, and features of three layers of the tower more,
which are added to the language model's first layers (deepstack)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from videor1.model import vision
from videor1.model.families.foreign import qwen2_template
from videor1.model.families.record import Family
from videor1.model.positions import MediaRun
from videor1.types import Media
from videor1.video import QWEN3_RULES


def _tower_inputs(grid_thw: Tensor, config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    merge = config.spatial_merge_size
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid_thw,
        math.isqrt(config.num_position_embeddings),
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=merge,
    )
    positions = get_vision_position_ids(grid_thw, merge)
    moved = {"position_ids": positions, "interp_indices": indices, "interp_weights": weights}
    return vision.tower_inputs(moved, {"cu_seqlens": get_vision_cu_seqlens(grid_thw)}, config, device, dtype)


def _runs(media: Media, config: Any) -> list[MediaRun]:
    """A run for each temporal patch: time is in the text between them."""
    T, h, w = media.grid_thw
    merge = config.spatial_merge_size
    return [MediaRun(torch.zeros(1, dtype=torch.int64), h // merge, w // merge)] * T


def _video_text(media: Media, place: str) -> str:
    """Return the text of a video: before the place of each temporal patch its time, in the true order.

    The times are in place of the template's own start and end tokens, not between them, as in the processor that
    published the models and in vLLM's.
    """
    if len(media.times) != media.grid_thw[0]:
        raise ValueError(f"expected the times of {media.grid_thw[0]} temporal patches, got {len(media.times)}")
    return "".join(f"<{time:.1f} seconds>{place}" for time in media.times)


def _server_video(media: Media) -> dict[str, Any]:
    """vLLM writes the mean of a temporal patch's two ``frames_indices`` / fps into the text, to a tenth of a second.

    So both are what the text has, in tenths: the same text in any case.
    """
    tenths = [round(10 * float(f"{time:.1f}")) for time in media.times for _ in range(2)]
    return {"fps": 10, "frames_indices": tenths, "total_num_frames": max(len(tenths), tenths[-1] + 1)}


def _features(output: Any) -> Tensor:
    return torch.cat([output.pooler_output, *output.deepstack_features], 1)


def _layer_inputs(further: Sequence[Tensor], at: Tensor) -> dict[str, Any]:
    return {"visual_pos_masks": at, "deepstack_visual_embeds": list(further)}


QWEN3_VL = Family(
    model_type="qwen3_vl",
    name="Qwen3-VL",
    model_class="Qwen3VLForConditionalGeneration",
    frames=QWEN3_RULES,
    tower_inputs=_tower_inputs,
    runs=_runs,
    video_text=_video_text,
    features=_features,
    layer_inputs=_layer_inputs,
    head_norms=lambda attention: (attention.q_norm, attention.k_norm),
    tokens=("<think>", "</think>"),
    opened=("<think>\n",),  # the Thinking models' template; the Instruct models' opens none
    recipes=("qwen3_vl_4b", "qwen3_vl_8b"),
    foreign_template=qwen2_template,
    server_video=_server_video,
)
