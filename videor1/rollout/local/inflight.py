"""The sequences in flight, as tensors of one row each: what each is to be fed next, and what it has drawn so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from videor1.rollout.local.scheduler import RunningSequence
from videor1.rollout.local.step import StepInputs
from videor1_kernels import DecodeLayout


class InFlight:
    """R sequences in flight, of N in the whole rollout; C new tokens at most.

    Attributes:
        sequences: in the order of the tensors' rows.
        tokens: int64 [R], drawn last.
        counts: int64 [R], tokens drawn so far, 1 or more once a sequence has entered.
        first: int64 [R], position of the sequence's first token.
        places: int64 [R], rows of the buffers ``drawn``, ``logp`` and ``uniform``, [N, C] each.
    """

    _PER_SEQUENCE = ("tokens", "counts", "first", "places")

    def __init__(self, total: int, new_tokens: int, device: torch.device) -> None:
        self.device = device
        self.sequences: list[RunningSequence] = []
        self.tokens, self.counts, self.first, self.places = (
            torch.empty(0, dtype=torch.int64, device=device) for _ in self._PER_SEQUENCE
        )
        self.drawn = torch.empty(total, new_tokens, dtype=torch.int64, device=device)
        self.logp = torch.empty(total, new_tokens, device=device)
        self.uniform = torch.empty(total, new_tokens, device=device)
        self._layout: tuple[int, DecodeLayout] | None = None  # and its size

    def __len__(self) -> int:
        return len(self.sequences)

    def inputs(self, size: int) -> StepInputs:
        """Of the next decode step, filled up to ``size`` rows with copies of the first."""
        fill = [*range(len(self)), *[0] * (size - len(self))]
        tokens, counts, first, places = self.tokens, self.counts, self.first, self.places
        if size > len(self):
            index = torch.tensor(fill, device=self.device)
            tokens, counts, first, places = (x[index] for x in (tokens, counts, first, places))
        return StepInputs(tokens, first + counts - 1, counts, self.uniform[places, counts], self._layout_of(fill))

    def _layout_of(self, fill: Sequence[int]) -> DecodeLayout:
        """Which prefix each row reads, and its slot; built again only when sequences come or go."""
        if self._layout is None or self._layout[0] != len(fill):
            sequences = [self.sequences[i] for i in fill]
            jobs = {id(sequence.job): sequence.job for sequence in sequences}
            place = {key: i for i, key in enumerate(jobs)}
            lengths = torch.tensor([0, *(job.length for job in jobs.values())])
            index = [
                lengths.cumsum(0),
                torch.tensor([place[id(sequence.job)] for sequence in sequences]),
                torch.tensor([job.start for job in jobs.values()]),
                torch.tensor([sequence.slot for sequence in sequences]),
            ]
            self._layout = len(fill), DecodeLayout(*(x.to(self.device) for x in index))
        return self._layout[1]

    def enter(self, sequences: Sequence[RunningSequence], first: Tensor, uniform: Tensor) -> None:
        """Sequences whose prompt is prefilled; ``uniform`` [sequences, C] are all the random numbers they will need."""
        new = {
            "tokens": torch.zeros(len(sequences), dtype=torch.int64),
            "counts": torch.zeros(len(sequences), dtype=torch.int64),
            "first": first,
            "places": torch.tensor([sequence.place for sequence in sequences]),
        }
        for name, values in new.items():
            setattr(self, name, torch.cat([getattr(self, name), values.to(self.device)]))
        self.uniform[self.places[len(self.sequences) :]] = uniform.to(self.device)
        self.sequences += sequences
        self._layout = None

    def record(self, since: int, tokens: Tensor, logp: Tensor) -> None:
        """What the sequences from ``since`` on have drawn."""
        places, counts = self.places[since:], self.counts[since:]
        self.drawn[places, counts] = tokens
        self.logp[places, counts] = logp
        self.tokens[since:] = tokens
        counts += 1

    def keep(self, going: Sequence[bool]) -> None:
        """Go on with the marked sequences alone. Nothing of the KV cache moves."""
        if all(going):
            return
        index = torch.tensor([i for i, go in enumerate(going) if go], dtype=torch.int64, device=self.device)
        for name in self._PER_SEQUENCE:
            setattr(self, name, getattr(self, name)[index])
        self.sequences = [sequence for sequence, go in zip(self.sequences, going, strict=True) if go]
        self._layout = None
