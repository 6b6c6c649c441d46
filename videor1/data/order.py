"""The endless order in which the samples of a data set are drawn."""

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
    """One draw of the endless order."""

    number: int  # from 0, over all ranks; seeds the permutation and the sampling
    sample: Sample | SampleError  # the error of a row that a stream could not use
    after: Any  # the position of the next draw of this rank, as the order counts

    @property
    def path(self) -> Path | str | None:
        return self.sample.path


class SampleStream:
    """An endless order over ``num_samples`` samples that any draw can be asked of, so a resumed run needs no replay.

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
        """Index of the sample at ``draw`` (from 0)."""
        if draw < 0:
            raise ValueError(f"draw: expected 0 or more, got {draw}")
        epoch, position = divmod(draw, self.num_samples)
        return int(self._order(epoch)[position]) if self.shuffle else position

    def iterate(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """(draw, sample index) from ``start`` on, without end."""
        draw = start
        while True:
            yield draw, self.at(draw)
            draw += 1

    def _order(self, epoch: int) -> torch.Tensor:
        if epoch not in self._orders:
            if len(self._orders) >= 2:  # a prefetch reads across the end of an epoch
                del self._orders[min(self._orders)]
            self._orders[epoch] = torch.randperm(self.num_samples, generator=generator(self.seed, "data", epoch))
        return self._orders[epoch]


class ListOrder:
    """The draws of a data set that is held whole. A position is how many draws this rank has made.

    Args:
        shard: (rank, ranks); rank r makes draws r, r + ranks, ... of the order that all share.
    """

    def __init__(self, dataset: Dataset, seed: int, shuffle: bool, shard: tuple[int, int] = (0, 1)) -> None:
        check_shard(shard)
        self.dataset, self.shard = dataset, shard
        self._stream = SampleStream(len(dataset), seed, shuffle)

    def begin(self, saved: Any) -> int:
        """The position that ``save`` wrote down; 0 is the beginning."""
        if not isinstance(saved, int):
            raise ConfigError("resume: the checkpoint is of a run that read its data as a stream (data.stream)")
        return saved

    def save(self, position: int) -> Any:
        return position

    def draws(self, position: int) -> int:
        return position

    def epochs(self, position: int) -> float:
        """Passes over the data up to a position."""
        return position * self.shard[1] / len(self.dataset)

    def iterate(self, position: int) -> Iterator[Draw]:
        rank, ranks = self.shard
        for made in itertools.count(position):
            number = made * ranks + rank
            yield Draw(number, self.dataset.samples[self._stream.at(number)], made + 1)

    def hopeless(self, failed: dict[Any, str], since: int, position: int) -> str | None:
        """Why failures without a success in between end the run, or None. Samples are counted, not draws: the end of
        one epoch and the start of the next may hold the same bad ones."""
        count = len(self.dataset)
        return f"none of its {count} samples can be used" if len(failed) >= count else None


def check_shard(shard: tuple[int, int]) -> None:
    """ValueError unless it is (rank, ranks)."""
    rank, ranks = shard
    if not 0 <= rank < ranks:
        raise ValueError(f"shard: expected (rank, ranks) with 0 <= rank < ranks, got {shard}")
