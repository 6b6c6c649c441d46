"""How shared-prefix groups lie in one packed row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from videor1_kernels.checks import INTEGERS, check_tensor, fail

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """Groups of one prompt and its completions, end to end in one row: [prompt | c1 | ... | cG] [prompt | c1 | ...] ...

    It is built once per batch and says where each token of the row lies. P groups, T tokens in all, N of them in
    completions, S completions, numbered group by group. A group may have no completion (prefill only).

    Args:
        prompt_lengths: P ints, tokens, 1 or more.
        completion_lengths: P lists of ints, tokens, 1 or more.
        device: where the index tensors live.

    Raises:
        ValueError: no group, lists of different lengths, a length below 1.
    """

    prompt_lengths: Sequence[int]
    completion_lengths: Sequence[Sequence[int]]
    device: torch.device | str = "cpu"

    total_tokens: int = field(init=False)  # T
    prompt_starts: tuple[int, ...] = field(init=False)  # P row positions
    completion_starts: tuple[tuple[int, ...], ...] = field(init=False)  # per group, per completion: row position
    prompt_index: Tensor = field(init=False, repr=False)  # int64: row positions of the prompt tokens, end to end
    completion_index: Tensor = field(init=False, repr=False)  # int64 [N]: row positions of the completion tokens
    # int64 [N]: row position whose hidden state predicts each completion token. A prompt's last position predicts the
    # first token of each of its completions, so it appears once per completion.
    predict_index: Tensor = field(init=False, repr=False)
    cu_completions: Tensor = field(init=False, repr=False)  # int32 [S+1]: where each completion starts in the [N]

    def __post_init__(self) -> None:
        prompts = tuple(int(n) for n in self.prompt_lengths)
        completions = tuple(tuple(int(n) for n in group) for group in self.completion_lengths)
        if not prompts:
            raise fail("PrefixLayout", "prompt_lengths", "at least one group", "none")
        if len(completions) != len(prompts):
            raise fail("PrefixLayout", "completion_lengths", f"{len(prompts)} lists, one per prompt", len(completions))
        for i, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
            if prompt < 1:
                raise fail("PrefixLayout", f"prompt_lengths[{i}]", "1 or more", prompt)
            if any(n < 1 for n in group):
                raise fail("PrefixLayout", f"completion_lengths[{i}]", "lengths of 1 or more (drop empty ones)", group)

        starts: list[int] = []
        completion_starts: list[tuple[int, ...]] = []
        position = 0
        for prompt, group in zip(prompts, completions, strict=True):
            bounds = list(accumulate(group, initial=position + prompt))
            starts.append(position)
            completion_starts.append(tuple(bounds[:-1]))
            position = bounds[-1]
        prompt_index, completion_index, predict_index = [], [], []
        for start, prompt, group_starts, group in zip(starts, prompts, completion_starts, completions, strict=True):
            prompt_index.append(torch.arange(start, start + prompt))
            for first, length in zip(group_starts, group, strict=True):
                own = torch.arange(first, first + length)
                completion_index.append(own)
                predict_index.append(torch.cat([own.new_tensor([start + prompt - 1]), own[:-1]]))
        flat = [n for group in completions for n in group]
        empty = torch.empty(0, dtype=torch.int64)
        device = torch.empty(0, device=self.device).device  # "cuda" becomes "cuda:0"
        values = {
            "prompt_lengths": prompts,
            "completion_lengths": completions,
            "device": device,
            "total_tokens": position,
            "prompt_starts": tuple(starts),
            "completion_starts": tuple(completion_starts),
            "prompt_index": torch.cat(prompt_index).to(device),
            "completion_index": torch.cat([empty, *completion_index]).to(device),
            "predict_index": torch.cat([empty, *predict_index]).to(device),
            "cu_completions": torch.tensor([0, *accumulate(flat)], dtype=torch.int32, device=device),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to(self, device: torch.device | str) -> PrefixLayout:
        """The same layout with its index tensors on ``device``."""
        if torch.device(device) == self.device:
            return self
        return PrefixLayout(self.prompt_lengths, self.completion_lengths, device)

    def text_positions(self, prompt_positions: Sequence[Tensor], next_position: Sequence[int]) -> Tensor:
        """M-RoPE positions of the packed row, int64 [3, 1, T].

        Args:
            prompt_positions: per group int64 [3, P_i] (time, height, width) of its prompt tokens.
            next_position: per group the position of the first token after the prompt; every completion of the group
                counts on from it, alike in the three rows.

        Raises:
            ValueError, TypeError: another number of entries than groups, a tensor of another shape or dtype.
        """
        op, groups = "PrefixLayout.text_positions", len(self.prompt_lengths)
        if len(prompt_positions) != groups or len(next_position) != groups:
            raise fail(
                op,
                "prompt_positions, next_position",
                f"{groups} entries each",
                f"{len(prompt_positions)} and {len(next_position)}",
            )
        parts = []
        for i, (prompt, first) in enumerate(zip(prompt_positions, next_position, strict=True)):
            check_tensor(op, f"prompt_positions[{i}]", prompt, (3, self.prompt_lengths[i]), INTEGERS)
            parts.append(prompt.to(self.device, torch.int64))
            for length in self.completion_lengths[i]:
                parts.append(torch.arange(int(first), int(first) + length, device=self.device).expand(3, length))
        return torch.cat(parts, dim=1)[:, None]


def once_per_layout(build: Callable[Concatenate[PrefixLayout, P], T]) -> Callable[Concatenate[PrefixLayout, P], T]:
    """Cache the result: all layers of a model share a layout, and their passes share its tiles."""
    built: WeakKeyDictionary[PrefixLayout, dict[object, T]] = WeakKeyDictionary()

    @functools.wraps(build)
    def cached(layout: PrefixLayout, /, *args: P.args, **options: P.kwargs) -> T:
        known, key = built.setdefault(layout, {}), (args, tuple(options.items()))
        if key not in known:
            known[key] = build(layout, *args, **options)
        return known[key]

    return cached


def layout_numbers(layout: PrefixLayout) -> tuple[list[int], list[int], list[int]]:
    """(prompt lengths, completions per group, completion lengths one group after the other)."""
    groups = layout.completion_lengths
    return list(layout.prompt_lengths), [len(group) for group in groups], [n for group in groups for n in group]


@functools.lru_cache(maxsize=64)
def known_layout(
    prompts: tuple[int, ...], counts: tuple[int, ...], completions: tuple[int, ...], device: torch.device
) -> PrefixLayout:
    """Cached: all layers of a model and their backward passes ask for a layout, and other rows may come in between."""
    bounds = list(accumulate(counts, initial=0))
    groups = [completions[first:last] for first, last in pairwise(bounds)]
    return PrefixLayout(prompts, groups, device)
