"""Streams: data that is too large to be held in memory, read in a new order each epoch and resumable at any position.

The shards are divided into blocks (``shards.py``). An epoch visits all blocks in a keyed pseudo-random order that takes
no memory. A window of several blocks is read at a time, and its rows are shuffled. Each draw depends only on (seed,
epoch, window, row), so a resumed run reads one window and continues.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from videor1.config import DataConfig, RewardConfig
from videor1.data.files import JSONL, find
from videor1.data.formats import RowReader
from videor1.data.order import Draw, check_shard
from videor1.data.samples import DEFAULT_REWARD, Dataset, EntryChecker, load_samples
from videor1.data.shards import Rows, Shard, open_shards
from videor1.errors import ConfigError, DataError
from videor1.seeding import derive_seed, generator
from videor1.types import Sample, SampleError

STREAM_BYTES = 256 * 2**20  # A .jsonl file of at least this size is a stream, unless data.stream is false.
COUNT_BYTES = 64 * 2**20  # Up to this size, rows are counted even if that means reading them (about 0.3 s).
MAX_WINDOW_BLOCKS = 256
MAX_EMPTY_EPOCHS = 8  # most epochs in a row that have no row for this rank
MAX_FAILURES = 10_000  # most draws in a row of which none can be used


def open_dataset(
    name: str, data: DataConfig, *, require_process: bool = False, reward: RewardConfig | None = DEFAULT_REWARD
) -> Dataset | RowStream:
    """Open the data that ``dataset_name`` names, held in memory or as a stream, as its size and ``data.stream`` decide.

    Args:
        name: the option ``dataset_name``.
        data: the options ``data.*``.
        require_process: whether every entry needs a ``process``.
        reward: how completions will be scored, by which every solution is checked; None: as ``load_samples``.

    Raises:
        ConfigError: as in ``files.find``, or ``data.stream`` is false for data that can only be a stream.
        DataError: as in ``load_samples`` and ``files.find``.
    """
    if _is_held_in_memory(name, data.stream):
        return load_samples(
            name,
            root=data.root,
            require_process=require_process,
            reward=reward,
            format=data.format,
            problem_type=data.problem_type,
        )
    if data.stream is False:
        raise ConfigError(f"data.stream: false holds one .json or .jsonl file in memory, got {name!r}")
    return RowStream(name, data, require_process=require_process, reward=reward)


def _is_held_in_memory(name: str, stream: bool | None) -> bool:
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
    """A keyed pseudo-random order of 0 .. n-1, of which each element is computed alone.

    It is a Feistel network of four rounds over the next power of four. The network is applied repeatedly until its
    output is below n.
    """

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        self.n, self._key = n, key
        self._half = max(1, -(-(n - 1).bit_length() // 2))  # bits
        self._mask = (1 << self._half) - 1

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.n:
            raise IndexError(f"place: expected 0 to {self.n - 1}, got {place}")
        while True:  # At most three more rounds are needed on average, because the network's domain is below 4 n.
            left, right = place >> self._half, place & self._mask
            for number in range(4):
                left, right = right, left ^ (derive_seed(self._key, number, right) & self._mask)
            place = left << self._half | right
            if place < self.n:
                return place


class RowStream:
    """A data set that is read block by block, as an order needs its rows.

    Args:
        name: the option ``dataset_name``.
        data: the options ``data.*``.
        require_process: whether every row needs a ``process``.
        reward: how completions will be scored; None: as ``load_samples``.

    Attributes:
        path: the name as it was given.
        shards: the shards that are not empty.
        blocks: the number of blocks of all shards.
        window_blocks: the number of blocks that are read, shuffled and held together; ``data.shuffle_mb`` limits it.
        large_blocks: a warning for the user if a block is much larger than ``data.shuffle_mb``, else "".

    Raises:
        ConfigError: as in ``files.find``, or ``data.root`` is needed and missing.
        DataError: as in ``files.find``, or the data is empty or ``data.root`` is not a folder.
    """

    def __init__(
        self,
        name: str,
        data: DataConfig,
        *,
        require_process: bool = False,
        reward: RewardConfig | None = DEFAULT_REWARD,
    ) -> None:
        self.path = name
        found, roots = find(name, data.split)
        if data.root is None and len(roots) > 1:
            raise ConfigError(f"data.root: needed, since dataset_name names several folders: {roots}")
        root = Path(os.path.realpath(data.root or roots[0]))
        if not root.is_dir():
            raise DataError(f"data.root: expected a folder, got {str(data.root)!r}")
        self._read = RowReader(data.format, data.problem_type)
        self.shards: list[Shard] = open_shards(found, self._read.columns)
        if not self.shards:
            raise DataError(f"{name}: holds no samples; its {len(found)} shards are empty")
        self._ends = list(itertools.accumulate(shard.blocks for shard in self.shards))
        self.blocks = self._ends[-1]
        largest, room = max(shard.block_bytes for shard in self.shards), data.shuffle_mb * 2**20
        self.window_blocks = min(max(1, room // max(1, largest)), MAX_WINDOW_BLOCKS)
        self.large_blocks = (
            ""
            if largest <= 4 * room
            else (
                f"{name}: its largest block, which is held whole, takes about {largest >> 20} MiB; write smaller row"
                " groups"
                " or shards for less memory and a better shuffle"
            )
        )
        self._head = self.shards[0].head()
        self.errors: list[SampleError] = []  # always empty: the error of a row is drawn in the row's place
        self._check = EntryChecker(name, root, require_process, reward)

    def error_counts(self) -> dict[str, int]:
        """Return no counts, unlike a ``Dataset``: rows are checked only when they are drawn."""
        return {}

    def reward_note(self) -> str:
        """Return nothing, for the same reason."""
        return ""

    @property
    def format_note(self) -> str:
        """What ``data.format auto`` takes the first rows for, in words; "" where the format was named."""
        return self._read.first_note(self._head)

    def count(self) -> int | None:
        """Return the number of rows in an epoch, including unusable ones; None if counting them would take long."""
        unknown = [shard for shard in self.shards if shard.rows is None]
        if sum(shard.size for shard in unknown) > COUNT_BYTES:
            return None
        counted = sum(shard.read(block).count() for shard in unknown for block in range(shard.blocks))
        return counted + sum(shard.rows or 0 for shard in self.shards)

    def read(self, block: int) -> tuple[int, Rows]:
        """Read a block and return (index of its shard, its rows)."""
        shard = bisect_right(self._ends, block)
        return shard, self.shards[shard].read(block - (self._ends[shard] - self.shards[shard].blocks))

    def sample(self, shard: int, rows: Rows, row: int) -> Sample | SampleError | None:
        """Check a row and return its sample or its error; None for a blank line."""
        found = rows.entry(row)
        if found is None:
            return None
        at, where, entry = found
        name = self._check.data_file = self.shards[shard].name
        if isinstance(entry, SampleError):
            return entry
        try:
            entry = self._read(where, entry, name)
            return self._check(shard << 40 | at, where, entry, problem_id=f"{os.path.basename(name)}:{at}")
        except SampleError as error:
            return error

    def digest(self) -> str:
        """Return a hash of the shards' names, sizes, blocks and rows, by which a resumed run detects changed data.

        The format of the rows counts too, unless it is the trainer's own.
        """
        facts: list[Any] = [(os.path.basename(s.name), s.size, s.blocks, s.rows) for s in self.shards]
        facts += self._read.identity(self._head)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a rank's next draw in a stream."""

    draws: int = 0  # draws that this rank has made
    epoch: int = 0
    window: int = 0  # index among this rank's windows of the epoch
    row: int = 0  # index among this rank's rows of the window, in their shuffled order


class StreamOrder:
    """The order of the draws of a stream.

    Args:
        stream: the data.
        seed: seeds the order of each epoch.
        shuffle: whether blocks and rows are shuffled; otherwise rows keep the order of the shards, and one block is
            read at a time.
        shard: (rank, ranks). A rank reads every ranks-th block of the epoch's order. If there are fewer than four
            blocks per rank, it reads all blocks and takes every ranks-th row of each window.
        changed_ok: whether to go on, with the next epoch, where the data are not those of a saved position.

    Attributes:
        note: what the user should know of the position that was begun at; "" if there is nothing.
    """

    def __init__(
        self, stream: RowStream, seed: int, shuffle: bool, shard: tuple[int, int] = (0, 1), *, changed_ok: bool = False
    ) -> None:
        check_shard(shard)
        self.stream, self.seed, self.shuffle = stream, seed, shuffle
        self._changed_ok = changed_ok
        self.note = ""
        self.rank, self.ranks = shard
        self.by_block = stream.blocks >= 4 * self.ranks
        self._window_blocks = stream.window_blocks if shuffle else 1
        rank_blocks = -(-(stream.blocks - self.rank) // self.ranks) if self.by_block else stream.blocks
        self.windows = -(-rank_blocks // self._window_blocks)
        self._digest = f"{stream.digest()}-{self._window_blocks}-{self.ranks}"

    def begin(self, saved: Any) -> Position:
        """Return the position that ``save`` returned earlier; 0 is the beginning.

        Raises:
            ConfigError: the position is not one of this stream, or the data is no longer the same.
        """
        if saved == 0:
            return Position()
        if not isinstance(saved, dict):
            raise ConfigError("resume: the checkpoint is of a run that held its data whole (data.stream false)")
        saved = dict(saved)
        digest = saved.pop("data", None)
        names = {field.name for field in fields(Position)}
        if saved.keys() != names or any(type(value) is not int or value < 0 for value in saved.values()):
            raise ConfigError(f"resume: not a position of a stream: {saved!r:.80}; resume from another checkpoint")
        if digest == self._digest:
            return Position(**saved)
        changed = (
            f"{self.stream.path} is not what the checkpoint's run read: its shards, their sizes, data.shuffle, "
            "data.shuffle_mb or the number of ranks changed"
        )
        if not self._changed_ok:
            raise ConfigError(
                f"resume: {changed}; start a new run from the checkpoint's weights, or go on with the next epoch of "
                "what is there now with --data.changed_ok true"
            )
        self.note = f"{changed}; the run goes on with the next epoch of what is there now"
        return Position(draws=saved["draws"], epoch=saved["epoch"] + 1)

    def save(self, position: Position) -> Any:
        """Return a position in a form that JSON can hold, for ``begin``."""
        return asdict(position) | {"data": self._digest}

    def draws(self, position: Position) -> int:
        """Return how many draws this rank has made up to a position."""
        return position.draws

    def epochs(self, position: Position) -> float:
        """Return how many passes over the data have been made up to a position, counted in begun windows."""
        return position.epoch + position.window / self.windows

    def iterate(self, position: Position) -> Iterator[Draw]:
        """Yield this rank's draws from a position on, without end.

        Raises:
            DataError: ``MAX_EMPTY_EPOCHS`` epochs in a row have no row for this rank.
        """
        epoch, window, row, made = position.epoch, position.window, position.row, position.draws
        empty_epochs = 0
        while True:
            for number in range(window, self.windows):
                blocks, order = self._window(epoch, number)
                for place in range(row, len(order)):
                    block, line = order[place]
                    sample = self.stream.sample(*blocks[block], line)
                    if sample is not None:
                        made, empty_epochs = made + 1, -1
                        after = Position(made, epoch, number, place + 1)
                        yield Draw((made - 1) * self.ranks + self.rank, sample, after)
                row = 0
                blocks.clear()  # This frees the memory before the next window is read.
            empty_epochs += 1
            if empty_epochs >= MAX_EMPTY_EPOCHS:
                for_rank = f" for rank {self.rank} of {self.ranks}" if self.ranks > 1 else ""
                raise DataError(f"{self.stream.path}: holds no samples{for_rank}")
            epoch, window = epoch + 1, 0

    def unusable_reason(self, failed: dict[Any, str], since: Position, position: Position) -> str | None:
        """Return why failures without a success in between must end the run, or None if they need not.

        They must if they span a whole epoch, or if there are ``MAX_FAILURES`` of them.

        Args:
            failed: the failed draws since the last success, each with the kind of its error.
            since: the position after the last success.
            position: the current position.
        """
        whole_epoch_done = since.epoch + (2 if since.window or since.row else 1)
        if position.epoch < whole_epoch_done and len(failed) < MAX_FAILURES:
            return None
        return f"none of the last {len(failed)} samples can be used"

    def _window(self, epoch: int, number: int) -> tuple[list[tuple[int, Rows]], _WindowOrder]:
        """Read the blocks of a window, and return them with the order of this rank's rows."""
        step = self.ranks if self.by_block else 1
        first = self.rank if self.by_block else 0
        rank_places = range(first, self.stream.blocks, step)
        places = rank_places[number * self._window_blocks : (number + 1) * self._window_blocks]
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
        if not self.by_block:
            # The ranks are rotated by a seeded number, so that windows with fewer rows than ranks serve all of them.
            rotation = derive_seed(self.seed, "ranks", epoch, number)
            rows = rows[(self.rank + rotation) % self.ranks :: self.ranks]
        return blocks, _WindowOrder(rows, ends)


class _WindowOrder:
    """The order of the rows of a window; an element is (index of the block in the window, row in the block).

    Args:
        rows: the rows in their order, numbered over all blocks of the window.
        ends: the number of rows up to the end of each block.
    """

    def __init__(self, rows: torch.Tensor, ends: torch.Tensor) -> None:
        self._rows, self._ends = rows, ends.tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> tuple[int, int]:
        row = int(self._rows[place])
        block = bisect_right(self._ends, row)
        return block, row - (self._ends[block - 1] if block else 0)
