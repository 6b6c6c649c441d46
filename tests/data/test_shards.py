"""Shards of every format give the same samples; bad rows, blank lines and damage cost only themselves."""

import gzip
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spies import spy
from streams import drawn, ids, json_lines, lines, order_of, parquet, row, samples, stream_of

import videor1.data.shards
from videor1.data import load_samples
from videor1.data.files import LocalFile
from videor1.data.parsing import Unparsed
from videor1.data.shards import JsonlShard, open_shards
from videor1.data.stream import Position
from videor1.errors import DataError
from videor1.types import Sample, SampleError


def all_lines(path: Path) -> list[tuple[int, Any]]:
    """(byte, parsed) of every line that is not blank, block by block."""
    (shard,) = open_shards([LocalFile(str(path), path.stat().st_size)]) or [None]
    found = []
    for block in range(shard.blocks if shard else 0):
        rows = shard.read(block)
        entries = [rows.entry(i) for i in range(len(rows))]
        found += [(at, value) for at, where, value in filter(None, entries) if where == f"byte {at}"]
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["\n", "\r\n", "\n\n", " \n"])), max_size=20),
    block=st.integers(4, 40),
    bom=st.booleans(),
    last=st.integers(0, 30),
)
def test_blocks_hold_every_line_once(
    parts: list[tuple[int, str]], block: int, bom: bool, last: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Lines shorter and longer than a block, blank ones, CRLF, a byte order mark, no newline at the end."""
    numbers = itertools.count(1)

    def number(digits: int) -> str:
        return str(next(numbers)).zfill(digits).replace("0", "7") if digits else ""

    text = ("\ufeff" if bom else "") + "".join(number(n) + end for n, end in parts) + number(last)
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
        patch.setattr(videor1.data.shards, "BLOCK_BYTES", block)
        assert all_lines(path) == expected


def test_a_line_too_long_to_be_held_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videor1.data.shards, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(videor1.data.shards, "MAX_ROW_BYTES", 200_000)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"1\n" + b"2" * 900_000 + b"\n3\n")
    too_long = Unparsed("a line of more than 200000 bytes")
    assert all_lines(path) == [(0, 1), (2, too_long), (900_003, 3)]

    read = spy(monkeypatch, LocalFile, "read", lambda _, file, start, stop: stop - start)
    JsonlShard(LocalFile(str(path), path.stat().st_size)).read(0)
    assert 200_000 < sum(read) < 600_000
    assert [error.kind for error in samples(stream_of(path), 3)] == ["wrong_type", "bad_json", "wrong_type"]


@pytest.mark.parametrize("content", [b"\n\n \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_nothing_but_blank_lines(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_bytes(content)
    stream = stream_of(tmp_path / "blank.jsonl")
    assert stream.count() == 0
    with pytest.raises(DataError, match=r"blank\.jsonl: holds no samples$"):
        drawn(stream, 1)
    for name in ("blank.jsonl", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="holds no samples; its 2 shards are empty"):
        stream_of(tmp_path)


BAD = [row(1, solution=...), row(2, data_type="videos"), [3], row(4, problem=" ")]
BAD += [row(5, data_type="video", path="../x"), row(6, problem_type="multiple choice")]


def test_bad_rows_are_the_errors_of_a_data_file(tmp_path: Path) -> None:
    content = lines([0]) + b'{"cut\n\xff\n' + json_lines(BAD)
    (tmp_path / "bad.jsonl").write_bytes(content)
    whole = load_samples(tmp_path / "bad.jsonl")
    good, *found = samples(stream_of(tmp_path / "bad.jsonl"), len(BAD) + 3)
    assert isinstance(good, Sample)
    assert [e.kind for e in found] == [e.kind for e in whole.errors]
    at = 0
    for error, expected, line in zip(found, whole.errors, content.splitlines()[1:], strict=True):
        at = content.index(line, at)
        assert error.message == f"byte {at}:" + expected.message.partition(":")[2]
        assert error.path == str(tmp_path / "bad.jsonl")


FULL = [
    row(0),
    row("a", data_type="video", path="clips/a.mp4", data_source="made", solution="<answer>1</answer>"),
    row(2, problem_id=...),
    row(3, problem_type="multiple choice", options=["A. red", "B. é"], solution="<answer>B</answer>"),
    row(4, process="<think>x</think>"),
]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "saved", "memory"])
def test_every_format_gives_the_same_samples(kind: str, tmp_path: Path) -> None:
    text = json_lines(FULL)
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
    found = samples(stream, 5)
    assert all(isinstance(sample, Sample) for sample in found), found
    for sample, same in zip(found, expected, strict=True):
        for field in ("problem", "data_type", "path", "options", "data_source", "process"):
            assert getattr(sample, field) == getattr(same, field)
    where = text.index(b'{"problem": "2?"') if "json" in kind or kind == "memory" else 2
    assert [s.problem_id for s in found[:3]] == ["0", "a", f"{name.rsplit('/', 1)[-1]}:{where}"]
    assert len({s.index for s in found}) == 5
    shuffled = [draw.sample for draw in drawn(stream_of(name, root=str(tmp_path)), 5)]
    assert sorted(s.problem for s in shuffled) == sorted(s.problem for s in expected)


def test_shards_of_several_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(range(5)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines(range(5, 8))))
    parquet(tmp_path / "c.parquet", [row(i) for i in range(8, 30)])
    (tmp_path / "README.md").write_text("no shard")
    (tmp_path / ".hidden.jsonl").write_text("no shard")
    stream = stream_of(tmp_path)
    assert [shard.blocks for shard in stream.shards] == [1, 1, 3]
    assert stream.count() == 30
    draws = drawn(stream, 30)
    assert sorted(map(int, ids(draws))) == list(range(30))
    assert len({draw.sample.index for draw in draws}) == 30


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    parquet(path, [row(i, problem=f"{i}{random.Random(i).random()}") for i in range(30)])
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1)
    column = group.column([group.column(i).path_in_schema for i in range(group.num_columns)].index("problem"))
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    draws = drawn(stream_of(tmp_path), 21, shuffle=False)
    ((place, error),) = [(i, d.sample) for i, d in enumerate(draws) if isinstance(d.sample, SampleError)]
    assert (place, error.kind, error.path) == (10, "bad_block", str(path))
    assert error.message.startswith("row group 1: cannot be decoded, its rows are lost: ")
    assert ids(draws) == [str(i) for i in range(30) if not 10 <= i < 20]


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_gzip_shard(damage: str, tmp_path: Path) -> None:
    packed = gzip.compress(lines(range(50)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-30] if damage == "cut" else b"no gzip at all")
    (tmp_path / "b.jsonl").write_bytes(lines(range(3)))
    error, *rest = samples(stream_of(tmp_path), 4)
    assert isinstance(error, SampleError)
    assert (error.kind, [sample.problem_id for sample in rest]) == ("bad_block", ["0", "1", "2"])


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path) -> None:
    import fsspec

    path, memory = tmp_path / "a.jsonl", fsspec.filesystem("memory")
    path.write_bytes(lines(range(10)))
    memory.pipe("/changes/a.jsonl", lines(range(10)))
    local, remote = (order_of(stream_of(name)) for name in (path, "memory://changes"))
    path.write_bytes(lines(range(9)))
    memory.pipe("/changes/a.jsonl", lines(range(9)))
    with pytest.raises(DataError, match=r"a\.jsonl: changed during the run: \d+ bytes when it was opened, now \d+"):
        next(local.iterate(Position()))
    with pytest.raises(DataError, match="changed during the run: it ends earlier"):
        next(remote.iterate(Position()))
    path.unlink()
    memory.rm("/changes/a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: No such file"):
        next(local.iterate(Position()))
    with pytest.raises(DataError, match=r"memory://.*a\.jsonl: cannot be read"):
        next(remote.iterate(Position()))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_row_that_is_not_utf8_is_an_error_in_its_place(kind: str, tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.Table.from_pylist([row(str(i), solution=f"<answer>{i}</answer>") for i in range(3)])
    texts = pyarrow.array([b"0?", b"\xff?", b"2?"], pyarrow.binary()).view(pyarrow.string())
    table = rows.set_column(rows.schema.get_field_index("problem"), "problem", texts)
    name = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, name)
    else:
        datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(name)
    first, error, last = samples(stream_of(name, root=str(tmp_path)), 3)
    assert [first.problem, last.problem] == ["0?", "2?"]
    assert isinstance(error, SampleError)
    assert (error.kind, error.path) == ("bad_text", str(name))
    assert error.message.startswith("row 1: cannot be decoded: ")
