"""Find and open the data files of a stream: on disk, behind a URL (fsspec), or of a dataset on the Hugging Face Hub."""

from __future__ import annotations

import glob
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from videor1.errors import ConfigError, DataError, install

JSONL = (".jsonl", ".ndjson")
GZIP = tuple(f"{suffix}.gz" for suffix in JSONL)
PARQUET = (".parquet",)
SHARDS = (*JSONL, *GZIP, *PARQUET)


@dataclass(frozen=True)
class LocalFile:
    """A file on disk, of which any range of bytes can be read."""

    name: str
    size: int

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes in [start, stop).

        Raises:
            DataError: the file cannot be read, or its size is no longer what it was when the data set was opened.
        """
        with self.open() as file:
            file.seek(start)
            return _check_length(self, file.read(stop - start), stop - start)

    def open(self) -> BinaryIO:
        """Open the file for reading; the caller closes it. Raises DataError as ``read`` does."""
        try:
            file = open(self.name, "rb")  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror}") from error
        if (now := os.fstat(file.fileno()).st_size) != self.size:
            file.close()
            raise DataError(f"{self.name}: changed during the run: {self.size} bytes when it was opened, now {now}")
        return file


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, of which ranges of bytes are read and never the whole file."""

    name: str
    size: int
    path: str
    filesystem: Any = field(repr=False, compare=False)

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes in [start, stop). Raises DataError where they cannot be read."""
        try:
            data = self.filesystem.cat_file(self.path, start=start, end=stop)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error}") from error
        return _check_length(self, data, stop - start)

    def open(self) -> BinaryIO:
        """Open the file for reading; the caller closes it. Raises DataError where that fails."""
        try:
            return self.filesystem.open(self.path, "rb")
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error}") from error


File = LocalFile | RemoteFile


def _check_length(file: File, data: bytes, expected: int) -> bytes:
    if len(data) != expected:
        raise DataError(f"{file.name}: changed during the run: it ends earlier than when it was opened")
    return data


@dataclass(frozen=True)
class Saved:
    """A folder that ``datasets.Dataset.save_to_disk`` wrote."""

    name: str


def find(name: str, split: str) -> tuple[list[File | Saved], list[str]]:
    """Find the shards that a ``dataset_name`` names.

    Returns:
        (the shards in order, the folders that the media paths of their rows may be relative to).

    Raises:
        DataError: there is no such data.
        ConfigError: the name is not understood, names a shard twice, or needs a package that is not installed.
    """
    found: list[File | Saved] = []
    roots: list[str] = []
    for item in [name] if os.path.exists(name) else [part.strip() for part in name.split(",") if part.strip()]:
        shards, root = _find_one(item, split)
        found += shards
        roots += [root] if root not in roots else []
    names = [os.path.realpath(s.name) if isinstance(s, LocalFile) else s.name for s in found]
    if repeated := next((n for n in names if names.count(n) > 1), None) if len(set(names)) < len(names) else None:
        raise ConfigError(f"dataset_name: {name!r} names {repeated} twice")
    return found, roots


def _find_one(item: str, split: str) -> tuple[list[File | Saved], str]:
    if item.startswith("hf://") and not item.startswith(("hf://datasets/", "hf://buckets/")):
        return list(_hub_files(item, split)), os.curdir
    if "://" in item:
        return list(_remote_files(item)), os.curdir
    path = Path(item)
    if os.path.isdir(item):
        if (path / "dataset_dict.json").is_file():
            splits = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
            raise ConfigError(
                f"dataset_name: {item} holds the splits {splits}; name one, e.g. {path / (splits or ['train'])[0]}"
            )
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return [Saved(str(path))], str(path)
        names = sorted(str(p) for p in path.iterdir() if p.name.endswith(SHARDS) and not p.name.startswith("."))
        expected = f"expected {', '.join(SHARDS)} files in it (folders below it: {path / '**' / '*.jsonl'})"
    else:
        names = (
            sorted(n for n in glob.glob(item, recursive=True) if os.path.isfile(n)) or [item][: os.path.exists(item)]
        )
        expected = "no such data file" if not glob.has_magic(item) else "no file matches"
    if not names:
        raise DataError(f"{item}: {expected}")
    for name in names:
        if not name.endswith(SHARDS):
            raise ConfigError(f"dataset_name: a stream reads {', '.join(SHARDS)} shards, got {name!r}")
    return [LocalFile(name, os.stat(name).st_size) for name in names], _fixed_folder(item)


def _fixed_folder(item: str) -> str:
    """Return the deepest folder of a path: the path itself, or what stands before a file's name or a wildcard."""
    path = Path(item)
    while not path.is_dir():
        path = path.parent
    return str(path)


def _remote_files(url: str) -> Iterator[RemoteFile]:
    import fsspec  # type: ignore[import-untyped]

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            paths = filesystem.glob(path)
        else:
            paths = [path] if filesystem.isfile(path) else filesystem.find(path)
        sizes = [filesystem.info(p)["size"] for p in paths]
    except ImportError as error:
        raise ConfigError(f"dataset_name: {url} needs a package that is not installed: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{url}: cannot be opened: {error}") from error
    shards = sorted((p, size) for p, size in zip(paths, sizes, strict=True) if str(p).endswith(SHARDS))
    if not shards:
        raise DataError(f"{url}: no {', '.join(SHARDS)} file is there")
    for path, size in shards:
        if size is None:
            raise DataError(f"{filesystem.unstrip_protocol(path)}: its server does not tell its size; download it")
        yield RemoteFile(filesystem.unstrip_protocol(path), size, path, filesystem)


def _hub_files(name: str, split: str) -> Iterator[File]:
    """Yield a split's data files, as the ``datasets`` library finds them. Ranges of them are read, nothing is kept."""
    parts = name.removeprefix("hf://").strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ConfigError(f"dataset_name: expected hf://user/name or hf://user/name/subset, got {name!r}")
    datasets = require("datasets")
    try:
        builder = datasets.load_dataset_builder("/".join(parts[:2]), *parts[2:])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: cannot be opened: {' '.join(str(error).split())}") from error
    files = builder.config.data_files or {}
    if split not in files:
        raise ConfigError(f"data.split: {name} has the splits {sorted(map(str, files))}, got {split!r}")
    for path in files[split]:
        without_query = str(path).partition("?")[0]
        if not without_query.endswith(SHARDS):
            raise ConfigError(
                f"dataset_name: {name}: a stream reads {', '.join(SHARDS)} shards, got {without_query!r}; "
                "download it, or write it with datasets' save_to_disk"
            )
        if "://" in without_query:
            yield from _remote_files(without_query)
        else:
            yield LocalFile(without_query, os.stat(without_query).st_size)


def require(package: str) -> ModuleType:
    """Import a package of the extra ``stream``. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"dataset_name: this data needs {package.partition('.')[0]}: {error}; {install('stream')}"
        ) from error
