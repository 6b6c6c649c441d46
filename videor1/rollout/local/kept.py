"""What an engine keeps between two rollouts: the KV cache, the decode weights and the CUDA graphs.

A graph reads and writes the addresses that it was captured with. The next rollout may replay it where everything lies
where it lay: the weights take new values there. Where anything does not fit (an adapter more, another dtype, a
parameter that has moved, a longer prompt), all is made anew.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from videor1.rollout.local.graph import GraphedSteps
from videor1.rollout.local.kv_cache import Capacity, KVCache
from videor1.rollout.local.step import DecodeStep

SHARE = 0.1  # of a GPU's memory, which may be kept while the model trains, unless a plan says otherwise
LEAST_POSITIONS = 4096  # of kept rotary tables, whose size is a power of two


@dataclass
class Kept:
    """A step with its cache, random numbers and graphs, for a later rollout."""

    step: DecodeStep
    cache: KVCache
    uniform: Tensor  # fp32 [N, C]
    graphs: GraphedSteps

    @property
    def bytes(self) -> int:
        """The memory that is kept beside the model's own."""
        own = self.cache.capacity.bytes + self.step.decoder.weights.bytes()
        return own + sum(x.nbytes for x in (self.uniform, *self.step.tables()))

    @property
    def positions(self) -> range:
        """Those of its rotary tables."""
        first = self.step.decoder.first
        return range(first, first + len(self.step.decoder.cos))

    def holds(self, capacity: Capacity, sequences: int, positions: range) -> bool:
        """Whether a rollout of these sizes has room in it."""
        own, table = self.cache.capacity, self.positions
        return (
            capacity.slots <= own.slots
            and capacity.prefix_tokens <= own.prefix_tokens
            and dataclasses.replace(own, slots=capacity.slots, prefix_tokens=capacity.prefix_tokens) == capacity
            and sequences <= len(self.uniform)
            and table.start <= positions.start
            and positions.stop <= table.stop
        )

    def renew(self, fresh: DecodeStep) -> bool:
        """Take the tables of a step that was just made; return False where the graphs cannot serve in its place."""
        if fresh.decoder.weights is not self.step.decoder.weights or fresh.form() != self.step.form():
            return False
        for ours, theirs in zip(self.step.tables(), fresh.tables(), strict=True):
            ours.copy_(theirs)
        return True


def table_of(positions: range) -> range:
    """The positions of kept rotary tables: from 0, so that later rollouts find theirs among them."""
    size = LEAST_POSITIONS
    while size < positions.stop:
        size *= 2
    return range(size)


def grown(capacity: Capacity, known: Capacity | None, budget: int) -> Capacity:
    """A capacity with room for prompts that are an eighth longer and for all that fitted before, within the budget."""
    tokens = capacity.prefix_tokens + capacity.prefix_tokens // 8
    slots = capacity.slots
    if known is not None:
        tokens, slots = max(tokens, known.prefix_tokens), max(slots, known.slots)
    larger = dataclasses.replace(capacity, slots=slots, prefix_tokens=tokens)
    return larger if larger.bytes <= budget else capacity


def default_room(device: torch.device) -> int:
    """Bytes that a rollout may take for itself between two calls, where no plan of the run says how many are free."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[1])
    return psutil.virtual_memory().available // 2
