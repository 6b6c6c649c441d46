"""Caches of decoded media: one in memory, and one on disk (safetensors files) that several runs may share.

An entry belongs to one version of the media file that it was made from (size, modification time, inode) and is no
longer returned once that version changes. It also belongs to one version of the code that made it: other versions of
the code do not find it. The :class:`~videor1.video.version.Key` of an entry holds both versions. Both caches remove
the least recently used entries first.
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
from videor1.video.patches import check_grid
from videor1.video.rules import QWEN2_RULES, FrameRules
from videor1.video.version import Key

try:
    import fcntl
except ImportError:  # Windows has no fcntl. Processes that write at the same time may exceed the limit there.
    fcntl = None  # type: ignore[assignment]

ABSENT: Any = object()

_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.(?P<owner>[0-9a-f]{12})\.\d+\.tmp")
_ABANDONED_SECONDS = 3600.0  # A temporary file that is older was left by a process that was killed.


class MemoryCache:
    """A cache in memory that holds at most a given number of bytes and drops the least recently used results first.

    Args:
        limit: bytes of the tensors of all results together; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.used = 0
        self._limit = limit
        self._entries: OrderedDict[Hashable, tuple[Hashable, Any, int]] = OrderedDict()

    def get(self, key: Key) -> Any:
        """Return the result that is kept under the key's name and version, or ``ABSENT``."""
        entry = self._entries.get(key.name)
        if entry is None or entry[0] != key.version:
            return ABSENT
        self._entries.move_to_end(key.name)
        return entry[1]

    def put(self, key: Key, value: Any) -> None:
        """Keep a result and drop the result of another version. A result above the limit is not kept."""
        self.drop(key.name)
        size = _tensor_bytes(value)
        if size > self._limit or not self._limit:
            return
        self._entries[key.name] = key.version, value, size
        self.used += size
        while self.used > self._limit:
            self.drop(next(iter(self._entries)))

    def holds_other(self, key: Key) -> bool:
        """Return whether a result of another version of the same file is kept."""
        entry = self._entries.get(key.name)
        return entry is not None and entry[0] != key.version

    def drop(self, name: Hashable) -> None:
        """Remove the result that is kept under a name, if there is one."""
        if name in self._entries:
            self.used -= self._entries.pop(name)[2]


@dataclass(frozen=True)
class CacheFailure:
    """A failure of the disk cache. The sample can still be decoded from its media file."""

    kind: Literal["read", "write", "damaged"]
    message: str
    code: int | None = None  # the errno of the OSError


@dataclass(frozen=True)
class CacheRead:
    """The result of :meth:`DiskCache.read`."""

    media: Media | None = None  # None if nothing usable is cached
    changed: bool = False  # whether an entry of another version of the media file was found
    failure: CacheFailure | None = None


class DiskCache:
    """A folder of 8-bit patches, with one safetensors file (and no pickle) for each media file and settings.

    Any number of processes may share the folder. A file is written under a temporary name and then renamed, so that it
    appears complete. The bytes in use are counted in the file ``.usage``, under a lock. The modification time of a
    cache file is the time of its last use. Each file carries a checksum, so no write is synced to the disk: a file that
    a power failure damages is detected when it is read. No method raises an ``OSError``: a failure to read or write is
    returned as a ``CacheFailure``, and the caller decodes the media file.

    Instances hold no open file and may be sent to other processes.

    Args:
        folder: the cache folder; it is created with the first write.
        limit: bytes of all complete files together; the least recently used are removed, a tenth of the limit at a
            time.
        settings: everything else that the patches depend on, as text.

    Raises:
        ConfigError: ``folder`` exists and is not a folder.
    """

    lock_seconds = 5.0  # how long to wait: a process that was suspended while it holds the lock must not block others

    def __init__(self, folder: str | Path, limit: int, settings: str) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._limit, self._settings = limit, settings
        self._owner = uuid.uuid4().hex[:12]
        if self._folder.exists() and not self._folder.is_dir():
            raise ConfigError(f"data.cache_dir: expected a folder, got {self._folder}, which is a file")

    def read(self, key: Key) -> CacheRead:
        """Read the patches of this version of a media file. A damaged or outdated cache file is removed."""
        started, path = time.perf_counter(), self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return CacheRead()
        except OSError as error:
            return CacheRead(failure=self._failure("read", error))
        try:
            version, media = _unpack(data, self._identity(key), started)
        except ValueError as error:
            _remove(path)
            return CacheRead(failure=CacheFailure("damaged", f"{path}: {error}; removed"))
        if version != _as_json(key.version):
            _remove(path)
            return CacheRead(changed=True)
        with suppress(OSError):  # The cache can also be used where its folder is read-only.
            os.utime(path)
        return CacheRead(media)

    def write(self, key: Key, media: Media) -> CacheFailure | None:
        """Write patches in place of those of another version. Patches larger than the whole limit are not written."""
        data = _pack(media, self._identity(key) | {"version": _as_json(key.version)})
        if len(data) > self._limit:
            return None
        path = self._path(key)
        # write_atomic does not serve here: clean() needs the name to tell which instance and process wrote the file,
        # and the rename has to wait for the lock.
        temporary = path.with_name(f".{path.stem}.{self._owner}.{os.getpid()}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_file(temporary, data)
            with self._locked_usage() as usage:
                before = _size(path)
                used = usage.get()
                if used is None or used - before + len(data) > self._limit:
                    used = self._make_room(len(data), replaced=path)
                # Counted before the rename: a process that is killed in between leaves a count that is too high, and
                # never one that is too low.
                usage.set(used - before + len(data))
                os.replace(temporary, path)
        except OSError as error:
            _remove(temporary)
            return self._failure("write", error)
        return None

    def clean(self) -> None:
        """Remove the temporary files of killed processes: those of this instance and its copies, and all over an hour
        old."""
        with suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                match = _TEMPORARY.fullmatch(entry.name)
                if match and (match["owner"] == self._owner or _is_abandoned(entry)):
                    _remove(Path(entry.path))

    def _path(self, key: Key) -> Path:
        digest = hashlib.sha256(json.dumps(self._identity(key)).encode()).hexdigest()
        return self._folder / f"{digest}.safetensors"

    def _failure(self, kind: Literal["read", "write"], error: OSError) -> CacheFailure:
        return CacheFailure(kind, f"{self._folder}: {error.strerror or error}", error.errno)

    def _identity(self, key: Key) -> dict[str, Any]:
        """Return what an entry depends on, apart from the version of its media file."""
        return {"format": key.format, "name": _as_json(key.name), "settings": self._settings}

    def _make_room(self, size: int, replaced: Path) -> int:
        """Count the cache files and remove the least recently used if ``size`` more bytes would exceed the limit.

        Args:
            size: bytes of the file that is about to be written.
            replaced: the path of that file; an older file at this path is not removed here, since it is replaced.

        Returns:
            The bytes that are in use afterwards.
        """
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _TEMPORARY.fullmatch(entry.name) and _is_abandoned(entry):
                    _remove(Path(entry.path))
                elif _ENTRY.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # Another process removed it as damaged.
                        status = entry.stat()
                        files.append((status.st_mtime_ns, entry.name, status.st_size))
        used = sum(file_size for _, _, file_size in files)
        replaced_size = sum(file_size for _, name, file_size in files if name == replaced.name)
        if used - replaced_size + size <= self._limit:
            return used
        # More is removed than is needed; otherwise each write to a full cache would have to count all of its files.
        room = min(self._limit - size, self._limit * 9 // 10) + replaced_size
        for _, name, file_size in sorted(files):
            if used > room and name != replaced.name:
                (self._folder / name).unlink(missing_ok=True)
                used -= file_size
        return used

    @contextmanager
    def _locked_usage(self) -> Iterator[_UsageCounter]:
        """Yield the count of bytes in use while holding the lock of the cache folder."""
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
            yield _UsageCounter(file)
        finally:
            os.close(file)  # This also releases the lock.


class _UsageCounter:
    """A number that is stored in an open file with a fixed count of digits."""

    def __init__(self, file: int) -> None:
        self._file = file

    def get(self) -> int | None:
        os.lseek(self._file, 0, os.SEEK_SET)
        text = os.read(self._file, 64)
        return int(text) if re.fullmatch(rb"\d{20}", text) else None

    def set(self, number: int) -> None:
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, b"%020d" % max(number, 0))


def disk_cache(
    folder: str | None, megabytes: int, video: VideoConfig, rules: FrameRules = QWEN2_RULES
) -> DiskCache | None:
    """Return the cache in ``data.cache_dir``, or None without one.

    Other video settings, and families with other rules for frames, never share its entries.
    """
    settings = json.dumps(asdict(video) | {"rules": rules.name}, sort_keys=True)
    return None if folder is None else DiskCache(folder, megabytes * 2**20, settings)


def _pack(media: Media, identity: dict[str, Any]) -> bytes:
    patches = media.patches.contiguous()
    header = identity | {"kind": media.kind, "grid_thw": list(media.grid_thw), "second_per_grid": media.second_per_grid}
    header["times"] = list(media.times)
    header["decoded_bytes"] = media.decoded_bytes
    header["crc32"] = _checksum(patches, header)
    return pack_tensors({"patches": patches}, {"videor1": json.dumps(header)})


def _unpack(data: bytes, identity: dict[str, Any], started: float) -> tuple[Any, Media]:
    """Parse the content of a cache file and return (version of the media file, media).

    Args:
        data: the content of the file.
        identity: what the entry must have been written for, see ``DiskCache._identity``.
        started: when the read began, by ``time.perf_counter``.

    Raises:
        ValueError: the content is not what :func:`_pack` wrote for ``identity``.
    """
    try:
        patches = unpack_tensors(data)["patches"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stored = json.loads(header["__metadata__"]["videor1"])
        T, h, w = stored["grid_thw"]
        kind, second_per_grid = stored["kind"], stored["second_per_grid"]
        if {name: stored[name] for name in identity} != identity:
            raise ValueError("it was written for other media or settings")
        times = tuple(float(time) for time in stored["times"])
        if patches.dtype != torch.uint8:
            raise ValueError(f"expected uint8 patches, got {patches.dtype}")
        check_grid(patches, (T, h, w))
        if kind not in ("video", "image") or not math.isfinite(second_per_grid):
            raise ValueError(f"expected a video or an image and its seconds per grid, got {kind}, {second_per_grid}")
        if _checksum(patches, {name: value for name, value in stored.items() if name != "crc32"}) != stored["crc32"]:
            raise ValueError("its checksum is wrong")
        decoded = int(stored.get("decoded_bytes", 0))  # which entries of earlier versions do not have
        seconds = time.perf_counter() - started
        return stored["version"], Media(kind, patches, (T, h, w), second_per_grid, seconds, "", times, decoded)
    except (SafetensorError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a whole safetensors file of patches ({type(error).__name__}: {error})") from None


def _checksum(patches: Tensor, header: dict[str, Any]) -> int:
    """Return the checksum of an entry: of its patches and of all that its header says of them."""
    return zlib.crc32(json.dumps(header, sort_keys=True).encode(), zlib.crc32(patches.numpy().data))


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        write_all(file, data)


def _as_json(value: Any) -> Any:
    """Return a value as it reads back from JSON (tuples become lists)."""
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
