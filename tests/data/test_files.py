"""What a dataset's name opens: files, folders, wildcards, URLs and datasets of the Hub, whole or as a stream."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from streams import ids, lines, order_of, parquet, row, stream_of

import videor1.data
import videor1.data.shards
import videor1.data.stream
from videor1.config import DataConfig
from videor1.data import Dataset
from videor1.data.stream import Position, RowStream, open_dataset
from videor1.errors import ConfigError, DataError
from videor1.types import SampleError


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
    monkeypatch.setattr(videor1.data.shards, "MAX_UNPACKED_BYTES", 2**20)
    (tmp_path / "big.jsonl.gz").write_bytes(gzip.compress(b" " * 2**20 + b"\n"))
    with pytest.raises(DataError, match=r"big\.jsonl\.gz: unpacks to more than 1 MiB"):
        next(order_of(stream_of(tmp_path / "big.jsonl.gz")).iterate(Position()))


def test_what_is_held_whole_and_what_is_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videor1.data.stream, "STREAM_BYTES", 5000)
    (tmp_path / "small.jsonl").write_bytes(lines(range(2)))
    (tmp_path / "large.jsonl").write_bytes(lines(range(100)))
    (tmp_path / "list.jsonl").write_text(json.dumps([row(i) for i in range(100)]))
    (tmp_path / "large.json").write_text(json.dumps([row(i) for i in range(100)]))
    (tmp_path / "[x],y.jsonl").write_bytes(lines(range(2)))  # a name, no wildcard and no list
    for name, stream in {
        "small.jsonl": False,
        "large.jsonl": True,
        "list.jsonl": False,
        "large.json": False,
        "[x],y.jsonl": False,
        "small*.jsonl": True,
        "": True,
    }.items():
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
    with pytest.raises(ConfigError, match=rf'needs {package.split(".")[0]}: .*pip install -e "\.\[stream\]"'):
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
