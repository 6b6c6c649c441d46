"""Damaged copies of small videos: everything about one follows from its seed."""

import ctypes
import gc
import os
import random
import resource
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from media import write_video

from videor1.types import SampleError
from videor1.video import read_frames
from videor1_kernels.frames_to_patches import PATCH_COLUMNS, frames_to_patches

FRAMES = 24
_GOP = {"g": "8", "bf": "2"}
FORMATS = {  # name of the file -> what write_video is told
    "a.mp4": {"options": _GOP},
    "a.mkv": {"options": _GOP},
    "a.webm": {"codec": "libvpx"},
    "a.avi": {"codec": "mpeg4"},
    "a.ts": {"options": _GOP},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "a.264": {"options": _GOP, "container": "h264"},
}
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def write_originals(folder: Path) -> list[Path]:
    """One small video of each format: a moving gradient with some noise, so that every byte of it says something."""
    noise = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :48]
    frames = np.stack([rows * 3 + columns * 4 + 9 * i for i in range(FRAMES)])[..., None] + np.array([0, 40, 80])
    frames = (frames + noise.integers(0, 24, frames.shape)).clip(0, 255).astype(np.uint8)
    return [write_video(folder / name, frames, **settings) for name, settings in FORMATS.items()]


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 4, 32))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def damage_header(data: bytearray, rng: random.Random) -> None:
    """Random bytes among the first or the last few hundred: where containers keep their tables."""
    length = min(len(data), rng.choice((64, 256, 1024)))
    start = rng.choice((0, len(data) - length))
    for _ in range(rng.choice((1, 4, 16))):
        data[start + rng.randrange(length)] = rng.randrange(256)


def extreme_number(data: bytearray, rng: random.Random) -> None:
    """Sizes, counts, times and dimensions of 1 to 8 bytes, at their extremes."""
    for _ in range(rng.choice((1, 2, 4))):
        value = struct.pack(rng.choice((">I", "<I")), rng.choice(EXTREMES))[: rng.choice((1, 2, 4))]
        value *= rng.choice((1, 2))
        start = rng.randrange(max(1, rng.choice((256, len(data))) - len(value)))
        data[start : start + len(value)] = value


def cut(data: bytearray, rng: random.Random, *, start: bool) -> None:
    place = rng.randrange(len(data))
    del data[slice(place) if start else slice(place, None)]


def change_block(data: bytearray, rng: random.Random, kind: str) -> None:
    start, length = rng.randrange(len(data)), rng.choice((4, 64, 1024) if kind == "zero" else (1, 16, 512))
    if kind == "remove":
        del data[start : start + length]
    elif kind == "zero":
        data[start : start + length] = bytes(min(length, len(data) - start))
    else:
        data[start:start] = (
            rng.randbytes(length) if kind == "noise" else data[start : start + length] * rng.choice((1, 8))
        )


MUTATIONS: dict[str, Callable[[bytearray, random.Random], None]] = {
    "bits flipped": flip_bits,
    "header damaged": damage_header,
    "extreme number": extreme_number,
    "end cut": partial(cut, start=False),
    "start cut": partial(cut, start=True),
    "block removed": partial(change_block, kind="remove"),
    "block repeated": partial(change_block, kind="repeat"),
    "block zeroed": partial(change_block, kind="zero"),
    "noise inserted": partial(change_block, kind="noise"),
}


@dataclass(frozen=True)
class Mutation:
    """One damaged file and how it is to be read."""

    seed: int
    path: Path
    planes: bool

    def __str__(self) -> str:
        return f"seed {self.seed} ({choices(self.seed)[1]}, planes={self.planes}): {self.path}"


@dataclass(frozen=True)
class Outcome:
    """What reading a file gave."""

    kind: str  # "frames" or SampleError.kind
    message: str
    megabytes: float = field(default_factory=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def choices(seed: int) -> tuple[int, str]:
    """(place of the format, mutation): the seeds go through all formats, then through the mutations."""
    return seed % len(FORMATS), list(MUTATIONS)[seed // len(FORMATS) % len(MUTATIONS)]


def mutate(seed: int, originals: list[Path], folder: Path) -> Mutation:
    """Write the damaged file of this seed."""
    form, mutation = choices(seed)
    data = bytearray(originals[form].read_bytes())
    MUTATIONS[mutation](data, random.Random(seed))
    path = folder / f"{seed}{originals[form].suffix}"
    path.write_bytes(data)
    return Mutation(seed, path, planes=seed % 2 == 1)


def read(item: Mutation) -> Outcome:
    """Read a file to patches, as a decode worker does; anything but frames or a ``SampleError`` escapes."""
    try:
        clip = read_frames(item.path, max_frames=8, planes=item.planes, threads=1, min_pixels=784, max_pixels=12544)
    except SampleError as error:
        if error.path != str(item.path):
            raise RuntimeError(f"an error of another file: {error}") from error
        return Outcome(error.kind, error.message)
    count = len(clip.frames)
    patches = frames_to_patches(clip.frames, size=clip.size, rotation=clip.rotation, dtype=torch.uint8)
    assert patches.shape == (count // 2 * clip.size[0] // 14 * clip.size[1] // 14, PATCH_COLUMNS), patches.shape
    assert count in (2, 4, 6, 8)
    assert len(clip.timestamps) == count
    assert list(clip.timestamps) == sorted(clip.timestamps), clip.timestamps
    assert 0 < clip.fps < float("inf")
    assert clip.total_frames >= count
    return Outcome("frames", "")


def read_many(items: tuple[Mutation, ...]) -> list[tuple[float, int]]:
    """Read files one after the other in this process: (resident megabytes, open files) after every 100."""
    measured = []
    for number, item in enumerate(items, start=1):
        read(item)
        if number % 100 == 0:
            measured.append((resident_megabytes(), len(os.listdir("/proc/self/fd"))))
    return measured


def resident_megabytes() -> float:
    """After collecting garbage, and after the allocator gave freed pages back: what is left is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def summary(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.kind for outcome in outcomes)
    return ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
