"""The file that is decoded is the one that was checked, whatever its path leads to afterwards."""

import functools
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from media import coded_frames, coded_numbers, refusal, sample_of, write_video
from PIL import Image

from videor1.config import VideoConfig
from videor1.data.prefetch import Prefetcher
from videor1.data.samples import load_samples
from videor1.report.thumbnails import Thumbnails
from videor1.types import Media, MediaItem, SampleError
from videor1.video import opened, read_frames, read_image
from videor1.video.frame_folder import read_frame_folder
from videor1.video.media import load_media, media_key

VIDEO = VideoConfig(max_pixels=56 * 84, image_max_pixels=56 * 84)
load = functools.partial(load_media, video=VIDEO)


@pytest.fixture(params=["with /proc", "without /proc"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if request.param == "without /proc":
        monkeypatch.setattr(opened, "_OPEN_FILES", str(tmp_path / "no such folder"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a video and an image; ``outside`` beside it has others of these names."""
    for name, frames, shade in (("root", coded_frames(20), 40), ("outside", coded_frames(20)[::-1], 200)):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "a.mp4", frames)
        Image.new("RGB", (60, 40), (shade,) * 3).save(tmp_path / name / "a.png")
    return tmp_path / "root"


def swap(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize(("name", "kind"), [("a.mp4", "video"), ("a.png", "image")])
def test_a_file_that_became_a_symlink(system: None, root: Path, name: str, kind: str) -> None:
    (root / "inner").mkdir()
    path, moved = (root / name).rename(root / "inner" / name), root / name
    outside, sample = root.with_name("outside"), sample_of(path, kind, root=root)
    before, key = load(sample), media_key(sample)
    assert key == media_key(sample_of(path, kind))
    assert key.version is not None
    path.rename(moved)
    path.symlink_to(outside / name)
    assert refusal(load, sample).kind == "outside_root"
    assert media_key(sample).version is None, "no cache may have it"
    assert media_key(sample_of(outside / name, kind, root=root)).version is None
    swap(path, moved)
    assert load(sample).patches.equal(before.patches), "a link within the root is followed"
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(outside)
    assert refusal(load, sample).kind == "outside_root", "its folder became a link"


def test_swapped_at_any_moment(system: None, root: Path) -> None:
    """The path leads elsewhere from each line on that opens and checks a file: frames of the outside never come."""
    inside, path = root / "a.mp4", root / "link.mp4"
    targets = (inside, root.with_name("outside") / "a.mp4")
    good = coded_numbers(read_frames(inside).frames)
    seen, lines = set(), 0

    def lead(target: Path) -> None:
        (root / "spare").symlink_to(target)
        os.replace(root / "spare", path)

    def read(moment: int, before: Path, after: Path) -> str:
        """Return what is read where the link leads to another file from the ``moment``-th line on."""
        nonlocal lines
        lead(before)
        lines = 0

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != opened.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == moment:
                    lead(after)
            return trace

        sys.settrace(trace)
        try:
            numbers = coded_numbers(read_frames(path, root=root, threads=1).frames)
        except SampleError as error:
            return error.kind
        finally:
            sys.settrace(None)
        return "frames" if numbers == good else "frames of the outside"

    for before, after in (targets, targets[::-1]):
        moment = 1
        while moment == 1 or moment <= lines:
            seen.add((before is inside, read(moment, before, after)))
            moment += 1
        assert moment > 20, "the lines of opened.py were not followed"
    assert seen == {(inside_first, kind) for inside_first in (True, False) for kind in ("frames", "outside_root")}


def test_who_else_reads_files_stays_in_the_root(system: None, root: Path) -> None:
    """A folder's images, samples of a data file, a cache that holds the outside file by its path, and thumbnails."""
    folder = root / "frames"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (60, 40), (number,) * 3).save(folder / f"{number}.png")
    assert len(read_frame_folder(folder, frames_per_second=3.0, root=root).frames) == 4
    swap(folder / "2.png", root.with_name("outside") / "a.png")
    error = refusal(lambda _: read_frame_folder(folder, frames_per_second=3.0, root=root), folder / "2.png")
    assert error.kind == "outside_root"
    assert len(read_frame_folder(folder, frames_per_second=3.0).frames) == 4, "no root was given"

    path, outside, data = root / "a.mp4", root.with_name("outside"), root / "data.jsonl"
    data.write_text(
        '{"problem": "Which?", "data_type": "video", "problem_type": "free-form", '
        '"solution": "<answer>x</answer>", "path": "a.mp4"}\n'
    )
    (sample,) = load_samples(data).samples
    assert sample.root == root.resolve()
    assert load(sample) is not None
    swap(path, outside / "a.mp4")
    assert refusal(load, sample).kind == "outside_root"
    with Prefetcher(load, workers=0, depth=1, timeout=60, cache_bytes=2**24, key=media_key) as ahead:
        given = [sample_of(outside / "a.mp4", root=outside), sample_of(path, root=root)]
        found, refused = (media for _, media in ahead.iterate(given))
    assert isinstance(found, Media)
    assert isinstance(refused, SampleError)
    assert refused.kind == "outside_root"
    thumbnails = Thumbnails(10**6, 60.0)
    thumbnails.add(MediaItem("video", path), VIDEO, root)
    assert thumbnails.media[0]["frames"] == []
    assert "outside data.root" in thumbnails.media[0]["note"]


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe, closed, loop = (tmp_path / f"{name}.mp4" for name in ("pipe", "closed", "loop"))
    os.mkfifo(pipe)
    closed.write_bytes(b"x")
    loop.symlink_to(loop)
    for path in (pipe, tmp_path, tmp_path / ("x" * 300)):
        assert refusal(read_frames, path).kind == "not_video", path
    for path in (loop, tmp_path / "a\0b", closed / "inner.mp4"):
        assert refusal(read_frames, path).kind == "missing_file", path
    assert refusal(read_image, pipe).kind == "image"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_no_file_stays_open(root: Path) -> None:
    text = root / "text.mp4"
    text.write_text("no video")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(6):
        read_frames(root / "a.mp4", root=root)
        read_image(root / "a.png", root=root)
        refusal(read_frames, text)
        refusal(read_image, text)
        refusal(read_frames, root / "a.mp4", root=root / "elsewhere")
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("kind", ["gif rgb8 gif", "apng rgb24 apng", "libx264 yuv420p h264"])
def test_a_name_without_its_ending(tmp_path: Path, kind: str) -> None:
    """What a file is follows from its bytes; the name under which it is opened has no ending."""
    codec, pix_fmt, container = kind.split()
    path = write_video(tmp_path / "plain", coded_frames(10), codec=codec, pix_fmt=pix_fmt, container=container)
    numbers = coded_numbers(read_frames(path).frames)
    assert numbers == sorted(set(numbers))
