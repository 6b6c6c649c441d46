"""One decode step: one more token of every sequence, from tensors whose shapes depend on the number of them alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout.local.decode import Decode, Decoder
from videor1.rollout.local.kv_cache import KVCache
from videor1.rollout.protocol import SamplingOptions
from videor1_kernels import DecodeLayout, dispatch
from videor1_kernels.linear_logprob.products import product
from videor1_kernels.sampling.reference import SampleTokensOptions


@dataclass(frozen=True)
class StepInputs:
    """R rows, one of each sequence in the decode batch."""

    tokens: Tensor  # int64 [R], drawn last
    positions: Tensor  # int64 [R], of these tokens
    lengths: Tensor  # int64 [R], of the sequences' own tokens, these included
    uniform: Tensor  # fp32 [R], for the draw
    layout: DecodeLayout  # its suffix_slots are the sequences' slots

    def clone(self) -> StepInputs:
        """Memory of its own, to be written into."""
        return StepInputs(
            self.tokens.clone(), self.positions.clone(), self.lengths.clone(), self.uniform.clone(), self.layout.clone()
        )


class DecodeStep:
    """Callable: inputs -> (tokens int64 [R], logp fp32 [R]). Writes the tokens' keys and values into the cache."""

    def __init__(
        self, model: VideoLM, cache: KVCache, options: SamplingOptions, *, positions: range, backend: str
    ) -> None:
        device, dtype = model.device, model.compute_dtype
        self.decoder, self.head, self.cache, self.options = Decoder(model, positions), model.head_weight, cache, options
        self.banned = torch.tensor(model.special.vision, device=device)
        # The implementations themselves: what the public functions check is the same in every layer and step.
        self.attention = dispatch.resolve("prefix_decode_attention", backend, device, dtype).prefix_decode_attention
        self.sampler = dispatch.resolve("sample_tokens", backend, device, torch.float32).sample_tokens
        top_k = options.top_k if options.top_k < len(self.head) else 0
        self.sampling = SampleTokensOptions(float(options.temperature), float(options.top_p), top_k)
        chosen = [
            dispatch.chosen_backend("prefix_decode_attention", device, backend, dtype),
            dispatch.chosen_backend("sample_tokens", device, backend, torch.float32),
        ]
        self.never_waits = device.type == "cuda" and chosen == ["triton"] * 2  # so a CUDA graph can hold it

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        context = Decode(inputs.layout, self.cache, inputs.lengths, self.attention)
        hidden = self.decoder.states(inputs.tokens, inputs.positions, context)
        return self.draw(self.logits(hidden), inputs.uniform)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [R, V] from states [R, H]."""
        with self.decoder.model.exactly():
            return product(hidden, self.head.T)

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, logp) of fp32 logits [R, V]."""
        with self.decoder.model.exactly():
            return self.sampler(logits, uniform, self.banned, self.sampling)
