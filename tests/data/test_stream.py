"""A stream draws every row once an epoch, on any ranks and from any position on, and reads and holds one window."""

import itertools
import json
import os
import random
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from spies import spy
from streams import drawn, ids, json_lines, lines, order_of, parquet, row, stream_of, write_shards
from test_source import Reader

import videor1.data.stream
from videor1.data.shards import JsonlShard, ParquetShard, Records
from videor1.data.stream import Permutation, Position, RowStream
from videor1.errors import ConfigError, DataError
from videor1.types import Sample


@pytest.mark.parametrize("n", [*range(1, 18), 63, 64, 65, 255, 256, 257, 1000])
def test_permutation_holds_every_place_once(n: int) -> None:
    assert sorted(map(Permutation(n, key=3).__getitem__, range(n))) == list(range(n))


def test_permutations_of_a_trillion_and_by_key_every_order_of_four() -> None:
    one, other = Permutation(10**12, key=1), Permutation(10**12, key=2)
    places = [0, 1, 2, 10**12 - 1]
    assert [one[p] for p in places] != [other[p] for p in places]
    first = sorted(one[p] for p in range(200))
    assert len(set(first)) == 200
    assert first[0] < 10**12 / 20  # they come from all over
    assert first[-1] > 10**12 * 19 / 20
    with pytest.raises(IndexError, match="expected 0 to 4, got 5"):
        Permutation(5, key=1)[5]
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        Permutation(0, key=1)
    found = Counter(tuple(Permutation(4, key)[i] for i in range(4)) for key in range(2400))
    assert len(found) == 24
    assert max(found.values()) < 3 * min(found.values())


@pytest.fixture
def stream(tmp_path: Path, small_blocks: None) -> RowStream:
    """300 rows in more than 40 blocks, in the folder "d"."""
    return stream_of(write_shards(tmp_path / "d"))


def append_a_row(folder: Path) -> RowStream:
    """The stream after its data has changed."""
    with open(folder / "d" / "000.jsonl", "ab") as file:
        file.write(lines([0]))
    return stream_of(folder / "d")


def test_an_epoch_holds_every_row_once_and_epochs_differ(stream: RowStream) -> None:
    order = order_of(stream)
    assert (stream.blocks > 40, order.windows > 10, stream.count()) == (True, True, 300)
    draws = drawn(stream, 900)
    assert [d.number for d in draws] == list(range(900))
    epochs = [ids(draws[i : i + 300]) for i in (0, 300, 600)]
    assert all(sorted(map(int, epoch)) == list(range(300)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    begins = [frozenset(ids(d for d in draws if d.after.epoch == e and not d.after.window)) for e in range(3)]
    assert len(set(begins)) == 3  # other blocks come first
    assert ids(drawn(stream, 300, seed=8)) != epochs[0]
    assert ids(drawn(stream, 300)) == epochs[0]
    numbers = [int(i) for i in epochs[0]]
    assert max(numbers[:12]) - min(numbers[:12]) > 100  # a window is from several places
    assert sum(b - a == 1 for a, b in itertools.pairwise(numbers)) < 60  # whose rows are mixed
    assert [order.epochs(d.after) for d in (draws[0], draws[-1])] == [0, pytest.approx(3, abs=2 / order.windows)]
    assert ids(drawn(stream, 350, shuffle=False)) == [str(i % 300) for i in range(350)]  # in the order of the files


@pytest.mark.parametrize("shard", [(0, 1), (1, 3), (2, 60)])
def test_resumed_anywhere(shard: tuple[int, int], stream: RowStream, tmp_path: Path) -> None:
    straight = drawn(stream, 400, shard=shard)
    for taken in (1, 2, 17, 99, 100, 101, 299, 300, 301, 390):
        saved = json.loads(json.dumps(order_of(stream, shard=shard).save(straight[taken - 1].after)))
        order = order_of(stream_of(tmp_path / "d"), shard=shard)
        assert list(itertools.islice(order.iterate(order.begin(saved)), 400 - taken)) == straight[taken:]


@pytest.mark.grid(ranks=[2, 3, 8, 40], shuffle=[True, False])
def test_ranks_share_an_epoch(ranks: int, shuffle: bool, stream: RowStream) -> None:
    """By blocks, and, where there are few blocks a rank, by rows."""
    found, numbers = Counter[str](), Counter[int]()
    for rank in range(ranks):
        order = order_of(stream, shuffle=shuffle, shard=(rank, ranks))
        assert order.by_block == (ranks <= 8)
        draws = list(itertools.takewhile(lambda d: d.after.epoch == 1, order.iterate(Position(epoch=1))))
        found.update(ids(draws))
        numbers.update(d.number for d in draws)
        assert abs(len(draws) - 300 / ranks) < 40
        assert draws
    assert found == Counter(map(str, range(300)))
    assert max(numbers.values()) == 1
    with pytest.raises(ValueError, match="expected \\(rank, ranks\\)"):
        order_of(stream, shard=(ranks, ranks))


@pytest.mark.parametrize("shuffle", [True, False])
def test_more_ranks_than_rows(shuffle: bool, tmp_path: Path) -> None:
    """They take turns."""
    (tmp_path / "two.jsonl").write_bytes(lines(range(2)))
    stream = stream_of(tmp_path / "two.jsonl")
    seen = Counter[tuple[int, str]]()
    for rank in range(3):
        order = order_of(stream, shuffle=shuffle, shard=(rank, 3))
        draws = itertools.takewhile(lambda d: d.after.epoch < 30, order.iterate(Position()))
        seen.update((d.after.epoch, d.sample.problem_id) for d in draws)
    assert seen == Counter((epoch, str(i)) for epoch in range(30) for i in range(2))


def test_a_position_in_other_data_is_refused(stream: RowStream, tmp_path: Path) -> None:
    order = order_of(stream)
    saved = order.save(Position(5, 0, 1, 2))
    assert order.begin(saved) == order_of(stream, seed=8).begin(saved) == Position(5, 0, 1, 2)
    changed = append_a_row(tmp_path)
    for other in (order_of(stream, shuffle=False), order_of(stream, shard=(0, 2)), order_of(changed)):
        with pytest.raises(ConfigError, match=r"is not what the checkpoint's run read: its shards, their sizes, data"):
            other.begin(saved)
    with pytest.raises(ConfigError, match=r"held its data whole \(data\.stream false\)"):
        order.begin(17)
    for change in ({"row": -1}, {"draws": "5"}, {"epoch": None}, {"window": True}, {"more": 1}, {"draws": 1.5}):
        with pytest.raises(ConfigError, match="not a position of a stream"):
            order.begin(saved | change)
    asked = order_of(changed, changed_ok=True)  # to go on with the next epoch
    assert order.note == asked.note == ""
    assert asked.begin(order.save(Position(5, 2, 1, 2))) == Position(draws=5, epoch=3)
    assert "goes on with the next epoch" in asked.note
    assert next(asked.iterate(Position(draws=5, epoch=3))).number == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_a_stream(workers: int, tmp_path: Path) -> None:
    """Bad rows and missing files are skips in their place; the state goes through JSON."""
    entries = [row(i) for i in range(12)]
    entries[3] = row(3, solution="no answer")
    entries[7] = row(7, data_type="image", path="gone.png")
    (tmp_path / "a.jsonl").write_bytes(json_lines(entries))

    def take(count: int, start: Any = 0) -> tuple[list[Any], Reader]:
        with Reader(stream_of(tmp_path), start=start, workers=workers, prefetch=4) as reader:
            return reader.source.take(count), reader

    whole, reader = take(25)
    assert len(reader.skips) == reader.source.skipped.total() == reader.source.position - 25
    assert {skip[1:] for skip in reader.skips} == {
        ("solution", str(tmp_path / "a.jsonl")),
        ("missing_file", str(tmp_path.resolve() / "gone.png")),
    }
    assert [draw for draw, _ in whole] == sorted({*range(reader.source.position)} - {s[0] for s in reader.skips})
    assert reader.source.epoch == pytest.approx(reader.source.position // 12)
    for taken in (1, 9, 10, 11, 24) if workers == 0 else (10,):
        _, first = take(taken)
        rest, second = take(25 - taken, json.loads(json.dumps(first.source.state)))
        assert rest == whole[taken:]
        assert first.skips + second.skips == reader.skips
        assert second.source.state == reader.source.state


def test_a_stream_of_nothing_usable_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(row(i, solution="none") for i in range(30)))
    message = r"none of the last 31 samples can be used \(solution 31\)\. The last: .*a\.jsonl: byte"
    with Reader(stream_of(tmp_path)) as reader, pytest.raises(DataError, match=message):
        reader.source.take(1)
    monkeypatch.setattr(videor1.data.stream, "MAX_FAILURES", 12)
    with Reader(stream_of(tmp_path)) as reader, pytest.raises(DataError, match="none of the last 12 samples"):
        reader.source.take(1)
    half = [row(i, solution="none") if i % 2 else row(i) for i in range(30)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(half))
    with Reader(stream_of(tmp_path)) as reader:  # failures before a success no longer count
        assert len(reader.source.take(20)) == 20


ROWS, MIB = 50_000, 2**20  # of 1 KiB: 50 MiB that are not held


def bytes_read() -> int:
    """Of all files, by this process."""
    return int(Path("/proc/self/io").read_text().split()[1])


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
def test_opening_and_resuming_read_a_window_and_hold_no_more(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / f"big.{write.__name__.removeprefix('write_')}"
    write(path)
    assert path.stat().st_size > 45 * MIB
    before, start = memory_mib(), bytes_read()
    stream = stream_of(path, shuffle_mb=8)
    assert bytes_read() - start < MIB / 2  # the beginning, or the footer
    order = order_of(stream)
    assert order.windows >= 6
    assert isinstance(next(order.iterate(Position())).sample, Sample)
    assert 7 * MIB < bytes_read() - start < 12 * MIB
    saved = order.save(Position(35_000, 0, int(0.7 * order.windows), 100))
    start = bytes_read()
    order = order_of(stream_of(path, shuffle_mb=8))
    draws = order.iterate(order.begin(saved))
    assert next(draws).number == 35_000
    assert bytes_read() - start < 12 * MIB
    for _ in range(12):  # 12,000 rows: more than a window
        assert len(ids(itertools.islice(draws, 1000))) == 1000
        assert memory_mib() - before < 40


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", [JsonlShard, ParquetShard])
def test_one_window_is_held_at_a_time(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    held = spy(monkeypatch, kind, "read", lambda rows, *_: alive.add(rows) or len(alive))
    if kind is JsonlShard:
        write_shards(tmp_path)
    else:
        parquet(tmp_path / "a.parquet", [row(i) for i in range(300)])
    assert len(drawn(stream_of(tmp_path), 700)) == 700
    assert max(held) == 4


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
