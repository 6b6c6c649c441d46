"""decord, torchcodec and PyNvVideoCodec return the requested frames or raise a SampleError; they never return others.

test_decoders.py and test_decord.py try the real ones, where they can be imported.
"""

import functools
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from coded_videos import COUNT, Make, assert_frames_asked_for, decode, decoded_numbers, whole
from media import coded_frames, cut, later, packets_of, refusal, remux, write_video
from video_libraries import install, stored

from videor1.errors import ConfigError
from videor1.video.decoders.decord import DecordDecoder
from videor1.video.decoders.library import LibraryDecoder, one_line, root_cause
from videor1.video.decoders.pynvvideocodec import PyNvVideoCodecDecoder
from videor1.video.decoders.torchcodec import TorchcodecDecoder
from videor1_kernels.frames_to_patches import YuvFrames

ADAPTERS: dict[str, Any] = {d.backend: d for d in (DecordDecoder, TorchcodecDecoder, PyNvVideoCodecDecoder)}
LEVELS = {"torchcodec": 0, "pynvvideocodec": 2}  # swscale rounds otherwise
StandIn = Callable[..., None]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Puts a stand-in with faults into the place of a library."""
    return functools.partial(install, monkeypatch)


@pytest.mark.parametrize("name", ["b-frames", "variable frame rate"])
@pytest.mark.parametrize(
    ("library", "faults"),
    [("pynvvideocodec", {}), *(("torchcodec", faults) for faults in ({}, {"more": 5}, {"more": -5}, {"shift": 1}))],
    ids=str,
)
def test_the_frames_asked_for(made: Make, stand_in: StandIn, library: str, faults: dict[str, int], name: str) -> None:
    stand_in(library, **faults)
    assert_frames_asked_for(ADAPTERS[library](made(name)), made(name), backend=library, levels=LEVELS[library])


@pytest.mark.parametrize("library", LEVELS)
def test_an_edit_list(made: Make, tmp_path: Path, stand_in: StandIn, library: str) -> None:
    path = remux(made("b-frames"), tmp_path / "edit.mp4", later(-0.5))
    unshown = sorted(packet.pts for packet in packets_of(path) if packet.is_discard)
    assert len(unshown) == 5
    stand_in(library, unshown=tuple(unshown))  # torchcodec does not count them
    assert_frames_asked_for(ADAPTERS[library](path), path, backend=library, first=5, levels=LEVELS[library])


def test_turns_and_surfaces(tmp_path: Path, stand_in: StandIn, made: Make) -> None:
    for library, shape, left in (("torchcodec", (80, 48), 0), ("pynvvideocodec", (48, 80), 90)):
        stand_in(library)
        decoder = ADAPTERS[library](write_video(tmp_path / "r.mp4", coded_frames(8), rotation=90))
        frames = decoder.frames([2, 1])
        assert (frames.pixels.shape, frames.rotation) == ((2, *shape, 3), left)
        assert decoder.probe().rotation == 90
    # Surfaces that are used again were copied.
    stand_in("pynvvideocodec")
    decoder = PyNvVideoCodecDecoder(made("b-frames"))
    first, planes = decoder.frames([4, 4, 2]), decoder.frames([9], planes=True)
    luma = planes.pixels.planes[0].clone()
    decoder.frames([7])
    assert decoded_numbers(first) == [4, 4, 2]
    assert torch.equal(planes.pixels.planes[0], luma)
    decoder.close()
    assert decoded_numbers(decoder.frames([8])) == [8]


@pytest.mark.parametrize(
    ("library", "faults", "reason"),
    [
        ("decord", {"count": COUNT + 1}, "counts 321 packets"),
        ("decord", {"count": COUNT - 1}, "counts 319 packets"),
        ("decord", {"step": 0.1001}, "cannot be told apart"),
        ("decord", {"step": float("nan")}, "cannot be told apart"),
        ("decord", {"shape": (48, 80, 4)}, "[2, 48, 80, 4] where [2, 48, 80, 3]"),
        ("decord", {"shape": (80, 48, 3)}, "where [2, 48, 80, 3]"),
        ("torchcodec", {"late": 0.1}, "no frame of its own for frame 1 at 0.100000 s"),
        ("torchcodec", {"late": float("nan")}, "no frame of its own for frame 1"),
        ("torchcodec", {"drop": 1}, "gave 1 frames of the 2 asked for"),
        ("torchcodec", {"more": 2, "by_time": False}, "decoding failed: Invalid pts in seconds"),
        ("torchcodec", {"error": ValueError("no decoder\nat x.cpp")}, "decoding failed: no decoder"),
        ("pynvvideocodec", {"late": 1}, "gives a frame of pts"),
        ("pynvvideocodec", {"repeat_last": 1}, "gives a frame of pts"),
        ("pynvvideocodec", {"unshown": (-2, -1)}, "gives a frame of pts"),
        ("pynvvideocodec", {"drop": 1}, "gave 1 frames of the 2 asked for"),
        ("pynvvideocodec", {"error": ValueError("Elementary streams")}, "decoding failed: Elementary streams"),
    ],
)
def test_a_library_is_checked(made: Make, stand_in: StandIn, library: str, faults: dict[str, Any], reason: str) -> None:
    if library == "decord" and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("decord has no wheel for this machine")
    stand_in(library, **faults)
    error = refusal(decode, made("b-frames"), [1, 319], by=ADAPTERS[library])
    assert error.kind == "decode"
    assert error.message.startswith(f"{library}: ")
    assert reason in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize("matrix", ["601", "709"])
@pytest.mark.parametrize("full", [False, True])
def test_pynvvideocodecs_planes(tmp_path: Path, stand_in: StandIn, matrix: str, full: bool) -> None:
    stand_in("pynvvideocodec")
    options = {"colorspace": {"601": "smpte170m", "709": "bt709"}[matrix]} | ({"color_range": "pc"} if full else {})
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 64, 3), dtype=np.uint8)
    decoder = PyNvVideoCodecDecoder(write_video(tmp_path / "p.mp4", noise, options=options))
    planes, rgb = (decoder.frames([9, 3, 9], planes=planes).pixels for planes in (True, False))
    nv12 = stored(tmp_path / "p.mp4")[[9, 3, 9]]
    assert isinstance(planes, YuvFrames)
    assert (planes.matrix, planes.range) == (matrix, "full" if full else "limited")
    luma, chroma = planes.planes
    assert torch.equal(luma, nv12[:, :32])
    assert torch.equal(chroma.flatten(1), nv12[:, 32:].flatten(1))
    assert torch.equal(rgb, planes.to_rgb(0, 3, torch.float32).round().to(torch.uint8).permute(0, 2, 3, 1))
    for pix_fmt, height in (("yuv444p", 32), ("yuv420p10le", 32), ("yuv420p", 31)):  # what comes as RGB
        path = write_video(tmp_path / f"{pix_fmt}.mkv", coded_frames(9, height, 64), pix_fmt=pix_fmt, codec="ffv1")
        assert torch.equal(decode(path, [5, 1], planes=True, by=PyNvVideoCodecDecoder).pixels, whole(path)[0][[5, 1]])


def throw(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("loads", [False, True], ids=["missing", "broken"])
@pytest.mark.parametrize("library", ADAPTERS)
def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, library: str, loads: bool) -> None:
    package = ADAPTERS[library].module.partition(".")[0]
    error: Exception = ModuleNotFoundError(f"No module named {package!r}", name=package)
    told = f'is not installed; pip install -e ".[{library}]" (in the clone), or use "pyav"'
    if loads:
        error = RuntimeError("Could not load this library: lib.so\n\n=== TROUBLESHOOTING ===")
        error.__cause__ = OSError("libcuda.so.1: cannot open shared object file\nmore")
        told = 'is installed but does not load (libcuda.so.1: cannot open shared object file); use "pyav"'
    missing = Mock(find_spec=lambda name, *_: None if name.partition(".")[0] != package else throw(error))
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    with patch.object(sys, "meta_path", [missing, *sys.meta_path]), pytest.raises(ConfigError) as caught:
        ADAPTERS[library]("a.mp4")
    assert str(caught.value) == f"video.backend: {library} {told}"


def test_what_is_not_the_librarys_fault(made: Make, tmp_path: Path, stand_in: StandIn) -> None:
    class Exhausted(LibraryDecoder):
        backend, module = "exhausted", "math"
        _read = Mock(side_effect=MemoryError)

    decoder = Exhausted(made("b-frames"))
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match=rf"\.mp4: frame {index} of 0\.\.319"):
            decoder.frames([0, index])
    assert decoder.frames([]).pixels.shape == (0, 48, 80, 3)
    with pytest.raises(MemoryError):
        decoder.frames([0])
    assert refusal(Exhausted, cut(made("b-frames"), tmp_path / "cut.mp4", 0.98)).kind == "truncated"
    # The cause in one line.
    text = "[20:22:32] /some/where/reader.cc:292: [20:22:32] /a/b.h:2: Check failed\nStack"
    assert one_line(ValueError(text)) == "Check failed"
    assert one_line(KeyError()) == "KeyError"
    error = RuntimeError("outer")
    error.__cause__ = OSError("inner\nlines")
    assert root_cause(error) == "inner"
    # torchcodec without FFmpeg.
    reason = "libavutil.so.60: cannot open shared object file: No such file or directory"
    error = RuntimeError(f"Could not load libtorchcodec. Likely causes:\n 1. ...\n  OSError: {reason}")
    stand_in("torchcodec", error=error)
    with pytest.raises(ConfigError, match=r"torchcodec does not load .*libavutil") as caught:
        decode(made("b-frames"), [0], by=TorchcodecDecoder)
    assert "\n" not in str(caught.value)
