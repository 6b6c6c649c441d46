"""Frames of a video as a training run samples them, by seeking, beside decoding everything and decord's get_batch."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from benchmarks.video_files import made_video
from videor1.video import read_frames, sample_indices
from videor1.video.decoders import open_decoder
from videor1_kernels.frames_to_patches import YuvFrames

VIDEOS = "VIDEOR1_BENCH_VIDEOS"  # in the environment: a folder of videos to measure too
EVERYTHING = "PyAV, every frame decoded"
STEP = 8  # of the pixels of a frame, each 8th of each 8th row is compared
Read = Callable[[Path, Sequence[int]], Tensor | YuvFrames]


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        return [_on_card(height) for height in (360, 720, 1080)]
    folder = os.environ.get(VIDEOS)
    real = sorted(Path(folder).iterdir()) if folder else []
    return [
        _case("16 frames of 20 s, a key frame every 2 s", "made 360p", functools.partial(made_video, 360, 20, gop=60)),
        *(_case("sampled frames", path.name, functools.partial(Path, path)) for path in real if _readable(path)),
        _case(
            "16 frames of 10 minutes, a key frame every 2 s",
            "made 1080p, 12 frames a second",
            functools.partial(made_video, 1080, 600, gop=24, rate=12),
            slow=True,
        ),
    ]


def _case(title: str, name: str, make: Callable[[], Path], *, slow: bool = False) -> Case:
    return Case(
        op="decode",
        title=title,
        size={"file": name},
        dtype=torch.float32,
        inputs=lambda device: make(),
        expected=_expected,
        work=lambda path: Work(0.0, path.stat().st_size, ""),
        contenders=(
            Contender(OURS.removesuffix("_kernels"), _step(_ours), does="opened, indexed, sought; all cores"),
            Contender(EVERYTHING, _step(_all), does="all cores; converts the sampled frames only"),
            Contender("decord get_batch", _step(_decord), missing=_no_decord, does="opened, sought; all cores"),
        ),
        slow=slow,
        against=EVERYTHING,
    )


def _on_card(height: int) -> Case:
    """20 seconds with a single key frame: all 600 frames are decoded, to planes on the card."""
    contenders = {
        "NVDEC": lambda path, indices: _planes(path, indices, backend="pyav-nvdec"),
        "CPU, 2 threads": lambda path, indices: _planes(path, indices, backend="pyav", threads=2),
        "CPU, 16 threads": lambda path, indices: _planes(path, indices, backend="pyav", threads=16),
        "the default": lambda path, indices: _planes(path, indices, backend="auto"),
    }
    return Case(
        op="decode",
        title="600 frames decoded for 16, to planes on the card",
        size={"file": f"made {height}p"},
        dtype=torch.float32,
        inputs=lambda device: made_video(height, 20, gop=600),
        expected=_expected,
        work=lambda path: Work(0.0, path.stat().st_size, "", tokens=600),
        contenders=[Contender(name, _step(read)) for name, read in contenders.items()],
        against="CPU, 16 threads",
    )


@functools.cache
def _indices(path: Path) -> tuple[int, ...]:
    with closing(open_decoder(path)) as decoder:
        info = decoder.probe()
    return tuple(sample_indices(info.num_frames, info.fps, max_frames=16, fps=2.0))


def _readable(path: Path) -> bool:
    try:
        read_frames(path)
    except ValueError:
        raise
    except Exception:
        return False
    return True


def _step(read: Read) -> Callable[[Path], Step]:
    def build(path: Path) -> Step:
        indices = _indices(path)

        def step() -> Mapping[str, Tensor]:
            frames = read(path, indices)
            pixels = frames.planes[0] if isinstance(frames, YuvFrames) else frames
            return {"frames": pixels[:, ::STEP, ::STEP].flatten(1).float()}

        return step

    return build


def _ours(path: Path, indices: Sequence[int]) -> Tensor | YuvFrames:
    return read_frames(path).frames


def _planes(path: Path, indices: Sequence[int], *, backend: str, threads: int = 0) -> Tensor | YuvFrames:
    return read_frames(path, backend=backend, device="cuda", planes=True, threads=threads).frames


def _all(path: Path, indices: Sequence[int]) -> Tensor:
    import av
    import numpy as np

    wanted, images = set(indices), []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                images.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
    return torch.from_numpy(np.stack(images))


def _decord(path: Path, indices: Sequence[int]) -> Tensor:
    import decord

    return torch.from_numpy(decord.VideoReader(str(path)).get_batch(list(indices)).asnumpy())


def _no_decord(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("decord") else "decord is not installed"


def _expected(outputs: Mapping[str, Tensor]) -> list[Expected]:
    return [Expected("frames", "frames", outputs["frames"].double(), bound=0.5)]


def test_decode(run_case):
    run_case()
