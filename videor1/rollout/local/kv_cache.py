"""The KV cache of a rollout: its capacity, the allocation of prompts in it, and its memory.

A prompt's keys and values are stored once for all its sequences, in a span of one pool of tokens. Each sequence in
flight has a slot for its sampled tokens, and for the states of layers of linear attention, which hold all that these
layers know of the prompt and of the tokens since. All memory is allocated once per rollout, before the first token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from videor1.errors import ConfigError
from videor1_kernels.integrations.transformers import LINEAR

MIB = 2**20


@dataclass(frozen=True)
class Capacity:
    """The size of a cache: ``slots`` sequences of up to ``new_tokens`` tokens, ``prefix_tokens`` tokens of prompts.

    Attributes:
        bytes_per_token: of one token, see :class:`Sizes`.
        state_bytes: of one sequence, whatever its length.
        spare: slots for what fills a batch up: a row that shared a slot with another would step its state twice.
    """

    slots: int
    prefix_tokens: int
    new_tokens: int
    bytes_per_token: int
    state_bytes: int = 0
    spare: int = 0

    @property
    def all_states(self) -> int:
        return (self.slots + self.spare) * self.state_bytes

    @property
    def bytes(self) -> int:
        tokens = (self.slots + self.spare) * self.new_tokens + self.prefix_tokens
        return tokens * self.bytes_per_token + self.all_states


class Sizes(NamedTuple):
    """What a model's cache takes.

    Attributes:
        token: bytes of one token's keys and values in all layers of attention.
        state: bytes of one sequence's states in all layers of linear attention; they do not grow with its length.
    """

    token: int
    state: int

    @staticmethod
    def of(text_config: Any, dtype: torch.dtype) -> Sizes:
        """Those of a language model that computes in ``dtype``."""
        heads, dim = _key_heads(text_config)
        kinds, state = layer_kinds(text_config), 0
        if linear := kinds.count(LINEAR):
            recurrent, tail = _state_shapes(text_config)
            one = math.prod(recurrent) * state_dtype(dtype).itemsize + math.prod(tail) * dtype.itemsize
            state = linear * one
        return Sizes(2 * (len(kinds) - linear) * heads * dim * dtype.itemsize, state)


def layer_kinds(text_config: Any) -> list[str]:
    """Return the kind of each layer, of which only :data:`LINEAR` is told apart."""
    kinds = getattr(text_config, "layer_types", None)
    return list(kinds or [""] * text_config.num_hidden_layers)[: text_config.num_hidden_layers]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the states of a model that computes in ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def _state_shapes(text_config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a sequence's state in a layer of linear attention: of the rule, and of the convolution's inputs."""
    key_heads, key_dim = text_config.linear_num_key_heads, text_config.linear_key_head_dim
    heads, dim = text_config.linear_num_value_heads, text_config.linear_value_head_dim
    channels = 2 * key_heads * key_dim + heads * dim
    return (heads, key_dim, dim), (channels, text_config.linear_conv_kernel_dim - 1)


def _key_heads(text_config: Any) -> tuple[int, int]:
    """Return the number of key heads and the entries of each, which need not add up to the model's width."""
    given = getattr(text_config, "head_dim", None)
    return text_config.num_key_value_heads, given or text_config.hidden_size // text_config.num_attention_heads


def plan_capacity(
    branches: Sequence[tuple[int, int]],
    new_tokens: int,
    sizes: Sizes,
    *,
    max_rows: int,
    budget: int | None = None,
    padded: bool = False,
) -> Capacity:
    """Plan the capacity of the cache, from which follows how many branches fit in flight.

    Args:
        branches: (prompt tokens, number of sequences) of each branch.
        new_tokens: most sampled tokens of a sequence.
        sizes: what a token and a sequence take.
        max_rows: most sequences in flight; those of a branch always run together, so that a larger branch still runs.
        budget: bytes of memory; None: only ``max_rows`` limits the capacity.
        padded: whether batches may be filled up, as those of CUDA graphs are.

    Raises:
        ConfigError: the budget is too small for the longest prompt with the most sequences; the message says what
            they need.
    """
    longest, most = (max(column) for column in zip(*branches, strict=True))
    spare = 1 if padded and sizes.state else 0

    def capacity(slots: int, prompts: int) -> Capacity:
        return Capacity(slots, prompts, new_tokens, sizes.token, sizes.state, spare)

    least, none = capacity(most, longest).bytes, capacity(0, 0).bytes
    if budget is not None and least > budget:
        a_state = f" and {sizes.state} a completion" if sizes.state else ""
        raise ConfigError(
            f"rollout.kv_mib: {most} completions of up to {new_tokens} tokens to a prompt of {longest} tokens need "
            f"{least / MIB:.4g} MiB of KV cache ({sizes.token} bytes a token{a_state}), the budget is "
            f"{budget / MIB:.4g} MiB; raise it, or lower max_completion_length, num_generations or the prompt's pixels"
        )
    prompts, sequences = (sum(column) for column in zip(*branches, strict=True))
    everything = capacity(sequences, prompts)
    if sequences <= max_rows and (budget is None or everything.bytes <= budget):
        return everything
    count = max(1, max_rows // most)  # branches in flight
    if budget is not None:
        count = min(count, (budget - none) // (least - none))
    return capacity(min(sequences, count * most), min(prompts, count * longest))


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


class States(NamedTuple):
    """What a layer of linear attention knows of each sequence."""

    recurrent: Tensor  # [S, Hv, Dk, Dv], of the gated delta rule, fp32 or more
    tail: Tensor  # [S, C, K - 1], the last inputs of the convolution


class KVCache:
    """The cache's memory: for each layer, keys and values of prompts [Tp, Hkv, D] and of sequences [S, C, Hkv, D], or
    states of sequences; the others of a layer have no entries.

    On a CPU the heads are outermost in memory, so that the products of one key head read one block.
    """

    def __init__(self, capacity: Capacity, text_config: Any, dtype: torch.dtype, device: torch.device) -> None:
        heads, dim = _key_heads(text_config)
        self.capacity = capacity
        slots, kinds = capacity.slots + capacity.spare, layer_kinds(text_config)

        def empty(*shape: int) -> list[Tensor]:
            shapes = [(0, *shape[1:]) if kind == LINEAR else shape for kind in kinds]
            if device.type == "cpu":
                return [torch.empty(heads, *shape, dim, dtype=dtype).movedim(0, -2) for shape in shapes]
            return [torch.empty(*shape, heads, dim, dtype=dtype, device=device) for shape in shapes]

        self.prefix_k, self.prefix_v = empty(capacity.prefix_tokens), empty(capacity.prefix_tokens)
        self.suffix_k, self.suffix_v = (empty(slots, capacity.new_tokens) for _ in range(2))
        self.states: dict[int, States] = {}  # by layer
        if LINEAR in kinds:
            recurrent, tail = _state_shapes(text_config)
            self.states = {
                layer: States(
                    torch.empty(slots, *recurrent, dtype=state_dtype(dtype), device=device),
                    torch.empty(slots, *tail, dtype=dtype, device=device),
                )
                for layer, kind in enumerate(kinds)
                if kind == LINEAR
            }

    @property
    def spare_slot(self) -> int | None:
        """The slot of rows that fill a batch up; None: they may use another row's."""
        return self.capacity.slots if self.capacity.spare else None
