"""What a decode step computes between its products: which operations, and their implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout.local.linear_attention import OPERATIONS as LINEAR_OPERATIONS
from videor1.rollout.local.linear_attention import LinearOperations
from videor1_kernels import dispatch
from videor1_kernels.prefix_attention import decode_backend


class Operations(NamedTuple):
    """Implementations of what a decode step computes between its products.

    They are called directly: the public functions would check at each call what is the same in every layer and step.
    """

    attention: Callable[..., Tensor]  # of prefix_decode_attention
    norm: Callable[..., tuple[Tensor, Tensor]]  # of add_rms_norm
    rotary: Callable[..., Tensor]  # of rotary_append
    silu: Callable[..., Tensor]  # of silu_mul
    gate: Callable[..., Tensor] | None  # of sigmoid_mul, where attention's output has a gate
    linear: LinearOperations | None  # where there is linear attention

    @staticmethod
    def names(model: VideoLM) -> tuple[str, ...]:
        """Return the operations that a step of the model has."""
        gate = ("sigmoid_mul",) if model.family.output_gate else ()
        linear = LINEAR_OPERATIONS if model.linear_layers else ()
        return ("prefix_decode_attention", "add_rms_norm", "rotary_append", "silu_mul", *gate, *linear)

    @staticmethod
    def of(model: VideoLM, backend: str) -> Operations:
        device, dtype = model.device, model.compute_dtype
        stream = next(model.hf.parameters()).dtype  # of the residual stream and the tables, fp32 in a whole bf16 model
        rarest = dtype if dtype == stream else torch.float32
        names = Operations.names(model)

        def resolve(op: str, of: torch.dtype = dtype, backend: str = backend) -> Any:
            return getattr(dispatch.resolve(op, backend, device, of), op)

        head_dim = attention_of(model.hf.model.language_model).head_dim
        return Operations(
            resolve("prefix_decode_attention", dtype, decode_backend(head_dim, device, backend)),
            resolve("add_rms_norm", rarest),
            resolve("rotary_append", rarest),
            resolve("silu_mul"),
            resolve("sigmoid_mul") if "sigmoid_mul" in names else None,
            LinearOperations(*map(resolve, LINEAR_OPERATIONS)) if model.linear_layers else None,
        )


def attention_of(text: Any) -> Any:
    """Return the attention of a language model's first layer that has it; that of others is of one kind with it."""
    return next(layer.self_attn for layer in text.layers if hasattr(layer, "self_attn"))
