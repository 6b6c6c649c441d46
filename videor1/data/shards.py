"""Divide shards into blocks that can be read in any order.

A block is a range of bytes of a JSONL file, a row group of a Parquet file, or a range of rows of a saved dataset.
Blocks are located without an index: a block of JSONL holds the lines that begin in its range, and the footer of a
Parquet file lists its row groups. Opening a shard therefore reads no row, and reading a block reads little more than
its bytes.
"""

from __future__ import annotations

import functools
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from videor1.data.files import GZIP, PARQUET, File, Saved, require
from videor1.data.formats import field_names
from videor1.data.parsing import Unparsed, parse_entry, without_nulls
from videor1.errors import DataError
from videor1.types import SampleError

BLOCK_BYTES = 2**20
MAX_ROW_BYTES = 64 * 2**20
MAX_UNPACKED_BYTES = 256 * 2**20
HEAD_BYTES = 64 * 2**10  # of a file of lines, in which its first rows are looked for
# Chooses which of a table's columns are read.
Columns = Callable[[Iterable[str]], list[str]]
_BOM = b"\xef\xbb\xbf"


class Rows(Protocol):
    """The rows of a block. A blank line counts as a row in ``len``, but not in ``count``."""

    def __len__(self) -> int: ...

    def count(self) -> int:
        """Return the number of rows without blank lines."""
        ...

    def entry(self, row: int) -> tuple[int, str, Any] | None:
        """Return a row, or None for a blank line.

        Returns:
            (a number that is unique in the shard, the place of the row in words, its parsed value or Unparsed or
            SampleError).
        """
        ...


class Shard(Protocol):
    """One file or folder of a data set, divided into blocks."""

    name: str
    size: int  # bytes that have to be read to count the rows
    blocks: int  # number of blocks
    block_bytes: int  # approximate bytes of the largest block in memory

    @property
    def rows(self) -> int | None:
        """The number of rows, or None if the shard would have to be read to count them."""
        ...

    def read(self, block: int) -> Rows:
        """Read the rows of a block."""
        ...

    def head(self) -> list[set[str]]:
        """Return the names of the fields of a few of the first rows, as far as little has to be read for them."""
        ...


class Lines:
    """The lines of a block of JSONL.

    Args:
        data: the bytes of the lines.
        start: the offset of ``data`` in the shard.
        cut: whether the last line is too long to be read whole.
    """

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
    """A block that cannot be decoded. One error stands in the place of its rows."""

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
    """A JSONL file, divided into blocks of ``BLOCK_BYTES``. A block holds the lines that begin in it."""

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
        if start:  # The read began one byte early: a line begins at the block's start only after a line end.
            skip = data.find(b"\n") + 1 or len(data)
            start, data = start - 1 + skip, data[skip:]
        elif data.startswith(_BOM):
            start, data = len(_BOM), data[len(_BOM) :]
        if not data or data.endswith(b"\n"):
            return Lines(data, start)
        rest, cut = self._rest_of_line(stop)
        return Lines(data + rest, start, cut=cut)

    def head(self) -> list[set[str]]:
        return _names_in_lines(self._file.read(0, min(self.size, HEAD_BYTES)), whole=self.size <= HEAD_BYTES)

    def _rest_of_line(self, start: int) -> tuple[bytes, bool]:
        """Read the part of a line that lies beyond its block, and return (the bytes, whether the line is too long)."""
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
    """A compressed JSONL file, which is a single block because it can only be read from its beginning."""

    rows = None

    def __init__(self, file: File) -> None:
        self.name, self._file, self.blocks = file.name, file, int(file.size > 0)
        # The trailer holds the unpacked size of the last gzip member, modulo 2**32, so this is only an estimate.
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

    def head(self) -> list[set[str]]:
        packed = self._file.read(0, min(self._file.size, HEAD_BYTES))
        try:
            data = zlib.decompressobj(wbits=31).decompress(packed, HEAD_BYTES)
        except zlib.error:
            return []
        return _names_in_lines(data, whole=False)


class Records:
    """Rows of an Arrow table. A null value is treated as a missing field.

    Args:
        table: the Arrow table.
        first: the number of its first row in the shard.
        name: the shard.
    """

    def __init__(self, table: Any, first: int, name: str) -> None:
        self._table, self._first, self._name = table, first, name

    def __len__(self) -> int:
        return self._table.num_rows

    def count(self) -> int:
        return len(self)

    def entry(self, row: int) -> tuple[int, str, Any]:
        at = self._first + row
        try:
            (record,) = self._table.slice(row, 1).to_pylist()
        except (ValueError, OverflowError) as error:  # Arrow does not check that text is UTF-8, or that a date exists.
            return at, f"row {at}", SampleError("bad_text", f"row {at}: cannot be decoded: {error}", self._name)
        return at, f"row {at}", without_nulls(record)


class ParquetShard:
    """A Parquet file. A block is a row group, of which only some columns are read."""

    def __init__(self, file: File, columns: Columns) -> None:
        self.name, self.size, self._file = file.name, file.size, file
        self._parquet = require("pyarrow.parquet")
        with file.open() as handle:
            try:
                opened = self._parquet.ParquetFile(handle)
                footer, self._columns = opened.metadata, columns(opened.schema_arrow.names)
            except Exception as error:  # pyarrow raises its own kinds, and OSError for a file that is not Parquet.
                raise DataError(f"{file.name}: not a Parquet file: {error}") from error
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        self.blocks, self.rows = len(groups), footer.num_rows
        self._firsts = np.cumsum([0, *(group.num_rows for group in groups)])
        self.block_bytes = max((_memory_bytes(group, self._columns) for group in groups), default=0)

    def read(self, block: int) -> Rows:
        with self._file.open() as handle:
            try:
                parquet = self._parquet.ParquetFile(handle, pre_buffer=True)
                table = parquet.read_row_group(block, columns=self._columns, use_threads=False)
            except DataError:
                raise
            except Exception as error:  # For a damaged page pyarrow raises OSError, ValueError and other kinds.
                return BadBlock(self.name, f"row group {block}", error)
        return Records(table, int(self._firsts[block]), self.name)

    def head(self) -> list[set[str]]:
        return [set(self._columns)]


def _memory_bytes(group: Any, names: Sequence[str]) -> int:
    """Return an estimate of the bytes that a row group takes in memory."""
    columns = [group.column(i) for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in names)
    return max(size, 128 * group.num_rows)  # The file stores repeated values only once, memory does not.


class SavedShard:
    """A dataset that ``datasets`` saved and maps into memory. A block is a range of its rows."""

    def __init__(self, saved: Saved, columns: Columns) -> None:
        datasets = require("datasets")
        try:
            data = datasets.load_from_disk(saved.name)
        except Exception as error:  # A damaged folder can make pyarrow raise many kinds of errors.
            raise DataError(f"{saved.name}: cannot be opened by datasets.load_from_disk: {error}") from error
        self._columns = columns(data.column_names)
        self._data = data.select_columns(self._columns).with_format("arrow")
        self.name, self.rows, self.size = saved.name, len(data), 0
        row_bytes = max(1, self._data.data.nbytes // max(1, self.rows))
        self._block_rows = min(max(64, BLOCK_BYTES // row_bytes), 65536)
        self.blocks = -(-self.rows // self._block_rows)
        self.block_bytes = self._block_rows * row_bytes

    def read(self, block: int) -> Rows:
        start = block * self._block_rows
        return Records(self._data[start : start + self._block_rows], start, self.name)

    def head(self) -> list[set[str]]:
        return [set(self._columns)]


def _names_in_lines(data: bytes, *, whole: bool) -> list[set[str]]:
    """Return the names of the fields of the objects in the first lines; ``whole``: the last line is not cut off."""
    lines = data.removeprefix(_BOM).split(b"\n")
    rows = (parse_entry(line) for line in (lines if whole else lines[:-1])[:64] if line.strip())
    return [field_names(row) for row in rows if isinstance(row, dict)]


def open_shards(found: Sequence[File | Saved], columns: Columns = list) -> list[Shard]:
    """Open shards and return those that are not empty, in order.

    Several threads open them, because reading a footer may take a network request.

    Args:
        found: the files and folders.
        columns: chooses which columns of a table are read, of the names of all of them.
    """
    with ThreadPoolExecutor(16) as pool:
        return [shard for shard in pool.map(functools.partial(_open, columns=columns), found) if shard.blocks]


def _open(found: File | Saved, columns: Columns) -> Shard:
    if isinstance(found, Saved):
        return SavedShard(found, columns)
    if found.name.endswith(PARQUET):
        return ParquetShard(found, columns)
    return GzipShard(found) if found.name.endswith(GZIP) else JsonlShard(found)
