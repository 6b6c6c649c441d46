"""A stream reads and holds one window, never a whole file."""

from __future__ import annotations

import itertools
import json
import os
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streams import drawn, ids, lines, order_of, parquet, row, stream_of, write_shards

import videor1.data.stream
from videor1.data.files import LocalFile
from videor1.data.shards import JsonlShard, ParquetShard, Records
from videor1.data.stream import Position
from videor1.types import Sample

ROWS, MIB = 50_000, 2**20  # of 1 KiB: 50 MiB that are not held


def memory_mib() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def write_jsonl(path: Path) -> None:
    with open(path, "wb") as file:
        for i in range(ROWS):
            file.write(json.dumps(row(i, problem=f"{i}{'x' * 850}")).encode() + b"\n")


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([row(i, problem=str(i).zfill(10) * 90) for i in range(1000)])
    with pyarrow.parquet.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(ROWS // 1000):
            writer.write_table(table)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_opening_and_resuming_read_a_window_and_hold_no_more(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"big.{write.__name__.removeprefix('write_')}"
    write(path)
    assert path.stat().st_size > 45 * MIB
    read: list[int] = []

    class Counting:
        """A file that counts what is read of it."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def read(self, size: int = -1) -> bytes:
            data = self._file.read(size)
            read.append(len(data))
            return data

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    original = LocalFile.open
    monkeypatch.setattr(LocalFile, "open", lambda file: Counting(original(file)))
    before = memory_mib()
    stream = stream_of(path, shuffle_mb=8)
    assert sum(read) < MIB / 2  # the beginning, or the footer
    order = order_of(stream)
    assert order.windows >= 6
    first = next(order.iterate(Position()))
    assert isinstance(first.sample, Sample)
    assert 7 * MIB < sum(read) < 12 * MIB
    saved = order.save(Position(35_000, 0, int(0.7 * order.windows), 100))
    read.clear()
    order = order_of(stream_of(path, shuffle_mb=8))
    draws = order.iterate(order.begin(saved))
    assert next(draws).number == 35_000
    assert sum(read) < 12 * MIB
    for _ in range(12):  # 12,000 rows: more than a window
        assert len(ids(itertools.islice(draws, 1000))) == 1000
        assert memory_mib() - before < 40


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", [JsonlShard, ParquetShard])
def test_one_window_is_held_at_a_time(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, original = 0, kind.read

    def read(shard: Any, block: int) -> Any:
        nonlocal most
        rows = original(shard, block)
        alive.add(rows)
        most = max(most, len(alive))
        return rows

    monkeypatch.setattr(kind, "read", read)
    if kind is JsonlShard:
        write_shards(tmp_path)
    else:
        parquet(tmp_path / "a.parquet", [row(i) for i in range(300)])
    assert len(drawn(stream_of(tmp_path), 700)) == 700
    assert most == 4


def test_large_columns_that_no_sample_has_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(0).randbytes(MIB)
    parquet(tmp_path / "a.parquet", [row(i, video=noise) for i in range(3)])
    stream = stream_of(tmp_path)
    assert stream.shards[0].block_bytes < 1000
    monkeypatch.setattr(Records, "entry", lambda records, i: (i, "", records._table.column_names))
    assert "video" not in stream.read(0)[1].entry(0)[2]


def test_large_blocks_are_told(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [row(i, problem=f"{i}" * 3000) for i in range(2000)], row_group_size=2000)
    assert stream_of(tmp_path, shuffle_mb=8).large_blocks == ""
    told = stream_of(tmp_path, shuffle_mb=1).large_blocks
    assert "its largest block, which is held whole, takes about" in told


def test_rows_are_counted_where_that_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(range(20)).replace(b"\n", b"\r\n \n", 7))
    assert stream_of(tmp_path).count() == 20
    monkeypatch.setattr(videor1.data.stream, "COUNT_BYTES", 1000)
    assert stream_of(tmp_path).count() is None
    parquet(tmp_path / "b.parquet", [row(i) for i in range(50)])
    (tmp_path / "a.jsonl").unlink()
    assert stream_of(tmp_path).count() == 50
