"""Data read as a stream: every row once an epoch, in any format, from any position, in bounded memory."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_source import Reader

import videor1.stream
import videor1.stream_files
import videor1.stream_shards
from videor1.config import DataConfig
from videor1.data import Dataset, Draw, load_samples
from videor1.errors import ConfigError, DataError
from videor1.stream import Permutation, Position, RowStream, StreamOrder, open_dataset
from videor1.stream_files import LocalFile
from videor1.stream_shards import JsonlShard, Unparsed, open_shards
from videor1.types import Sample, SampleError


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A text sample; a field set to ... is left out."""
    entry = {"problem_id": number, "problem": f"{number}?", "data_type": "text", "problem_type": "numerical"}
    entry |= {"solution": f"<answer>{number}</answer>"} | changes
    return {name: value for name, value in entry.items() if value is not ...}


def lines(numbers: range) -> bytes:
    return b"".join(json.dumps(row(i)).encode() + b"\n" for i in numbers)


def write_shards(folder: Path, count: int = 300, shards: int = 3) -> Path:
    """``count`` rows in JSONL shards of unequal sizes, and an empty one."""
    folder.mkdir(exist_ok=True)
    cuts = [0, *sorted(random.Random(count).sample(range(1, count), shards - 1)), count]
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        (folder / f"{i:03d}.jsonl").write_bytes(lines(range(start, stop)))
    (folder / "empty.jsonl").write_bytes(b"")
    return folder


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of about five rows, windows of four blocks."""
    monkeypatch.setattr(videor1.stream_shards, "BLOCK_BYTES", 640)
    monkeypatch.setattr(videor1.stream, "MAX_WINDOW_BLOCKS", 4)


def stream_of(name: Path | str, **data: Any) -> RowStream:
    stream = open_dataset(str(name), DataConfig(stream=True, **data))
    assert isinstance(stream, RowStream)
    return stream


def ids(draws: Iterator[Draw], count: int) -> list[str]:
    return [d.sample.problem_id for d in itertools.islice(draws, count) if isinstance(d.sample, Sample)]


def order_of(stream: RowStream, **options: Any) -> StreamOrder:
    return StreamOrder(stream, **{"seed": 7, "shuffle": True} | options)


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000])
def test_permutation_holds_every_place_once(n: int) -> None:
    assert sorted(map(Permutation(n, key=3).__getitem__, range(n))) == list(range(n))


def test_permutation_of_a_trillion() -> None:
    one, other = Permutation(10**12, key=1), Permutation(10**12, key=2)
    places = [0, 1, 2, 10**12 - 1]
    assert [one[p] for p in places] != [other[p] for p in places]
    assert len({one[p] for p in range(200)}) == 200
    assert min(sorted(one[p] for p in range(200))) < 10**12 / 20  # they come from all over
    assert max(one[p] for p in range(200)) > 10**12 * 19 / 20
    with pytest.raises(IndexError, match="expected 0 to 4, got 5"):
        Permutation(5, key=1)[5]
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        Permutation(0, key=1)


def test_permutations_by_key_reach_every_order() -> None:
    found = Counter(tuple(Permutation(4, key)[i] for i in range(4)) for key in range(2400))
    assert len(found) == 24
    assert max(found.values()) < 3 * min(found.values())


def all_lines(path: Path) -> list[tuple[int, Any]]:
    """(byte, parsed) of every line that is not blank, block by block."""
    (shard,) = open_shards([LocalFile(str(path), path.stat().st_size)]) or [None]
    found = []
    for block in range(shard.blocks if shard else 0):
        rows = shard.read(block)
        entries = [rows.entry(i) for i in range(len(rows))]
        found += [(at, value) for at, where, value in filter(None, entries) if where == f"byte {at}"]
    return found


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["\n", "\r\n", "\n\n", " \n"])), max_size=20),
    block=st.integers(4, 40), bom=st.booleans(), last=st.integers(0, 30),
)  # fmt: skip
def test_blocks_hold_every_line_once(
    parts: list[tuple[int, str]], block: int, bom: bool, last: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Lines shorter and longer than a block, blank ones, CRLF, a byte order mark, no newline at the end."""
    numbers = itertools.count(1)

    def number(digits: int) -> str:
        return str(next(numbers)).zfill(digits).replace("0", "7") if digits else ""

    text = ("﻿" if bom else "") + "".join(number(n) + end for n, end in parts) + number(last)
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    data = text.encode()
    path.write_bytes(data)
    expected, at = [], 0
    for i, line in enumerate(data.split(b"\n")):
        begin = at + (3 if bom and i == 0 else 0)
        content = data[begin : at + len(line)]
        if content.strip():
            expected.append((begin, int(content)))
        at += len(line) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(videor1.stream_shards, "BLOCK_BYTES", block)
        assert all_lines(path) == expected


def test_a_line_too_long_to_be_held_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videor1.stream_shards, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(videor1.stream_shards, "MAX_ROW_BYTES", 200_000)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"1\n" + b"2" * 900_000 + b"\n3\n")
    (one, long, three), read = all_lines(path), []
    assert (one, three) == ((0, 1), (900_003, 3))
    assert long == (2, Unparsed("a line of more than 200000 bytes"))
    original = LocalFile.read

    def reading(file: LocalFile, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return original(file, start, stop)

    monkeypatch.setattr(LocalFile, "read", reading)
    JsonlShard(LocalFile(str(path), path.stat().st_size)).read(0)
    assert 200_000 < sum(read) < 600_000
    stream = stream_of(path)
    errors = [d.sample for d in itertools.islice(order_of(stream, shuffle=False).iterate(Position()), 3)]
    assert [error.kind for error in errors if isinstance(error, SampleError)] == [
        "wrong_type",
        "bad_json",
        "wrong_type",
    ]


@pytest.mark.usefixtures("small_blocks")
def test_an_epoch_holds_every_row_once_and_epochs_differ(tmp_path: Path) -> None:
    stream = stream_of(write_shards(tmp_path / "d"))
    order = order_of(stream)
    assert (stream.blocks > 40, order.windows > 10, stream.count()) == (True, True, 300)
    draws = list(itertools.islice(order.iterate(Position()), 900))
    assert [d.number for d in draws] == list(range(900))
    epochs = [[d.sample.problem_id for d in draws[i : i + 300]] for i in (0, 300, 600)]  # type: ignore[union-attr]
    assert all(sorted(map(int, epoch)) == list(range(300)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    begins = [{d.sample.problem_id for d in draws if d.after.epoch == e and not d.after.window} for e in range(3)]  # type: ignore[union-attr]
    assert len(set(map(frozenset, begins))) == 3  # other blocks come first
    assert ids(order_of(stream, seed=8).iterate(Position()), 300) != epochs[0]
    assert ids(order_of(stream).iterate(Position()), 300) == epochs[0]
    first = [int(i) for i in epochs[0][:12]]
    assert max(first) - min(first) > 100  # a window is from several places
    follow = sum(int(b) - int(a) == 1 for a, b in itertools.pairwise(epochs[0]))
    assert follow < 60  # whose rows are mixed
    assert [order.epochs(d.after) for d in (draws[0], draws[-1])] == [0, pytest.approx(3, abs=2 / order.windows)]


@pytest.mark.usefixtures("small_blocks")
def test_without_shuffle_in_the_order_of_the_files(tmp_path: Path) -> None:
    stream = stream_of(write_shards(tmp_path / "d"), shuffle=False)
    assert ids(order_of(stream, shuffle=False).iterate(Position()), 350) == [str(i % 300) for i in range(350)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shard", [(0, 1), (1, 3), (2, 60)])
def test_resumed_anywhere(shard: tuple[int, int], tmp_path: Path) -> None:
    stream = stream_of(write_shards(tmp_path / "d"))
    straight = list(itertools.islice(order_of(stream, shard=shard).iterate(Position()), 400))
    for taken in (1, 2, 17, 99, 100, 101, 299, 300, 301, 390):
        saved = json.loads(json.dumps(order_of(stream, shard=shard).save(straight[taken - 1].after)))
        order = order_of(stream_of(tmp_path / "d"), shard=shard)
        again = list(itertools.islice(order.iterate(order.begin(saved)), 400 - taken))
        assert again == straight[taken:]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 8, 40])
def test_ranks_share_an_epoch(ranks: int, shuffle: bool, tmp_path: Path) -> None:
    """By blocks, and, where there are few blocks a rank, by rows."""
    stream = stream_of(write_shards(tmp_path / "d"))
    found, numbers = Counter[str](), Counter[int]()
    for rank in range(ranks):
        order = order_of(stream, shuffle=shuffle, shard=(rank, ranks))
        assert order.by_block == (ranks <= 8)
        draws = list(itertools.takewhile(lambda d: d.after.epoch == 1, order.iterate(Position(epoch=1))))
        found.update(d.sample.problem_id for d in draws if isinstance(d.sample, Sample))
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
        seen.update((d.after.epoch, d.sample.problem_id) for d in draws if isinstance(d.sample, Sample))
    assert seen == Counter((epoch, str(i)) for epoch in range(30) for i in range(2))


@pytest.mark.parametrize("content", [b"\n\n \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_nothing_but_blank_lines(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_bytes(content)
    stream = stream_of(tmp_path / "blank.jsonl")
    assert stream.count() == 0
    with pytest.raises(DataError, match=r"blank\.jsonl: holds no samples$"):
        next(order_of(stream).iterate(Position()))


def test_all_shards_empty(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="holds no samples; its 2 shards are empty"):
        stream_of(tmp_path)


BAD = [
    row(1, solution=...), row(2, data_type="videos"), [3], row(4, problem=" "), row(5, data_type="video", path="../x"),
    row(6, problem_type="multiple choice"),
]  # fmt: skip


def test_bad_rows_are_the_errors_of_a_data_file(tmp_path: Path) -> None:
    content = b"\n".join([json.dumps(row(0)).encode(), b'{"cut', b"\xff", *(json.dumps(b).encode() for b in BAD)])
    (tmp_path / "bad.jsonl").write_bytes(content)
    whole = load_samples(tmp_path / "bad.jsonl")
    order = order_of(stream_of(tmp_path / "bad.jsonl"), shuffle=False)
    good, *errors = [d.sample for d in itertools.islice(order.iterate(Position()), len(BAD) + 3)]
    assert isinstance(good, Sample)
    found = [error for error in errors if isinstance(error, SampleError)]
    assert [e.kind for e in found] == [e.kind for e in whole.errors]
    at = 0
    for error, expected, line in zip(found, whole.errors, content.split(b"\n")[1:], strict=True):
        at = content.index(line, at)
        assert error.message == f"byte {at}:" + expected.message.partition(":")[2]
        assert error.path == str(tmp_path / "bad.jsonl")


def parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 10) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size, data_page_size=100, compression="snappy")


FULL = [
    row(0), row("a", data_type="video", path="clips/a.mp4", data_source="made"), row(2, problem_id=...),
    row(3, problem_type="multiple choice", options=["A. red", "B. é"]), row(4, process="<think>x</think>"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "saved", "memory"])
def test_every_format_gives_the_same_samples(kind: str, tmp_path: Path) -> None:
    text = "\n".join(map(json.dumps, FULL)).encode()
    (tmp_path / "whole.jsonl").write_bytes(text)
    expected = load_samples(tmp_path / "whole.jsonl").samples
    name = str(tmp_path / f"data.{kind}")
    columns = [{field: entry.get(field) for field in {k for e in FULL for k in e} | {"large"}} for entry in FULL]
    for entry in columns:  # a column has one type
        entry["problem_id"] = None if entry["problem_id"] is None else str(entry["problem_id"])
    if kind == "jsonl":
        Path(name).write_bytes(text)
    elif kind == "jsonl.gz":
        Path(name).write_bytes(gzip.compress(text[:70]) + gzip.compress(text[70:]))  # two members
    elif kind == "parquet":
        parquet(Path(name), columns, row_group_size=2)
    elif kind == "saved":
        import datasets

        datasets.Dataset.from_list(columns).save_to_disk(name, num_shards=2)
    else:
        import fsspec

        name = "memory://shards/data.jsonl"
        fsspec.filesystem("memory").pipe("/shards/data.jsonl", text)
    stream = stream_of(name, root=str(tmp_path))
    assert stream.count() == 5
    draws = list(itertools.islice(order_of(stream, shuffle=False).iterate(Position()), 5))
    found = [d.sample for d in draws]
    assert all(isinstance(sample, Sample) for sample in found), found

    def content(sample: Sample) -> tuple[Any, ...]:
        return sample.problem, sample.data_type, sample.path, sample.options, sample.data_source, sample.process

    assert [content(s) for s in found] == [content(s) for s in expected]  # type: ignore[arg-type]
    assert [s.problem_id for s in found[:2]] == ["0", "a"]  # type: ignore[union-attr]
    default = found[2].problem_id  # type: ignore[union-attr]
    where = sum(len(json.dumps(e)) + 1 for e in FULL[:2]) if "json" in kind or kind == "memory" else 2
    assert default == f"{name.rsplit('/', 1)[-1]}:{where}"
    assert len({s.index for s in found}) == 5  # type: ignore[union-attr]
    shuffled = order_of(stream_of(name, root=str(tmp_path)))
    assert sorted(s.problem for s in (d.sample for d in itertools.islice(shuffled.iterate(Position()), 5))) == sorted(
        s.problem for s in expected
    )


def test_shards_of_several_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(range(5)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines(range(5, 8))))
    parquet(tmp_path / "c.parquet", [row(i) for i in range(8, 30)])
    (tmp_path / "README.md").write_text("no shard")
    (tmp_path / ".hidden.jsonl").write_text("no shard")
    stream = stream_of(tmp_path)
    assert [shard.blocks for shard in stream.shards] == [1, 1, 3]
    assert stream.count() == 30
    draws = list(itertools.islice(order_of(stream).iterate(Position()), 30))
    assert sorted(map(int, ids(iter(draws), 30))) == list(range(30))
    assert len({d.sample.index for d in draws}) == 30  # type: ignore[union-attr]


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path: Path) -> None:
    parquet(tmp_path / "d.parquet", [row(i, problem=f"{i}{random.Random(i).random()}") for i in range(30)])
    import pyarrow.parquet

    group = pyarrow.parquet.ParquetFile(tmp_path / "d.parquet").metadata.row_group(1)
    column = group.column([group.column(i).path_in_schema for i in range(group.num_columns)].index("problem"))
    data = bytearray((tmp_path / "d.parquet").read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "d.parquet").write_bytes(data)
    draws = list(itertools.islice(order_of(stream_of(tmp_path), shuffle=False).iterate(Position()), 21))
    errors = [(i, d.sample) for i, d in enumerate(draws) if isinstance(d.sample, SampleError)]
    ((place, error),) = errors
    assert (place, error.kind, error.path) == (10, "bad_block", str(tmp_path / "d.parquet"))
    assert error.message.startswith("row group 1: cannot be decoded, its rows are lost: ")
    assert ids(iter(draws), 21) == [str(i) for i in range(30) if not 10 <= i < 20]


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_gzip_shard(damage: str, tmp_path: Path) -> None:
    packed = gzip.compress(lines(range(50)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-30] if damage == "cut" else b"no gzip at all")
    (tmp_path / "b.jsonl").write_bytes(lines(range(3)))
    draws = list(itertools.islice(order_of(stream_of(tmp_path), shuffle=False).iterate(Position()), 4))
    assert isinstance(draws[0].sample, SampleError)
    assert (draws[0].sample.kind, len(ids(iter(draws), 4))) == ("bad_block", 3)


def test_what_cannot_be_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps([row(0)]))
    with pytest.raises(DataError, match=r"list\.jsonl: holds a JSON list"):
        stream_of(tmp_path / "list.jsonl")
    (tmp_path / "list.json").write_text(json.dumps([row(0)]))
    with pytest.raises(ConfigError, match=r"a stream reads \.jsonl, .* got .*list\.json"):
        stream_of(tmp_path / "list.json")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match=r"p\.parquet: not a Parquet file"):
        stream_of(tmp_path / "p.parquet")
    monkeypatch.setattr(videor1.stream_shards, "MAX_UNPACKED_BYTES", 2**20)
    (tmp_path / "big.jsonl.gz").write_bytes(gzip.compress(b" " * 2**20 + b"\n"))
    with pytest.raises(DataError, match=r"big\.jsonl\.gz: unpacks to more than 1 MiB"):
        next(order_of(stream_of(tmp_path / "big.jsonl.gz")).iterate(Position()))


def test_what_is_held_whole_and_what_is_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videor1.stream, "STREAM_BYTES", 5000)
    (tmp_path / "small.jsonl").write_bytes(lines(range(2)))
    (tmp_path / "large.jsonl").write_bytes(lines(range(100)))
    (tmp_path / "list.jsonl").write_text(json.dumps([row(i) for i in range(100)]))
    (tmp_path / "large.json").write_text(json.dumps([row(i) for i in range(100)]))
    (tmp_path / "[x],y.jsonl").write_bytes(lines(range(2)))  # a name, no wildcard and no list
    for name, stream in {
        "small.jsonl": False, "large.jsonl": True, "list.jsonl": False, "large.json": False, "[x],y.jsonl": False,
        "small*.jsonl": True, "": True,
    }.items():  # fmt: skip
        if name:
            opened = open_dataset(str(tmp_path / name), DataConfig())
            assert isinstance(opened, RowStream if stream else Dataset), name
            assert opened.count() in (2, 100)
        if name.startswith(("small*", "[x]")):
            assert open_dataset(str(tmp_path / name), DataConfig(stream=True)).count() == 2
    assert isinstance(open_dataset(str(tmp_path / "large.jsonl"), DataConfig(stream=False)), Dataset)
    with pytest.raises(ConfigError, match=r"data\.stream: false holds one \.json or \.jsonl file"):
        open_dataset(str(tmp_path), DataConfig(stream=False))
    with pytest.raises(DataError, match="no such data file"):
        open_dataset(str(tmp_path / "gone.json"), DataConfig())
    with pytest.raises(DataError, match="no such data file"):
        stream_of(tmp_path / "gone.jsonl")


def test_names_of_several_shards(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, start in ((one, 0), (two, 10)):
        folder.mkdir()
        for i in range(2):
            (folder / f"{i}.jsonl").write_bytes(lines(range(start + i, start + i + 1)))

    def found(name: str, **data: Any) -> list[str]:
        stream = stream_of(name, **data)
        return ids(order_of(stream, shuffle=False).iterate(Position()), len(stream.shards))

    assert found(f"{one}/*.jsonl") == ["0", "1"]
    assert found(f"{tmp_path}/**/*.jsonl") == ["0", "1", "10", "11"]
    assert found(f"{two}, {one}/1.jsonl", root=str(tmp_path)) == ["10", "11", "1"]
    with pytest.raises(ConfigError, match=r"data\.root: needed, since dataset_name names several folders"):
        found(f"{two},{one}")
    with pytest.raises(ConfigError, match=r"names .*0\.jsonl twice"):
        found(f"{one},{one}/0.jsonl")
    many = ",".join([f"{two}/*.jsonl", f"{one}/0.jsonl", *[f"{one}/./{'./' * i}1.jsonl" for i in range(1, 2)]])
    assert found(many, root=str(tmp_path)) == ["10", "11", "0", "1"]
    with pytest.raises(DataError, match="no such data file"):
        found(",".join(f"{one}/{i}" for i in range(9, 5000)))  # too long for a file's name
    with pytest.raises(DataError, match="no file matches"):
        found(f"{one}/*.parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: expected \.jsonl, .* files in it"):
        found(f"{tmp_path}/none")
    with pytest.raises(DataError, match=r"memory://nowhere.*: no \.jsonl, "):
        found("memory://nowhere/*.parquet")
    with pytest.raises(DataError, match=r"ftpx://host/x: cannot be opened: Protocol not known"):
        found("ftpx://host/x")
    with pytest.raises(DataError, match=r"data\.root: expected a folder, got .*gone"):
        found(str(one), root=str(tmp_path / "gone"))


def test_what_a_url_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/sizes/a.jsonl", lines(range(2)))
    monkeypatch.setattr(type(memory), "info", lambda *_, **__: {"size": None, "type": "file"})
    with pytest.raises(DataError, match=r"memory://.*a\.jsonl: its server does not tell its size"):
        stream_of("memory://sizes/a.jsonl")

    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"s3://bucket/a\.jsonl needs a package that is not installed"):
        stream_of("s3://bucket/a.jsonl")


def test_media_paths_stay_under_the_root(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    entries = [row(i, data_type="video", path=path) for i, path in enumerate(["a.mp4", "../b.mp4"])]
    (folder / "0.jsonl").write_text("\n".join(map(json.dumps, entries)))
    for name in (folder, f"{folder}/*.jsonl", folder / "0.jsonl"):
        good, bad = (
            d.sample for d in itertools.islice(order_of(stream_of(name), shuffle=False).iterate(Position()), 2)
        )
        assert good.path == folder.resolve() / "a.mp4"
        assert isinstance(bad, SampleError)
        assert bad.kind == "outside_root"
    above = order_of(stream_of(folder, root=str(tmp_path)), shuffle=False)
    paths = [d.sample.path for d in itertools.islice(above.iterate(Position()), 2)]
    assert paths == [tmp_path.resolve() / "a.mp4", None] or isinstance(paths[1], str)


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
    monkeypatch.setattr(videor1.stream_shards.Records, "entry", lambda records, i: (i, "", records._table.column_names))
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


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(range(10)))
    order = order_of(stream_of(path))
    path.write_bytes(lines(range(9)))
    with pytest.raises(DataError, match=r"a\.jsonl: changed during the run: \d+ bytes when it was opened, now \d+"):
        next(order.iterate(Position()))
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: No such file"):
        next(order.iterate(Position()))
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/changes/a.jsonl", lines(range(10)))
    order = order_of(stream_of("memory://changes"))
    memory.pipe("/changes/a.jsonl", lines(range(9)))
    with pytest.raises(DataError, match="changed during the run: it ends earlier"):
        next(order.iterate(Position()))
    memory.rm("/changes/a.jsonl")
    with pytest.raises(DataError, match=r"memory://.*a\.jsonl: cannot be read"):
        next(order.iterate(Position()))


@pytest.mark.usefixtures("small_blocks")
def test_a_position_in_other_data_is_refused(tmp_path: Path) -> None:
    stream = stream_of(write_shards(tmp_path / "d"))
    order = order_of(stream)
    saved = order.save(Position(5, 0, 1, 2))
    assert order.begin(saved) == Position(5, 0, 1, 2)
    assert order_of(stream, seed=8).begin(saved) == Position(5, 0, 1, 2)
    for other in (order_of(stream, shuffle=False), order_of(stream, shard=(0, 2))):
        with pytest.raises(ConfigError, match=r"is not what the checkpoint's run read: its shards, their sizes, data"):
            other.begin(saved)
    with open(tmp_path / "d" / "000.jsonl", "ab") as file:
        file.write(lines(range(1)))
    with pytest.raises(ConfigError, match="is not what the checkpoint's run read"):
        order_of(stream_of(tmp_path / "d")).begin(saved)
    with pytest.raises(ConfigError, match=r"held its data whole \(data\.stream false\)"):
        order.begin(17)


def test_large_blocks_are_told(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [row(i, problem=f"{i}" * 3000) for i in range(2000)], row_group_size=2000)
    assert stream_of(tmp_path, shuffle_mb=8).large_blocks == ""
    told = stream_of(tmp_path, shuffle_mb=1).large_blocks
    assert "its largest block, which is held whole, takes about" in told


def test_rows_are_counted_where_that_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(range(20)).replace(b"\n", b"\r\n \n", 7))
    assert stream_of(tmp_path).count() == 20
    monkeypatch.setattr(videor1.stream, "COUNT_BYTES", 1000)
    assert stream_of(tmp_path).count() is None
    parquet(tmp_path / "b.parquet", [row(i) for i in range(50)])
    (tmp_path / "a.jsonl").unlink()
    assert stream_of(tmp_path).count() == 50


@pytest.mark.parametrize(
    ("package", "make"), [("pyarrow.parquet", "a.parquet"), ("datasets", "saved"), ("datasets", "hf://user/name")]
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, make: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = make if "://" in make else str(tmp_path / make)
    if make == "a.parquet":
        parquet(Path(name), [row(0)])
    elif make == "saved":
        Path(name).mkdir()
        for file in ("state.json", "dataset_info.json"):
            (Path(name) / file).write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package.split('.')[0]}: pip install 'videor1\[stream\]'"):
        stream_of(name)


@pytest.mark.usefixtures("small_blocks")
def test_folders_of_datasets(tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_list([row(i) for i in range(200)])
    datasets.DatasetDict({"train": saved, "test": saved.select(range(5))}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ConfigError, match=r"holds the splits \['test', 'train'\]; name one, e\.g\. .*both/test"):
        stream_of(tmp_path / "both")
    stream = stream_of(tmp_path / "both" / "train")
    assert (stream.count(), stream.blocks) == (200, 4)
    assert sorted(map(int, ids(order_of(stream).iterate(Position()), 200))) == list(range(200))
    (tmp_path / "both" / "test" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"test: cannot be opened by datasets\.load_from_disk"):
        stream_of(tmp_path / "both" / "test")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset repository on disk, and ``datasets`` told to look there."""
    import datasets

    repository = tmp_path / "hub"
    (repository / "data").mkdir(parents=True)
    for split, start in (("train", 0), ("test", 100)):
        for i in range(2):
            rows = [row(start + 10 * i + k) for k in range(10)]
            parquet(repository / "data" / f"{split}-0000{i}-of-00002.parquet", rows, row_group_size=5)
    original = datasets.load_dataset_builder

    def load(name: str, *subset: str) -> Any:
        if name != "user/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")
        return original(str(repository), *subset, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    return repository


def test_a_dataset_of_the_hub(hub: Path) -> None:
    stream = stream_of("hf://user/name")
    assert (stream.count(), stream.blocks) == (20, 4)
    assert sorted(map(int, ids(order_of(stream).iterate(Position()), 20))) == list(range(20))
    test = stream_of("hf://user/name/default", split="test")
    assert ids(order_of(test, shuffle=False).iterate(Position()), 3) == ["100", "101", "102"]
    with pytest.raises(ConfigError, match=r"data\.split: hf://user/name has the splits \['test', 'train'\], got 'dev'"):
        stream_of("hf://user/name", split="dev")
    with pytest.raises(DataError, match=r"hf://user/gone: cannot be opened: Dataset 'user/gone' doesn't exist on the"):
        stream_of("hf://user/gone")
    with pytest.raises(ConfigError, match="expected hf://user/name or hf://user/name/subset, got 'hf://name'"):
        stream_of("hf://name")


def test_a_dataset_of_the_hub_in_another_format(hub: Path) -> None:
    for file in (hub / "data").iterdir():
        file.unlink()
    (hub / "data" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"a stream reads \.jsonl, .*got '.*train\.csv'; download it"):
        stream_of("hf://user/name")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_a_stream(workers: int, tmp_path: Path) -> None:
    """Bad rows and missing files are skips in their place; the state goes through JSON."""
    entries = [row(i) for i in range(12)]
    entries[3] = row(3, solution="no answer")
    entries[7] = row(7, data_type="image", path="gone.png")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))

    def take(count: int, start: Any = 0) -> tuple[list[Any], Reader]:
        with Reader(stream_of(tmp_path), start=start, workers=workers, prefetch=4) as reader:  # type: ignore[arg-type]
            return reader.source.take(count), reader

    whole, reader = take(25)
    assert len(reader.skips) == reader.source.skipped.total() == reader.source.position - 25
    assert {skip[1:] for skip in reader.skips} == {
        ("solution", str(tmp_path / "a.jsonl")), ("missing_file", str(tmp_path.resolve() / "gone.png"))
    }  # fmt: skip
    assert [draw for draw, _ in whole] == sorted({*range(reader.source.position)} - {s[0] for s in reader.skips})
    assert reader.source.epoch == pytest.approx(reader.source.position // 12)
    for taken in (1, 9, 10, 11, 24):
        _, first = take(taken)
        rest, second = take(25 - taken, json.loads(json.dumps(first.source.state)))
        assert rest == whole[taken:]
        assert first.skips + second.skips == reader.skips
        assert second.source.state == reader.source.state


def test_a_stream_of_nothing_usable_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row(i, solution="none")) for i in range(30)))
    with (
        Reader(stream_of(tmp_path)) as reader,
        pytest.raises(  # type: ignore[arg-type]
            DataError, match=r"none of the last 31 samples can be used \(solution 31\)\. The last: .*a\.jsonl: byte"
        ),
    ):
        reader.source.take(1)
    monkeypatch.setattr(videor1.stream, "MAX_FAILURES", 12)
    with Reader(stream_of(tmp_path)) as reader, pytest.raises(DataError, match="none of the last 12 samples"):  # type: ignore[arg-type]
        reader.source.take(1)
