"""liger-kernel's Triton kernels for the RMSNorms, SwiGLU and the rotary embedding of a model."""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

from torch import nn

from videor1.errors import ConfigError, install
from videor1.model.families import family_of


def use_liger(hf: Any) -> None:
    """Replace the forward passes of a model's norms and MLPs, and transformers' rotary embedding of its architecture.

    The rotary embedding is a function of transformers' module: it changes for every model of the class. Results
    agree to rounding; weights, names and checkpoints stay as they are. (Liger's own
    ``apply_liger_kernel_to_qwen2_5_vl`` needs torchvision for a loss that is not used here, and replaces a function of
    M-RoPE that the supported transformers do not have.)

    Raises:
        ConfigError: liger-kernel is not installed.
    """
    try:
        from liger_kernel.transformers.rms_norm import LigerRMSNorm
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
        from liger_kernel.transformers.swiglu import LigerSwiGLUMLP
    except ImportError as error:
        raise ConfigError(f"model.liger: {error}; {install('liger')}") from error

    modeling: Any = sys.modules[type(hf).__module__]
    text, tower = hf.model.language_model, hf.model.visual
    # M-RoPE chooses the angles before this function is called, which then does the plain rotation. Liger's rotates
    # whole heads.
    assert modeling.apply_rotary_pos_emb
    if text.config.rope_parameters.get("partial_rotary_factor", 1.0) == 1.0:
        modeling.apply_rotary_pos_emb = liger_rotary_pos_emb
    # Of the class of the last one: that of linear attention takes a gate besides.
    norms = [m for part in (text, tower.blocks) for m in part.modules() if type(m) is type(text.norm)]
    for layer in text.layers:
        layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)
    unit_offset = family_of(hf.config.model_type).unit_offset
    for norm in norms:
        _use_norm(norm, LigerRMSNorm, unit_offset=unit_offset)


def _use_norm(norm: nn.Module, liger_norm: Any, *, unit_offset: bool) -> None:
    """Replace a norm's forward pass by Liger's, and set what that reads from the module.

    It must not work in place, since its input is the residual stream. A norm by 1 + weight rounds where Gemma's does.
    """
    settings = {"offset": 0.0, "casting_mode": "llama", "in_place": False, "row_mode": None}
    if unit_offset:
        settings |= {"offset": 1.0, "casting_mode": "gemma", "variance_epsilon": norm.eps}
    for name, value in settings.items():
        setattr(norm, name, value)
    norm.forward = MethodType(liger_norm.forward, norm)
