"""A decode step: one more token of every sequence, with tensors whose shapes depend on the batch size alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from videor1.model import VideoLM
from videor1.rollout.local.decode import Decoder
from videor1.rollout.local.kv_cache import KVCache
from videor1.rollout.local.operations import Operations
from videor1.rollout.local.weights import DecodeWeights
from videor1.rollout.protocol import SamplingOptions
from videor1_kernels import DecodeLayout, dispatch
from videor1_kernels.linear_logprob.products import product
from videor1_kernels.sampling.reference import SampleTokensOptions


@dataclass
class Batch:
    """The state of R sequences, which a decode step advances in place."""

    tokens: Tensor  # int64 [R], the last sampled tokens
    counts: Tensor  # int64 [R], tokens sampled so far
    first: Tensor  # int64 [R], position of the first sampled token
    rows: Tensor  # int64 [R], of ``uniform``
    uniform: Tensor  # fp32 [N, C], the random numbers of all N sequences of the rollout
    layout: DecodeLayout  # its suffix_slots are the sequences' cache slots

    STATE = ("tokens", "counts", "first", "rows")

    def clone(self) -> Batch:
        """Return a copy of the state in memory of its own, for the same layout and random numbers."""
        return replace(self, **{name: getattr(self, name).clone() for name in self.STATE})

    def copy_(self, other: Batch) -> None:
        """Overwrite the state, and what kernels read of the layout."""
        for name in self.STATE:
            getattr(self, name).copy_(getattr(other, name))
        if other.layout is not self.layout:
            self.layout.copy_(other.layout)


class DecodeStep:
    """The decode step, as a callable: batch -> fp64 [2, R], the new tokens and their log-probs.

    It writes the keys and values of the last tokens into the cache and advances the batch, so that nothing is left to
    do between two steps. fp64 holds both exactly, and one copy takes both to the host.
    """

    def __init__(
        self,
        model: VideoLM,
        cache: KVCache,
        options: SamplingOptions,
        *,
        positions: range,
        backend: str,
        weights: DecodeWeights | None = None,
    ) -> None:
        device, dtype = model.device, model.compute_dtype
        self.decoder, self.options = Decoder(model, cache, positions, backend, weights), options
        self.head = self.decoder.weights.head
        self.banned = torch.tensor(model.special.vision, device=device)
        self.sampler = dispatch.resolve("sample_tokens", backend, device, torch.float32).sample_tokens
        top_k = options.top_k if options.top_k < len(self.head) else 0
        self.sampling = SampleTokensOptions(float(options.temperature), float(options.top_p), top_k)
        dtypes = dict.fromkeys(Operations.names(model), dtype)
        dtypes["sample_tokens"] = torch.float32
        chosen = {dispatch.chosen_backend(op, device, backend, dtypes[op]) for op in dtypes}
        # A CUDA graph can capture the step only if it never waits for the device.
        self.capturable = device.type == "cuda" and chosen == {"triton"}

    def __call__(self, batch: Batch) -> Tensor:
        with self.decoder.model.without_autocast():
            positions = batch.first + batch.counts - 1
            hidden = self.decoder.states(batch.tokens, positions, batch.counts, batch.layout)
        tokens, logp = self.draw(self.logits(hidden), batch.uniform[batch.rows, batch.counts])
        batch.tokens.copy_(tokens)
        batch.counts.add_(1)
        return torch.stack([tokens.double(), logp.double()])

    def tables(self) -> list[Tensor]:
        """Return what a step reads beside its batch, the cache and the weights."""
        return [self.banned, self.decoder.cos, self.decoder.sin]

    def form(self) -> tuple[object, ...]:
        """Return what two steps on the same weights must share for one's graphs to serve the other."""
        return (self.sampling, self.decoder.first, self.decoder.operations, *(x.shape for x in self.tables()))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, fp32 [R, V], of hidden states [R, H]."""
        with self.decoder.model.without_autocast():
            return product(hidden, self.head.T)

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Sample from fp32 logits [R, V]; return (tokens, log-probs)."""
        with self.decoder.model.without_autocast():
            return self.sampler(logits, uniform, self.banned, self.sampling)
