"""liger-kernel's Triton kernels for RMSNorm, SwiGLU and the rotary embedding of a Qwen2.5-VL."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from videor1.errors import ConfigError, install


def use_liger(hf: Any) -> None:
    """Replace the forward passes of a model's norms and MLPs, and transformers' rotary embedding of its architecture.

    The rotary embedding is a function of transformers' module: it changes for every Qwen2.5-VL of the process. Results
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
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    # M-RoPE chooses the angles before this function is called, which then does the plain rotation.
    assert modeling.apply_rotary_pos_emb
    modeling.apply_rotary_pos_emb = liger_rotary_pos_emb
    text, tower = hf.model.language_model, hf.model.visual
    norms = [text.norm, *(norm for block in tower.blocks for norm in (block.norm1, block.norm2))]
    for layer in text.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)
    for norm in norms:
        _use_norm(norm, LigerRMSNorm)


def _use_norm(norm: nn.Module, liger_norm: Any) -> None:
    """Replace a norm's forward pass by Liger's, and set what that reads from the module.

    It must not work in place, since its input is the residual stream.
    """
    settings = {"offset": 0.0, "casting_mode": "llama", "in_place": False, "row_mode": None}
    for name, value in settings.items():
        setattr(norm, name, value)
    norm.forward = MethodType(liger_norm.forward, norm)
