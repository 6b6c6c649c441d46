"""decord, torchcodec and PyNvVideoCodec return the requested frames or raise a SampleError; they never return others.

The real decord is tested. The other libraries need CUDA, so their adapters are tested against fakes with the signatures
of torchcodec 0.17 and PyNvVideoCodec 2.2, which decode with PyAV; the real libraries are tested where they can be
imported.
"""

from __future__ import annotations

import enum
import importlib
import platform
import random
import sys
import types
import warnings
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from media import frame_numbers, numbered_frames, real_video, write_video

from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video import read_frames
from videor1.video.decoders.decord import DecordDecoder
from videor1.video.decoders.library import one_line, root_cause
from videor1.video.decoders.pynvvideocodec import PyNvVideoCodecDecoder
from videor1.video.decoders.torchcodec import TorchcodecDecoder
from videor1_kernels.frames_to_patches import YuvFrames

with_decord = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="decord has no wheel for this machine"
)
COUNT, HEIGHT, WIDTH = 50, 32, 64  # decord cannot read narrower frames
B_FRAMES = {"g": "12", "bf": "3", "b-adapt": "0", "sc_threshold": "0"}
OPEN_GOP = B_FRAMES | {"x264-params": "open-gop=1"}
FILES = {
    "gop1.mp4": {"options": {"g": "1"}},
    "gop12.mp4": {"options": B_FRAMES | {"bf": "0"}},
    "gop250.mp4": {"options": B_FRAMES | {"g": "250"}},
    "b.mp4": {"options": B_FRAMES},
    "b.mkv": {"options": B_FRAMES},
    "b.flv": {"options": B_FRAMES},
    "open.mp4": {"options": OPEN_GOP},
    "open.mkv": {"options": OPEN_GOP},
    "refresh.mp4": {"options": B_FRAMES | {"bf": "0", "x264-params": "intra-refresh=1"}},
    "refresh.mkv": {"options": B_FRAMES | {"bf": "0", "x264-params": "intra-refresh=1"}},
    "hevc.mp4": {"codec": "libx265", "options": {"g": "12", "x265-params": "log-level=none"}},
    "closed.mp4": {"codec": "libx265", "options": {"g": "12", "x265-params": "log-level=none:open-gop=0:keyint=12"}},
    "radl.mp4": {
        "codec": "libx265",
        "options": {"g": "12", "x265-params": "log-level=none:open-gop=0:keyint=12:bframes=4:b-adapt=0:radl=3"},
    },
    "vp8.webm": {"codec": "libvpx", "options": {"g": "12"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "4M"}},
    "vfr.mp4": {"options": B_FRAMES, "pts_ms": [20 * i + 7 * i * i for i in range(COUNT)]},
    "vfr.mkv": {"options": B_FRAMES, "pts_ms": [20 * i + 7 * i * i for i in range(COUNT)]},
}


def made(tmp_path, name):
    return write_video(tmp_path / name, numbered_frames(COUNT, HEIGHT, WIDTH), **FILES[name])


def with_edit_list(tmp_path, hidden=5):
    """Write b.mp4 shifted to begin ``hidden`` frames before time zero; these frames are stored but not shown."""
    source, target = made(tmp_path, "b.mp4"), tmp_path / "edit.mp4"
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        stream = before.streams.video[0]
        copy = after.add_stream_from_template(stream)
        for packet in before.demux(stream):
            if packet.dts is not None:
                shift = int(Fraction(hidden, 10) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                after.mux(packet)
    return target


def all_frames(path, pixel_format="rgb24"):
    """Decode every frame of a file with PyAV; return (upright pixels, pts, times in seconds) in presentation order."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        pixels = [np.rot90(frame.to_ndarray(format=pixel_format), frame.rotation // 90) for frame in frames]
        return torch.from_numpy(np.stack(pixels)), [frame.pts for frame in frames], [frame.time for frame in frames]


def refused(call, *args, **kwargs):
    """Call a function that must raise a SampleError, and return the error's message."""
    with pytest.raises(SampleError) as caught:
        call(*args, **kwargs)
    assert caught.value.kind == "decode"
    assert caught.value.path is not None
    assert "\n" not in caught.value.message
    return caught.value.message


def check_frames(decoder, path, first=0):
    """Request frames in any order, with duplicates, one and many; their numbers and times must be the file's.

    The pixels are yielded with the expected ones, for the caller to compare.
    """
    pixels, _, seconds = all_frames(path)
    count = decoder.probe().num_frames
    assert count == len(pixels)
    rng = random.Random(1)
    some = [[rng.randrange(count) for _ in range(9)] for _ in range(9)]
    for indices in ([count - 1], [0], list(range(count)), [3, 1, 3], *some):
        frames = decoder.frames(indices)
        assert frame_numbers(frames.pixels) == [first + i for i in indices]
        assert frames.pixels.dtype == torch.uint8
        assert frames.seconds == pytest.approx([seconds[i] for i in indices], abs=1e-9)
        assert frames.rotation == 0
        assert len(set(indices)) <= frames.decoded <= count
        yield frames, pixels[indices]


# ---- decord


@with_decord
@pytest.mark.parametrize("name", FILES)
def test_decord_gives_the_frames_asked_for(tmp_path, name):
    path = made(tmp_path, name)
    for frames, expected in check_frames(DecordDecoder(path), path):
        assert frames.backend == "decord"
        assert torch.equal(frames.pixels, expected)


@with_decord
def test_decord_decodes_few_frames_of_closed_gops_only(tmp_path):
    decoded = {
        name: DecordDecoder(made(tmp_path, name)).frames([47, 30]).decoded for name in FILES if "vfr" not in name
    }
    in_order = {"b.flv", "open.mp4", "open.mkv", "refresh.mp4", "refresh.mkv", "hevc.mp4", "radl.mp4", "mpeg4.mp4"}
    assert {name for name, count in decoded.items() if count == 48} == in_order | {"gop250.mp4"}
    assert {decoded[name] for name in ("b.mp4", "b.mkv", "gop12.mp4")} == {12 + 7}
    assert DecordDecoder(made(tmp_path, "gop12.mp4")).frames([14, 20, 15]).decoded == 9


@with_decord
def test_decord_maps_an_edit_list(tmp_path):
    path = with_edit_list(tmp_path)
    decoder = DecordDecoder(path)
    assert decoder.probe().num_frames == COUNT - 5
    for frames, expected in check_frames(decoder, path, first=5):
        assert torch.equal(frames.pixels, expected)


@with_decord
@pytest.mark.parametrize(("name", "levels"), [("pancake.mkv", 0), ("hevc.mp4", 0), ("rotated_90.mov", 3)])
def test_decord_equals_pyav_on_real_videos(name, levels):
    path = real_video(name)
    expected, _, seconds = all_frames(path)
    decoder = DecordDecoder(path)
    count = decoder.probe().num_frames
    indices = [count - 1, 0, count // 2, count // 2, count // 3]
    frames = decoder.frames(indices)
    # decord turns a picture before it converts its colours, PyAV's is turned afterwards.
    assert (frames.pixels.int() - expected[indices].int()).abs().max() <= levels
    assert frames.rotation == 0
    assert frames.seconds == pytest.approx([seconds[i] for i in indices])


@with_decord
@pytest.mark.parametrize("rotation", [None, 90])
def test_a_clip_by_decord_is_the_one_by_pyav(tmp_path, rotation):
    path = write_video(tmp_path / "r.mp4", numbered_frames(COUNT, HEIGHT, WIDTH), rotation=rotation)
    clips = [read_frames(path, backend=backend) for backend in ("decord", "pyav")]
    assert [clip.backend for clip in clips] == ["decord", "pyav"]
    assert torch.equal(clips[0].frames, clips[1].frames)
    assert clips[0].timestamps == clips[1].timestamps
    assert (clips[0].size, clips[0].rotation) == (clips[1].size, clips[1].rotation)


@with_decord
@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("a.avi", {"codec": "mpeg4", "options": {"bf": "2"}}, "frames cannot be told apart"),
        ("a.264", {"options": B_FRAMES, "container": "h264"}, "do not say in which order"),
        ("b.ts", {"options": B_FRAMES}, "recovered from nearest frames"),
        ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}, "Failed to measure"),
    ],
)
def test_decord_refuses_what_it_cannot_tell_apart(tmp_path, name, settings, reason):
    decoder = DecordDecoder(write_video(tmp_path / name, numbered_frames(COUNT, HEIGHT, WIDTH), **settings))
    message = refused(decoder.frames, [3, 20, 45])
    assert message.startswith("decord: ")
    assert reason in message


@with_decord
def test_decord_does_not_believe_that_every_packet_is_a_key_frame(tmp_path):
    """decord assumes this where an MP4 file has no table of key frames."""
    settings = {"options": B_FRAMES | {"bf": "0", "g": "48"}}
    path = write_video(tmp_path / "a.mp4", numbered_frames(COUNT, HEIGHT, WIDTH), **settings)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free", 1))
    for frames, expected in check_frames(DecordDecoder(path), path):
        assert torch.equal(frames.pixels, expected)


@with_decord
def test_decord_on_narrow_frames(tmp_path):
    narrow = write_video(tmp_path / "narrow.mp4", numbered_frames(8, 32, 48))
    assert "size must exactly match" in refused(DecordDecoder(narrow).frames, [1, 2])


@with_decord
@pytest.mark.parametrize(("name", "reason"), [("corrupted.mp4", "Error sending packet"), ("av1.mkv", "video stream")])
def test_decord_is_quiet_about_bad_files(capfd, name, reason):
    decoder = DecordDecoder(real_video(name))
    message = refused(decoder.frames, range(decoder.probe().num_frames))
    assert reason in message
    assert ".cc" not in message
    assert capfd.readouterr().err == ""


@with_decord
def test_decord_leaves_the_bridge_as_it_was(tmp_path):
    decord = pytest.importorskip("decord")
    path = made(tmp_path, "b.mp4")
    DecordDecoder(path).frames([1])
    assert isinstance(decord.VideoReader(str(path))[0], decord.nd.NDArray)


class FakeReader:
    """A fake ``decord.VideoReader`` of ``made("b.mp4")``, whose subclasses each have one fault."""

    count, step, shape, left = COUNT, 0.1, (HEIGHT, WIDTH, 3), COUNT

    def __init__(self, uri, ctx=None, width=-1, height=-1, num_threads=0, fault_tol=-1):
        assert 0 < fault_tol * COUNT < 1
        assert num_threads == 1

    def __len__(self):
        return self.count

    def get_frame_timestamp(self, indices):
        return np.array([[self.step * i, self.step * (i + 1)] for i in indices], dtype=np.float32)

    def get_batch(self, indices):
        return torch.zeros(len(indices), *self.shape, dtype=torch.uint8)

    def get_key_indices(self):
        return [0, 12, 24, 36, 48]

    def next(self):
        self.left -= 1
        if self.left < 0:
            raise StopIteration
        return torch.zeros(self.shape, dtype=torch.uint8)


@with_decord
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"count": COUNT + 1}, "counts 51 packets"),
        ({"count": COUNT - 1}, "counts 49 packets"),
        ({"step": 0.1001}, "cannot be told apart"),
        ({"step": float("nan")}, "cannot be told apart"),
        ({"shape": (HEIGHT, WIDTH, 4)}, "[2, 32, 64, 4] where [2, 32, 64, 3]"),
        ({"shape": (WIDTH, HEIGHT, 3)}, "where [2, 32, 64, 3]"),
    ],
)
def test_decord_is_checked(tmp_path, monkeypatch, wrong, reason):
    decoder = DecordDecoder(made(tmp_path, "b.mp4"))
    monkeypatch.setattr(decoder.library, "VideoReader", type("Wrong", (FakeReader,), wrong))
    assert reason in refused(decoder.frames, [1, 2])


@with_decord
def test_decord_that_ends_early_or_shows_more(tmp_path, monkeypatch):
    decoder = DecordDecoder(made(tmp_path, "open.mp4"))
    monkeypatch.setattr(decoder.library, "VideoReader", type("Short", (FakeReader,), {"left": 20}))
    assert "ended after 20 of 50 frames" in refused(decoder.frames, [1, 30])
    decoder = DecordDecoder(with_edit_list(tmp_path))
    monkeypatch.setattr(decoder.library, "VideoReader", FakeReader)
    assert "shows more than the 45 frames" in refused(decoder.frames, [1])
    monkeypatch.setattr(decoder.library, "VideoReader", type("Exact", (FakeReader,), {"left": 45}))
    assert len(decoder.frames([1]).pixels) == 1


# ---- what all adapters share


def fake(monkeypatch, name, **members):
    """Put a fake module with these members, and the packages above it, into sys.modules."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in members.items():
        setattr(module, key, value)
    return module


@pytest.mark.parametrize(
    ("decoder", "module", "extra"),
    [
        (DecordDecoder, "decord", "decord"),
        (TorchcodecDecoder, "torchcodec", "torchcodec"),
        (PyNvVideoCodecDecoder, "PyNvVideoCodec", "pynvvideocodec"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, decoder, module, extra):
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoSuchPackage(module), *sys.meta_path])
    with pytest.raises(ConfigError) as caught:
        decoder("a.mp4")
    message = str(caught.value)
    command = f'pip install -e ".[{extra}]" (in the clone)'
    assert message == f'video.backend: {extra} is not installed; {command}, or use "pyav"'


class NoSuchPackage:
    """An import finder that hides a package even where it is installed."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.name)


@pytest.mark.parametrize(
    ("decoder", "module"), [(TorchcodecDecoder, "torchcodec"), (PyNvVideoCodecDecoder, "PyNvVideoCodec")]
)
def test_a_package_that_does_not_load_says_why(tmp_path, monkeypatch, decoder, module):
    package = tmp_path / module
    package.mkdir()
    (package / "__init__.py").write_text(
        "try:\n"
        "    raise OSError('libcuda.so.1: cannot open shared object file\\nmore')\n"
        "except OSError as error:\n"
        "    raise RuntimeError('Could not load this library: lib.so\\n\\n=== TROUBLESHOOTING ===') from error\n"
    )
    (package / "decoders.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError) as caught:
        decoder("a.mp4")
    assert "does not load (libcuda.so.1: cannot open shared object file)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cause_in_one_line():
    assert one_line(ValueError("[20:22:32] /some/where/reader.cc:292: [20:22:32] /a/b.h:2: Check failed\nStack")) == (
        "Check failed"
    )
    assert one_line(KeyError()) == "KeyError"
    error = RuntimeError("outer")
    error.__cause__ = OSError("inner\nlines")
    assert root_cause(error) == "inner"


@with_decord
def test_an_index_outside_of_the_file(tmp_path):
    decoder = DecordDecoder(made(tmp_path, "b.mp4"))
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match=rf"b\.mp4: frame {index} of 0\.\.49"):
            decoder.frames([0, index])
    assert decoder.frames([]).pixels.shape == (0, HEIGHT, WIDTH, 3)


@with_decord
def test_a_bad_file_keeps_its_kind(tmp_path):
    path = made(tmp_path, "b.mp4")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SampleError) as caught:
        DecordDecoder(path)
    assert caught.value.kind == "truncated"


@with_decord
def test_running_out_of_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    decoder = DecordDecoder(made(tmp_path, "b.mp4"))

    def exhausted(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(decoder.library, "VideoReader", exhausted)
    with pytest.raises(MemoryError):
        decoder.frames([0])


# ---- torchcodec


@dataclass
class FrameBatch:
    data: torch.Tensor
    pts_seconds: torch.Tensor
    duration_seconds: torch.Tensor


def torchcodec(monkeypatch, *, more=0, shift=0, drop=0, late=0.0, by_time=True, error=None):
    """Fake ``torchcodec.decoders`` with a VideoDecoder that can have faults.

    It counts ``more`` frames, and may number or time them differently, leave some out or raise an error.
    """

    class VideoDecoder:
        def __init__(
            self,
            source,
            *,
            stream_index=None,
            dimension_order="NCHW",
            num_ffmpeg_threads=1,
            device=None,
            seek_mode="exact",
            transforms=None,
            output_dtype=torch.uint8,
            custom_frame_mappings=None,
        ):
            if error is not None:
                raise error
            assert (stream_index, dimension_order, seek_mode, device) == (0, "NHWC", "exact", "cpu")
            self._pixels, _, seconds = all_frames(source)
            self._seconds = torch.tensor(seconds, dtype=torch.float64)

        def __len__(self):
            return len(self._pixels) + more

        def get_frames_at(self, indices):
            assert indices == sorted(set(indices))
            if indices[-1] >= len(self):
                raise IndexError(f"Invalid frame index={indices[-1]}")
            return self._batch([(index - shift) % len(self._pixels) for index in indices][drop:])

        def get_frames_played_at(self, seconds):
            if not by_time:
                raise RuntimeError("Invalid pts in seconds\n(more)")
            at = torch.searchsorted(self._seconds, torch.tensor(seconds, dtype=torch.float64), right=True) - 1
            return self._batch(at.tolist())

        def _batch(self, numbers):
            times = self._seconds[numbers] + late
            return FrameBatch(self._pixels[numbers], times, torch.zeros(len(numbers)))

    fake(monkeypatch, "torchcodec.decoders", VideoDecoder=VideoDecoder)


@pytest.mark.parametrize("settings", [{}, {"more": 5}, {"more": -5}, {"shift": 1}], ids=str)
@pytest.mark.parametrize("name", ["b.mp4", "vfr.mkv"])
def test_torchcodec_gives_the_frames_asked_for(tmp_path, monkeypatch, name, settings):
    torchcodec(monkeypatch, **settings)
    path = made(tmp_path, name)
    for frames, expected in check_frames(TorchcodecDecoder(path), path):
        assert frames.backend == "torchcodec"
        assert torch.equal(frames.pixels, expected)


def test_torchcodec_maps_an_edit_list(tmp_path, monkeypatch):
    torchcodec(monkeypatch)
    path = with_edit_list(tmp_path)
    for frames, expected in check_frames(TorchcodecDecoder(path), path, first=5):
        assert torch.equal(frames.pixels, expected)


def test_torchcodec_rotates(tmp_path, monkeypatch):
    torchcodec(monkeypatch)
    path = write_video(tmp_path / "r.mp4", numbered_frames(8, HEIGHT, WIDTH), rotation=90)
    frames = TorchcodecDecoder(path).frames([2, 1])
    assert frames.pixels.shape == (2, WIDTH, HEIGHT, 3)
    assert frames.rotation == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"late": 0.1}, "no frame of its own for frame 1 at 0.100000 s"),
        ({"late": float("nan")}, "no frame of its own for frame 1"),
        ({"drop": 1}, "gave 1 frames of the 2 asked for"),
        ({"more": 2, "by_time": False}, "decoding failed: Invalid pts in seconds"),
        ({"error": ValueError("no decoder for this\nat x.cpp")}, "decoding failed: no decoder for this"),
    ],
)
def test_torchcodec_is_checked(tmp_path, monkeypatch, settings, reason):
    torchcodec(monkeypatch, **settings)
    decoder = TorchcodecDecoder(made(tmp_path, "b.mp4"))
    message = refused(decoder.frames, [1, 2])
    assert message.startswith("torchcodec: ")
    assert reason in message


def test_torchcodec_without_ffmpeg(tmp_path, monkeypatch):
    reason = "libavutil.so.60: cannot open shared object file: No such file or directory"
    error = RuntimeError(f"Could not load libtorchcodec. Likely causes:\n 1. ...\n  OSError: {reason}")
    torchcodec(monkeypatch, error=error)
    decoder = TorchcodecDecoder(made(tmp_path, "b.mp4"))
    with pytest.raises(ConfigError, match=r"torchcodec does not load .*libavutil") as caught:
        decoder.frames([0])
    assert "\n" not in str(caught.value)


# ---- PyNvVideoCodec


class Surface:
    """A fake decoded frame that is read through DLPack; the library reuses its memory at the next call."""

    def __init__(self, pixels, pts):
        self._pixels, self._pts = pixels.clone(), pts

    def getPTS(self):  # noqa: N802
        return self._pts

    def __dlpack_device__(self):
        return self._pixels.__dlpack_device__()

    def __dlpack__(self, stream=None):
        return self._pixels.__dlpack__(stream=stream)

    def take_back(self):
        self._pixels.fill_(99)


def pynvvideocodec(monkeypatch, *, unshown=None, repeat_last=0, late=0, drop=0, error=None):
    """Fake PyNvVideoCodec, whose SimpleDecoder also returns ``unshown`` (pixels, pts) before the file's frames."""
    asked = []

    class OutputColorType(enum.Enum):
        NATIVE = 0
        RGB = 1
        RGBP = 2

    class SimpleDecoder:
        def __init__(
            self,
            enc_file_path,
            gpu_id=0,
            cuda_context=0,
            cuda_stream=0,
            use_device_memory=True,
            max_width=0,
            max_height=0,
            need_scanned_stream_metadata=0,
            decoder_cache_size=4,
            output_color_type=OutputColorType.NATIVE,
            bWaitForSessionWarmUp=False,
            enableDecodeStats=False,
        ):
            if error is not None:
                raise error
            assert (gpu_id, use_device_memory, need_scanned_stream_metadata) == (0, True, True)
            form = {OutputColorType.NATIVE: "nv12", OutputColorType.RGB: "rgb24"}[output_color_type]
            with av.open(enc_file_path) as container:  # as stored: not rotated
                frames = list(container.decode(video=0))
            self._pts = [frame.pts for frame in frames]
            self._pixels = [torch.from_numpy(frame.to_ndarray(format=form)) for frame in frames]
            if unshown is not None:
                self._pts = unshown + self._pts
                self._pixels = [self._pixels[0]] * len(unshown) + self._pixels
            self._out = []

        def __len__(self):
            return len(self._pts)

        def get_batch_frames_by_index(self, indices):
            asked.append(list(indices))
            for surface in self._out:
                surface.take_back()
            numbers = []
            for index in indices:
                if not 0 <= index < len(self):
                    warnings.warn(f"Skipping index {index}: Out of valid range", stacklevel=2)
                elif index not in numbers:
                    numbers.append(index)
            numbers = [min(n, len(self) - 1 - repeat_last) for n in numbers][drop:]
            self._out = [Surface(self._pixels[n], self._pts[n] + late) for n in numbers]
            return self._out

    fake(monkeypatch, "PyNvVideoCodec", SimpleDecoder=SimpleDecoder, OutputColorType=OutputColorType)
    return asked


@pytest.mark.parametrize("name", ["b.mp4", "vfr.mkv"])
def test_pynvvideocodec_gives_the_frames_asked_for(tmp_path, monkeypatch, name):
    asked = pynvvideocodec(monkeypatch)
    path = made(tmp_path, name)
    decoder = PyNvVideoCodecDecoder(path)
    for frames, expected in check_frames(decoder, path):
        assert frames.backend == "pynvvideocodec"
        assert (frames.pixels.int() - expected.int()).abs().max() <= 2  # swscale rounds otherwise
    assert all(numbers == sorted(set(numbers)) for numbers in asked)
    first = decoder.frames([4, 4, 2]).pixels
    decoder.frames([7])
    assert frame_numbers(first) == [4, 4, 2], "the surfaces were not copied"
    one = decoder.frames([9], planes=True).pixels
    assert isinstance(one, YuvFrames)
    luma = one.planes[0].clone()
    decoder.frames([7])
    assert torch.equal(one.planes[0], luma), "the surface was not copied"
    decoder.close()
    assert decoder._decoder is None
    assert frame_numbers(decoder.frames([8]).pixels) == [8]


def test_pynvvideocodec_maps_an_edit_list(tmp_path, monkeypatch):
    path = with_edit_list(tmp_path)
    with av.open(str(path)) as container:
        unshown = sorted(packet.pts for packet in container.demux(video=0) if packet.size and packet.is_discard)
    assert len(unshown) == 5
    pynvvideocodec(monkeypatch, unshown=unshown)
    for _ in check_frames(PyNvVideoCodecDecoder(path), path, first=5):
        pass


@pytest.mark.parametrize("matrix", ["601", "709"])
@pytest.mark.parametrize("full", [False, True])
def test_pynvvideocodec_planes(tmp_path, monkeypatch, matrix, full):
    pynvvideocodec(monkeypatch)
    options = {"colorspace": {"601": "smpte170m", "709": "bt709"}[matrix]}
    options |= {"color_range": "pc"} if full else {}
    noise = np.random.default_rng(0).integers(0, 256, (20, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = write_video(tmp_path / "p.mp4", noise, options=options)
    planes = PyNvVideoCodecDecoder(path).frames([9, 3, 9], planes=True).pixels
    nv12 = all_frames(path, "nv12")[0][[9, 3, 9]]
    assert isinstance(planes, YuvFrames)
    assert (planes.matrix, planes.range) == (matrix, "full" if full else "limited")
    luma, chroma = planes.planes
    assert torch.equal(luma, nv12[:, :HEIGHT])
    assert torch.equal(chroma.flatten(1), nv12[:, HEIGHT:].flatten(1))
    rgb = PyNvVideoCodecDecoder(path).frames([9, 3, 9]).pixels
    assert torch.equal(rgb, planes.to_rgb(0, 3, torch.float32).round().to(torch.uint8).permute(0, 2, 3, 1))


@pytest.mark.parametrize(("pix_fmt", "height"), [("yuv444p", 32), ("yuv420p10le", 32), ("yuv420p", 31)])
def test_pynvvideocodec_rgb_of_other_formats(tmp_path, monkeypatch, pix_fmt, height):
    pynvvideocodec(monkeypatch)
    path = write_video(tmp_path / "f.mkv", numbered_frames(9, height, WIDTH), pix_fmt=pix_fmt, codec="ffv1")
    pixels = PyNvVideoCodecDecoder(path).frames([5, 1], planes=True).pixels
    assert torch.equal(pixels, all_frames(path)[0][[5, 1]])


def test_pynvvideocodec_leaves_the_rotation(tmp_path, monkeypatch):
    pynvvideocodec(monkeypatch)
    path = write_video(tmp_path / "r.mp4", numbered_frames(8, HEIGHT, WIDTH), rotation=90)
    frames = PyNvVideoCodecDecoder(path).frames([2, 1])
    assert frames.pixels.shape == (2, HEIGHT, WIDTH, 3)
    assert frames.rotation == PyNvVideoCodecDecoder(path).probe().rotation == 90


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"late": 1}, "gives a frame of pts"),
        ({"repeat_last": 1}, "gives a frame of pts"),
        ({"unshown": [-2, -1]}, "gives a frame of pts"),
        ({"drop": 1}, "gave 1 frames of the 2 asked for"),
        ({"error": Exception("Elementary streams not supported by Simple Decoder.")}, "decoding failed: Elementary"),
    ],
)
def test_pynvvideocodec_is_checked(tmp_path, monkeypatch, settings, reason):
    pynvvideocodec(monkeypatch, **settings)
    message = refused(PyNvVideoCodecDecoder(made(tmp_path, "b.mp4")).frames, [1, 49])
    assert message.startswith("pynvvideocodec: ")
    assert reason in message


# ---- the real ones


@pytest.mark.parametrize(
    ("decoder", "module", "device"),
    [(TorchcodecDecoder, "torchcodec.decoders", "cpu"), (PyNvVideoCodecDecoder, "PyNvVideoCodec", "cuda")],
)
def test_the_real_library(tmp_path, decoder, module, device):
    try:
        importlib.import_module(module)
    except Exception as error:
        pytest.skip(f"{module}: {root_cause(error)}")
    path = made(tmp_path, "b.mp4")
    pixels, _, _ = all_frames(path)
    frames = decoder(path, device=device).frames([30, 3, 30, 49])
    assert frame_numbers(frames.pixels.cpu()) == [30, 3, 30, 49]
    assert (frames.pixels.cpu().int() - pixels[[30, 3, 30, 49]].int()).abs().max() <= 3
