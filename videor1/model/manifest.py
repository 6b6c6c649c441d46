"""The manifest of a checkpoint: a digest of each of its files, by which damage and later changes are noticed.

    videor1_manifest.json    {"version": 1, "files": {"config.json": {"bytes": 1234, "blake2b": "9f86..."}, ...}}

It is written last and lists every other file of the folder, the trainer's state included. ``b2sum -l 256 FILE`` prints
the same digest. A folder without a manifest comes from elsewhere or from an earlier version, and is not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from videor1.atomic import write_atomic

MANIFEST = "videor1_manifest.json"
TRAINER = "trainer"  # the subfolder with the trainer's state

_VERSION = 1
_THREADS = 4  # hashlib releases the interpreter's lock, so that several files are hashed at once
# Files of these kinds are read when a folder is loaded. One that the manifest does not list has been added later.
_READ = (".json", ".safetensors", ".bin", ".pt", ".pth", ".jinja", ".txt", ".model", ".py")


class Entry(TypedDict):
    """What a manifest holds about a file."""

    bytes: int
    blake2b: str  # of 256 bits, as hexadecimal digits


class DamagedError(ValueError):
    """Raised for a folder that is not what its manifest says, or a manifest that cannot be read."""


def file_entry(path: Path) -> Entry:
    """Read a file and return its size and digest."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
        return {"bytes": os.fstat(file.fileno()).st_size, "blake2b": digest.hexdigest()}


def write_manifest(folder: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Write the manifest of a folder, which must hold its other files already.

    Args:
        folder: the folder.
        known: entries that are known already, by the path relative to the folder; these files are not read again.
    """
    files = dict(known or {})
    names = sorted(name for name in _names(folder) if name not in files)
    files |= dict(zip(names, _in_threads(lambda name: file_entry(folder / name), names), strict=True))
    document = {"version": _VERSION, "files": {name: files[name] for name in sorted(files)}}
    write_atomic(folder / MANIFEST, json.dumps(document, indent=1) + "\n", sync=True)


def check_manifest(folder: Path, *, trainer: bool) -> bool:
    """Check the files of a folder against its manifest, if it has one.

    Args:
        folder: the folder of a checkpoint.
        trainer: whether to check the trainer's state too; a folder that is only loaded as a model may lack it.

    Returns:
        Whether there is a manifest.

    Raises:
        DamagedError: a file is missing, of another size or content, or was added, or the manifest is no manifest.
        OSError: a file cannot be read.
    """
    if not os.path.lexists(folder / MANIFEST):
        return False
    files = _read(folder / MANIFEST)
    if not trainer:
        files = {name: entry for name, entry in files.items() if not name.startswith(f"{TRAINER}/")}
    sizes = {name: _size(folder / name) for name in files}
    problems = [f"{name} is missing" for name in files if sizes[name] is None]
    problems += [
        f"{name} has {sizes[name]} bytes instead of {entry['bytes']}"
        for name, entry in files.items()
        if sizes[name] not in (None, entry["bytes"])
    ]
    added = [name for name in _names(folder) if name not in files and name.endswith(_READ)]
    problems += [f"{name} was added" for name in sorted(added) if trainer or not name.startswith(f"{TRAINER}/")]
    if not problems:  # Only then is it worth reading the files.
        names = sorted(files)
        found = _in_threads(lambda name: file_entry(folder / name), names)
        problems = [
            f"{name} has changed since it was written"
            for name, entry in zip(names, found, strict=True)
            if entry != files[name]
        ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DamagedError(f"not what {MANIFEST} lists: {'; '.join(problems[:5])}{more}")
    return True


def _read(path: Path) -> dict[str, Entry]:
    """Read and check a manifest. Raises DamagedError if it is none."""
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or type(document.get("version")) is not int:
            raise ValueError('expected {"version": ..., "files": ...}')
        if document["version"] != _VERSION:
            raise ValueError(f"expected version {_VERSION}, got {document['version']}")
        files = document.get("files")
        if not isinstance(files, dict) or "config.json" not in files:
            raise ValueError("its files are not a mapping that lists config.json")
        for name, entry in files.items():
            _check_entry(name, entry)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DamagedError(f"{MANIFEST} cannot be read: {error}") from error
    return files


def _check_entry(name: str, entry: Any) -> None:
    parts = PurePosixPath(name).parts
    if not is_plain(name, depth=2) or (len(parts) == 2 and parts[0] != TRAINER):
        raise ValueError(f"{name!r} is not the name of a file in the folder or its {TRAINER}/")
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or entry["bytes"] < 0:
        raise ValueError(f"{name}: expected bytes and blake2b, got {entry!r:.80}")
    if not isinstance(entry.get("blake2b"), str) or not re.fullmatch("[0-9a-f]{64}", entry["blake2b"]):
        raise ValueError(f"{name}: expected a blake2b of 64 hexadecimal digits, got {entry.get('blake2b')!r:.80}")


def is_plain(name: object, *, depth: int = 1) -> bool:
    """Return whether a name leads to a file in a folder, at most ``depth`` parts deep, and nowhere else."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or ":" in name:
        return False
    parts = name.split("/")
    return len(parts) <= depth and all(part not in ("", ".", "..") for part in parts)


def _names(folder: Path) -> Iterable[str]:
    """Return the paths of the files in a folder and in its ``trainer/``, relative to it; hidden ones are left out."""
    found = [path for place in (folder, folder / TRAINER) if place.is_dir() for path in place.iterdir()]
    names = [path.relative_to(folder).as_posix() for path in found if path.is_file() and path.name[0] != "."]
    return [name for name in names if name != MANIFEST]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _in_threads(call: Callable[[str], Entry], names: list[str]) -> list[Entry]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(call, names))
