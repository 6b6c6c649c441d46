"""What a dataset's name opens: files, folders, wildcards, URLs and datasets of the Hub, whole or as a stream."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from streams import drawn, ids, json_lines, lines, parquet, row, samples, stream_of

import videor1.data.shards
import videor1.data.stream
from videor1.config import DataConfig
from videor1.data import Dataset
from videor1.data.stream import RowStream, open_dataset
from videor1.errors import ConfigError, DataError
from videor1.types import SampleError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files of many kinds; read only."""
    folder = tmp_path_factory.mktemp("files")
    for name, start in (("one", 0), ("two", 10)):
        (folder / name).mkdir()
        for i in range(2):
            (folder / name / f"{i}.jsonl").write_bytes(lines([start + i]))
    (folder / "none").mkdir()
    files = {"small.jsonl": lines(range(2)), "[x],y.jsonl": lines(range(2)), "large.jsonl": lines(range(100))}
    listed = json.dumps([row(i) for i in range(100)]).encode()
    files |= {"list.jsonl": listed, "large.json": listed, "p.parquet": b"PAR1 no PAR1"}
    files["big.jsonl.gz"] = gzip.compress(b" " * 2**20 + b"\n")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("@/list.jsonl", DataError, r"list\.jsonl: holds a JSON list"),
        ("@/large.json", ConfigError, r"a stream reads \.jsonl, .* got .*large\.json"),
        ("@/p.parquet", DataError, r"p\.parquet: not a Parquet file"),
        ("@/gone.jsonl", DataError, "no such data file"),
        (",".join(f"@/{i}" for i in range(9, 5000)), DataError, "no such data file"),  # too long for a file's name
        ("@/one/*.parquet", DataError, "no file matches"),
        ("@/none", DataError, r"none: expected \.jsonl, .* files in it"),
        ("@/two,@/one", ConfigError, r"data\.root: needed, since dataset_name names several folders"),
        ("@/one,@/one/0.jsonl", ConfigError, r"names .*0\.jsonl twice"),
        ("memory://nowhere/*.parquet", DataError, r"memory://nowhere.*: no \.jsonl, "),
        ("ftpx://host/x", DataError, r"ftpx://host/x: cannot be opened: Protocol not known"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_cannot_be_a_stream(name: str, error: type[Exception], message: str, folder: Path) -> None:
    with pytest.raises(error, match=message):
        stream_of(name.replace("@", str(folder)))


def test_what_is_held_whole_and_what_is_a_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videor1.data.stream, "STREAM_BYTES", 5000)
    whole = {"small.jsonl": 2, "list.jsonl": 100, "large.json": 100, "[x],y.jsonl": 2}  # no wildcard and no list
    for name, count in (whole | {"large.jsonl": 100, "small*.jsonl": 2}).items():
        opened = open_dataset(str(folder / name), DataConfig())
        assert isinstance(opened, Dataset if name in whole else RowStream), name
        assert opened.count() == count
        assert count == 100 or stream_of(folder / name).count() == 2
    assert isinstance(open_dataset(str(folder / "large.jsonl"), DataConfig(stream=False)), Dataset)


def test_what_cannot_be_held_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videor1.data.shards, "MAX_UNPACKED_BYTES", 2**20)
    with pytest.raises(DataError, match=r"big\.jsonl\.gz: unpacks to more than 1 MiB"):
        drawn(stream_of(folder / "big.jsonl.gz"), 1)
    with pytest.raises(ConfigError, match=r"data\.stream: false holds one \.json or \.jsonl file"):
        open_dataset(str(folder), DataConfig(stream=False))
    with pytest.raises(DataError, match="no such data file"):
        open_dataset(str(folder / "gone.json"), DataConfig())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("@/one/*.jsonl", ["0", "1"]),
        ("@/**/[01].jsonl", ["0", "1", "10", "11"]),
        ("@/two, @/one/1.jsonl", ["10", "11", "1"]),
        ("@/two/*.jsonl,@/one/0.jsonl,@/one/././1.jsonl", ["10", "11", "0", "1"]),
    ],
)
def test_names_of_several_shards(name: str, found: list[str], folder: Path) -> None:
    options = {"root": str(folder)} if "," in name else {}
    stream = stream_of(name.replace("@", str(folder)), **options)
    assert ids(drawn(stream, len(stream.shards), shuffle=False)) == found
    with pytest.raises(DataError, match=r"data\.root: expected a folder, got .*gone"):
        stream_of(folder / "one", root=str(folder / "gone"))


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
    rows = [row(i, data_type="video", path=path) for i, path in enumerate(["a.mp4", "../b.mp4"])]
    (folder / "0.jsonl").write_bytes(json_lines(rows))
    for name in (folder, f"{folder}/*.jsonl", folder / "0.jsonl"):
        good, bad = samples(stream_of(name), 2)
        assert good.path == folder.resolve() / "a.mp4"
        assert isinstance(bad, SampleError)
        assert bad.kind == "outside_root"
    good, above = samples(stream_of(folder, root=str(tmp_path)), 2)
    assert [good.path, above.path] == [tmp_path.resolve() / "a.mp4", str(folder / "0.jsonl")]


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow.parquet", "@/a.parquet"), ("datasets", "@/saved"), ("datasets", "hf://user/name")]
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "a.parquet", [row(0)])
    (tmp_path / "saved").mkdir()
    for file in ("state.json", "dataset_info.json"):
        (tmp_path / "saved" / file).write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'needs {package.split(".")[0]}: .*pip install -e "\.\[stream\]"'):
        stream_of(name.replace("@", str(tmp_path)))


@pytest.mark.usefixtures("small_blocks")
def test_folders_of_datasets(tmp_path: Path) -> None:
    import datasets

    saved, both = datasets.Dataset.from_list([row(i) for i in range(200)]), tmp_path / "both"
    datasets.DatasetDict({"train": saved, "test": saved.select(range(5))}).save_to_disk(str(both))
    with pytest.raises(ConfigError, match=r"holds the splits \['test', 'train'\]; name one, e\.g\. .*both/test"):
        stream_of(both)
    stream = stream_of(both / "train")
    assert (stream.count(), stream.blocks) == (200, 4)
    assert sorted(map(int, ids(drawn(stream, 200)))) == list(range(200))
    (both / "test" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"test: cannot be opened by datasets\.load_from_disk"):
        stream_of(both / "test")


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
    assert sorted(map(int, ids(drawn(stream, 20)))) == list(range(20))
    test = stream_of("hf://user/name/default", split="test")
    assert ids(drawn(test, 3, shuffle=False)) == ["100", "101", "102"]
    with pytest.raises(ConfigError, match=r"data\.split: hf://user/name has the splits \['test', 'train'\], got 'dev'"):
        stream_of("hf://user/name", split="dev")
    with pytest.raises(DataError, match=r"hf://user/gone: cannot be opened: Dataset 'user/gone' doesn't exist on the"):
        stream_of("hf://user/gone")
    with pytest.raises(ConfigError, match="expected hf://user/name or hf://user/name/subset, got 'hf://name'"):
        stream_of("hf://name")
    for file in (hub / "data").iterdir():
        file.unlink()
    (hub / "data" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"a stream reads \.jsonl, .*got '.*train\.csv'; download it"):
        stream_of("hf://user/name")
