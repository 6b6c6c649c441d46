"""The two passes of a rollout over the language model: prompts (prefill), and one new token per sequence (decode)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout.local.kv_cache import KVCache
from videor1.rollout.local.operations import Operations, attention_of
from videor1.rollout.local.text_layers import OPERATIONS, TextLayers
from videor1.rollout.local.weights import DecodeLayer, DecodeWeights, Norm
from videor1.side_by_side import on_cores, side_by_side, threads
from videor1_kernels import (
    DecodeLayout,
    PrefixLayout,
    dispatch,
    prefix_attention,
    prefix_causal_conv,
    prefix_gated_delta,
)
from videor1_kernels.integrations.transformers import linear_backend
from videor1_kernels.prefix_attention.decode_layout import DecodeInputs
from videor1_kernels.rotary_append.reference import Places
from videor1_kernels.transfer import to_device

LEAST_ROWS = 48  # that are worth a thread


@dataclass(frozen=True)
class Prefill:
    """Context of a prefill: prompts end to end, whose keys and values go to the cache at ``starts``."""

    layout: PrefixLayout
    cache: KVCache
    starts: Sequence[int]
    slots: Sequence[Sequence[int]]  # of each prompt's sequences, which get the states of linear attention behind it
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

    def convolve(self, layer: int, x: Tensor, weight: Tensor, activation: str) -> Tensor:
        out, states = prefix_causal_conv(
            x, weight, self.layout, activation=activation, return_states=True, backend=linear_backend(self.backend)
        )
        self._fork(self.cache.states[layer].tail, states.prompts)
        return out

    def recur(self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        out, states = prefix_gated_delta(
            q, k, v, g, beta, self.layout, return_states=True, backend=linear_backend(self.backend)
        )
        self._fork(self.cache.states[layer].recurrent, states.prompts)
        return out

    def _fork(self, pool: Tensor, prompts: Tensor) -> None:
        """Give each sequence a copy of its prompt's state."""
        slots, prompt = self._copies
        pool.index_copy_(0, slots, prompts.index_select(0, prompt).to(pool.dtype))

    @functools.cached_property
    def _copies(self) -> tuple[Tensor, Tensor]:
        """int64 [sequences]: the slot of each, and the number of its prompt."""
        pairs = [(slot, number) for number, slots in enumerate(self.slots) for slot in slots]
        slots, prompt = to_device(torch.tensor(pairs, dtype=torch.int64).T.contiguous(), self.layout.device)
        return slots, prompt


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float | None) -> Tensor:
    """Compute causal attention of prompts that lie end to end."""
    from flash_attn import flash_attn_varlen_func

    lengths = torch.tensor([0, *layout.prompt_lengths], dtype=torch.int32)
    ends, longest = lengths.cumsum(0, dtype=torch.int32).to(q.device), int(lengths.max())
    return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True)


class Decoder:
    """The language model's forward pass for one new token per sequence.

    It uses the weights of transformers' modules directly: for a single token the code between the modules costs more
    than their computation.
    Text positions are equal in time, height and width, so that the rotary embedding is the plain one. fp32 results
    equal the model's own to rounding.
    """

    def __init__(
        self,
        model: VideoLM,
        cache: KVCache | None,
        positions: range,
        backend: str = "auto",
        weights: DecodeWeights | None = None,
    ) -> None:
        """``positions``: all positions of new tokens. After a long clip they begin far above the number of tokens."""
        self.model, self.text, self.cache = model, model.hf.model.language_model, cache
        self.dtype = model.compute_dtype
        self.operations = Operations.of(model, backend)
        chosen = {dispatch.chosen_backend(op, model.device, backend, self.dtype) for op in OPERATIONS}
        native = chosen == {"native"} and on_cores(model.device) and not model.flash
        self.weights = DecodeWeights(model) if weights is None else weights
        self.layers = self.weights.layers
        attention = attention_of(self.text)
        self.scale, self.head_dim = attention.scaling, attention.head_dim
        self.gated = model.family.output_gate
        self.native = TextLayers.of(self.text, self.layers, self.dtype) if native else None
        self.first = positions.start
        every = torch.arange(positions.start, positions.stop, device=model.device).expand(3, 1, -1)
        self.cos, self.sin = (x.reshape(len(positions), -1) for x in self.text.rotary_emb(self._example_state(), every))

    def _example_state(self) -> Tensor:
        """Return a tensor of the hidden states' dtype and device, which rotary_emb gives to its tables."""
        return self.text.embed_tokens(torch.zeros(1, 1, dtype=torch.int64, device=self.model.device))

    def prefill(self, ids: Tensor, positions: Tensor, features: Sequence[Tensor], context: Prefill) -> Tensor:
        """Return the last hidden states [T, H] of prompts end to end, see ``VideoLM.hidden_states``."""
        if self.native is None:
            return self.model.hidden_states(ids, positions, context, features)
        x, further = self.model.embeddings(ids, features)
        if further:  # which layers take besides, as only the model's own code knows
            return self.model.hidden_states(ids, positions, context, features)
        cos, sin = (table.reshape(len(ids), -1) for table in self.text.rotary_emb(x, positions))
        return self._normed(self.native.prefill(x, cos, sin, context.layout, context.cache, context.starts))

    def states(self, tokens: Tensor, positions: Tensor, lengths: Tensor, layout: DecodeLayout) -> Tensor:
        """Return the last hidden states [R, H] in the compute dtype; the keys and values go to the cache.

        Args:
            tokens, positions: int64 [R], the new tokens and their positions.
            lengths: int64 [R], number of the sequences' sampled tokens, the new one included.
            layout: its ``suffix_slots`` are the cache slots of the sequences.
        """
        run, cache, dtype = self.operations, self.cache, self.dtype
        assert cache is not None
        assert layout.suffix_slots is not None
        places = Places(positions - self.first, lengths, layout.suffix_slots)
        change: Tensor = self.text.embed_tokens(tokens)  # what is added to the residual stream next
        if self.native is not None:
            run_some = functools.partial(
                self.native.decode, change, self.cos, self.sin, cache, places.positions, lengths, layout
            )
            step = max(LEAST_ROWS, -(-len(tokens) // threads()))
            calls = [functools.partial(run_some, slice(i, i + step)) for i in range(0, len(tokens), step)]
            return self._normed(torch.cat(side_by_side(calls, tokens.device)))

        def norm(module: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            normed, summed = run.norm(x, module.weight, residual, module.eps, module.unit_offset)
            return normed.to(dtype), summed

        hidden: Tensor | None = None
        for index, layer in enumerate(self.layers):
            x, hidden = norm(layer.input_norm, change, hidden)
            products = layer.qkv(x)
            if layer.linear is None:
                out = self._attend(index, layer, products, places, layout)
            else:
                assert run.linear is not None
                out = layer.linear.step(products, cache.states[index], layout.suffix_slots, run.linear)
            x, hidden = norm(layer.mlp_norm, layer.out(out), hidden)
            change = layer.down(run.silu(*layer.gate_up.terms(x)))
        return self._normed(change if hidden is None else hidden + change)

    def _attend(self, index: int, layer: DecodeLayer, products: Tensor, places: Places, layout: DecodeLayout) -> Tensor:
        """Return the output [R, Hq D] of a layer's attention, for what its first product gave."""
        run, cache = self.operations, self.cache
        assert cache is not None
        keys, values = cache.suffix_k[index], cache.suffix_v[index]
        gate = None
        if self.gated:  # each head's gate lies behind its query
            kv = 2 * keys.shape[2] * self.head_dim
            queries, rest = products.split([products.shape[1] - kv, kv], 1)
            query, of_gate = queries.unflatten(1, (-1, 2, self.head_dim)).unbind(2)
            products = torch.cat([query.flatten(1), rest, of_gate.flatten(1)], 1)
            products, gate = products.split([query.shape[1] * self.head_dim + kv, query.shape[1] * self.head_dim], 1)
        q = run.rotary(products, self.cos, self.sin, keys, values, places, layer.head_norms)
        inputs = DecodeInputs(q, cache.prefix_k[index], cache.prefix_v[index], keys, values, places.suffix_lengths)
        out = run.attention(inputs, layout, self.scale).flatten(1)
        return out if gate is None or run.gate is None else run.gate(out, gate)

    def _normed(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.text.norm(hidden)
        return normed.to(self.dtype)
