"""The sequences in flight as one batch: added after their prefill, removed as they end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from videor1.rollout.local.scheduler import RunningSequence
from videor1.rollout.local.step import Batch
from videor1_kernels import DecodeLayout
from videor1_kernels.transfer import to_device


class InFlight:
    """The R sequences in flight, of N in the whole rollout, with C new tokens each at most.

    Attributes:
        sequences: the sequences, in the order of the batch.
        uniform: fp32 [N, C], their random numbers.
        spare: the slot of what fills a batch up; None: that of the first sequence.
    """

    def __init__(self, uniform: Tensor, spare: int | None = None) -> None:
        device = self.device = uniform.device
        self.sequences: list[RunningSequence] = []
        self.uniform, self._spare = uniform, spare
        # int64 [R] each, and behind them what a padded batch has more: tokens, counts, first, rows of uniform
        self._state = {name: torch.empty(0, dtype=torch.int64, device=device) for name in Batch.STATE}
        self._batch: Batch | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, size: int) -> Batch:
        """Return the batch of the next decode step, padded to ``size`` sequences with copies of the first.

        It is made anew only when sequences have been added or removed, or the padded size has changed.
        """
        if self._batch is None or len(self._batch.tokens) != size:
            padded = [*range(len(self)), *[0] * (size - len(self))]
            index = to_device(torch.tensor(padded), self.device)
            state = {name: values[index] for name, values in self._state.items()}
            self._batch = Batch(**state, uniform=self.uniform, layout=self._layout(padded))
            self.advanced(self._batch)
        return self._batch

    def advanced(self, batch: Batch) -> None:
        """Go on from the batch that a step has advanced."""
        self._batch = batch
        self._state = {name: getattr(batch, name) for name in Batch.STATE}

    def add(self, sequences: Sequence[RunningSequence], first: Tensor, uniform: Tensor) -> Tensor:
        """Add sequences whose prompt is prefilled; return the random numbers of their first tokens.

        Args:
            first: int64 [sequences], the positions of their first tokens.
            uniform: fp32 [sequences, C], on the host.
        """
        rows = to_device(torch.tensor([sequence.buffer_row for sequence in sequences]), self.device)
        zeros = torch.zeros(len(sequences), dtype=torch.int64, device=self.device)
        new = {"tokens": zeros, "counts": zeros, "first": to_device(first, self.device), "rows": rows}
        kept = len(self)
        self._state = {name: torch.cat([values[:kept], new[name]]) for name, values in self._state.items()}
        numbers = to_device(uniform, self.device)
        self.uniform[rows] = numbers
        self.sequences += sequences
        self._batch = None
        return numbers[:, 0]

    def first_tokens(self, tokens: Tensor) -> None:
        """Set the first tokens, int64 [sequences], of those that were added last."""
        start = len(self) - len(tokens)
        self._state["tokens"][start:] = tokens
        self._state["counts"][start:] = 1

    def keep(self, kept: Sequence[bool]) -> None:
        """Remove the sequences that are not marked in ``kept``. Nothing is moved in the KV cache."""
        if all(kept):
            return
        index = to_device(torch.tensor([i for i, keep in enumerate(kept) if keep], dtype=torch.int64), self.device)
        self._state = {name: values[index] for name, values in self._state.items()}
        self.sequences = [sequence for sequence, keep in zip(self.sequences, kept, strict=True) if keep]
        self._batch = None

    def _layout(self, padded: Sequence[int]) -> DecodeLayout:
        """Return the layout: the prefix that each sequence reads, and its slot."""
        sequences = [self.sequences[i] for i in padded]
        jobs = {id(sequence.job): sequence.job for sequence in sequences}
        prefix_index = {key: i for i, key in enumerate(jobs)}
        lengths = torch.tensor([0, *(job.length for job in jobs.values())])
        slots = [sequence.slot for sequence in sequences]
        if self._spare is not None:
            slots[len(self) :] = [self._spare] * (len(slots) - len(self))
        layout = DecodeLayout(
            lengths.cumsum(0),
            torch.tensor([prefix_index[id(sequence.job)] for sequence in sequences]),
            torch.tensor([job.start for job in jobs.values()]),
            torch.tensor(slots),
        )
        return layout if self.device.type == "cpu" else layout.to(self.device)
