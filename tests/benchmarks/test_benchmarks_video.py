"""The video benchmarks: their files are what they say, and a wrong result has no speed."""

import dataclasses
import functools

import pytest
from made_up import CPU

from benchmarks import bench_decode, bench_frames_to_patches, measure, run
from benchmarks.measure import Clock, plain_stopwatch
from benchmarks.video_files import made_video
from videor1.video.decoders.index import read_index


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_frames_to_patches, "FRAMES", 2)
    monkeypatch.setattr(bench_frames_to_patches, "SOURCE", (216, 384))
    monkeypatch.setattr(bench_frames_to_patches, "SIZE", (28, 56))
    resize = functools.partial(bench_frames_to_patches._resize.func, size=(28, 56), mode="bicubic", antialias=True)
    monkeypatch.setattr(bench_frames_to_patches, "_resize", resize)
    return bench_frames_to_patches.cases(CPU)


def row_of(case, contender):
    clock = Clock(CPU)
    return measure.measure(case, contender, CPU, plain_stopwatch(clock), clock)


def test_frames_to_patches_beside_the_chain(small):
    for case in small:
        rows = [row_of(case, contender) for contender in case.contenders]
        assert [row.status for row in rows] == ["measured"] * 3, [row.reason for row in rows]
        assert rows[0].backend == "native"


def test_a_wrong_chain_has_no_speed(small, monkeypatch):
    monkeypatch.setattr(bench_frames_to_patches, "MEAN", (0.5, 0.5, 0.5))
    assert row_of(small[1], small[1].contenders[1]).status == "failed"


@pytest.mark.parametrize(("seconds", "frames"), [(5, 20), (60, 240)])
def test_made_files(seconds, frames):
    index = read_index(made_video(90, seconds, gop=8, rate=4))
    assert index.info.num_frames == frames
    assert index.info.key_frames == tuple(range(0, frames, 8))
    assert index.info.seconds == pytest.approx([i / 4 for i in range(frames)], abs=1e-3)
    assert any(dts != pts for dts, pts in zip(index.dts, index.pts, strict=True)), "B-frames"


def test_decoding_side_by_side():
    case = bench_decode._case("16 frames", "made", functools.partial(made_video, 90, 60, gop=8, rate=4))
    rows = run.in_turns(case, CPU, Clock(CPU), 1)
    ours, everything, decord = rows
    assert (ours.status, everything.status) == ("measured", "measured"), (ours.reason, everything.reason)
    assert max(ours.errors.values()) == 0
    assert decord.status == "measured" or decord.reason == "decord is not installed"


def test_other_frames_have_no_speed():
    case = bench_decode._case("16 frames", "made", functools.partial(made_video, 90, 5, gop=8, rate=4))

    def late(path, indices):
        return bench_decode._all(path, [*(i + 1 for i in indices[:-1]), indices[-1]])

    wrong = dataclasses.replace(case.contenders[0], build=bench_decode._step(late))
    rows = run.in_turns(dataclasses.replace(case, contenders=[wrong, case.contenders[1]]), CPU, Clock(CPU), 1)
    assert rows[0].status == "failed"
    assert "frames: rms error" in rows[0].reason
