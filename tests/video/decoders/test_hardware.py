"""NVDEC is used where it can decode and pays, its surfaces are copied, and the CPU takes over where it fails.

Where NVDEC is forced, its failure is an error.
"""

import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import ORIENTATIONS, coded_numbers

from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video.decoders import hardware, stack
from videor1.video.decoders.hardware import SurfaceStack, decide
from videor1.video.decoders.index import frames_to_decode
from videor1.video.decoders.protocol import FramesChangedError, VideoInfo
from videor1.video.decoders.pyav import PyAvDecoder
from videor1.video.decoders.seeking import PacketReader, Planner
from videor1.video.decoders.stack import MixedLayoutError


def info_of(codec="h264", pix_fmt="yuv420p", width=1920, height=1080, count=1000, gop=60):
    return VideoInfo(
        num_frames=count,
        fps=30.0,
        width=width,
        height=height,
        rotation=0,
        codec=codec,
        pix_fmt=pix_fmt,
        seconds=tuple(i / 30 for i in range(count)),
        key_frames=tuple(range(0, count, gop)),
    )


SPREAD = [0, 250, 499, 750, 999]


@pytest.fixture
def with_a_card(monkeypatch):
    """Pretend that the machine has a CUDA device and a PyAV that can use it."""

    class CardAccel:
        def __init__(self, device_type, device=None, allow_software_fallback=True, is_hw_owned=False):
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(hardware, "HWAccel", CardAccel)
    monkeypatch.setattr(hardware, "hwdevices_available", lambda: ["cuda"])
    return monkeypatch


def test_frames_to_decode():
    info = info_of()
    assert frames_to_decode(info, [0]) == 1
    assert frames_to_decode(info, [59, 60]) == 61
    assert frames_to_decode(info, [10, 20, 20]) == 21
    assert frames_to_decode(info, [130, 599]) == 11 + 60
    assert frames_to_decode(replace(info, key_frames=(5, 500)), [3, 510]) == 4 + 11


def test_nvdec_for_long_runs_of_large_frames(with_a_card):
    assert decide(info_of(), SPREAD, "cuda", "auto").where == "nvdec"
    for info, indices, reason in (
        (info_of(width=640, height=360), SPREAD, "640x360 is below"),
        (info_of(), [0, 60, 120], "3 frames to decode are below"),
        (info_of(pix_fmt="yuv420p10le"), SPREAD, "no h264 in yuv420p10le"),
        (info_of(pix_fmt="yuv444p"), SPREAD, "no h264 in yuv444p"),
        (info_of("prores", "yuv422p10le"), SPREAD, "NVDEC has no prores"),
        (info_of(width=1921), SPREAD, "1921x1080 would lack"),
        (replace(info_of(), rotation=30), SPREAD, "turned by 30 degrees"),
    ):
        choice = decide(info, indices, "cuda", "auto")
        assert choice.where == "cpu"
        assert reason in choice.reason
    for codec in ("hevc", "av1", "vp9"):
        assert decide(info_of(codec, "yuv420p10le"), SPREAD, "cuda", "auto").where == "nvdec"
    assert decide(info_of(), SPREAD, "cuda", "auto", planes=False).reason == "RGB frames are asked for"
    assert decide(info_of(), SPREAD, "cpu", "auto").reason == "the frames are wanted on cpu"
    assert decide(info_of(), SPREAD, "cuda", "none").where == "cpu"
    with pytest.raises(ValueError, match="none, auto or cuda"):
        decide(info_of(), SPREAD, "cuda", "always")


def test_what_this_pyav_can_do():
    known = {16: False, 18: True}  # by PyAV's major version
    expected = known.get(int(av.__version__.partition(".")[0]))
    for found in (hardware._frames_stay_on_card(), bool(stack._ONE_THREAD)):
        assert expected is None or found == expected


def test_forced_nvdec(with_a_card):
    assert decide(info_of(width=64, height=64), [0], "cuda", "cuda", planes=False).where == "nvdec"
    with pytest.raises(ConfigError, match="no h264 in yuv444p"):
        decide(info_of(pix_fmt="yuv444p"), SPREAD, "cuda", "cuda")
    with pytest.raises(ConfigError, match="the frames are wanted on cpu"):
        decide(info_of(), SPREAD, "cpu", "cuda")


def test_no_nvdec_without_a_card_or_with_an_old_pyav(with_a_card):
    with_a_card.setattr(hardware, "hwdevices_available", lambda: ["vaapi"])
    assert "does not give out frames on the card" in decide(info_of(), SPREAD, "cuda", "auto").reason

    class OldAccel:
        def __init__(self, device_type, device=None, allow_software_fallback=False):
            pass

    with_a_card.setattr(hardware, "hwdevices_available", lambda: ["cuda"])
    with_a_card.setattr(hardware, "HWAccel", OldAccel)
    assert "does not give out frames on the card" in decide(info_of(), SPREAD, "cuda", "auto").reason
    with_a_card.setattr(torch.cuda, "is_available", lambda: False)
    assert decide(info_of(), SPREAD, "cuda", "auto").reason == "no CUDA device is available"


@dataclass
class Surface:
    """A fake frame in GPU memory with the attributes that ``SurfaceStack`` uses."""

    planes: list[torch.Tensor]
    colorspace: int = 1
    color_range: int = 1
    side_data: dict = field(default_factory=dict)
    format: object = field(default_factory=lambda: type("Format", (), {"name": "cuda"}))


def surface(height=4, width=6, dtype=torch.uint8, value=0, **kwargs):
    pitch = 16  # samples a line takes up: surfaces are padded
    Y = torch.full((height, pitch), value, dtype=dtype)[:, :width]
    UV = torch.full((height // 2, pitch), value, dtype=dtype)[:, :width].unflatten(1, (-1, 2))
    return Surface([Y, UV], **kwargs)


def matrix(rotation, mirrored=False):
    a, b, c, d = (65536 * value for value in ORIENTATIONS[rotation, mirrored])
    return {"DISPLAYMATRIX": struct.pack("9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)}


def test_surfaces_are_copied():
    stack = SurfaceStack(Path("a.mp4"), 2, "cpu")
    first, second = surface(value=3, side_data=matrix(90, True)), surface(value=7, side_data=matrix(90, True))
    stack.put(1, first)
    stack.put(0, second)
    for plane in first.planes + second.planes:
        plane.zero_()  # the surface is used again
    pixels = stack.pixels()
    assert [list(plane.shape) for plane in pixels.planes] == [[2, 4, 6], [2, 2, 3, 2]]
    assert all(plane.is_contiguous() for plane in pixels.planes)
    assert all(
        torch.equal(plane[i], torch.full_like(plane[i], v)) for plane in pixels.planes for i, v in ((0, 7), (1, 3))
    )
    assert (pixels.matrix, pixels.range, stack.orientation) == ("709", "limited", (90, True))
    stack = SurfaceStack(Path("a.mp4"), 1, "cpu")
    stack.put(0, surface(dtype=torch.uint16, colorspace=9, color_range=2))
    assert stack.pixels().planes[0].dtype == torch.uint16
    assert (stack.pixels().matrix, stack.pixels().range) == ("2020", "full")


def test_surfaces_that_do_not_fit_together():
    stack = SurfaceStack(Path("a.mp4"), 3, "cpu")
    stack.put(0, surface())
    with pytest.raises(SampleError, match="the frame size changes"):
        stack.put(1, surface(height=8))
    with pytest.raises(SampleError, match="the orientation changes"):
        stack.put(1, surface(side_data=matrix(0, True)))
    for other in (surface(colorspace=9), surface(colorspace=7), surface(dtype=torch.uint16)):
        with pytest.raises(MixedLayoutError):
            stack.put(1, other)
    with pytest.raises(SampleError, match="came out in main memory, as yuv420p"):
        stack.put(1, surface(format=type("Format", (), {"name": "yuv420p"})))


class CardStack(SurfaceStack):
    """A ``SurfaceStack`` that accepts frames in main memory in place of frames in GPU memory."""

    def __init__(self, path, count, device):
        super().__init__(path, count, "cpu")

    def put(self, slot, frame):
        Y, U, V = (np.frombuffer(p, np.uint8).reshape(p.height, -1)[:, : p.width].copy() for p in frame.planes)
        planes = [torch.from_numpy(Y), torch.from_numpy(np.stack((U, V), -1))]
        super().put(slot, Surface(planes, int(frame.colorspace), int(frame.color_range), frame.side_data))


@pytest.fixture
def with_a_fake_card(with_a_card):
    """Decode on the CPU what is meant for the GPU."""
    with_a_card.setattr("videor1.video.decoders.pyav.SurfaceStack", CardStack)
    with_a_card.setattr(hardware, "hwaccel", lambda device: None)
    with_a_card.setattr(hardware, "MIN_PIXELS", 48 * 80)
    with_a_card.setattr(hardware, "MIN_RUN", 3)
    return with_a_card


def test_decoding_on_the_card(made, with_a_fake_card):
    path, indices = made("b-frames"), [5, 100, 101, 300]
    on_cpu = PyAvDecoder(path)
    expected = on_cpu.frames(indices, planes=True)
    rgb = on_cpu.frames(indices).pixels
    on_cpu.close()
    decoder = PyAvDecoder(path, hardware="auto", device="cuda")
    frames = decoder.frames(indices, planes=True)
    assert (frames.backend, frames.seconds, frames.decoded) == ("pyav-nvdec", expected.seconds, expected.decoded)
    Y, UV = frames.pixels.planes
    assert torch.equal(Y, expected.pixels.planes[0])
    assert torch.equal(UV, torch.stack(expected.pixels.planes[1:], -1))
    assert decoder.frames([5], planes=True).backend == "pyav-nvdec", "five frames make a run"
    assert decoder.frames([0], planes=True).backend == "pyav", "one frame does not"
    assert torch.equal(decoder.frames(indices).pixels, rgb), "RGB is made on the CPU"
    decoder.close()
    decoder = PyAvDecoder(path, hardware="cuda", device="cuda")
    frames = decoder.frames(indices)
    assert frames.backend == "pyav-nvdec"
    assert (frames.pixels.int() - rgb.int()).abs().max() <= 3
    decoder.close()


def test_a_card_that_fails(made, with_a_fake_card):
    def refuse(stack, slot, frame):
        raise SampleError("decode", "no such luck", stack._path)

    with_a_fake_card.setattr(CardStack, "put", refuse)
    decoder = PyAvDecoder(made("b-frames"), hardware="auto", device="cuda")
    frames = decoder.frames([5, 300], planes=True)
    assert frames.backend == "pyav"
    assert coded_numbers(frames.pixels.planes[0]) == [5, 300]
    decoder.close()
    decoder = PyAvDecoder(made("b-frames"), hardware="cuda", device="cuda")
    with pytest.raises(ConfigError, match=r"NVDEC cannot decode .*: no such luck"):
        decoder.frames([5, 300], planes=True)
    decoder.close()


def test_a_card_that_loses_frames(made, with_a_fake_card):
    def lossy(*args, **kwargs):
        return (frame for number, frame in enumerate(decode(*args, **kwargs)) if number != 7 or decoder._where == "cpu")

    decode = PacketReader.decode
    with_a_fake_card.setattr(PacketReader, "decode", lossy)
    with_a_fake_card.setattr(Planner, "plan", lambda planner, wanted: None)
    decoder = PyAvDecoder(made("b-frames"), hardware="auto", device="cuda")
    frames = decoder.frames([5, 300], planes=True)
    assert (frames.backend, coded_numbers(frames.pixels.planes[0])) == ("pyav", [5, 300])
    decoder.close()
    decoder = PyAvDecoder(made("b-frames"), hardware="cuda", device="cuda")
    with pytest.raises(FramesChangedError, match="319 frames, not the 320"):
        decoder.frames([5, 300], planes=True)
    decoder.close()


def test_a_card_that_cannot_be_opened(made, with_a_fake_card):
    def refuse(*args, **kwargs):
        if kwargs.get("hwaccel") is not None:
            raise av.error.PermissionError(1, "Operation not permitted")
        return opened(*args, **kwargs)

    opened = av.open
    with_a_fake_card.setattr(av, "open", refuse)
    with_a_fake_card.setattr(hardware, "hwaccel", lambda device: object())
    decoder = PyAvDecoder(made("b-frames"), hardware="auto", device="cuda")
    assert decoder.frames([5, 300], planes=True).backend == "pyav"
    decoder.close()
    decoder = PyAvDecoder(made("b-frames"), hardware="cuda", device="cuda")
    with pytest.raises(ConfigError, match="Operation not permitted"):
        decoder.frames([5, 300])
    decoder.close()
