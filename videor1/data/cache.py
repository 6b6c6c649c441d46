"""Results that are not computed twice: in memory, and 8-bit patches as safetensors files that several runs may share.

What is kept belongs to a version of the file it was made from (size, time of modification, inode): when that changes,
it is not handed out any more; and to a version of the code that made it, which finds nothing of another. Both versions
are the key's. Both caches drop the least recently used first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as unpack_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor

from videor1.atomic import write_all
from videor1.config import VideoConfig
from videor1.errors import ConfigError
from videor1.types import Media
from videor1.video.version import Key
from videor1_kernels.frames_to_patches import PATCH_COLUMNS

try:
    import fcntl
except ImportError:  # Windows: the budget may be overshot there by what several processes write at once
    fcntl = None  # type: ignore[assignment]

ABSENT: Any = object()

_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.(?P<owner>[0-9a-f]{12})\.\d+\.tmp")
_ABANDONED_SECONDS = 3600.0  # a temporary file this old was left by a process that was killed


class MemoryCache:
    """Least recently used results within a number of bytes (of their tensors)."""

    def __init__(self, limit: int) -> None:
        self.used = 0
        self._limit = limit
        self._entries: OrderedDict[Hashable, tuple[Hashable, Any, int]] = OrderedDict()

    def get(self, key: Key) -> Any:
        """The result of this version, or ABSENT."""
        entry = self._entries.get(key.name)
        if entry is None or entry[0] != key.version:
            return ABSENT
        self._entries.move_to_end(key.name)
        return entry[1]

    def put(self, key: Key, value: Any) -> None:
        """Keep a result, in place of another version's."""
        self.drop(key.name)
        size = _tensor_bytes(value)
        if size > self._limit or not self._limit:
            return
        self._entries[key.name] = key.version, value, size
        self.used += size
        while self.used > self._limit:
            self.drop(next(iter(self._entries)))

    def holds_other(self, key: Key) -> bool:
        """Whether another version is kept."""
        entry = self._entries.get(key.name)
        return entry is not None and entry[0] != key.version

    def drop(self, name: Hashable) -> None:
        if name in self._entries:
            self.used -= self._entries.pop(name)[2]


@dataclass(frozen=True)
class Trouble:
    """What went wrong with the files of a cache; the sample itself is none the worse."""

    kind: Literal["read", "write", "damaged"]
    message: str
    code: int | None = None  # errno


@dataclass(frozen=True)
class Found:
    """The answer of :meth:`DiskCache.read`."""

    media: Media | None = None
    changed: bool = False  # there was one, of another version of the file
    trouble: Trouble | None = None


class DiskCache:
    """8-bit patches in a folder, one safetensors file for each media file and settings; no pickle.

    Any number of processes may share the folder: a file appears whole (written aside, then renamed), and the bytes in
    use are counted under a lock, in the file ``.usage``. A file's time of modification is its last use. Each carries a
    checksum, so nothing is synced to the disk: what a power cut damages is found out. Nothing here raises an
    ``OSError``: a cache that cannot be read or written is a ``Trouble``, and the video is decoded.

    Instances hold no open file and may be sent to other processes.

    Args:
        folder: made when something is written.
        limit: bytes of all whole files together; the least recently used are removed, a tenth of the limit at a time.
        settings: whatever else the patches depend on, as text.

    Raises:
        ConfigError: ``folder`` is there and is not a folder.
    """

    lock_seconds = 5.0  # to wait for the lock; a process that was stopped while it held it must not stop the others

    def __init__(self, folder: str | Path, limit: int, settings: str) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._limit, self._settings = limit, settings
        self._owner = uuid.uuid4().hex[:12]
        if self._folder.exists() and not self._folder.is_dir():
            raise ConfigError(f"data.cache_dir: expected a folder, got {self._folder}, which is a file")

    def read(self, key: Key) -> Found:
        """The patches kept for this version of the file. A damaged or outdated file is removed."""
        started, path = time.perf_counter(), self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return Found()
        except OSError as error:
            return Found(trouble=self._trouble("read", error))
        try:
            version, media = _unpack(data, self._about(key), started)
        except ValueError as error:
            _remove(path)
            return Found(trouble=Trouble("damaged", f"{path}: {error}; removed"))
        if version != _plain(key.version):
            _remove(path)
            return Found(changed=True)
        with suppress(OSError):  # a folder that may only be read serves too
            os.utime(path)
        return Found(media)

    def write(self, key: Key, media: Media) -> Trouble | None:
        """Keep patches, in place of another version's. Those that are larger than the whole budget are not kept."""
        data = _pack(media, self._about(key) | {"version": _plain(key.version)})
        if len(data) > self._limit:
            return None
        path = self._path(key)
        # Not write_atomic: its name tells which process writes it, for clean, and the rename waits for the lock.
        temporary = path.with_name(f".{path.stem}.{self._owner}.{os.getpid()}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_file(temporary, data)
            with self._usage() as usage:
                before = _size(path)
                used = usage.get()
                if used is None or used - before + len(data) > self._limit:
                    used = self._make_room(len(data), spare=path)
                usage.set(used - before + len(data))  # first: a process killed here counts too much, not too little
                os.replace(temporary, path)
        except OSError as error:
            _remove(temporary)
            return self._trouble("write", error)
        return None

    def clean(self) -> None:
        """Remove what killed processes left half-written: this instance's and its copies', and what is an hour old."""
        with suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                match = _TEMPORARY.fullmatch(entry.name)
                if match and (match["owner"] == self._owner or _is_abandoned(entry)):
                    _remove(Path(entry.path))

    def _path(self, key: Key) -> Path:
        digest = hashlib.sha256(json.dumps(self._about(key)).encode()).hexdigest()
        return self._folder / f"{digest}.safetensors"

    def _trouble(self, kind: Literal["read", "write"], error: OSError) -> Trouble:
        return Trouble(kind, f"{self._folder}: {error.strerror or error}", error.errno)

    def _about(self, key: Key) -> dict[str, Any]:
        return {"format": key.format, "name": _plain(key.name), "settings": self._settings}

    def _make_room(self, size: int, spare: Path) -> int:
        """Count the files, and remove the oldest if ``size`` more bytes do not fit; the bytes then in use."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _TEMPORARY.fullmatch(entry.name) and _is_abandoned(entry):
                    _remove(Path(entry.path))
                elif _ENTRY.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # removed by another process as damaged
                        status = entry.stat()
                        found.append((status.st_mtime_ns, entry.name, status.st_size))
        used = sum(size for _, _, size in found)
        replaced = sum(size for _, name, size in found if name == spare.name)
        if used - replaced + size <= self._limit:
            return used
        # More than is needed: or each write to a full cache would count all of its files.
        room = min(self._limit - size, self._limit * 9 // 10) + replaced
        for _, name, old in sorted(found):
            if used > room and name != spare.name:
                (self._folder / name).unlink(missing_ok=True)
                used -= old
        return used

    @contextmanager
    def _usage(self) -> Iterator[_Usage]:
        """The count of bytes in use, locked."""
        file = os.open(self._folder / ".usage", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            deadline = time.monotonic() + self.lock_seconds
            while fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise OSError(None, f"another process held the lock for {self.lock_seconds:g} s") from None
                    time.sleep(0.01)
            yield _Usage(file)
        finally:
            os.close(file)  # gives the lock back


class _Usage:
    """A number in an open file, always as many digits."""

    def __init__(self, file: int) -> None:
        self._file = file

    def get(self) -> int | None:
        os.lseek(self._file, 0, os.SEEK_SET)
        text = os.read(self._file, 64)
        return int(text) if re.fullmatch(rb"\d{20}", text) else None

    def set(self, number: int) -> None:
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, b"%020d" % max(number, 0))


def disk_cache(folder: str | None, megabytes: int, video: VideoConfig) -> DiskCache | None:
    """The cache that ``data.cache_dir`` asks for; what is made under other video settings is never found in it."""
    return None if folder is None else DiskCache(folder, megabytes * 2**20, json.dumps(asdict(video), sort_keys=True))


def _pack(media: Media, about: dict[str, Any]) -> bytes:
    patches = media.patches.contiguous()
    about = about | {
        "kind": media.kind,
        "grid_thw": list(media.grid_thw),
        "second_per_grid": media.second_per_grid,
        "crc32": _checksum(patches),
    }
    return pack_tensors({"patches": patches}, {"videor1": json.dumps(about)})


def _unpack(data: bytes, about: dict[str, Any], started: float) -> tuple[Any, Media]:
    """(version, patches) of a file. ValueError: it is not what :func:`_pack` wrote for ``about``."""
    try:
        patches = unpack_tensors(data)["patches"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stored = json.loads(header["__metadata__"]["videor1"])
        T, h, w = stored["grid_thw"]
        kind, second_per_grid = stored["kind"], stored["second_per_grid"]
        if {name: stored[name] for name in about} != about:
            raise ValueError("it was written for other media or settings")
        if patches.dtype != torch.uint8 or tuple(patches.shape) != (T * h * w, PATCH_COLUMNS):
            raise ValueError(f"expected uint8 patches for grid {(T, h, w)}, got {patches.dtype} {list(patches.shape)}")
        if kind not in ("video", "image") or not math.isfinite(second_per_grid):
            raise ValueError(f"expected a video or an image and its seconds per grid, got {kind}, {second_per_grid}")
        if _checksum(patches) != stored["crc32"]:
            raise ValueError("its checksum is wrong")
        media = Media(kind, patches, (T, h, w), second_per_grid, time.perf_counter() - started)
        return stored["version"], media
    except (SafetensorError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a whole safetensors file of patches ({type(error).__name__}: {error})") from None


def _checksum(patches: Tensor) -> int:
    return zlib.crc32(patches.numpy().data)


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        write_all(file, data)


def _plain(value: Any) -> Any:
    """As JSON reads it back."""
    return json.loads(json.dumps(value))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS
    return False


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value) and not isinstance(value, type):
        return sum(_tensor_bytes(getattr(value, f.name)) for f in fields(value))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return 0
