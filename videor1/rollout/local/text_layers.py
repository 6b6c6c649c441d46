"""The language model's layers in one call on a CPU, in fp32: prompts, or one new token per sequence.

A pass of a small model is hundreds of small operations, which take longer to start than to compute, one after the other
under Python's lock. csrc/text_layers.cpp makes the whole pass; several run side by side.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from videor1.rollout.local.kv_cache import KVCache
from videor1.rollout.local.operations import attention_of
from videor1.rollout.local.projections import Projections
from videor1_kernels import DecodeLayout, PrefixLayout, extension
from videor1_kernels.extension import vector_bits
from videor1_kernels.prefix_attention.work import segment_numbers

PANEL = 32  # kPanel
LANES = 16  # of which the heads' size is a multiple
MOST_WEIGHTS = 2**24  # numbers; a larger model's products take long enough to be started one by one, on all cores
OPERATIONS = ("prefix_decode_attention", "add_rms_norm", "rotary_append")


@functools.cache
def _functions() -> tuple[Callable[..., int], bytes] | str:
    """The function, and the addresses of those that it calls; or why there is none here."""
    try:
        step = extension.load("decode_step")
        called = [
            step.add_rms_norm,
            step.rotary_append,
            extension.load("decode_attention").decode_attention,
            extension.load("prefix_attention").prefix_attention,
        ]
        call = extension.load("text_layers").text_layers
    except extension.Unavailable as reason:
        return str(reason)
    call.argtypes = [ctypes.c_char_p]
    return call, struct.pack("4q", *(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in called))


class TextLayers:
    """The layers with their weights, which must not change meanwhile.

    Use :meth:`of`, which returns None where the model or the machine is another.
    """

    def __init__(self, text: Any, layers: Sequence[Any], call: Callable[..., int], functions: bytes) -> None:
        attention, config = attention_of(text), text.config
        self._call, self._functions = call, functions
        self._dim, self._scale = attention.head_dim, float(attention.scaling)
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._mlp = config.intermediate_size
        self._eps = layers[0].input_norm.eps
        self._head_eps = 0.0 if layers[0].head_norms is None else layers[0].head_norms.eps
        self._kept: list[Tensor] = []  # what the numbers of the layers point to
        self._layers = [self._numbers(layer) for layer in layers]

    @staticmethod
    def of(text: Any, layers: Sequence[Any], dtype: torch.dtype) -> TextLayers | None:
        """Return them for a language model and its layers' weights; None where the pass cannot be one call."""
        parameters = list(text.parameters())
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in text.modules() if m is not text.norm)
        plain = (
            dtype == torch.float32
            and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters)
            and sum(p.numel() for p in parameters) - text.embed_tokens.weight.numel() <= MOST_WEIGHTS
            and text.config.hidden_act == "silu"
            and all(layer.linear is None for layer in layers)
            and not any(norm.unit_offset for layer in layers for norm in (layer.input_norm, layer.mlp_norm))
            and attention_of(text).head_dim % LANES == 0
            and all(p.joined() is not None for layer in layers for p in layer if isinstance(p, Projections))
            and all(getattr(layer.self_attn, "sliding_window", None) is None for layer in text.layers)
            and len({norm.eps for layer in layers for norm in (layer.input_norm, layer.mlp_norm)}) == 1
            and len({layer.head_norms and layer.head_norms.eps for layer in layers}) == 1
            and not hooked  # they would not be called
        )
        found = _functions() if plain else ""
        return None if isinstance(found, str) else TextLayers(text, layers, *found)

    def _numbers(self, layer: Any) -> bytes:
        norms = [layer.input_norm.weight.contiguous(), layer.mlp_norm.weight.contiguous()]
        self._kept += norms
        qkv, out, gate_up, down = (self._linear(p) for p in (layer.qkv, layer.out, layer.gate_up, layer.down))
        first, second = (struct.pack("q", norm.data_ptr()) for norm in norms)
        heads = [] if layer.head_norms is None else [norm.contiguous() for norm in layer.head_norms[:2]]
        self._kept += heads
        head_norms = struct.pack("2q", *([norm.data_ptr() for norm in heads] or (0, 0)))
        return first + qkv + out + second + gate_up + down + head_norms

    def _linear(self, projections: Projections) -> bytes:
        joined = projections.joined()
        assert joined is not None
        weight, bias, b = joined
        panels = [_panels(weight)] + ([] if b is None else [_panels(b)])
        if bias is not None:
            panels.append(torch.cat([bias, bias.new_zeros(-len(bias) % PANEL)]))
        self._kept += panels
        rank = 0 if b is None else b.shape[1]
        pointers = panels[0].data_ptr(), panels[-1].data_ptr() if bias is not None else 0
        b_pointer = 0 if b is None else panels[1].data_ptr()
        return struct.pack("6q", *pointers, b_pointer, weight.shape[1], len(weight) - rank, rank)

    def prefill(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PrefixLayout, cache: KVCache, starts: Sequence[int]
    ) -> Tensor:
        """Return the residual stream [T, H] behind the last layer, of prompts end to end; fill the cache's prefixes.

        Args:
            x: [T, H], the embeddings, which are overwritten.
            cos, sin: [T, D] of each token.
            starts: where each prompt begins in the cache.
        """
        rows = zip(starts, layout.prompt_starts, layout.prompt_lengths, strict=True)
        copies = struct.pack(f"{3 * len(starts)}q", *(number for row in rows for number in row))
        segments = segment_numbers(layout)
        return self._run(x, cos, sin, cache, segments=segments, copies=copies)

    def decode(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        positions: Tensor,
        lengths: Tensor,
        layout: DecodeLayout,
        rows: slice,
    ) -> Tensor:
        """Return the last hidden states [R, H] of one new token per sequence, see ``Decoder.states``.

        Args:
            x: [R, H], the embeddings of the whole batch, of which these ``rows`` are overwritten.
            positions, lengths: int64 [R], also of the whole batch; positions are rows of cos and sin.
        """
        return self._run(x[rows], cos, sin, cache, decoding=(positions[rows], lengths[rows], layout, rows))

    def _run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        *,
        segments: Any = None,
        copies: bytes = b"",
        decoding: tuple[Tensor, Tensor, DecodeLayout, slice] | None = None,
    ) -> Tensor:
        x, cos, sin = (values.contiguous() for values in (x, cos, sin))
        layers = b"".join(numbers + own for numbers, own in zip(self._layers, _caches(cache), strict=True))
        pk, pv, sk, sv = cache.prefix_k[0], cache.prefix_v[0], cache.suffix_k[0], cache.suffix_v[0]
        addresses: tuple[int, ...] = (0, 0, 0, 0)
        if decoding is not None:
            positions, lengths, layout, rows = decoding
            positions, lengths, slots = positions.contiguous(), lengths.contiguous(), layout.table[rows, 2].contiguous()
            table = layout.table[rows].contiguous()
            addresses = (positions.data_ptr(), lengths.data_ptr(), slots.data_ptr(), table.data_ptr())
        buffers = [ctypes.c_char_p(layers), ctypes.c_char_p(copies)]
        layers_at, copies_at = (ctypes.cast(buffer, ctypes.c_void_p).value or 0 for buffer in buffers)
        numbers = struct.pack(
            "9q3d",
            x.data_ptr(),
            len(x),
            x.shape[1],
            self._heads,
            self._kv_heads,
            self._dim,
            self._mlp,
            len(self._layers),
            vector_bits(),
            self._eps,
            self._head_eps,
            self._scale,
        ) + struct.pack(
            "24q",
            layers_at,
            cos.data_ptr(),
            sin.data_ptr(),
            len(cos),
            *pk.stride()[:2],
            *pv.stride()[:2],
            *sk.stride()[:3],
            *sv.stride()[:3],
            *addresses,
            *sk.shape[:2],
            0 if segments is None else ctypes.addressof(segments),
            copies_at,
            0 if segments is None else len(segments) // 4,
            len(copies) // 24,
        )
        error = self._call(numbers + self._functions)
        if error == -1000:
            raise MemoryError(f"text_layers: no memory for a pass of {len(x)} tokens")
        if error:
            raise RuntimeError(f"text_layers: a position, length or slot is out of range (error {error})")
        return x


def _caches(cache: KVCache) -> Iterator[bytes]:
    for tensors in zip(cache.prefix_k, cache.prefix_v, cache.suffix_k, cache.suffix_v, strict=True):
        yield struct.pack("4q", *(x.data_ptr() for x in tensors))


def _panels(weight: Tensor) -> Tensor:
    """[outputs / PANEL, inputs, PANEL] of a weight [outputs, inputs], with outputs of zeros behind the last."""
    rows, inputs = weight.shape
    padded = torch.cat([weight, weight.new_zeros(-rows % PANEL, inputs)]) if rows % PANEL else weight
    return padded.view(-1, PANEL, inputs).transpose(1, 2).contiguous()
