"""Decoders give the frames asked for, whatever the file's structure, and decode no more than they need."""

import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import (
    coded_frames,
    coded_numbers,
    cut,
    numbered_frames,
    real_video,
    shift_edit_list,
    write_sound,
    write_video,
)

from videor1.decoders import BACKENDS, check_backend, hardware, open_decoder, stack
from videor1.decoders.hardware import SurfaceStack, decide
from videor1.decoders.index import frames_to_decode, read_index
from videor1.decoders.protocol import FramesChangedError, VideoInfo
from videor1.decoders.pyav import PyAvDecoder, _Promises, _UnreliableError
from videor1.decoders.seeking import PacketReader, Planner
from videor1.decoders.stack import MixedLayoutError
from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video import read_frames
from videor1_kernels.frames_to_patches import YuvFrames

COUNT = 320
REAL = ("nasa.mp4", "pancake.mkv", "av1.mkv", "hevc.mp4", "rotated_90.mov")
X264 = {"preset": "veryfast", "sc_threshold": "0"}
SPARSE = {"max_packets": 3 * 26}  # three frames in as many groups of at most 24, and the pictures around


@dataclass(frozen=True)
class Made:
    """A file of ``coded_frames``."""

    name: str
    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    max_packets: int | None = None  # decoded for three frames far apart; None: all may be
    offset: int = 0  # number of the first frame shown
    vfr: bool = False
    size: tuple[int, int] = (48, 80)
    mux_options: dict[str, str] = field(default_factory=dict)
    all_sync: bool = False  # the table of key frames is taken out: every packet says that it is one

    def write(self, folder: Path) -> Path:
        times = None
        if self.vfr:
            times = [40 * i if i < 100 else 4000 + 300 * (i - 100) for i in range(COUNT)]
        path = write_video(
            folder / self.name,
            coded_frames(COUNT, *self.size),
            codec=self.codec,
            pix_fmt=self.pix_fmt,
            options=self.options,
            pts_ms=times,
            mux_options=self.mux_options,
            container="h264" if self.name.endswith(".264") else None,
        )
        if self.all_sync:
            path.write_bytes(path.read_bytes().replace(b"stss", b"free", 1))
        return shift_edit_list(path, self.offset / 10) if self.offset else path


B_FRAMES = X264 | {"bf": "3", "b-adapt": "0", "g": "24"}
X265 = {"preset": "ultrafast"}
OPEN_GOP = X264 | {"x264-params": "open-gop=1:keyint=12:min-keyint=1:bframes=3:b-adapt=0:scenecut=0"}
MADE = {
    "gop 1": Made("a.mp4", options=X264 | {"g": "1"}, max_packets=3),
    "gop 12": Made("a.mp4", options=X264 | {"g": "12", "bf": "0"}, **SPARSE),
    "gop 250": Made("a.mp4", options=X264 | {"g": "250", "bf": "2"}),
    "b-frames": Made("a.mp4", options=B_FRAMES, **SPARSE),
    "b-frames mkv": Made("a.mkv", options=B_FRAMES, **SPARSE),
    "b-frames ts": Made("a.ts", options=B_FRAMES),
    "b-frames flv": Made("a.flv", options=B_FRAMES),
    "b-pyramid": Made("a.mp4", options=B_FRAMES | {"bf": "7", "b-pyramid": "normal"}, **SPARSE),
    "open gop": Made("a.mp4", options=OPEN_GOP, **SPARSE),
    "open gop mkv": Made("a.mkv", options=OPEN_GOP, **SPARSE),
    "intra refresh": Made("a.mp4", options=X264 | {"x264-params": "intra-refresh=1", "g": "24", "bf": "0"}),
    "no table of key frames": Made("a.mp4", options=B_FRAMES | {"g": "48"}, all_sync=True),
    "no table of key frames, hevc": Made(
        "a.mp4", "libx265", options=X265 | {"x265-params": "log-level=none:keyint=48"}, all_sync=True
    ),
    "fragments": Made("a.mp4", options=B_FRAMES, mux_options={"movflags": "frag_keyframe+empty_moov"}, **SPARSE),
    "mkv without cues": Made("a.mkv", options=B_FRAMES, mux_options={"live": "1"}, **SPARSE),
    "variable frame rate": Made("a.mkv", options=B_FRAMES, vfr=True, **SPARSE),
    "edit list": Made("a.mp4", options=B_FRAMES | {"bf": "0"}, offset=30, **SPARSE),
    "edit list, b-frames": Made("a.mp4", options=B_FRAMES, offset=30, **SPARSE),
    "no times": Made("a.264", options=B_FRAMES),
    "odd size": Made("a.mp4", options=B_FRAMES, pix_fmt="yuv444p", size=(47, 81), **SPARSE),
    "odd size 4:2:0": Made("a.mkv", "ffv1", options={"g": "24"}, size=(47, 81), **SPARSE),
    "10 bit": Made(
        "a.mp4", "libx265", "yuv420p10le", X265 | {"x265-params": "log-level=none:keyint=24:min-keyint=24"}, **SPARSE
    ),
    "hevc open gop": Made(
        "a.mkv", "libx265", options=X265 | {"x265-params": "log-level=none:keyint=12:open-gop=1:bframes=4"}, **SPARSE
    ),
    "hevc temporal layers": Made(
        "a.mp4", "libx265", options=X265 | {"x265-params": "log-level=none:keyint=24:temporal-layers=3"}
    ),
    "av1": Made("a.mp4", "libsvtav1", options={"preset": "8", "g": "24", "crf": "20"}, size=(96, 160), **SPARSE),
    "vp9": Made("a.webm", "libvpx-vp9", options={"g": "24", "deadline": "realtime", "cpu-used": "8"}, **SPARSE),
    "vp8": Made("a.webm", "libvpx", options={"g": "24", "deadline": "realtime", "cpu-used": "8"}, **SPARSE),
    "mpeg2": Made("a.ts", "mpeg2video", options={"g": "12", "bf": "2", "b": "2M"}),
    "mpeg2 mkv": Made("a.mkv", "mpeg2video", options={"g": "12", "bf": "2", "b": "2M"}, **SPARSE),
    "mpeg4 avi": Made("a.avi", "mpeg4", options={"g": "12", "bf": "2", "b": "2M"}),
    "mpeg4 mp4": Made("a.mp4", "mpeg4", options={"g": "12", "bf": "2", "b": "2M"}, **SPARSE),
    "mjpeg": Made("a.mkv", "mjpeg", "yuvj420p", max_packets=3),
    "prores": Made("a.mov", "prores_ks", "yuv422p10le", max_packets=3),
    "gif": Made("a.gif", "gif", "rgb8"),
    "apng": Made("a.apng", "apng", "rgb24"),
}


def available():
    names = []
    for name in BACKENDS:
        try:
            check_backend(name)
        except ConfigError:
            continue
        if name not in ("auto", "pyav-nvdec"):
            names.append(name)
    return names


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files by their name in ``MADE``, each made once."""
    files: dict[str, Path] = {}

    def make(name):
        if name not in files:
            files[name] = MADE[name].write(tmp_path_factory.mktemp("made"))
        return files[name]

    return make


def picks(count):
    """Sparse, dense and single choices of frames, ascending."""
    rng = random.Random(count)
    yield [0, count // 2, count - 1]
    yield sorted(rng.sample(range(count), 16))
    yield [count - 1]
    yield list(range(count // 3, count // 3 + 30))
    for _ in range(12):
        yield sorted(rng.sample(range(count), rng.choice((1, 2, 3, 5))))


def decoded_numbers(frames):
    return coded_numbers(frames.pixels)


@pytest.mark.parametrize("threads", [1, 0])
@pytest.mark.parametrize("name", MADE)
def test_the_frames_asked_for(made, name, threads):
    file, path = MADE[name], made(name)
    total = COUNT - file.offset
    with_all = PyAvDecoder(path, threads=threads)
    info = with_all.probe()
    assert info.num_frames == len(info.seconds) == total
    everything = with_all.frames(range(total))
    with_all.close()
    assert decoded_numbers(everything) == [file.offset + i for i in range(total)]
    assert everything.seconds == pytest.approx(info.seconds)
    decoder = PyAvDecoder(path, threads=threads)
    for indices in picks(total):
        frames = decoder.frames(indices)
        assert torch.equal(frames.pixels, everything.pixels[indices]), indices
        assert frames.seconds == tuple(everything.seconds[i] for i in indices)
        if len(indices) == 3 and file.max_packets:
            assert frames.decoded <= file.max_packets
    decoder.close()


@pytest.mark.parametrize("backend", available())
@pytest.mark.parametrize("name", ["gop 12", "b-frames", "open gop mkv", "variable frame rate", "edit list", "odd size"])
def test_every_backend_gives_the_frames_asked_for_or_says_why_not(made, name, backend):
    file = MADE[name]
    decoder = open_decoder(made(name), backend=backend)
    try:
        total = decoder.probe().num_frames
        assert total == COUNT - file.offset
        for indices in (range(total), [3, 100, 101, total - 1], [200, 7, 200]):
            frames = decoder.frames(indices)
            assert coded_numbers(frames.pixels) == [file.offset + i for i in indices]
            assert frames.backend == backend
    except SampleError:
        if backend == "pyav":
            raise
    finally:
        decoder.close()


def test_order_duplicates_and_bounds(made):
    decoder = PyAvDecoder(made("b-frames"))
    for planes in (False, True):
        frames = decoder.frames([300, 5, 300, 6], planes=planes)
        assert coded_numbers(frames.pixels.planes[0] if planes else frames.pixels) == [300, 5, 300, 6]
        assert frames.seconds == pytest.approx((30.0, 0.5, 30.0, 0.6))
        assert len(decoder.frames([], planes=planes).pixels) == 0
    for number in (-1, COUNT):
        with pytest.raises(IndexError, match=f"frame {number} of a video of {COUNT} frames"):
            decoder.frames([0, number])
    decoder.close()


@pytest.mark.parametrize("name", REAL)
def test_sparse_frames_of_real_videos_are_those_of_a_whole_decode(name):
    path = real_video(name)
    with av.open(str(path)) as container:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    decoder = PyAvDecoder(path)
    for indices in picks(len(whole)) if len(whole) > 60 else ([0], [len(whole) - 1], list(range(len(whole)))):
        assert np.array_equal(decoder.frames(indices).pixels.numpy(), whole[indices])
    decoder.close()


def test_seeking_decodes_few_frames(made):
    decoder = PyAvDecoder(made("b-frames"))
    everything = decoder.frames(range(COUNT)).decoded
    assert everything == COUNT
    assert decoder.frames([0]).decoded == 1
    assert decoder.frames([24 * 8]).decoded <= 2, "a key frame needs nothing else"
    # Of the 21 up to this one, 10 are pictures that nothing refers to.
    assert decoder.frames([24 * 5 + 20]).decoded <= 14
    assert decoder.frames([10, 200, 310]).decoded <= 3 * 14
    decoder.close()


def test_a_leading_picture_needs_the_key_frame_before(made):
    index = read_index(made("open gop"))
    planner = Planner(index)
    keys = [position for position, key in enumerate(index.key) if key]
    leading = [s for p, s in enumerate(index.pts) if keys[3] < p < keys[4] and s < index.pts[keys[3]]]
    assert leading, "the file must have leading pictures"
    for stamp in leading:
        (segment,) = planner.plan([stamp])
        assert (segment.start, segment.since) == (keys[2], index.pts[keys[2]])
    (segment,) = planner.plan([index.pts[keys[3]]])
    assert segment.start == keys[3]


@pytest.mark.parametrize("lands", ["later", "earlier", "nowhere", "error"])
def test_seeks_that_land_elsewhere(made, lands):
    class Astray:
        """A container whose seeks miss."""

        def __init__(self, container):
            self.container, self.sought = container, 0

        def seek(self, stamp, *, stream):
            self.sought += 1
            if lands == "error":
                raise av.error.PermissionError(1, "no seeking here")
            last = index.pts[-1]
            self.container.seek({"later": last, "earlier": 0, "nowhere": 10 * last}[lands], stream=stream)

        def __getattr__(self, name):
            return getattr(self.container, name)

    path = made("b-frames mkv")
    index = read_index(path)
    decoder = PyAvDecoder(path)
    decoder.probe()
    astray = decoder._reader.container = Astray(decoder._reader.container)
    frames = decoder.frames([30, 150, 280])
    assert decoded_numbers(frames) == [30, 150, 280]
    assert astray.sought
    assert frames.decoded < 60
    decoder.close()


def test_damaged_leading_pictures_are_no_error(made):
    """Pictures shown before the key frame that decoding began at may come out damaged, or not at all."""

    class Frame:
        def __init__(self, pts, is_corrupt=False):
            self.pts, self.is_corrupt = pts, is_corrupt

    index = read_index(made("open gop"))
    start = [position for position, key in enumerate(index.key) if key][3]
    (segment,) = Planner(index).plan([index.pts[start]])
    segment = replace(segment, stop=start + 5)
    fed = index.pts[start : segment.stop]
    leading = [stamp for stamp in fed if stamp < fed[0]]
    assert leading

    def check(frames):
        promises = _Promises(index, segment)
        for position, stamp in enumerate(fed, start):
            promises.fed(position, stamp, skipped=False)
        kept = [frame.pts for frame in frames if promises.came(frame)]
        promises.kept()
        return kept

    shown = [stamp for stamp in fed if stamp >= fed[0]]
    assert check([Frame(stamp, stamp in leading) for stamp in fed]) == shown
    assert check([Frame(stamp) for stamp in shown]) == shown
    for frames in (
        [Frame(stamp, stamp == shown[0]) for stamp in fed],  # damaged
        [Frame(stamp) for stamp in fed if stamp != shown[1]],  # lost
        [Frame(stamp) for stamp in (*fed, max(index.pts))],  # from nowhere
    ):
        with pytest.raises(_UnreliableError):
            check(frames)


def test_packets_out_of_step_with_the_index_are_noticed(made):
    index = read_index(made("gop 12"))
    decoder = PyAvDecoder(made("gop 12"))
    decoder.probe()
    pts = list(index.pts)
    pts[100] += 1  # as if the file had changed since
    decoder._index = replace(index, pts=tuple(pts))
    decoder._planner = Planner(decoder._index)
    frames = decoder.frames([105])
    assert decoded_numbers(frames) == [105]
    assert frames.decoded >= COUNT, "the whole file is decoded"
    decoder.close()


def hide_vp8_frames(path, hidden):
    """Clear the bit of these packets' headers that lets them be shown."""
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for number in hidden:
        packet = packets[number]
        assert data.count(packet) == 1
        data = data.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:])
    path.write_bytes(data)


def test_hidden_frames_are_not_counted(tmp_path, monkeypatch):
    path = MADE["vp8"].write(tmp_path)
    hidden = (30, 31, 150)
    hide_vp8_frames(path, hidden)
    shown = [number for number in range(COUNT) if number not in hidden]
    decoder = PyAvDecoder(path)
    assert decoder.probe().num_frames == len(shown)
    assert decoded_numbers(decoder.frames([5, 100, 200])) == [shown[5], shown[100], shown[200]]
    decoder.close()
    # Where the index cannot tell, it shows when a hidden picture is decoded.
    monkeypatch.setattr("videor1.decoders.index._hidden_vp8", lambda packet: False)
    decoder = PyAvDecoder(path)
    assert decoder.probe().num_frames == COUNT
    with pytest.raises(FramesChangedError, match=f"{len(shown)} frames, not the {COUNT}"):
        decoder.frames([3, 32])
    assert decoder.probe().num_frames == len(shown)
    assert decoded_numbers(decoder.frames([5, 100, 200])) == [shown[5], shown[100], shown[200]]
    decoder.close()
    clip = read_frames(path, max_frames=100)
    assert clip.total_frames == len(shown)
    assert coded_numbers(clip.frames)[-1] == COUNT - 1


def test_a_file_that_decodes_differently_each_time_is_an_error(made):
    decoder = PyAvDecoder(made("no times"))  # always decoded whole
    index = decoder._indexed()
    decoder._index = index.reindexed(index.stamps[:-1])
    with pytest.raises(FramesChangedError):
        decoder.frames([0])
    assert len(decoder.frames([0]).pixels) == 1
    decoder._index = index.reindexed(index.stamps[:-2])
    with pytest.raises(SampleError, match="two passes"):
        decoder.frames([0])
    decoder.close()


def test_damage_is_an_error_where_it_is_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", noise, options=X264 | {"g": "10", "bf": "0"})
    index = read_index(path)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    at, size = places[35]
    data[at : at + size] = b"\xff" * size
    path.write_bytes(data)
    assert index.info.key_frames[:5] == (0, 10, 20, 30, 40)
    for numbers in ([36], [0, 35], [10, 39, 50]):
        decoder = PyAvDecoder(path)
        with pytest.raises(SampleError) as caught:
            decoder.frames(numbers)
        assert (caught.value.kind, caught.value.path) == ("decode", str(path))
        decoder.close()
    decoder = PyAvDecoder(path)
    assert len(decoder.frames([0, 29, 34, 40, 59]).pixels) == 5, "what is not decoded is not checked"
    decoder.close()


def test_several_threads_miss_no_damage(made, tmp_path):
    def outcome(threads):
        try:
            return read_frames(path, max_frames=4, threads=threads).total_frames
        except SampleError as error:
            return error.kind

    path = tmp_path / "cut.264"
    outcomes = []
    for part in range(20):
        cut(made("no times"), path, 0.6 + part / 1000)
        outcomes.append(outcome(1))
        assert outcome(4) == outcomes[-1]
    assert "decode" in outcomes


def plane_arrays(path):
    """[F, height, width] of each plane, as the decoder gives them; width in bytes."""
    planes = ([], [], [])
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            width = {"yuv420p10le": 2}.get(frame.format.name, 1)
            for frames, plane in zip(planes, frame.planes, strict=True):
                lines = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
                frames.append(lines[:, : plane.width * width].copy())
    return [np.stack(frames) for frames in planes]


COLOURS = {
    "untagged": ("libx264", "yuv420p", "", "601", "limited"),
    "709": ("libx264", "yuv420p", "colormatrix=bt709", "709", "limited"),
    "470bg": ("libx264", "yuv420p", "colormatrix=bt470bg", "601", "limited"),
    "170m": ("libx264", "yuv420p", "colormatrix=smpte170m", "601", "limited"),
    "2020": ("libx264", "yuv420p", "colormatrix=bt2020nc", "2020", "limited"),
    "full range": ("libx264", "yuv420p", "fullrange=on:colormatrix=bt709", "709", "full"),
    "yuvj": ("mjpeg", "yuvj420p", "", "601", "full"),
}


@pytest.mark.parametrize("name", COLOURS)
def test_planes_are_the_decoders(tmp_path, name):
    codec, pix_fmt, params, matrix, levels = COLOURS[name]
    noise = np.random.default_rng(0).integers(0, 256, (8, 34, 58, 3), dtype=np.uint8)
    options = {"x264-params": params} if params else {}
    path = write_video(tmp_path / "a.mkv", noise, codec=codec, pix_fmt=pix_fmt, options=options)
    decoder = PyAvDecoder(path)
    pixels = decoder.frames([6, 2], planes=True).pixels
    decoder.close()
    assert isinstance(pixels, YuvFrames)
    assert (pixels.matrix, pixels.range) == (matrix, levels)
    for plane, expected in zip(pixels.planes, plane_arrays(path), strict=True):
        assert np.array_equal(plane.numpy(), expected[[6, 2]])


def test_planes_of_odd_sizes(made):
    decoder = PyAvDecoder(made("odd size 4:2:0"))
    pixels = decoder.frames([1, 300], planes=True).pixels
    assert [list(plane.shape) for plane in pixels.planes] == [[2, 47, 81], [2, 24, 41], [2, 24, 41]]
    assert coded_numbers(pixels.planes[0]) == [1, 300]
    decoder.close()


def test_ten_bit_planes_lose_nothing(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mkv", noise, codec="ffv1", pix_fmt="yuv420p10le")
    decoder = PyAvDecoder(path)
    pixels = decoder.frames(range(4), planes=True).pixels
    decoder.close()
    assert [plane.dtype for plane in pixels.planes] == [torch.uint16] * 2
    Y, UV = (plane.numpy() for plane in pixels.planes)
    expected = [plane.view(np.uint16) for plane in plane_arrays(path)]
    assert expected[0].max() > 255
    assert np.array_equal(Y, expected[0] << 6)
    assert np.array_equal(UV, np.stack(expected[1:], -1) << 6)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "params"),
    [("libx264", "yuv444p", ""), ("libx264", "yuv420p", "colormatrix=smpte240m"), ("ffv1", "bgr0", "")],
)
def test_what_has_no_planes_comes_as_rgb(tmp_path, codec, pix_fmt, params):
    options = {"x264-params": params} if params else {}
    path = write_video(tmp_path / "a.mkv", numbered_frames(8), codec=codec, pix_fmt=pix_fmt, options=options)
    decoder = PyAvDecoder(path)
    pixels, rgb = (decoder.frames([1, 5], planes=planes).pixels for planes in (True, False))
    decoder.close()
    assert isinstance(pixels, torch.Tensor)
    assert torch.equal(pixels, rgb)


def test_pixel_formats_that_change_come_as_rgb(tmp_path):
    parts = [
        write_video(tmp_path / f"{fmt}.264", numbered_frames(20), pix_fmt=fmt, container="h264").read_bytes()
        for fmt in ("yuv420p", "yuv444p")
    ]
    path = tmp_path / "both.264"
    path.write_bytes(b"".join(parts))
    clip = read_frames(path, planes=True)
    assert clip.total_frames == 40
    assert isinstance(clip.frames, torch.Tensor)
    assert torch.equal(clip.frames, read_frames(path).frames)


def test_rotation_is_reported_and_applied(tmp_path):
    path = write_video(tmp_path / "r.mp4", coded_frames(20, 48, 80), rotation=90)
    decoder = PyAvDecoder(path)
    assert (decoder.probe().rotation, decoder.probe().height, decoder.probe().width) == (90, 48, 80)
    frames = decoder.frames([3, 17])
    decoder.close()
    assert frames.rotation == 90
    assert decoded_numbers(frames) == [3, 17]
    clip, planes = read_frames(path), read_frames(path, planes=True)
    assert (clip.rotation, planes.rotation) == (0, 90)
    assert clip.size == planes.size
    assert clip.frames.shape[1:3] == (80, 48)
    luma = planes.frames.planes[0]
    assert coded_numbers(luma) == coded_numbers(torch.rot90(clip.frames, -1, dims=(1, 2)))


def test_index(made, tmp_path):
    index = read_index(made("b-frames"))
    info = index.info
    assert (info.num_frames, info.fps, info.width, info.height) == (COUNT, 10.0, 80, 48)
    assert (info.codec, info.pix_fmt, info.rotation) == ("h264", "yuv420p", 0)
    assert info.key_frames == tuple(range(0, COUNT, 24))
    assert info.seconds == pytest.approx([i / 10 for i in range(COUNT)])
    assert sorted(index.pts) == list(index.stamps) != list(index.pts)
    hidden = read_index(made("edit list"))
    assert (hidden.info.num_frames, sum(hidden.shown), len(hidden.pts)) == (COUNT - 30, COUNT - 30, COUNT - 24)
    raw = read_index(made("no times"))
    assert (raw.by_pts, raw.info.num_frames, raw.info.key_frames) == (False, COUNT, (0,))
    assert read_index(write_video(tmp_path / "1.mp4", numbered_frames(1))).info.num_frames == 1
    assert read_index(write_sound(tmp_path / "none.mkv", with_empty_video=True)).info.num_frames == 0
    for path, kind in (
        (write_sound(tmp_path / "sound.mp4"), "not_video"),
        (tmp_path / "nowhere.mp4", "missing_file"),
        (cut(made("gop 12"), tmp_path / "cut.mp4"), "truncated"),
    ):
        with pytest.raises(SampleError) as caught:
            read_index(path)
        assert (caught.value.kind, caught.value.path) == (kind, str(path))


def test_one_frame(tmp_path):
    decoder = PyAvDecoder(write_video(tmp_path / "1.mp4", coded_frames(1)))
    assert decoded_numbers(decoder.frames([0, 0])) == [0, 0]
    decoder.close()


def test_backends_by_name(made, monkeypatch):
    path = made("gop 12")
    for backend in ("auto", "pyav"):
        decoder = open_decoder(path, backend=backend)
        assert decoder.frames([1]).backend == decoder.backend == "pyav"
        decoder.close()
    with pytest.raises(ConfigError, match="did you mean 'decord'"):
        open_decoder(path, backend="decrod")
    monkeypatch.setitem(sys.modules, "decord", None)
    for call in (lambda: check_backend("decord"), lambda: open_decoder(path, backend="decord")):
        with pytest.raises(ConfigError, match="decord"):
            call()
    decoder = open_decoder(path, backend="pyav-nvdec")
    with pytest.raises(ConfigError, match="the frames are wanted on cpu"):
        decoder.frames([0])
    decoder.close()


def test_threads_default_to_one_in_a_worker(made, monkeypatch):
    asked = []

    def spy(*args, **kwargs):
        asked.append(kwargs["threads"])
        return open_decoder(*args, **kwargs)

    monkeypatch.setattr("videor1.video.open_decoder", spy)
    read_frames(made("gop 12"))
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    read_frames(made("gop 12"))
    read_frames(made("gop 12"), threads=3)
    assert asked == [0, 1, 3]


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
    """A machine that says it has a CUDA device, and a PyAV that can use it."""

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
    """A frame on the card, as far as ``SurfaceStack`` looks at it."""

    planes: list[torch.Tensor]
    colorspace: int = 1
    color_range: int = 1
    rotation: int = 0
    format: object = field(default_factory=lambda: type("Format", (), {"name": "cuda"}))


def surface(height=4, width=6, dtype=torch.uint8, value=0, **kwargs):
    pitch = 16  # samples a line takes up: surfaces are padded
    Y = torch.full((height, pitch), value, dtype=dtype)[:, :width]
    UV = torch.full((height // 2, pitch), value, dtype=dtype)[:, :width].unflatten(1, (-1, 2))
    return Surface([Y, UV], **kwargs)


def test_surfaces_are_copied():
    stack = SurfaceStack(Path("a.mp4"), 2, "cpu")
    first, second = surface(value=3, rotation=90), surface(value=7, rotation=90)
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
    assert (pixels.matrix, pixels.range, stack.rotation) == ("709", "limited", 90)
    stack = SurfaceStack(Path("a.mp4"), 1, "cpu")
    stack.put(0, surface(dtype=torch.uint16, colorspace=9, color_range=2))
    assert stack.pixels().planes[0].dtype == torch.uint16
    assert (stack.pixels().matrix, stack.pixels().range) == ("2020", "full")


def test_surfaces_that_do_not_fit_together():
    stack = SurfaceStack(Path("a.mp4"), 3, "cpu")
    stack.put(0, surface())
    with pytest.raises(SampleError, match="the frame size changes"):
        stack.put(1, surface(height=8))
    with pytest.raises(SampleError, match="the rotation changes"):
        stack.put(1, surface(rotation=180))
    for other in (surface(colorspace=9), surface(colorspace=7), surface(dtype=torch.uint16)):
        with pytest.raises(MixedLayoutError):
            stack.put(1, other)
    with pytest.raises(SampleError, match="came out in main memory, as yuv420p"):
        stack.put(1, surface(format=type("Format", (), {"name": "yuv420p"})))


class CardStack(SurfaceStack):
    """Takes frames in main memory for such on the card."""

    def __init__(self, path, count, device):
        super().__init__(path, count, "cpu")

    def put(self, slot, frame):
        Y, U, V = (np.frombuffer(p, np.uint8).reshape(p.height, -1)[:, : p.width].copy() for p in frame.planes)
        planes = [torch.from_numpy(Y), torch.from_numpy(np.stack((U, V), -1))]
        super().put(slot, Surface(planes, int(frame.colorspace), int(frame.color_range), frame.rotation))


@pytest.fixture
def with_a_fake_card(with_a_card):
    """Decodes on the CPU what is sent to the card."""
    with_a_card.setattr("videor1.decoders.pyav.SurfaceStack", CardStack)
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
