"""A recurrence over a packed row of shared-prefix groups, made of one over sequences that lie end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from videor1_kernels.prefix_attention.layout import PrefixLayout, once_per_layout
from videor1_kernels.prefix_gated_delta.rows import Move, move_to


@dataclass(frozen=True, eq=False)
class PrefixStates:
    """What a recurrence holds after each prompt and after each completion: what a rollout goes on from. P groups, S
    completions, numbered group by group.

    Of ``prefix_gated_delta`` a state is [Hv, Dk, Dv], fp32 (fp64 where an input is); of ``prefix_causal_conv`` the last
    K - 1 inputs, [C, K - 1], the oldest first, in x's dtype, with zeros before a sequence began. Both are
    differentiable.
    """

    prompts: Tensor  # [P, ...]
    completions: Tensor  # [S, ...]


class Recurrence(Protocol):
    """Runs over sequences that lie end to end, N tokens in all, and stops at each border."""

    def __call__(
        self, inputs: Sequence[Tensor], lengths: tuple[int, ...], initial: Tensor | None, *, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``initial``: a state for each sequence; None: zeros. Returns the outputs [N, ...] and, with ``final``, the
        state after each sequence."""


def over_groups(
    run: Recurrence, inputs: Sequence[Tensor], layout: PrefixLayout, *, states: bool
) -> tuple[Tensor, PrefixStates | None]:
    """``run`` over all prompts, and then over all completions, each from the state after its prompt."""
    tokens, order = sum(layout.prompt_lengths), _prompts_first(layout)
    counts = [len(group) for group in layout.completion_lengths]
    lengths = tuple(n for group in layout.completion_lengths for n in group)
    moved = inputs if order is None else [order(x) for x in inputs]
    prompts, completions = zip(*(x.split([tokens, len(x) - tokens]) for x in moved), strict=True)
    out, after = run(prompts, tuple(layout.prompt_lengths), None, final=states or bool(lengths))
    end = None
    if lengths:
        assert after is not None
        # Not index_select, whose gradient on a GPU is added up in another order every time.
        forks = [after[i : i + 1].expand(count, *after.shape[1:]) for i, count in enumerate(counts)]
        own, end = run(completions, lengths, torch.cat(forks), final=states)
        out = torch.cat([out, own])
    out = out if order is None else order.reverse(out)
    if not states:
        return out, None
    assert after is not None
    return out, PrefixStates(after, after.new_zeros(0, *after.shape[1:]) if end is None else end)


@once_per_layout
def _prompts_first(layout: PrefixLayout) -> Move | None:
    """The move of a packed row to all prompts, then all completions; None: there they are."""
    if len(layout.prompt_lengths) == 1:
        return None
    return move_to(torch.cat([layout.prompt_index, layout.completion_index]), layout.total_tokens)
