"""The endless seeded order in which the samples of a data set are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from videor1.data.samples import Dataset
from videor1.errors import ConfigError
from videor1.seeding import generator
from videor1.types import Sample, SampleError


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample that the order draws."""

    number: int  # counted from 0 over all ranks; seeds the frame permutation and the sampling of completions
    sample: Sample | SampleError  # an error where a row of a stream cannot be used
    after: Any  # the position of this rank's next draw, in the order's own form

    @property
    def path(self) -> Path | str | None:
        """The path of the sample's media file, or the path that its error names."""
        return self.sample.path


class SampleStream:
    """An endless order of ``num_samples`` samples. Any draw is computed alone, so a resumed run replays nothing.

    Draw ``d`` is position ``d % n`` of epoch ``d // n``. An epoch's order is ``torch.randperm(n)`` with the generator
    ``seeding.generator(seed, "data", epoch)``; without ``shuffle`` it is 0 .. n-1.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, torch.Tensor] = {}

    def at(self, draw: int) -> int:
        """Return the index of the sample of a draw. Draws count from 0."""
        if draw < 0:
            raise ValueError(f"draw: expected 0 or more, got {draw}")
        epoch, position = divmod(draw, self.num_samples)
        return int(self._order(epoch)[position]) if self.shuffle else position

    def iterate(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (draw, sample index) from the draw ``start`` on, without end."""
        draw = start
        while True:
            yield draw, self.at(draw)
            draw += 1

    def _order(self, epoch: int) -> torch.Tensor:
        if epoch not in self._orders:
            if len(self._orders) >= 2:  # Two are kept, because a prefetch reads across the end of an epoch.
                del self._orders[min(self._orders)]
            self._orders[epoch] = torch.randperm(self.num_samples, generator=generator(self.seed, "data", epoch))
        return self._orders[epoch]


class ListOrder:
    """The order of the draws of a data set that is held in memory.

    A position is the number of draws that this rank has made.

    Args:
        dataset: the samples.
        seed: seeds the order of each epoch.
        shuffle: whether an epoch is shuffled; otherwise it keeps the order of the data file.
        shard: (rank, ranks); rank r makes draws r, r + ranks, ... of the order that all ranks share.
    """

    def __init__(self, dataset: Dataset, seed: int, shuffle: bool, shard: tuple[int, int] = (0, 1)) -> None:
        check_shard(shard)
        self.dataset, self.shard = dataset, shard
        self.note = ""  # as StreamOrder's
        self._stream = SampleStream(len(dataset), seed, shuffle)

    def begin(self, saved: Any) -> int:
        """Return the position that ``save`` returned earlier; 0 is the beginning.

        Raises:
            ConfigError: the position is one of a stream.
        """
        if type(saved) is not int or saved < 0:
            raise ConfigError("resume: the checkpoint is of a run that read its data as a stream (data.stream)")
        return saved

    def save(self, position: int) -> Any:
        """Return a position in a form that JSON can hold, for ``begin``."""
        return position

    def draws(self, position: int) -> int:
        """Return how many draws this rank has made up to a position."""
        return position

    def epochs(self, position: int) -> float:
        """Return how many passes over the data have been made up to a position."""
        return position * self.shard[1] / len(self.dataset)

    def iterate(self, position: int) -> Iterator[Draw]:
        """Yield this rank's draws from a position on, without end."""
        rank, ranks = self.shard
        for made in itertools.count(position):
            number = made * ranks + rank
            yield Draw(number, self.dataset.samples[self._stream.at(number)], made + 1)

    def unusable_reason(self, failed: dict[Any, str], since: int, position: int) -> str | None:
        """Return why failures without a success in between must end the run, or None if they need not.

        Distinct samples are counted and not draws, because the end of one epoch and the start of the next may draw the
        same bad samples.

        Args:
            failed: the failed samples since the last success, each with the kind of its error.
            since: the position after the last success.
            position: the current position.
        """
        count = len(self.dataset)
        return f"none of its {count} samples can be used" if len(failed) >= count else None


def check_shard(shard: tuple[int, int]) -> None:
    """Raise a ValueError unless ``shard`` is (rank, ranks) with 0 <= rank < ranks."""
    rank, ranks = shard
    if not 0 <= rank < ranks:
        raise ValueError(f"shard: expected (rank, ranks) with 0 <= rank < ranks, got {shard}")
