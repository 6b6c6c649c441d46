"""Qwen3.5, and 3.6 and 3.8, which are of one architecture: three layers of linear attention (Gated DeltaNet) to one of
attention, whose output has a gate. Prompts, frames and the tower are Qwen3-VL's, without deepstack."""

from __future__ import annotations

import dataclasses

from videor1.model.families.qwen3_vl import QWEN3_VL
from videor1.model.families.record import QWEN_LINEAR, nothing, pooled

QWEN3_5 = dataclasses.replace(
    QWEN3_VL,
    model_type="qwen3_5",
    name="Qwen3.5",
    model_class="Qwen3_5ForConditionalGeneration",
    features=pooled,
    layer_inputs=nothing,
    unit_offset=True,
    output_gate=True,
    opened=("<think>\n", "<think>\n\n</think>\n\n"),
    lora_targets=(*QWEN_LINEAR, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    recipes=("qwen3_5_9b",),
)
