"""NVDEC is used where it can decode and pays, its surfaces are copied, and the CPU takes over where it fails.

Where NVDEC is forced, its failure is an error.
"""

import contextlib
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import av
import numpy as np
import pytest
import torch
from coded_videos import Make, decode, decoded_numbers
from media import ORIENTATIONS

from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video.decoders import hardware, pyav, stack
from videor1.video.decoders.hardware import SurfaceStack, decide
from videor1.video.decoders.index import frames_to_decode
from videor1.video.decoders.protocol import FramesChangedError, VideoInfo
from videor1.video.decoders.pyav import PyAvDecoder
from videor1.video.decoders.seeking import PacketReader, Planner
from videor1.video.decoders.stack import MixedLayoutError

COUNT = 1000
SECONDS, KEYS = tuple(i / 30 for i in range(COUNT)), tuple(range(0, COUNT, 60))
INFO = VideoInfo(COUNT, 30.0, 1920, 1080, 0, "h264", "yuv420p", SECONDS, KEYS)
SPREAD = [0, 250, 499, 750, 999]
CUDA = {"indices": SPREAD, "device": "cuda", "hardware": "auto"}


@pytest.fixture
def with_a_card() -> Iterator[None]:
    """Pretend that the machine has a CUDA device and a PyAV that can use it."""
    with (
        patch.multiple(torch.cuda, is_available=lambda: True, current_device=lambda: 0),
        patch.multiple(hardware, HWAccel=lambda device_type, is_hw_owned: None, hwdevices_available=lambda: ["cuda"]),
    ):
        yield


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        *(({"codec": codec, "pix_fmt": "yuv420p10le"}, {}, None) for codec in ("hevc", "av1", "vp9")),
        ({}, {}, None),
        ({"width": 640, "height": 360}, {}, "640x360 is below"),
        ({}, {"indices": [0, 60, 120]}, "3 frames to decode are below"),
        ({"pix_fmt": "yuv420p10le"}, {}, "no h264 in yuv420p10le"),
        ({"pix_fmt": "yuv444p"}, {}, "no h264 in yuv444p"),
        ({"codec": "prores", "pix_fmt": "yuv422p10le"}, {}, "NVDEC has no prores"),
        ({"width": 1921}, {}, "1921x1080 would lack"),
        ({"rotation": 30}, {}, "turned by 30 degrees"),
        ({}, {"planes": False}, "RGB frames are asked for"),
        ({}, {"device": "cpu"}, "the frames are wanted on cpu"),
        ({}, {"hardware": "none"}, "not asked for"),
    ],
)
def test_nvdec_for_long_runs_of_large_frames(
    with_a_card: Any, changes: dict[str, Any], options: dict[str, Any], reason: str | None
) -> None:
    choice = decide(replace(INFO, **changes), **CUDA | options)
    assert choice.where == ("cpu" if reason else "nvdec")
    assert (reason or "") in choice.reason


def test_forced_and_impossible(with_a_card: None) -> None:
    assert frames_to_decode(INFO, [0]) == 1
    assert frames_to_decode(INFO, [59, 60]) == 61
    assert frames_to_decode(INFO, [10, 20, 20]) == 21
    assert frames_to_decode(INFO, [130, 599]) == 11 + 60
    assert frames_to_decode(replace(INFO, key_frames=(5, 500)), [3, 510]) == 4 + 11
    forced = CUDA | {"hardware": "cuda"}
    small = replace(INFO, width=64, height=64)
    assert decide(small, **forced | {"indices": [0], "planes": False}).where == "nvdec"
    with pytest.raises(ConfigError, match="no h264 in yuv444p"):
        decide(replace(INFO, pix_fmt="yuv444p"), **forced)
    with pytest.raises(ConfigError, match="the frames are wanted on cpu"):
        decide(INFO, **forced | {"device": "cpu"})
    with pytest.raises(ValueError, match="none, auto or cuda"):
        decide(INFO, **forced | {"hardware": "always"})
    for owner, name, value, reason in (
        (hardware, "hwdevices_available", lambda: ["vaapi"], "does not give out frames on the card"),
        (hardware, "HWAccel", lambda device_type: None, "does not give out frames on the card"),
        (torch.cuda, "is_available", lambda: False, "no CUDA device is available"),
    ):
        with patch.object(owner, name, value):
            assert reason in decide(INFO, **CUDA).reason


def test_what_this_pyav_can_do() -> None:
    expected = {16: False, 18: True}.get(int(av.__version__.partition(".")[0]))  # by its major version
    for found in (hardware._frames_stay_on_card(), bool(stack._ONE_THREAD)):
        assert expected is None or found == expected


class Plane:
    """A plane in GPU memory as PyAV has it: it gives its memory to no stream, and is no tensor."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # CUDA's first

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        if stream is not None:
            raise NotImplementedError("CUDA stream synchronization is not supported")
        return self.memory.__dlpack__()


@dataclass
class Surface:
    """A fake frame in GPU memory with the attributes that ``SurfaceStack`` uses."""

    planes: list[Plane]
    colorspace: int = 1
    color_range: int = 1
    side_data: dict[str, bytes] = field(default_factory=dict)
    format: Any = field(default_factory=lambda: type("Format", (), {"name": "cuda"}))


def surface(height: int = 4, dtype: Any = torch.uint8, value: int = 0, turn: int = -1, **kwargs: Any) -> Surface:
    """Padded, as surfaces are: a line takes up 16 samples, of which 6 are the picture's; ``turn`` of a mirrored one."""
    Y = torch.full((height, 16), value, dtype=dtype)[:, :6]
    UV = torch.full((height // 2, 16), value, dtype=dtype)[:, :6].unflatten(1, (-1, 2))
    if turn >= 0:
        a, b, c, d = (65536 * value for value in ORIENTATIONS[turn, True])
        kwargs["side_data"] = {"DISPLAYMATRIX": struct.pack("9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)}
    return Surface([Plane(Y), Plane(UV)], **kwargs)


def test_surfaces() -> None:
    surfaces = SurfaceStack(Path("a.mp4"), 2, "cpu")
    for slot, value in ((1, 3), (0, 7)):
        given = surface(value=value, turn=90)
        surfaces.put(slot, given)
        for plane in given.planes:
            plane.memory.zero_()  # the surface is used again
    pixels = surfaces.pixels()
    assert [list(plane.shape) for plane in pixels.planes] == [[2, 4, 6], [2, 2, 3, 2]]
    for plane in pixels.planes:
        assert plane.is_contiguous()
        assert [plane[i].unique().tolist() for i in range(2)] == [[7], [3]]
    assert (pixels.matrix, pixels.range, surfaces.orientation) == ("709", "limited", (90, True))
    deep = SurfaceStack(Path("a.mp4"), 1, "cpu")
    deep.put(0, surface(dtype=torch.uint16, colorspace=9, color_range=2))
    assert deep.pixels().planes[0].dtype == torch.uint16
    assert (deep.pixels().matrix, deep.pixels().range) == ("2020", "full")
    # Those that do not fit together.
    surfaces = SurfaceStack(Path("a.mp4"), 3, "cpu")
    surfaces.put(0, surface())
    for other, message in (
        (surface(height=8), "the frame size changes"),
        (surface(turn=0), "the orientation changes"),
        (surface(format=type("Format", (), {"name": "yuv420p"})), "came out in main memory, as yuv420p"),
    ):
        with pytest.raises(SampleError, match=message):
            surfaces.put(1, other)
    for other in (surface(colorspace=9), surface(colorspace=7), surface(dtype=torch.uint16)):
        with pytest.raises(MixedLayoutError):
            surfaces.put(1, other)


class CardStack(SurfaceStack):
    """A ``SurfaceStack`` that accepts frames in main memory in place of frames in GPU memory."""

    def put(self, slot: int, frame: av.VideoFrame) -> None:
        Y, U, V = (np.frombuffer(p, np.uint8).reshape(p.height, -1)[:, : p.width].copy() for p in frame.planes)
        planes = [torch.from_numpy(Y), torch.from_numpy(np.stack((U, V), -1))]
        super().put(
            slot, Surface([*map(Plane, planes)], int(frame.colorspace), int(frame.color_range), frame.side_data)
        )


@pytest.fixture
def with_a_fake_card(with_a_card: None) -> Iterator[None]:
    """Decode on the CPU what is meant for the GPU."""
    with (
        patch.object(pyav, "SurfaceStack", lambda path, count, device: CardStack(path, count, "cpu")),
        patch.multiple(hardware, hwaccel=lambda device: None, MIN_PIXELS=48 * 80, MIN_RUN=3),
    ):
        yield


def test_decoding_on_the_card(made: Make, with_a_fake_card: None) -> None:
    path, indices = made("b-frames"), [5, 100, 101, 300]
    expected, rgb = decode(path, indices, planes=True), decode(path, indices).pixels
    with closing(PyAvDecoder(path, hardware="auto", device="cuda")) as decoder:
        frames = decoder.frames(indices, planes=True)
        assert (frames.backend, frames.seconds, frames.decoded) == ("pyav-nvdec", expected.seconds, expected.decoded)
        Y, UV = frames.pixels.planes
        assert torch.equal(Y, expected.pixels.planes[0])
        assert torch.equal(UV, torch.stack(expected.pixels.planes[1:], -1))
        assert decoder.frames([5], planes=True).backend == "pyav-nvdec", "five frames make a run"
        assert decoder.frames([0], planes=True).backend == "pyav", "one frame does not"
        assert torch.equal(decoder.frames(indices).pixels, rgb), "RGB is made on the CPU"
    frames = decode(path, indices, hardware="cuda", device="cuda")
    assert frames.backend == "pyav-nvdec"
    assert (frames.pixels.int() - rgb.int()).abs().max() <= 3


def lossy(reader: PacketReader, decode_all: Any = PacketReader.decode) -> Iterator[Any]:
    on_card = reader._open_file.__self__._where == "nvdec"  # type: ignore[attr-defined]
    return (frame for number, frame in enumerate(decode_all(reader)) if number != 7 or not on_card)


def unopened(*args: Any, opened: Any = av.open, **options: Any) -> Any:
    if "hwaccel" in options:
        raise av.error.PermissionError(1, "Operation not permitted")
    return opened(*args, **options)


def fails(error: Exception) -> Any:
    return Mock(side_effect=error)


@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        ([(CardStack, "put", fails(SampleError("decode", "no such luck")))], ConfigError, "no such luck"),
        ([(Plane, "__dlpack__", fails(NotImplementedError("no DLPack")))], ConfigError, "no DLPack"),
        ([(hardware, "empty_planes", fails(torch.OutOfMemoryError("no room")))], ConfigError, "no room"),
        (
            [(PacketReader, "decode", lossy), (Planner, "plan", Mock(return_value=None))],
            FramesChangedError,
            "319 frames",
        ),
        ([(av, "open", unopened), (hardware, "hwaccel", Mock())], ConfigError, "Operation not permitted"),
    ],
)
def test_a_card_that_fails(made: Make, with_a_fake_card: None, broken: list[Any], kind: Any, message: str) -> None:
    with contextlib.ExitStack() as breaks:
        for part in broken:
            breaks.enter_context(patch.object(*part))
        frames = decode(made("b-frames"), [5, 300], planes=True, hardware="auto", device="cuda")
        assert (frames.backend, decoded_numbers(frames)) == ("pyav-after-nvdec", [5, 300]), "which is counted apart"
        with pytest.raises(kind, match=f"{message}, not the 320" if broken[0][2] is lossy else f"NVDEC.*{message}"):
            decode(made("b-frames"), [5, 300], planes=True, hardware="cuda", device="cuda")
