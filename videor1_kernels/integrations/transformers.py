"""Shared prompts inside an unmodified transformers model: attention through its registry, and linear attention.

    share_prefixes(language_model)                  # of the language model only
    model(inputs_embeds=..., position_ids=..., use_cache=False, videor1_context=PackedRow(layout))

transformers gives a registered name that it has no mask for ``attention_mask=None`` and hands every keyword argument
of ``forward`` to the attention function, so that no class is patched for it. There is no such registry for linear
attention: its layers get a subclass of their own class.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videor1_kernels.prefix_attention import PrefixLayout, prefix_attention
from videor1_kernels.prefix_gated_delta import ACTIVATIONS, prefix_causal_conv, prefix_gated_delta

NAME = "videor1_prefix"
LINEAR = "linear_attention"  # in a config's layer_types
LINEAR_KERNELS = ("prefix_causal_conv", "prefix_gated_delta")  # what such a layer computes a packed row with


class AttentionContext(Protocol):
    """What the tokens of one forward pass see: ``attend`` is called once per layer of attention, ``convolve`` and then
    ``recur`` once per layer of linear attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Return the output [T, Hq, D] for q [T, Hq, D] and k, v [T, Hkv, D], which have rotary positions applied."""
        ...

    def convolve(self, layer: int, x: Tensor, weight: Tensor, activation: str) -> Tensor:
        """Return the causal convolution [T, C] of x [T, C] with weight [C, K], as ``prefix_causal_conv`` does."""
        ...

    def recur(self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """Return the output [T, Hv, Dv] of the gated delta rule for q, k [T, Hk, Dk], v [T, Hv, Dv] and g, beta
        [T, Hv], as ``prefix_gated_delta`` does."""
        ...


@dataclass(frozen=True)
class PackedRow:
    """Training and prefill: one packed row of shared-prefix groups."""

    layout: PrefixLayout  # of the row
    backend: str = "auto"  # of prefix_attention, see linear_backend for linear attention

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return prefix_attention(q, k, v, self.layout, scale=scale, backend=self.backend)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, activation: str) -> Tensor:
        backend = linear_backend(self.backend)
        return prefix_causal_conv(x, weight, self.layout, activation=activation, backend=backend)

    def recur(self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return prefix_gated_delta(q, k, v, g, beta, self.layout, backend=linear_backend(self.backend))


def linear_backend(backend: str) -> str:
    """Return the backend of linear attention where ``backend`` is that of attention: there is ``auto``, which means
    flash-linear-attention's Triton kernels where they run, and ``reference``."""
    return "reference" if backend == "reference" else "auto"


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


def share_prefixes(language_model: Any) -> int:
    """Have a language model of transformers take packed rows of shared-prefix groups, through its linear layers too.

    Without this a layer of linear attention would run over a packed row from end to end: the state of one answer would
    leak into the next, without an error. Known are Qwen3.5's layers (Gated DeltaNet with ``in_proj_qkv``,
    ``in_proj_z``, ``in_proj_a`` and ``in_proj_b``). Parameters keep their names, and ``forward`` without
    ``videor1_context`` is the model's own.

    Args:
        language_model: the decoder, with ``layers`` and ``set_attn_implementation``.

    Returns:
        The number of layers of linear attention.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model has linear attention of another kind.

    Source:
        This library, on Qwen3.5's layers in transformers (https://github.com/huggingface/transformers).
    """
    language_model.set_attn_implementation(register())
    kinds = getattr(language_model.config, "layer_types", None) or ()
    linear = [layer for layer, kind in zip(language_model.layers, kinds, strict=False) if kind == LINEAR]
    for layer in linear:
        mixer: Any = getattr(layer, "linear_attn", None)
        if not (hasattr(mixer, "forward") and all(hasattr(mixer, name) for name in _MIXER)):
            raise ValueError(
                f"share_prefixes: {type(layer).__name__} has linear attention of a kind that is not known here "
                f"({type(mixer).__name__}); a packed row would leak from one answer into the next. Known is a Gated "
                f"DeltaNet with {', '.join(_MIXER)}, as Qwen3.5's linear_attn"
            )
        if mixer.activation not in ACTIVATIONS:
            raise ValueError(f"share_prefixes: expected an activation of {ACTIVATIONS}, got {mixer.activation!r}")
        if type(mixer.conv1d) is not _Convolution:  # which it is where this was called before
            base: Any = type(mixer)
            mixer.__class__, mixer.conv1d.__class__ = _shared(base), _Convolution
    for layer in language_model.layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.videor1_shares = True
    return len(linear)


# What a layer of linear attention computes with.
_MIXER = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "conv1d", "A_log", "dt_bias", "norm", "out_proj")


class _Convolution(nn.Conv1d):
    """The convolution of such a layer, called as a module: hooks that gather its weight (ZeRO-3) are called."""

    def forward(
        self, x: Tensor, context: AttentionContext | None = None, layer: int = 0, activation: str = ""
    ) -> Tensor:
        if context is None:
            return super().forward(x)
        return context.convolve(layer, x, self.weight.squeeze(1), activation)


@functools.cache
def _shared(base: Any) -> Any:
    """A layer's class, whose ``forward`` leaves what crosses tokens to the context."""

    def forward(
        module: Any,
        hidden_states: Tensor,  # [1, T, H]
        *arguments: Any,  # whose order and names transformers' versions change
        videor1_context: AttentionContext | None = None,
        **options: Any,
    ) -> Tensor:
        if videor1_context is None:
            out: Tensor = base.forward(module, hidden_states, *arguments, **options)
            return out
        _check_row(hidden_states, options.get("attention_mask"))
        context, layer, x = videor1_context, module.layer_idx, hidden_states[0]
        mixed = module.conv1d(module.in_proj_qkv(x), context, layer, module.activation)
        q, k, v = mixed.split([module.key_dim, module.key_dim, module.value_dim], -1)
        q, k = (part.unflatten(-1, (-1, module.head_k_dim)) for part in (q, k))
        v, z = (part.unflatten(-1, (-1, module.head_v_dim)) for part in (v, module.in_proj_z(x)))
        # In fp32 whatever the layer's dtype: exp of a rounded logarithm would be far off after many tokens.
        g = -module.A_log.float().exp() * F.softplus(module.in_proj_a(x).float() + module.dt_bias)
        mixed = context.recur(layer, q, k, v, g, module.in_proj_b(x).sigmoid())
        normed = module.norm(mixed.flatten(0, 1), z.flatten(0, 1))
        return module.out_proj(normed.view(1, len(x), -1))

    return type(base.__name__, (base,), {"forward": forward})


def _check_row(x: Tensor, mask: Tensor | None) -> None:
    if x.shape[0] != 1 or mask is not None:
        raise ValueError(
            f"attention {NAME!r} takes one packed row without a mask, got batch {x.shape[0]}, "
            f"mask {None if mask is None else tuple(mask.shape)}"
        )


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
    _check_row(query, attention_mask)
    kinds = getattr(getattr(module, "config", None), "layer_types", None) or ()
    if LINEAR in kinds and not hasattr(module, "videor1_shares"):
        raise ValueError(
            "the model has layers of linear attention, which would carry what they know from one completion of a "
            "packed row into the next: call videor1_kernels.integrations.transformers.share_prefixes(language_model) "
            "in place of set_attn_implementation"
        )
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # As autocast does before torch's own attention: fp32 rotary tables have made query and key fp32.
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return videor1_context.attend(module.layer_idx, q, k, v, scaling)[None], None
