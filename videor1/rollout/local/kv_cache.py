"""The KV cache of a rollout: how large it may be, where a prompt and its answers lie, the memory itself.

A prompt's keys and values are stored once for all its answers, in a span of one pool of tokens; each answer in flight
owns a slot for its own tokens. Everything is allocated once per rollout, before the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videor1.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class Capacity:
    """Room for ``slots`` answers of up to ``new_tokens`` tokens, and for ``prefix_tokens`` tokens of prompts."""

    slots: int
    prefix_tokens: int
    new_tokens: int
    bytes_per_token: int

    @property
    def bytes(self) -> int:
        return (self.slots * self.new_tokens + self.prefix_tokens) * self.bytes_per_token


def bytes_per_token(text_config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    heads, dim = text_config.num_key_value_heads, text_config.hidden_size // text_config.num_attention_heads
    return 2 * text_config.num_hidden_layers * heads * dim * dtype.itemsize


def plan_capacity(
    branches: Sequence[tuple[int, int]], new_tokens: int, token_bytes: int, *, max_rows: int, budget: int | None = None
) -> Capacity:
    """The cache for ``branches``, (prompt tokens, answers) each, of which as many as fit are in flight.

    Args:
        new_tokens: of an answer at most.
        max_rows: answers in flight at most; a branch's are never split, so one larger branch still runs.
        budget: bytes; None: ``max_rows`` alone bounds.

    Raises:
        ConfigError: the budget is too small for the longest prompt with the most answers; says what they need.
    """
    longest, most = (max(column) for column in zip(*branches, strict=True))
    need = (longest + most * new_tokens) * token_bytes
    if budget is not None and need > budget:
        raise ConfigError(
            f"rollout.kv_mib: {most} answers of up to {new_tokens} tokens to a prompt of {longest} tokens need "
            f"{need / MIB:.4g} MiB of KV cache ({token_bytes} bytes a token), the budget is {budget / MIB:.4g} MiB; "
            "raise it, or lower max_completion_length, num_generations or the prompt's pixels"
        )
    prompts, answers = (sum(column) for column in zip(*branches, strict=True))
    whole = Capacity(answers, prompts, new_tokens, token_bytes)
    if answers <= max_rows and (budget is None or whole.bytes <= budget):
        return whole
    count = max(1, max_rows // most)  # branches in flight
    if budget is not None:
        count = min(count, budget // need)
    return Capacity(min(answers, count * most), min(prompts, count * longest), new_tokens, token_bytes)


def default_budget(device: torch.device) -> int | None:
    """60% of what a GPU has free, memory that torch holds unused included; None elsewhere."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(0.6 * (torch.cuda.mem_get_info(device)[0] + unused))


class Spans:
    """First-fit allocation of spans of [0, size)."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)] if size else []  # (start, length), in order, never touching

    def take(self, length: int) -> int | None:
        """Start of a free span of ``length``, now taken; None if there is none."""
        for i, (start, room) in enumerate(self._free):
            if room >= length:
                self._free[i : i + 1] = [(start + length, room - length)] if room > length else []
                return start
        return None

    def give(self, start: int, length: int) -> None:
        """Free a span that was taken."""
        merged: list[tuple[int, int]] = []
        for begin, room in sorted([*self._free, (start, length)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((begin, room))
        self._free = merged


class KVCache:
    """Per layer: prompts [Tp, Hkv, D] and answers [S, C, Hkv, D], keys and values.

    On a CPU the heads lie outermost in memory: the products of a key head then read one block.
    """

    def __init__(self, capacity: Capacity, text_config: Any, dtype: torch.dtype, device: torch.device) -> None:
        heads, dim = text_config.num_key_value_heads, text_config.hidden_size // text_config.num_attention_heads
        self.capacity = capacity

        def empty(*shape: int) -> list[Tensor]:
            layers = range(text_config.num_hidden_layers)
            if device.type == "cpu":
                return [torch.empty(heads, *shape, dim, dtype=dtype).movedim(0, -2) for _ in layers]
            return [torch.empty(*shape, heads, dim, dtype=dtype, device=device) for _ in layers]

        self.prefix_k, self.prefix_v = empty(capacity.prefix_tokens), empty(capacity.prefix_tokens)
        self.suffix_k, self.suffix_v = (empty(capacity.slots, capacity.new_tokens) for _ in range(2))
