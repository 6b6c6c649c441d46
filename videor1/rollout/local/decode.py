"""The two passes of a rollout over the language model: prompts (prefill), and one new token per sequence (decode)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videor1.model import VideoLM
from videor1.rollout.local.kv_cache import KVCache
from videor1.rollout.local.projections import Projections
from videor1_kernels import DecodeLayout, PrefixLayout, prefix_attention
from videor1_kernels.prefix_attention.decode_layout import DecodeInputs


@dataclass(frozen=True)
class Prefill:
    """Attention context of a prefill: prompts end to end, whose keys and values go to the cache at ``starts``."""

    layout: PrefixLayout
    cache: KVCache
    starts: Sequence[int]
    backend: str
    flash: bool = False  # whether flash-attn computes the attention

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        for pool, new in ((self.cache.prefix_k[layer], k), (self.cache.prefix_v[layer], v)):
            for start, begin, length in zip(
                self.starts, self.layout.prompt_starts, self.layout.prompt_lengths, strict=True
            ):
                pool[start : start + length] = new[begin : begin + length]
        if self.flash:
            return _flash_attention(q, k, v, self.layout, scale)
        return prefix_attention(q, k, v, self.layout, scale=scale, backend=self.backend)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float | None) -> Tensor:
    """Compute causal attention of prompts that lie end to end."""
    from flash_attn import flash_attn_varlen_func

    lengths = torch.tensor([0, *layout.prompt_lengths], dtype=torch.int32)
    ends, longest = lengths.cumsum(0, dtype=torch.int32).to(q.device), int(lengths.max())
    return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True)


@dataclass
class Decode:
    """Attention context of a decode step: one new token per sequence.

    Attributes:
        layout: its ``suffix_slots`` are the cache slots of the sequences.
        lengths: int64 [R], number of the sequences' sampled tokens, the new one included.
        attention: an implementation of ``prefix_decode_attention``. The public function would check the shapes at each
            call, though they are the same in every layer and step.
    """

    layout: DecodeLayout
    cache: KVCache
    lengths: Tensor
    attention: Callable[..., Tensor]

    def __post_init__(self) -> None:
        assert self.layout.suffix_slots is not None
        self.last = self.lengths - 1
        # If all sequences write at the same index of the first slots, that index: slicing is then faster.
        self.column: int | None = None
        if self.layout.slots_in_order and not self.lengths.is_cuda:
            first, *others = set(self.last.tolist())
            self.column = None if others else first

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        cache = self.cache
        suffix_k, suffix_v = cache.suffix_k[layer], cache.suffix_v[layer]
        if self.column is not None:
            suffix_k[: len(k), self.column], suffix_v[: len(v), self.column] = k, v
        else:
            slots = self.layout.suffix_slots
            suffix_k[slots, self.last], suffix_v[slots, self.last] = k, v
        inputs = DecodeInputs(q, cache.prefix_k[layer], cache.prefix_v[layer], suffix_k, suffix_v, self.lengths)
        return self.attention(inputs, self.layout, scale)


class Decoder:
    """The language model's forward pass for one new token per sequence.

    It uses the weights of transformers' modules directly: for a single token the code between the modules costs more
    than their computation.
    Text positions are equal in time, height and width, so that the rotary embedding is the plain one. fp32 results
    equal the model's own to rounding.
    """

    def __init__(self, model: VideoLM, positions: range) -> None:
        """``positions``: all positions of new tokens. After a long clip they begin far above the number of tokens."""
        self.model, self.text = model, model.hf.model.language_model
        self.layers = [_Layer.of(layer, model.compute_dtype) for layer in self.text.layers]
        attention = self.text.layers[0].self_attn
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.first = positions.start
        every = torch.arange(positions.start, positions.stop, device=model.device).expand(3, 1, -1)
        cos, sin = (x.reshape(len(positions), 1, -1) for x in self.text.rotary_emb(self._example_state(), every))
        half = self.head_dim // 2
        # The sign of rotate_half is moved into sin, so that a step needs only a roll.
        self.cos, self.sin = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)

    def _example_state(self) -> Tensor:
        """Return a tensor of the hidden states' dtype and device, which rotary_emb gives to its tables."""
        return self.text.embed_tokens(torch.zeros(1, 1, dtype=torch.int64, device=self.model.device))

    def states(self, tokens: Tensor, positions: Tensor, context: Decode) -> Tensor:
        """Return the last hidden states [R, H] in the compute dtype, of int64 ``tokens`` and ``positions`` [R]."""
        text, half = self.text, self.head_dim // 2
        hidden = text.embed_tokens(tokens)
        at = positions - self.first
        cos, sin = self.cos.index_select(0, at), self.sin.index_select(0, at)  # [R, 1, D]
        for index, layer in enumerate(self.layers):
            x = _norm(layer.input_norm, hidden)
            q, k, v = (projected.view(len(x), -1, self.head_dim) for projected in layer.qkv(x))
            # Products of bf16 with the fp32 tables are fp32, as in the model; the kernels take the values' dtype.
            q, k = (torch.addcmul(x * cos, x.roll(half, -1), sin).to(v.dtype) for x in (q, k))
            out = context.attend(index, q, k, v, self.scale)
            hidden = hidden + layer.out(out.flatten(1))[0]
            gate, up = layer.gate_up(_norm(layer.mlp_norm, hidden))
            hidden = hidden + layer.down(F.silu(gate) * up)[0]
        return text.norm(hidden).to(self.model.compute_dtype)


class _Layer(NamedTuple):
    """What a decoder layer computes with."""

    input_norm: nn.Module
    qkv: Projections
    out: Projections
    mlp_norm: nn.Module
    gate_up: Projections
    down: Projections

    @staticmethod
    def of(layer: Any, dtype: torch.dtype) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            layer.input_layernorm,
            Projections([attention.q_proj, attention.k_proj, attention.v_proj], dtype),
            Projections([attention.o_proj], dtype),
            layer.post_attention_layernorm,
            Projections([mlp.gate_proj, mlp.up_proj], dtype),
            Projections([mlp.down_proj], dtype),
        )


def _norm(module: Any, x: Tensor) -> Tensor:
    if x.is_cuda:  # A single kernel on a GPU; on a CPU torch's rms_norm is slower than the operations below.
        return torch.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(module.variance_epsilon).rsqrt_()
    return (wide * scale).to(x.dtype) * module.weight
