"""A stream reads and holds one window, never a whole file."""

from __future__ import annotations

import itertools
import json
import os
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
from streams import ids, lines, order_of, parquet, row, stream_of, write_shards

import videor1.data
import videor1.data.shards
import videor1.data.stream
from videor1.data.files import LocalFile
from videor1.data.shards import JsonlShard
from videor1.data.stream import Position
from videor1.types import Sample


def memory_mib() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_opening_and_resuming_read_a_window_and_memory_is_bounded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 rows of 1 KiB: 100 MiB that are not held."""
    path, count = tmp_path / f"big.{kind}", 100_000
    if kind == "jsonl":
        text = "x" * 850
        with open(path, "wb") as file:
            for i in range(count):
                file.write(json.dumps(row(i, problem=f"{i}{text}")).encode() + b"\n")
    else:
        import pyarrow
        import pyarrow.parquet

        chunk = 1000
        rows = [row(i, problem=str(i).zfill(10) * 90) for i in range(chunk)]
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.parquet.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
            for _ in range(count // chunk):
                writer.write_table(table)
    size = path.stat().st_size
    assert size > 90 * 2**20
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
    assert sum(read) < 2**19  # the beginning, or the footer
    order = order_of(stream)
    assert order.windows >= 12
    first = next(order.iterate(Position()))
    assert 7 * 2**20 < sum(read) < 12 * 2**20
    saved = order.save(Position(70_000, 0, int(0.7 * order.windows), 100))
    read.clear()
    order = order_of(stream_of(path, shuffle_mb=8))
    draws = order.iterate(order.begin(saved))
    assert next(draws).number == 70_000
    assert sum(read) < 12 * 2**20
    most = 0.0
    for _ in range(20):  # 20,000 rows: two windows and more
        assert len(ids(draws, 1000)) == 1000
        most = max(most, memory_mib() - before)
    assert most < 60
    assert isinstance(first.sample, Sample)


def test_large_columns_that_no_sample_has_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(0).randbytes(2**20)
    parquet(tmp_path / "a.parquet", [row(i, video=noise) for i in range(3)])
    stream = stream_of(tmp_path)
    assert stream.shards[0].block_bytes < 1000
    monkeypatch.setattr(videor1.data.shards.Records, "entry", lambda records, i: (i, "", records._table.column_names))
    assert "video" not in stream.read(0)[1].entry(0)[2]  # type: ignore[index]


@pytest.mark.usefixtures("small_blocks")
def test_one_window_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, original = 0, JsonlShard.read

    def read(shard: JsonlShard, block: int) -> Any:
        nonlocal most
        rows = original(shard, block)
        alive.add(rows)
        most = max(most, len(alive))
        return rows

    monkeypatch.setattr(JsonlShard, "read", read)
    order = order_of(stream_of(write_shards(tmp_path / "d")))
    assert len(list(itertools.islice(order.iterate(Position()), 700))) == 700
    assert most == 4


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
