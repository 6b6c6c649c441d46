"""A decode step: one more token of every sequence, from tensors whose shapes depend on the batch size alone."""

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
    """The inputs of a decode step for R sequences."""

    tokens: Tensor  # int64 [R], the last sampled tokens
    positions: Tensor  # int64 [R], of these tokens
    lengths: Tensor  # int64 [R], number of sampled tokens, these included
    uniform: Tensor  # fp32 [R], random numbers for sampling
    layout: DecodeLayout  # its suffix_slots are the sequences' cache slots

    def clone(self) -> StepInputs:
        """Return a copy in memory of its own."""
        return StepInputs(
            self.tokens.clone(), self.positions.clone(), self.lengths.clone(), self.uniform.clone(), self.layout.clone()
        )


class DecodeStep:
    """The decode step, as a callable: inputs -> (new tokens int64 [R], their log-probs fp32 [R]).

    It writes the keys and values of the input tokens into the cache.
    """

    def __init__(
        self, model: VideoLM, cache: KVCache, options: SamplingOptions, *, positions: range, backend: str
    ) -> None:
        device, dtype = model.device, model.compute_dtype
        self.decoder, self.head, self.cache, self.options = Decoder(model, positions), model.head_weight, cache, options
        self.banned = torch.tensor(model.special.vision, device=device)
        # The backends' implementations are called directly: the public functions would check the same shapes each time.
        self.attention = dispatch.resolve("prefix_decode_attention", backend, device, dtype).prefix_decode_attention
        self.sampler = dispatch.resolve("sample_tokens", backend, device, torch.float32).sample_tokens
        top_k = options.top_k if options.top_k < len(self.head) else 0
        self.sampling = SampleTokensOptions(float(options.temperature), float(options.top_p), top_k)
        chosen = [
            dispatch.chosen_backend("prefix_decode_attention", device, backend, dtype),
            dispatch.chosen_backend("sample_tokens", device, backend, torch.float32),
        ]
        # A CUDA graph can capture the step only if it never waits for the device.
        self.capturable = device.type == "cuda" and chosen == ["triton"] * 2

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        context = Decode(inputs.layout, self.cache, inputs.lengths, self.attention)
        hidden = self.decoder.states(inputs.tokens, inputs.positions, context)
        return self.draw(self.logits(hidden), inputs.uniform)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, fp32 [R, V], of hidden states [R, H]."""
        with self.decoder.model.without_autocast():
            return product(hidden, self.head.T)

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Sample from fp32 logits [R, V]; return (tokens, log-probs)."""
        with self.decoder.model.without_autocast():
            return self.sampler(logits, uniform, self.banned, self.sampling)
