"""The KV cache of a rollout: its capacity, the allocation of prompts in it, and its memory.

A prompt's keys and values are stored once for all its sequences, in a span of one pool of tokens. Each sequence in
flight has a slot for its sampled tokens. All memory is allocated once per rollout, before the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from videor1.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class Capacity:
    """The size of a cache: ``slots`` sequences of up to ``new_tokens`` tokens, ``prefix_tokens`` tokens of prompts."""

    slots: int
    prefix_tokens: int
    new_tokens: int
    bytes_per_token: int

    @property
    def bytes(self) -> int:
        return (self.slots * self.new_tokens + self.prefix_tokens) * self.bytes_per_token


def bytes_per_token(text_config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    heads, dim = _key_heads(text_config)
    return 2 * text_config.num_hidden_layers * heads * dim * dtype.itemsize


def _key_heads(text_config: Any) -> tuple[int, int]:
    """Return the number of key heads and the entries of each, which need not add up to the model's width."""
    given = getattr(text_config, "head_dim", None)
    return text_config.num_key_value_heads, given or text_config.hidden_size // text_config.num_attention_heads


def plan_capacity(
    branches: Sequence[tuple[int, int]], new_tokens: int, token_bytes: int, *, max_rows: int, budget: int | None = None
) -> Capacity:
    """Plan the capacity of the cache, from which follows how many branches fit in flight.

    Args:
        branches: (prompt tokens, number of sequences) of each branch.
        new_tokens: most sampled tokens of a sequence.
        token_bytes: bytes of one token's keys and values in all layers.
        max_rows: most sequences in flight; those of a branch always run together, so that a larger branch still runs.
        budget: bytes of memory; None: only ``max_rows`` limits the capacity.

    Raises:
        ConfigError: the budget is too small for the longest prompt with the most sequences; the message says what
            they need.
    """
    longest, most = (max(column) for column in zip(*branches, strict=True))
    need = (longest + most * new_tokens) * token_bytes
    if budget is not None and need > budget:
        raise ConfigError(
            f"rollout.kv_mib: {most} completions of up to {new_tokens} tokens to a prompt of {longest} tokens need "
            f"{need / MIB:.4g} MiB of KV cache ({token_bytes} bytes a token), the budget is {budget / MIB:.4g} MiB; "
            "raise it, or lower max_completion_length, num_generations or the prompt's pixels"
        )
    prompts, sequences = (sum(column) for column in zip(*branches, strict=True))
    everything = Capacity(sequences, prompts, new_tokens, token_bytes)
    if sequences <= max_rows and (budget is None or everything.bytes <= budget):
        return everything
    count = max(1, max_rows // most)  # branches in flight
    if budget is not None:
        count = min(count, budget // need)
    return Capacity(min(sequences, count * most), min(prompts, count * longest), new_tokens, token_bytes)


def cache_budget(device: torch.device, asked: int | None) -> int:
    """Return the bytes that the KV cache may take.

    Args:
        device: the model's device.
        asked: the budget that the user has given, in bytes; None: 60% of a GPU's free memory, including memory that
            torch holds unused, and on a CPU all of the machine's memory.

    Raises:
        ConfigError: ``asked`` is more than the device has.
    """
    on_gpu = device.type == "cuda"
    total = torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total
    if asked is not None and asked > total:
        raise ConfigError(
            f"rollout.kv_mib: expected at most {total // MIB:,}, the memory of this {device.type}, got {asked // MIB:,}"
        )
    if asked is not None or not on_gpu:
        return total if asked is None else asked
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(0.6 * (torch.cuda.mem_get_info(device)[0] + unused))


class Spans:
    """A first-fit allocator of spans of [0, size)."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)] if size else []  # (start, length) in order; adjacent ones are always merged

    def take(self, length: int) -> int | None:
        """Allocate a span of ``length`` and return its start; None if no free span is long enough."""
        for i, (start, room) in enumerate(self._free):
            if room >= length:
                self._free[i : i + 1] = [(start + length, room - length)] if room > length else []
                return start
        return None

    def give(self, start: int, length: int) -> None:
        """Free a span that was allocated."""
        merged: list[tuple[int, int]] = []
        for begin, room in sorted([*self._free, (start, length)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((begin, room))
        self._free = merged


class KVCache:
    """The cache's memory: for each layer, keys and values of prompts [Tp, Hkv, D] and of sequences [S, C, Hkv, D].

    On a CPU the heads are outermost in memory, so that the products of one key head read one block.
    """

    def __init__(self, capacity: Capacity, text_config: Any, dtype: torch.dtype, device: torch.device) -> None:
        heads, dim = _key_heads(text_config)
        self.capacity = capacity

        def empty(*shape: int) -> list[Tensor]:
            layers = range(text_config.num_hidden_layers)
            if device.type == "cpu":
                return [torch.empty(heads, *shape, dim, dtype=dtype).movedim(0, -2) for _ in layers]
            return [torch.empty(*shape, heads, dim, dtype=dtype, device=device) for _ in layers]

        self.prefix_k, self.prefix_v = empty(capacity.prefix_tokens), empty(capacity.prefix_tokens)
        self.suffix_k, self.suffix_v = (empty(capacity.slots, capacity.new_tokens) for _ in range(2))
