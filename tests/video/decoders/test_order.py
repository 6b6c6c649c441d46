"""Frames come in the order in which they leave the decoder where a file's times follow another one."""

import functools
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from coded_videos import MADE, X264, Make, decode, decoded_numbers
from media import (
    coded_frames,
    coded_numbers,
    ffmpeg_frames,
    in_decode_order,
    join,
    later,
    packets_of,
    refusal,
    remux,
    write_video,
)

from videor1.types import Clip
from videor1.video import read_frames, sample_indices
from videor1.video.decoders.decord import DecordDecoder
from videor1.video.decoders.timeline import Timeline, timeline_of_frames, timeline_of_packets
from videor1_kernels.frames_to_patches import YuvFrames

CODED = ("b-frames", "one b-frame", "b-pyramid", "open gop", "gop 12")
IN = dict.fromkeys(CODED, (".mp4", ".mov", ".mkv", ".flv", ".ts"))
IN |= {"hevc": (".mp4", ".mkv", ".ts"), "mpeg4 mp4": (".mp4", ".mkv"), "mpeg2 mkv": (".mkv", ".ts")}


@functools.cache
def recording(folder: Path, name: str, number: int) -> Path:
    """Four seconds, coded as a file of MADE: frames 40 ``number`` and on."""
    path = folder / f"{name} {number}.mp4"
    return write_video(path, coded_frames(40 * number + 40)[-40:], options=MADE[name].options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


def shown(path: Path) -> list[int]:
    """The numbers of the frames as they leave the decoder."""
    return coded_numbers(np.stack([frame.to_ndarray(format="gray") for frame in ffmpeg_frames(path)]))


def assert_in_order(path: Path, *max_frames: int, truth: list[int] | None = None) -> Clip:
    """Read clips, as RGB and as planes by turns; their frames must be those that FFmpeg shows, sampled by the rule."""
    truth = truth or shown(path)
    assert truth == sorted(truth), "the decoder gives them in order"
    for turn, most in enumerate(max_frames or (16, 16)):
        clip = read_frames(path, max_frames=most, planes=turn % 2 == 1, threads=1 - turn % 2)
        pixels = clip.frames.planes[0] if isinstance(clip.frames, YuvFrames) else clip.frames
        expected = sample_indices(len(truth), clip.source_fps, max_frames=most, fps=2.0)
        assert coded_numbers(pixels) == [truth[i] for i in expected]
        assert clip.total_frames == len(truth)
        assert clip.source_fps == pytest.approx(10.0, rel=0.01)
        assert list(clip.timestamps) == sorted(clip.timestamps)
    return clip


@pytest.mark.parametrize(("name", "suffix"), [(name, suffix) for name in IN for suffix in IN[name]])
def test_times_that_follow_decoding(made: Make, tmp_path: Path, name: str, suffix: str) -> None:
    path = remux(made(name), tmp_path / f"a{suffix}", in_decode_order, most=120)
    stamps = [packet.pts for packet in packets_of(path)]
    assert all(a < b for a, b in pairwise(stamps)), "no time shows that frames are reordered"
    assert_in_order(path, 2, 4, 16)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".flv"])
def test_frames_that_are_reordered_late_in_the_file(tmp_path: Path, suffix: str) -> None:
    """The first groups of pictures show nothing, and single frames are sought for."""
    source, first, kinds = tmp_path / "source.mp4", 72, av.video.frame.PictureType
    with av.open(str(source), "w") as out:
        stream = out.add_stream("libx264", rate=10, options=X264 | {"bf": "3", "b-adapt": "0", "g": "24"})
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        for number, pixels in enumerate(coded_frames(2 * first)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if number < first:
                frame.pict_type = kinds.P if number % 24 else kinds.I
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    path = remux(source, tmp_path / f"a{suffix}", in_decode_order)
    truth = shown(path)
    assert_in_order(path, 2, 4, 6, 16, truth=truth)
    for number in range(60, len(truth), 5):
        assert decoded_numbers(decode(path, [number])) == [truth[number]]


@pytest.mark.grid(
    name=["b-frames", "gop 12", "b-pyramid"],
    suffix=[".ts", ".flv", ".mkv"],
    starts=[(1, 1), (1, 4.95), (10, 1), (1, 2.5, 1.75), (5, 2.05), (1, 0.9), (1, 3.5)],
)
def test_a_clock_that_is_set_back(folder: Path, tmp_path: Path, name: str, suffix: str, starts: Any) -> None:
    """Recordings of 4 s in one file, whose clocks begin at these seconds."""
    live = {"live": "1"} if suffix == ".mkv" else {}
    pieces = [
        remux(recording(folder, name, number), tmp_path / f"{number}{suffix}", later(start), **live)
        for number, start in enumerate(starts)
    ]
    path = join(pieces, tmp_path / f"whole{suffix}")
    clip = assert_in_order(path, truth=list(range(40 * len(starts))))
    assert np.diff(clip.timestamps).min() > 0.15, "one piece after the other"
    part = read_frames(path, max_frames=4, start=4.5, end=6.0)  # of the second piece
    assert all(44 <= number <= 61 for number in coded_numbers(part.frames))


def test_files_that_are_whole_and_one_that_is_not(made: Make, tmp_path: Path) -> None:
    """H.264 in AVI, as UCF101 and HMDB51 are published, and transport streams joined by cat."""
    for name in ("b-frames", "b-pyramid"):
        path = write_video(tmp_path / f"{name}.avi", coded_frames(120), options=MADE[name].options)
        assert_in_order(path, 2, 16, truth=list(range(120)))
    pieces = [
        write_video(tmp_path / f"{first}.ts", coded_frames(130)[first:stop], options=MADE["b-frames"].options)
        for first, stop in ((0, 40), (40, 90), (90, 130))
    ]
    path = join(pieces, tmp_path / "whole.ts")
    assert any(packet.is_corrupt for packet in packets_of(path)), "FFmpeg suspects a loss at each joint"
    assert_in_order(path, truth=list(range(130)))
    frames = [decode(made("gop 12"), [number]) for number in (0, 50, 95, 119)]
    assert [decoded_numbers(one)[0] for one in frames] == [0, 50, 95, 119]
    told = "no reordering costs at most two more than the frame needs, none past a key frame"
    assert [one.decoded for one in frames] == [3, 5, 12, 12], told
    # A loss in a transport stream is an error where it is decoded.
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.ts", noise, options=X264 | {"bf": "0", "g": "10"})
    data = path.read_bytes()
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    for at, lost in ((len(packets) // 2 + 5, 1), (len(packets) // 3, 3)):
        path.write_bytes(b"".join(packets[:at] + packets[at + lost :]))
        assert any(packet.is_corrupt for packet in packets_of(path))
        assert refusal(decode, path, range(40)).kind == "decode"
        assert len(decode(path, [5, 35]).pixels) == 2, "of other groups"


@pytest.mark.parametrize(("name", "suffix"), [("b-frames", ".mp4"), ("b-frames", ".mkv"), ("hevc", ".mp4")])
def test_other_decoders_refuse_what_they_cannot_order(made: Make, tmp_path: Path, name: str, suffix: str) -> None:
    pytest.importorskip("decord")
    path = remux(made(name), tmp_path / f"a{suffix}", in_decode_order)
    truth = shown(path)
    for numbers in ([0, 50, 100], [97], list(range(30, 60))):
        assert decoded_numbers(decode(path, numbers)) == [truth[number] for number in numbers]
        assert "in which order they are shown" in refusal(decode, path, numbers, by=DecordDecoder).message
    assert decoded_numbers(decode(made(name), [0, 50, 100], by=DecordDecoder)) == [0, 50, 100]


def timeline(stamps: Sequence[int | None], clock: Any = (), key: Any = (), header: Fraction | None = None) -> Timeline:
    keys = [number in key for number in range(len(stamps))]
    return timeline_of_packets(stamps, clock or [None] * len(stamps), keys, 2, Fraction(1, 10), header)


def test_timelines() -> None:
    plain = timeline([0, 3, 1, 2, 6, 4, 5])
    assert (plain.stamps, plain.by_pts, plain.fps) == ((0, 1, 2, 3, 4, 5, 6), True, 10.0)
    assert [timeline([0, 1, 2], header=Fraction(rate)).fps for rate in ("10.05", "11")] == [10.05, 10.0]
    back = timeline([10, 11, 12, 13, 3, 4, 5, 6])
    assert (back.by_pts, back.fps) == (False, 10.0)
    assert back.seconds == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7])
    little = timeline([10, 12, 14, 13, 15, 17], clock=[8, 9, 10, 9, 10, 11], key=(3,))
    assert (little.by_pts, little.fps) == (False, 5.0)
    assert not timeline([10, 12, 14, 13, 15, 17], clock=[8, 9, 10, 9, 10, 11]).by_pts, "decode times fall"
    twice = timeline([0, 1, 2, 2, 3])
    assert not twice.by_pts, "no frame has a time of its own"
    assert list(twice.seconds) == sorted(twice.seconds)
    untimed = timeline([0, None, 2], header=Fraction(5))
    assert (untimed.by_pts, untimed.seconds) == (False, (0.0, 0.2, 0.4))
    assert timeline([]).seconds == ()
    assert timeline([7]).seconds == (0.7,)
    assert timeline([7, 7, 7], header=Fraction(4)).seconds == (0.0, 0.25, 0.5)
    given = timeline_of_frames([0, 2, 3, 1, 5, 6, 4], Fraction(1, 10), None)
    assert (given.by_pts, given.fps, given.seconds[3]) == (False, 10.0, 0.3)
    assert timeline_of_frames([1, 2, 3], Fraction(1, 10), None).by_pts
