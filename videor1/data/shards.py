"""Shards cut into blocks that can be read in any order: pieces of JSONL, row groups of Parquet, ranges of saved rows.

A block is found without an index: the lines that begin among its bytes, or what the file's footer says. So opening
reads no row, and reading a block costs no more than the block.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from videor1.data.files import GZIP, PARQUET, File, Saved, require
from videor1.data.samples import Unparsed, parse_entry
from videor1.errors import DataError
from videor1.types import SampleError

BLOCK_BYTES = 2**20
MAX_ROW_BYTES = 64 * 2**20
MAX_UNPACKED_BYTES = 256 * 2**20
# What is read of a row; other columns may be large.
FIELDS = (
    "problem_id", "problem", "data_type", "problem_type", "options", "solution", "path", "data_source", "process",
)  # fmt: skip
_BOM = b"\xef\xbb\xbf"


class Rows(Protocol):
    """The rows of a block; a blank line is one."""

    def __len__(self) -> int: ...

    def count(self) -> int:
        """Without blank lines."""
        ...

    def entry(self, row: int) -> tuple[int, str, Any] | None:
        """(a number that no other row of the shard has, where it is in words, its parsed value, Unparsed or
        SampleError); None for a blank line."""
        ...


class Shard(Protocol):
    """Some of the data."""

    name: str
    size: int  # bytes that counting the rows would read
    blocks: int
    block_bytes: int  # of the largest block, in memory, about

    @property
    def rows(self) -> int | None:
        """None where counting them means reading them."""
        ...

    def read(self, block: int) -> Rows: ...


class Lines:
    """The lines of ``data``, which begins at byte ``start`` of a shard."""

    def __init__(self, data: bytes, start: int, *, cut: bool = False) -> None:
        self._data, self._start, self._cut = data, start, cut
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")).astype(np.int32)
        self._ends = ends if data.endswith(b"\n") or not data else np.append(ends, np.int32(len(data)))

    def __len__(self) -> int:
        return len(self._ends)

    def count(self) -> int:
        return sum(1 for line in self._data.split(b"\n") if line.strip())

    def entry(self, row: int) -> tuple[int, str, Any] | None:
        begin, end = int(self._ends[row - 1]) + 1 if row else 0, int(self._ends[row])
        line = self._data[begin:end]
        if not line.strip():
            return None
        at = self._start + begin
        if self._cut and row == len(self) - 1:
            return at, f"byte {at}", Unparsed(f"a line of more than {MAX_ROW_BYTES} bytes")
        return at, f"byte {at}", parse_entry(line)


class BadBlock:
    """A block that cannot be decoded: one error in the place of its rows."""

    def __init__(self, name: str, where: str, error: BaseException) -> None:
        lost = SampleError("bad_block", f"{where}: cannot be decoded, its rows are lost: {error}", name)
        self._entry = (0, where, lost)

    def __len__(self) -> int:
        return 1

    def count(self) -> int:
        return 1

    def entry(self, row: int) -> tuple[int, str, Any]:
        return self._entry


class JsonlShard:
    """Pieces of ``BLOCK_BYTES``; a block holds the lines that begin in it."""

    rows = None

    def __init__(self, file: File) -> None:
        self.name, self.size, self._file = file.name, file.size, file
        self.blocks = -(-file.size // BLOCK_BYTES)
        self.block_bytes = min(file.size, BLOCK_BYTES)
        first = file.read(0, min(file.size, 4096)).removeprefix(_BOM).lstrip()
        if first.startswith(b"["):
            raise DataError(f"{file.name}: holds a JSON list; a stream needs one JSON object a line")

    def read(self, block: int) -> Rows:
        start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.size)
        data = self._file.read(max(start - 1, 0), stop)
        if start:  # a line begins here only after the end of another
            skip = data.find(b"\n") + 1 or len(data)
            start, data = start - 1 + skip, data[skip:]
        elif data.startswith(_BOM):
            start, data = len(_BOM), data[len(_BOM) :]
        if not data or data.endswith(b"\n"):
            return Lines(data, start)
        rest, cut = self._rest_of_line(stop)
        return Lines(data + rest, start, cut=cut)

    def _rest_of_line(self, start: int) -> tuple[bytes, bool]:
        """(what a line has beyond its block, whether it is too long to be read)."""
        parts: list[bytes] = []
        length, step = 0, 2**16
        while start + length < self.size:
            part = self._file.read(start + length, min(start + length + step, self.size))
            end = part.find(b"\n")
            if end >= 0:
                return b"".join([*parts, part[:end]]), False
            parts.append(part)
            length, step = length + len(part), 2 * step
            if length > MAX_ROW_BYTES:
                return b"", True
        return b"".join(parts), False


class GzipShard:
    """One block: nothing inside can be reached but from the beginning."""

    rows = None

    def __init__(self, file: File) -> None:
        self.name, self._file, self.blocks = file.name, file, int(file.size > 0)
        # The trailer tells the unpacked size, of the last member and modulo 2**32: an estimate.
        unpacked = int.from_bytes(file.read(max(file.size - 4, 0), file.size), "little")
        self.size = self.block_bytes = max(unpacked, file.size)

    def read(self, block: int) -> Rows:
        packed = self._file.read(0, self._file.size)
        try:
            with gzip.open(io.BytesIO(packed)) as file:
                data = file.read(MAX_UNPACKED_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            return BadBlock(self.name, "gzip", error)
        if len(data) > MAX_UNPACKED_BYTES:
            raise DataError(
                f"{self.name}: unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB, which would be held whole; "
                "unpack it, or write smaller shards"
            )
        skip = len(_BOM) if data.startswith(_BOM) else 0
        return Lines(data[skip:], skip)


class Records:
    """Rows of an Arrow table; null is a field that is not there."""

    def __init__(self, table: Any, first: int) -> None:
        self._table, self._first = table, first

    def __len__(self) -> int:
        return self._table.num_rows

    def count(self) -> int:
        return len(self)

    def entry(self, row: int) -> tuple[int, str, Any]:
        (record,) = self._table.slice(row, 1).to_pylist()
        at = self._first + row
        return at, f"row {at}", {name: value for name, value in record.items() if value is not None}


class ParquetShard:
    """Row groups, each read whole, the columns of ``FIELDS`` alone."""

    def __init__(self, file: File) -> None:
        self.name, self.size, self._file = file.name, file.size, file
        self._parquet = require("pyarrow.parquet")
        with file.open() as handle:
            try:
                footer = self._parquet.ParquetFile(handle).metadata
            except Exception as error:  # pyarrow's own kinds, and OSError for what is no Parquet
                raise DataError(f"{file.name}: not a Parquet file: {error}") from error
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        self.blocks, self.rows = len(groups), footer.num_rows
        self._firsts = np.cumsum([0, *(group.num_rows for group in groups)])
        self.block_bytes = max((_held_bytes(group) for group in groups), default=0)

    def read(self, block: int) -> Rows:
        with self._file.open() as handle:
            try:
                parquet = self._parquet.ParquetFile(handle, pre_buffer=True)
                names = [name for name in FIELDS if name in parquet.schema_arrow.names]
                table = parquet.read_row_group(block, columns=names, use_threads=False)
            except DataError:
                raise
            except Exception as error:  # a damaged page: pyarrow raises OSError, ValueError and more
                return BadBlock(self.name, f"row group {block}", error)
        return Records(table, int(self._firsts[block]))


def _held_bytes(group: Any) -> int:
    columns = [group.column(i) for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in FIELDS)
    return max(size, 128 * group.num_rows)  # repeated values are kept once in the file


class SavedShard:
    """Ranges of rows of what ``datasets`` saved, which it maps into memory."""

    def __init__(self, saved: Saved) -> None:
        datasets = require("datasets")
        try:
            data = datasets.load_from_disk(saved.name)
        except Exception as error:  # whatever a damaged folder makes pyarrow raise
            raise DataError(f"{saved.name}: cannot be opened by datasets.load_from_disk: {error}") from error
        self._data = data.select_columns([n for n in FIELDS if n in data.column_names]).with_format("arrow")
        self.name, self.rows, self.size = saved.name, len(data), 0
        each = max(1, self._data.data.nbytes // max(1, self.rows))
        self._step = min(max(64, BLOCK_BYTES // each), 65536)
        self.blocks = -(-self.rows // self._step)
        self.block_bytes = self._step * each

    def read(self, block: int) -> Rows:
        start = block * self._step
        return Records(self._data[start : start + self._step], start)


def open_shards(found: Sequence[File | Saved]) -> list[Shard]:
    """The shards that are not empty, in order. Footers are read by several threads: each may be a request."""
    with ThreadPoolExecutor(16) as pool:
        return [shard for shard in pool.map(_open, found) if shard.blocks]


def _open(found: File | Saved) -> Shard:
    if isinstance(found, Saved):
        return SavedShard(found)
    if found.name.endswith(PARQUET):
        return ParquetShard(found)
    return GzipShard(found) if found.name.endswith(GZIP) else JsonlShard(found)
