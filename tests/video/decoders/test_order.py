"""Frames come in the order in which they leave the decoder where a file's times follow another one."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from coded_videos import OPEN_GOP, X264
from media import coded_frames, coded_numbers, in_decode_order, join, later, remux, write_video

from videor1.types import SampleError
from videor1.video import read_frames, sample_indices
from videor1.video.decoders import open_decoder
from videor1.video.decoders.pyav import PyAvDecoder
from videor1.video.decoders.timeline import timeline_of_frames, timeline_of_packets

COUNT = 120
CODED = {
    "b-frames": ("libx264", X264 | {"bf": "3", "g": "24"}),
    "one b-frame": ("libx264", X264 | {"bf": "1", "b-adapt": "0", "g": "60"}),
    "b-pyramid": ("libx264", X264 | {"bf": "7", "b-pyramid": "normal", "b-adapt": "0", "g": "48"}),
    "open gop": ("libx264", OPEN_GOP),
    "no b-frames": ("libx264", X264 | {"bf": "0", "g": "24"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:keyint=24:bframes=4:b-adapt=0"}),
    "mpeg4": ("mpeg4", {"g": "12", "bf": "2", "b": "2M"}),
    "mpeg2": ("mpeg2video", {"g": "12", "bf": "2", "b": "2M"}),
}
IN = dict.fromkeys(list(CODED)[:5], ("a.mp4", "a.mov", "a.mkv", "a.flv", "a.ts"))
IN |= {"hevc": ("a.mp4", "a.mkv", "a.ts"), "mpeg4": ("a.mp4", "a.mkv"), "mpeg2": ("a.mkv", "a.ts")}


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Each of CODED with true times, and in each container of IN with those of decoding; read only."""
    folder = tmp_path_factory.mktemp("coded")
    made = {}

    def make(name, container=None):
        if (name, container) not in made:
            codec, options = CODED[name]
            inner = folder / name / str(container)
            inner.mkdir(parents=True)
            if container is None:
                made[name, None] = write_video(inner / "a.mp4", coded_frames(COUNT), codec=codec, options=options)
            else:
                made[name, container] = remux(make(name), inner / container, in_decode_order)
        return made[name, container]

    return make


def shown(path):
    """Return the numbers of the frames as they leave the decoder, of a whole decode without this library's reader."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    return coded_numbers(np.stack(frames))


def assert_in_order(path, *, count=None, fps=10.0, max_frames=16):
    """Read a clip; its frames must be those that FFmpeg shows, sampled by the reference's rule."""
    truth = shown(path)
    assert truth == sorted(truth), "the decoder gives them in order"
    assert count is None or truth == list(range(count))
    for planes, threads in ((False, 1), (True, 0)):
        clip = read_frames(path, max_frames=max_frames, planes=planes, threads=threads)
        picture = clip.frames.planes[0] if planes else clip.frames
        expected = sample_indices(len(truth), clip.source_fps, max_frames=max_frames, fps=2.0)
        assert coded_numbers(picture) == [truth[i] for i in expected]
        assert clip.total_frames == len(truth)
        assert clip.source_fps == pytest.approx(fps, rel=0.01)
        assert list(clip.timestamps) == sorted(clip.timestamps)
    return clip


@pytest.mark.parametrize(("name", "container"), [(name, container) for name in IN for container in IN[name]])
def test_times_that_follow_decoding(coded, name, container):
    path = coded(name, container)
    with av.open(str(path)) as file:
        stamps = [packet.pts for packet in file.demux(video=0) if packet.size]
    assert all(a < b for a, b in pairwise(stamps)), "no time shows that frames are reordered"
    for max_frames in (2, 4, 16):
        assert_in_order(path, max_frames=max_frames)


@pytest.mark.parametrize("name", ["b-frames", "b-pyramid"])
def test_avi(tmp_path, name):
    """H.264 in AVI, as UCF101 and HMDB51 are published."""
    path = write_video(tmp_path / "a.avi", coded_frames(COUNT), options=CODED[name][1])
    for max_frames in (2, 16):
        assert_in_order(path, count=COUNT, max_frames=max_frames)


@pytest.mark.parametrize("container", ["a.mp4", "a.mkv", "a.flv"])
def test_frames_that_are_reordered_late_in_the_file(tmp_path, container):
    """The first groups of pictures show nothing, and single frames are sought for."""
    count, first = 144, 72
    source = tmp_path / "source.mp4"
    with av.open(str(source), "w") as out:
        stream = out.add_stream("libx264", rate=10, options=X264 | {"bf": "3", "b-adapt": "0", "g": "24"})
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        kinds = av.video.frame.PictureType
        for number, pixels in enumerate(coded_frames(count)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if number < first:
                frame.pict_type = kinds.P if number % 24 else kinds.I
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    path = remux(source, tmp_path / container, in_decode_order)
    for max_frames in (2, 4, 6, 16):
        assert_in_order(path, max_frames=max_frames)
    truth = shown(path)
    for number in range(60, len(truth), 5):
        decoder = PyAvDecoder(path)
        assert coded_numbers(decoder.frames([number]).pixels) == [truth[number]]
        decoder.close()


def test_true_times_cost_nothing_and_no_reordering_little(coded):
    decoded = {}
    for name in ("b-frames", "no b-frames"):
        decoder = PyAvDecoder(coded(name))
        frames = [decoder.frames([number]) for number in (0, 50, 95, 119)]
        assert [coded_numbers(one.pixels)[0] for one in frames] == [0, 50, 95, 119]
        decoded[name] = [one.decoded for one in frames]
        decoder.close()
    assert decoded["b-frames"][0] == 1
    assert max(decoded["b-frames"]) <= 24
    assert decoded["no b-frames"] == [3, 5, 24, 24], "at most two more than the frame needs, none past a key frame"


@pytest.mark.parametrize("name", ["b-frames", "no b-frames", "b-pyramid"])
@pytest.mark.parametrize("suffix", [".ts", ".flv", ".mkv"])
@pytest.mark.parametrize("starts", [(1, 1), (1, 4.95), (10, 1), (1, 2.5, 1.75), (5, 2.05), (1, 0.9), (1, 3.5)])
def test_a_clock_that_is_set_back(tmp_path, name, suffix, starts):
    """Recordings of 4 s in one file, whose clocks begin at these seconds."""
    pieces = []
    for number, start in enumerate(starts):
        frames = coded_frames(40 * len(starts))[40 * number : 40 * number + 40]
        piece = write_video(tmp_path / f"{number}.mp4", frames, options=CODED[name][1])
        live = {"live": "1"} if suffix == ".mkv" else {}
        pieces.append(remux(piece, tmp_path / f"{number}{suffix}", later(start), **live))
    path = join(pieces, tmp_path / f"whole{suffix}")
    clip = assert_in_order(path, count=40 * len(starts))
    steps = np.diff(clip.timestamps)
    assert steps.min() > 0.15, "one piece after the other"
    part = read_frames(path, max_frames=4, start=4.5, end=6.0)  # of the second piece
    assert all(44 <= number <= 61 for number in coded_numbers(part.frames))


def test_transport_streams_joined_by_cat_are_whole(tmp_path):
    pieces = [
        write_video(tmp_path / f"{number}.ts", coded_frames(130)[a:b], options=CODED["b-frames"][1])
        for number, (a, b) in enumerate(((0, 40), (40, 90), (90, 130)))
    ]
    path = join(pieces, tmp_path / "whole.ts")
    with av.open(str(path)) as container:
        assert any(packet.is_corrupt for packet in container.demux(video=0)), "FFmpeg suspects a loss at each joint"
    assert_in_order(path, count=130)


def test_a_loss_in_a_transport_stream_is_an_error_where_it_is_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.ts", noise, options=X264 | {"bf": "0", "g": "10"})
    data = path.read_bytes()
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    for at, lost in ((len(packets) // 2 + 5, 1), (len(packets) // 3, 3)):
        path.write_bytes(b"".join(packets[:at] + packets[at + lost :]))
        with av.open(str(path)) as container:
            assert any(packet.is_corrupt for packet in container.demux(video=0))
        decoder = PyAvDecoder(path)
        with pytest.raises(SampleError) as caught:
            decoder.frames(range(40))
        assert caught.value.kind == "decode"
        assert len(decoder.frames([5, 35]).pixels) == 2, "of other groups"
        decoder.close()


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize(("name", "container"), [("b-frames", "a.mp4"), ("b-frames", "a.mkv"), ("hevc", "a.mp4")])
def test_other_decoders_refuse_what_they_cannot_order(tmp_path, backend, name, container):
    """Frames wide enough for decord."""
    if backend == "decord":
        pytest.importorskip("decord")
    codec, options = CODED[name]
    source = write_video(tmp_path / "source.mp4", coded_frames(COUNT, 64, 160), codec=codec, options=options)
    path = remux(source, tmp_path / container, in_decode_order)
    truth = shown(path)
    decoder = open_decoder(path, backend=backend)
    for numbers in ([0, 50, 100], [97], list(range(30, 60))):
        if backend == "decord":
            with pytest.raises(SampleError, match="in which order they are shown"):
                decoder.frames(numbers)
        else:
            assert coded_numbers(decoder.frames(numbers).pixels) == [truth[number] for number in numbers]
    decoder.close()
    decoder = open_decoder(source, backend=backend)
    assert coded_numbers(decoder.frames([0, 50, 100]).pixels) == [0, 50, 100]
    decoder.close()


def test_timelines():
    def of(stamps, clock=None, key=(), reorder=2, header=None):
        keys = [number in key for number in range(len(stamps))]
        return timeline_of_packets(stamps, clock or [None] * len(stamps), keys, reorder, Fraction(1, 10), header)

    plain = of([0, 3, 1, 2, 6, 4, 5])
    assert (plain.stamps, plain.by_pts, plain.fps) == ((0, 1, 2, 3, 4, 5, 6), True, 10.0)
    back = of([10, 11, 12, 13, 3, 4, 5, 6])
    assert (back.by_pts, back.fps) == (False, 10.0)
    assert back.seconds == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7])
    little = of([10, 12, 14, 13, 15, 17], clock=[8, 9, 10, 9, 10, 11], key=(3,))
    assert (little.by_pts, little.fps) == (False, 5.0)
    assert not of([10, 12, 14, 13, 15, 17], clock=[8, 9, 10, 9, 10, 11]).by_pts, "decode times fall"
    twice = of([0, 1, 2, 2, 3])
    assert not twice.by_pts, "no frame has a time of its own"
    assert list(twice.seconds) == sorted(twice.seconds)
    untimed = of([0, None, 2], header=Fraction(5))
    assert (untimed.by_pts, untimed.seconds) == (False, (0.0, 0.2, 0.4))
    assert of([]).seconds == ()
    assert of([7]).seconds == (0.7,)
    assert of([7, 7, 7], header=Fraction(4)).seconds == (0.0, 0.25, 0.5)
    given = timeline_of_frames([0, 2, 3, 1, 5, 6, 4], Fraction(1, 10), None)
    assert (given.by_pts, given.fps, given.seconds[3]) == (False, 10.0, 0.3)
    assert timeline_of_frames([1, 2, 3], Fraction(1, 10), None).by_pts
