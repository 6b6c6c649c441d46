"""The two passes of a rollout over the language model: prompts (prefill), and one new token per sequence (decode)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout.local.kv_cache import KVCache
from videor1.rollout.local.text_layers import OPERATIONS, TextLayers
from videor1.rollout.local.weights import DecodeWeights, Norm
from videor1.side_by_side import on_cores, side_by_side, threads
from videor1_kernels import DecodeLayout, PrefixLayout, dispatch, prefix_attention
from videor1_kernels.prefix_attention import decode_backend
from videor1_kernels.prefix_attention.decode_layout import DecodeInputs
from videor1_kernels.rotary_append.reference import Places

LEAST_ROWS = 48  # that are worth a thread


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


class Operations(NamedTuple):
    """Implementations of what a decode step computes between its products.

    They are called directly: the public functions would check at each call what is the same in every layer and step.
    """

    attention: Callable[..., Tensor]  # of prefix_decode_attention
    norm: Callable[..., tuple[Tensor, Tensor]]  # of add_rms_norm
    rotary: Callable[..., Tensor]  # of rotary_append
    silu: Callable[..., Tensor]  # of silu_mul

    @staticmethod
    def of(model: VideoLM, backend: str) -> Operations:
        device, dtype = model.device, model.compute_dtype
        stream = next(model.hf.parameters()).dtype  # of the residual stream and the tables, fp32 in a whole bf16 model
        rarest = dtype if dtype == stream else torch.float32

        def resolve(op: str, of: torch.dtype, backend: str = backend) -> Any:
            return getattr(dispatch.resolve(op, backend, device, of), op)

        head_dim = model.hf.model.language_model.layers[0].self_attn.head_dim
        return Operations(
            resolve("prefix_decode_attention", dtype, decode_backend(head_dim, device, backend)),
            resolve("add_rms_norm", rarest),
            resolve("rotary_append", rarest),
            resolve("silu_mul", dtype),
        )


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
        self.scale = self.text.layers[0].self_attn.scaling
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
            normed, summed = run.norm(x, module.weight, residual, module.eps)
            return normed.to(dtype), summed

        hidden: Tensor | None = None
        for index, layer in enumerate(self.layers):
            x, hidden = norm(layer.input_norm, change, hidden)
            keys, values = cache.suffix_k[index], cache.suffix_v[index]
            q = run.rotary(layer.qkv(x), self.cos, self.sin, keys, values, places, layer.head_norms)
            inputs = DecodeInputs(q, cache.prefix_k[index], cache.prefix_v[index], keys, values, lengths)
            out = run.attention(inputs, layout, self.scale)
            x, hidden = norm(layer.mlp_norm, layer.out(out.flatten(1)), hidden)
            change = layer.down(run.silu(*layer.gate_up.terms(x)))
        return self._normed(change if hidden is None else hidden + change)

    def _normed(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.text.norm(hidden)
        return normed.to(self.dtype)
