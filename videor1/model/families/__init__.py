"""The table of model families: a new one is a file beside this and a line here."""

from __future__ import annotations

from videor1.errors import ConfigError
from videor1.model.families.qwen2_5_vl import QWEN2_5_VL
from videor1.model.families.qwen2_vl import QWEN2_VL
from videor1.model.families.qwen3_5 import QWEN3_5
from videor1.model.families.qwen3_vl import QWEN3_VL
from videor1.model.families.record import Family

__all__ = ["FAMILIES", "QWEN2_5_VL", "Family", "family_of"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_5)}

# Models that look like a family's and are not.
_MISSING = {
    "qwen3_vl_moe": "its experts are fused tensors, which adapters do not reach, and a rollout here computes no "
    "router; only half of the model would be trained. Take a dense Qwen3-VL (2B, 4B, 8B, 32B)"
}


def family_of(model_type: object, source: str = "") -> Family:
    """Return the family of a model type.

    Args:
        model_type: that of a config.json.
        source: the model, for the message.

    Raises:
        ConfigError: there is none; the message names those there are.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if missing := _MISSING.get(str(model_type)):
        raise ConfigError(f"model_name_or_path: {source!r} is a model of type {model_type!r}, refused: {missing}")
    if family is None:
        known = ", ".join(f"{f.model_type} ({f.name})" for f in FAMILIES.values())
        raise ConfigError(f"model_name_or_path: {source!r} is a model of type {model_type!r}, expected one of {known}")
    return family
