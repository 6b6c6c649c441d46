"""decord returns the requested frames or a SampleError; it never returns others."""

import importlib
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from coded_videos import COUNT, Make, assert_frames_asked_for, decode, whole
from media import later, numbered_frames, real_video, refusal, remux, write_video
from video_libraries import install

from videor1.video.decoders.decord import DecordDecoder

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("decord has no wheel for this machine", allow_module_level=True)
decord = importlib.import_module("decord")

OPEN = ("open gop", "open gop mkv", "intra refresh", "intra refresh mkv", "hevc open gop", "hevc radl")
READ = ("gop 1", "gop 12", "gop 250", "b-frames", "b-frames mkv", "b-frames flv", *OPEN, "hevc closed gop", "vp8")
READ += ("mpeg4 mp4", "no table of key frames")
TRIED = {"gop 12", "b-frames", "open gop mkv"}  # by test_decoders.py


def refused(path: Path, indices: Iterable[int]) -> str:
    """The message of the error that reading these frames must raise, in one line."""
    error = refusal(decode, path, indices, by=DecordDecoder)
    assert error.kind == "decode"
    assert error.message.startswith("decord: ")
    assert "\n" not in error.message
    return error.message


@pytest.mark.parametrize("name", sorted({*READ, "variable frame rate mp4"} - TRIED))
def test_the_frames_asked_for(made: Make, name: str) -> None:
    assert_frames_asked_for(DecordDecoder(made(name)), made(name), backend="decord")


def test_few_frames_are_decoded_of_closed_gops_only(made: Make) -> None:
    decoded = {name: DecordDecoder(made(name)).frames([47, 30]).decoded for name in READ}
    # Of a file without a table of key frames, decord takes every packet for one, which is not believed.
    in_order = {*OPEN, "mpeg4 mp4", "no table of key frames", "gop 250"}
    assert decoded["b-frames flv"] == COUNT, "it may begin behind the first frame, which only its end shows"
    assert {name for name, count in decoded.items() if count == 48} == in_order
    assert decoded["gop 12"] == 12 + 7
    assert decoded["b-frames"] == decoded["b-frames mkv"] == 24
    assert DecordDecoder(made("gop 12")).frames([14, 20, 15]).decoded == 9


@pytest.mark.parametrize(("name", "levels"), [("pancake.mkv", 0), ("hevc.mp4", 0), ("rotated_90.mov", 3)])
def test_real_videos(name: str, levels: int) -> None:
    path = real_video(name)
    expected, seconds = whole(path)
    count = len(expected)
    indices = [count - 1, 0, count // 2, count // 2, count // 3]
    frames = DecordDecoder(path).frames(indices)
    # decord turns a picture before it converts its colours, PyAV's is turned afterwards.
    assert (frames.pixels.int() - expected[indices].int()).abs().max() <= levels
    assert frames.rotation == 0
    assert frames.seconds == pytest.approx([seconds[i] for i in indices])


UNTOLD = {"mpeg4 avi": "frames cannot be told apart", "no times": "do not say in which order"}
UNTOLD |= {"gif": "Failed to measure", "b-frames ts": "recovered from nearest frames"}


@pytest.mark.parametrize(("name", "reason"), UNTOLD.items())
def test_what_it_cannot_tell_apart_is_refused(made: Make, tmp_path: Path, name: str, reason: str) -> None:
    assert reason in refused(made(name), [3, 20, 45])
    narrow = write_video(tmp_path / "narrow.mp4", numbered_frames(8, 32, 48))
    assert "size must exactly match" in refused(narrow, [1, 2])


@pytest.mark.parametrize(("name", "reason"), [("corrupted.mp4", "Error sending packet"), ("av1.mkv", "video stream")])
def test_it_is_quiet_about_bad_files(capfd: pytest.CaptureFixture[str], name: str, reason: str) -> None:
    path = real_video(name)
    message = refused(path, range(DecordDecoder(path).probe().num_frames))
    assert reason in message
    assert ".cc" not in message
    assert capfd.readouterr().err == ""


def test_an_early_end_and_frames_too_many(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit list hides frames that are stored, but not shown."""
    edited = remux(made("b-frames"), tmp_path / "edit.mp4", later(-0.5))
    assert_frames_asked_for(DecordDecoder(edited), edited, backend="decord", first=5)
    bridged = decord.VideoReader(str(made("b-frames")))[0]
    assert isinstance(bridged, decord.nd.NDArray), "its bridge stays as it was"
    install(monkeypatch, "decord", left=20)
    assert "ended after 20 of 320 frames" in refused(made("open gop"), [1, 30])
    install(monkeypatch, "decord")
    assert "shows more than the 315 frames" in refused(edited, [1])
    install(monkeypatch, "decord", left=COUNT - 5)
    assert len(DecordDecoder(edited).frames([1]).pixels) == 1
