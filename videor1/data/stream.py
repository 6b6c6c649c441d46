"""Data too large to be held, read as a stream: bounded memory, a new order each epoch, resumed at any position.

The shards are cut into blocks (``shards.py``). An epoch visits all blocks in a keyed pseudo-random order that
takes no memory; a window of them is read at a time and its rows are shuffled. Everything is a function of (seed, epoch,
window, row), so a resumed run reads one window and goes on.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from videor1.config import DataConfig
from videor1.data.files import JSONL, find
from videor1.data.order import Draw, check_shard
from videor1.data.samples import Dataset, EntryChecker, load_samples
from videor1.data.shards import Rows, Shard, open_shards
from videor1.errors import ConfigError, DataError
from videor1.seeding import derive_seed, generator
from videor1.types import Sample, SampleError

STREAM_BYTES = 256 * 2**20  # a .jsonl from this size on is a stream unless data.stream is false
COUNT_BYTES = 64 * 2**20  # rows of less are counted where that means reading them: about 0.3 s
MAX_WINDOW_BLOCKS = 256
MAX_EMPTY_EPOCHS = 8  # in a row, without a row for this rank
MAX_FAILURES = 10_000  # draws in a row without one that can be used


def open_dataset(name: str, data: DataConfig, *, require_process: bool = False) -> Dataset | RowStream:
    """A data file that is held whole, or a stream of whatever ``dataset_name`` and ``data.stream`` ask for.

    Raises ConfigError and DataError as ``load_samples`` and ``files.find`` do.
    """
    if _held_whole(name, data.stream):
        return load_samples(name, root=data.root, require_process=require_process)
    if data.stream is False:
        raise ConfigError(f"data.stream: false holds one .json or .jsonl file in memory, got {name!r}")
    return RowStream(name, data, require_process=require_process)


def _held_whole(name: str, stream: bool | None) -> bool:
    path = Path(name)
    if not os.path.exists(name):
        return not (stream or glob.has_magic(name) or "," in name or "://" in name)
    if stream or path.is_dir():
        return False
    if path.name.endswith((".gz", ".parquet")):
        return False
    if stream is False or path.suffix.lower() not in JSONL or path.stat().st_size < STREAM_BYTES:
        return True
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


class Permutation:
    """A keyed pseudo-random order of 0 .. n-1, any place of which is computed alone: a Feistel network of four rounds
    over the next power of four, walked until it is below n."""

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        self.n, self._key = n, key
        self._half = max(1, -(-(n - 1).bit_length() // 2))  # bits
        self._mask = (1 << self._half) - 1

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.n:
            raise IndexError(f"place: expected 0 to {self.n - 1}, got {place}")
        while True:  # at most three more walks on average: the network's domain is below 4 n
            left, right = place >> self._half, place & self._mask
            for number in range(4):
                left, right = right, left ^ (derive_seed(self._key, number, right) & self._mask)
            place = left << self._half | right
            if place < self.n:
                return place


class RowStream:
    """The data of a run, of which only what an order asks for is read.

    Attributes:
        path: as it was given.
        shards: those that hold anything.
        blocks: of all shards.
        window_blocks: read, shuffled and held together; as many as ``data.shuffle_mb`` has room for.
        large_blocks: what to tell the user of blocks that are larger than that; "" where there are none.
    """

    def __init__(self, name: str, data: DataConfig, *, require_process: bool = False) -> None:
        self.path = name
        found, roots = find(name, data.split)
        if data.root is None and len(roots) > 1:
            raise ConfigError(f"data.root: needed, since dataset_name names several folders: {roots}")
        root = Path(os.path.realpath(data.root or roots[0]))
        if not root.is_dir():
            raise DataError(f"data.root: expected a folder, got {str(data.root)!r}")
        self.shards: list[Shard] = open_shards(found)
        if not self.shards:
            raise DataError(f"{name}: holds no samples; its {len(found)} shards are empty")
        self._ends = list(itertools.accumulate(shard.blocks for shard in self.shards))
        self.blocks = self._ends[-1]
        largest, room = max(shard.block_bytes for shard in self.shards), data.shuffle_mb * 2**20
        self.window_blocks = min(max(1, room // max(1, largest)), MAX_WINDOW_BLOCKS)
        self.large_blocks = "" if largest <= 4 * room else (
            f"{name}: its largest block, which is held whole, takes about {largest >> 20} MiB; write smaller row groups"
            " or shards for less memory and a better shuffle"
        )  # fmt: skip
        self.errors: list[SampleError] = []  # a row's error comes out in its place
        self._check = EntryChecker(name, root, require_process)

    def error_counts(self) -> dict[str, int]:
        """As of a Dataset: nothing is checked before it is drawn."""
        return {}

    def count(self) -> int | None:
        """Rows of an epoch, unusable ones included; None where counting them would take long."""
        unknown = [shard for shard in self.shards if shard.rows is None]
        if sum(shard.size for shard in unknown) > COUNT_BYTES:
            return None
        counted = sum(shard.read(block).count() for shard in unknown for block in range(shard.blocks))
        return counted + sum(shard.rows or 0 for shard in self.shards)

    def read(self, block: int) -> tuple[int, Rows]:
        """(shard, rows) of a block."""
        shard = bisect_right(self._ends, block)
        return shard, self.shards[shard].read(block - (self._ends[shard] - self.shards[shard].blocks))

    def sample(self, shard: int, rows: Rows, row: int) -> Sample | SampleError | None:
        """A row, checked; None for a blank line."""
        found = rows.entry(row)
        if found is None:
            return None
        at, where, entry = found
        name = self._check.data_file = self.shards[shard].name
        if isinstance(entry, SampleError):
            return entry
        try:
            return self._check(shard << 40 | at, where, entry, problem_id=f"{os.path.basename(name)}:{at}")
        except SampleError as error:
            return error

    def digest(self) -> str:
        """Tells apart data whose blocks are not the same."""
        facts = [(os.path.basename(s.name), s.size, s.blocks, s.rows) for s in self.shards]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Position:
    """Where in a stream the next draw is."""

    draws: int = 0  # made by this rank
    epoch: int = 0
    window: int = 0  # of this rank's, in the epoch
    row: int = 0  # of this rank's, in the window's order


class StreamOrder:
    """The draws of a stream.

    Args:
        shuffle: false: in the order of the shards, one block at a time.
        shard: (rank, ranks). Every ranks-th block of the epoch's order is a rank's own; where there are fewer than four
            blocks a rank, every ranks-th row of each window.
    """

    def __init__(self, stream: RowStream, seed: int, shuffle: bool, shard: tuple[int, int] = (0, 1)) -> None:
        check_shard(shard)
        self.stream, self.seed, self.shuffle = stream, seed, shuffle
        self.rank, self.ranks = shard
        self.by_block = stream.blocks >= 4 * self.ranks
        self._each = stream.window_blocks if shuffle else 1
        own = -(-(stream.blocks - self.rank) // self.ranks) if self.by_block else stream.blocks
        self.windows = -(-own // self._each)
        self._digest = f"{stream.digest()}-{self._each}-{self.ranks}"

    def begin(self, saved: Any) -> Position:
        """The position that ``save`` wrote down; 0 is the beginning. ConfigError where the data is not the same."""
        if saved == 0:
            return Position()
        if not isinstance(saved, dict):
            raise ConfigError("resume: the checkpoint is of a run that held its data whole (data.stream false)")
        saved = dict(saved)
        if saved.pop("data") != self._digest:
            raise ConfigError(
                f"resume: {self.stream.path} is not what the checkpoint's run read: its shards, their sizes, "
                "data.shuffle, data.shuffle_mb or the number of ranks changed; start a new run from the checkpoint's "
                "weights"
            )
        return Position(**saved)

    def save(self, position: Position) -> Any:
        return asdict(position) | {"data": self._digest}

    def draws(self, position: Position) -> int:
        return position.draws

    def epochs(self, position: Position) -> float:
        """Passes over the data up to a position, by the windows that were begun."""
        return position.epoch + position.window / self.windows

    def iterate(self, position: Position) -> Iterator[Draw]:
        """The draws from a position on, without end. DataError: epoch after epoch has no row for this rank."""
        epoch, window, row, made = position.epoch, position.window, position.row, position.draws
        empty = 0  # epochs
        while True:
            for number in range(window, self.windows):
                blocks, order = self._window(epoch, number)
                for place in range(row, len(order)):
                    block, line = order[place]
                    sample = self.stream.sample(*blocks[block], line)
                    if sample is not None:
                        made, empty = made + 1, -1
                        after = Position(made, epoch, number, place + 1)
                        yield Draw((made - 1) * self.ranks + self.rank, sample, after)
                row = 0
                blocks.clear()  # before the next are read
            empty += 1
            if empty >= MAX_EMPTY_EPOCHS:
                who = f" for rank {self.rank} of {self.ranks}" if self.ranks > 1 else ""
                raise DataError(f"{self.stream.path}: holds no samples{who}")
            epoch, window = epoch + 1, 0

    def hopeless(self, failed: dict[Any, str], since: Position, position: Position) -> str | None:
        """Why failures without a success in between end the run, or None: a whole epoch of them, or very many."""
        whole = since.epoch + (2 if since.window or since.row else 1)
        if position.epoch < whole and len(failed) < MAX_FAILURES:
            return None
        return f"none of the last {len(failed)} samples can be used"

    def _window(self, epoch: int, number: int) -> tuple[list[tuple[int, Rows]], _Order]:
        """The blocks of a window, and (block, row) of this rank's rows in their order."""
        step = self.ranks if self.by_block else 1
        first = self.rank if self.by_block else 0
        places = range(first, self.stream.blocks, step)[number * self._each : (number + 1) * self._each]
        if self.shuffle:
            order = Permutation(self.stream.blocks, derive_seed(self.seed, "blocks", epoch))
            chosen = [order[place] for place in places]
        else:
            chosen = list(places)
        blocks = [self.stream.read(block) for block in chosen]
        ends = torch.tensor([len(rows) for _, rows in blocks]).cumsum(0)
        total = int(ends[-1])
        if self.shuffle:
            source = generator(self.seed, "rows", epoch, number, *([self.rank] if self.by_block else []))
            rows = torch.randperm(total, generator=source)
        else:
            rows = torch.arange(total)
        if not self.by_block:  # turned, so that windows of fewer rows than ranks serve all ranks
            turn = derive_seed(self.seed, "ranks", epoch, number)
            rows = rows[(self.rank + turn) % self.ranks :: self.ranks]
        return blocks, _Order(rows, ends)


class _Order:
    """Rows of several blocks, numbered through, in an order."""

    def __init__(self, rows: torch.Tensor, ends: torch.Tensor) -> None:
        self._rows, self._ends = rows, ends.tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> tuple[int, int]:
        row = int(self._rows[place])
        block = bisect_right(self._ends, row)
        return block, row - (self._ends[block - 1] if block else 0)
