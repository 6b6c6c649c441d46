"""The plan of which groups go into which packed row, under a bound on the tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from videor1_kernels.checks import fail


@dataclass(frozen=True)
class RowPart:
    """Some completions of one group, with its prompt: ``completions`` are numbered within the group."""

    group: int  # its number among the groups
    completions: tuple[int, ...]  # their numbers, ascending


def plan_rows(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], max_tokens_per_row: int | None = None
) -> list[list[RowPart]]:
    """Share the groups out over as few packed rows as first-fit decreasing finds, none longer than the bound.

    A group that does not fit into a row by itself is split between completions; its prompt is repeated in each part.
    Nothing is padded, cut or dropped. The order is a function of the lengths alone.

    Args:
        prompt_lengths: P ints, tokens, 1 or more.
        completion_lengths: P lists of ints, tokens, 1 or more.
        max_tokens_per_row: the bound, in tokens; None: everything in one row.

    Returns:
        Rows of parts, in the order of their groups: make a :class:`PrefixLayout` of each.

    Raises:
        ValueError: lists of different lengths, or a prompt that exceeds the bound with one of its completions.

    Source:
        This library; first-fit decreasing is D. S. Johnson's (Near-Optimal Bin Packing Algorithms, 1973).
    """
    op = "plan_rows"
    if len(prompt_lengths) != len(completion_lengths):
        expected = f"{len(prompt_lengths)} lists, one per prompt"
        raise fail(op, "completion_lengths", expected, len(completion_lengths))
    everything = [RowPart(i, tuple(range(len(group)))) for i, group in enumerate(completion_lengths)]
    if max_tokens_per_row is None:
        return [everything] if everything else []
    bins: list[tuple[int, list[RowPart]]] = []
    sized = [
        (tokens, part)
        for whole in everything
        for tokens, part in _split(
            whole, prompt_lengths[whole.group], completion_lengths[whole.group], max_tokens_per_row
        )
    ]
    for tokens, part in sorted(sized, key=lambda entry: -entry[0]):
        fitting = next((i for i, (used, _) in enumerate(bins) if used + tokens <= max_tokens_per_row), None)
        if fitting is None:
            bins.append((tokens, [part]))
        else:
            used, parts = bins[fitting]
            bins[fitting] = (used + tokens, [*parts, part])
    rows = [sorted(parts, key=lambda part: (part.group, part.completions)) for _, parts in bins]
    return sorted(rows, key=lambda parts: (parts[0].group, parts[0].completions))


def _split(whole: RowPart, prompt: int, lengths: Sequence[int], limit: int) -> list[tuple[int, RowPart]]:
    """A group as (tokens, part) that each fit, its completions in order."""
    parts: list[tuple[int, RowPart]] = []
    chosen: tuple[int, ...] = ()
    used = prompt
    for i, length in enumerate(lengths):
        if prompt + length > limit:
            raise _too_long(prompt + length, f"the prompt and completion {i} of group {whole.group}", limit)
        if used + length > limit:
            parts.append((used, RowPart(whole.group, chosen)))
            used, chosen = prompt, ()
        used, chosen = used + length, (*chosen, i)
    if used > limit:
        raise _too_long(used, f"the prompt of group {whole.group}", limit)
    return [*parts, (used, RowPart(whole.group, chosen))]


def _too_long(tokens: int, what: str, limit: int) -> ValueError:
    return fail("plan_rows", "max_tokens_per_row", f"at least {tokens} ({what})", limit)
