"""The state of the sequences in flight as batched tensors: the next inputs and the sampled tokens of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from videor1.rollout.local.scheduler import RunningSequence
from videor1.rollout.local.step import StepInputs
from videor1_kernels import DecodeLayout


class InFlight:
    """The R sequences in flight, of N in the whole rollout, with C new tokens each at most.

    Attributes:
        sequences: the sequences, in the order of the tensors' first dimension.
        tokens: int64 [R], the last sampled tokens.
        counts: int64 [R], tokens sampled so far.
        first: int64 [R], position of each sequence's first sampled token.
        buffer_rows: int64 [R], indices into the buffers ``sampled``, ``logp`` and ``uniform``, [N, C] each.
    """

    _PER_SEQUENCE = ("tokens", "counts", "first", "buffer_rows")

    def __init__(self, total: int, new_tokens: int, device: torch.device) -> None:
        self.device = device
        self.sequences: list[RunningSequence] = []
        self.tokens, self.counts, self.first, self.buffer_rows = (
            torch.empty(0, dtype=torch.int64, device=device) for _ in self._PER_SEQUENCE
        )
        self.sampled = torch.empty(total, new_tokens, dtype=torch.int64, device=device)
        self.logp = torch.empty(total, new_tokens, device=device)
        self.uniform = torch.empty(total, new_tokens, device=device)
        self._layout: tuple[int, DecodeLayout] | None = None  # the padded batch size and the layout for it

    def __len__(self) -> int:
        return len(self.sequences)

    def inputs(self, size: int) -> StepInputs:
        """Return the inputs of the next decode step, padded to ``size`` sequences with copies of the first."""
        padded = [*range(len(self)), *[0] * (size - len(self))]
        tokens, counts, first, buffer_rows = self.tokens, self.counts, self.first, self.buffer_rows
        if size > len(self):
            index = torch.tensor(padded, device=self.device)
            tokens, counts, first, buffer_rows = (x[index] for x in (tokens, counts, first, buffer_rows))
        uniform = self.uniform[buffer_rows, counts]
        return StepInputs(tokens, first + counts - 1, counts, uniform, self._layout_of(padded))

    def _layout_of(self, padded: Sequence[int]) -> DecodeLayout:
        """Return the layout: the prefix that each sequence reads, and its slot.

        It is built again only when sequences have been added or removed, or the padded size has changed.
        """
        if self._layout is None or self._layout[0] != len(padded):
            sequences = [self.sequences[i] for i in padded]
            jobs = {id(sequence.job): sequence.job for sequence in sequences}
            prefix_index = {key: i for i, key in enumerate(jobs)}
            lengths = torch.tensor([0, *(job.length for job in jobs.values())])
            index = [
                lengths.cumsum(0),
                torch.tensor([prefix_index[id(sequence.job)] for sequence in sequences]),
                torch.tensor([job.start for job in jobs.values()]),
                torch.tensor([sequence.slot for sequence in sequences]),
            ]
            self._layout = len(padded), DecodeLayout(*(x.to(self.device) for x in index))
        return self._layout[1]

    def add(self, sequences: Sequence[RunningSequence], first: Tensor, uniform: Tensor) -> None:
        """Add sequences whose prompt is prefilled; ``uniform`` [sequences, C] are their random numbers."""
        new = {
            "tokens": torch.zeros(len(sequences), dtype=torch.int64),
            "counts": torch.zeros(len(sequences), dtype=torch.int64),
            "first": first,
            "buffer_rows": torch.tensor([sequence.buffer_row for sequence in sequences]),
        }
        for name, values in new.items():
            setattr(self, name, torch.cat([getattr(self, name), values.to(self.device)]))
        self.uniform[self.buffer_rows[len(self.sequences) :]] = uniform.to(self.device)
        self.sequences += sequences
        self._layout = None

    def record(self, start: int, tokens: Tensor, logp: Tensor) -> None:
        """Store the tokens that the sequences from index ``start`` on have sampled, and their log-probs."""
        rows, counts = self.buffer_rows[start:], self.counts[start:]
        self.sampled[rows, counts] = tokens
        self.logp[rows, counts] = logp
        self.tokens[start:] = tokens
        counts += 1

    def keep(self, kept: Sequence[bool]) -> None:
        """Remove the sequences that are not marked in ``kept``. Nothing is moved in the KV cache."""
        if all(kept):
            return
        index = torch.tensor([i for i, keep in enumerate(kept) if keep], dtype=torch.int64, device=self.device)
        for name in self._PER_SEQUENCE:
            setattr(self, name, getattr(self, name)[index])
        self.sequences = [sequence for sequence, keep in zip(self.sequences, kept, strict=True) if keep]
        self._layout = None
