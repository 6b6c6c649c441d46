"""The file that is decoded is the one that was checked, whatever its path leads to afterwards."""

from __future__ import annotations

import gc
import os
import sys

import numpy as np
import pytest
from media import coded_frames, coded_numbers, write_video
from PIL import Image

from videor1.config import VideoConfig
from videor1.data.prefetch import Prefetcher
from videor1.data.samples import load_samples
from videor1.report.thumbnails import Thumbnails
from videor1.types import Sample, SampleError
from videor1.video import opened, read_frames, read_image
from videor1.video.frame_folder import read_frame_folder
from videor1.video.media import load_media, media_key
from videor1.video.opened import MediaFile
from videor1.video.version import Key

VIDEO = VideoConfig(max_pixels=56 * 84, image_max_pixels=56 * 84)


@pytest.fixture(params=["with /proc", "without /proc"])
def system(request, monkeypatch, tmp_path):
    if request.param == "without /proc":
        monkeypatch.setattr(opened, "_OPEN_FILES", str(tmp_path / "no such folder"))
    return request.param


@pytest.fixture
def places(tmp_path):
    """A root with a video and an image, and others outside of it."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    for folder, shade in ((root, 40), (outside, 200)):
        write_video(folder / "a.mp4", coded_frames(20)[::-1] if shade == 200 else coded_frames(20))
        Image.new("RGB", (60, 40), (shade,) * 3).save(folder / "a.png")
    return root, outside


def sample_of(path, root, kind="video"):
    return Sample(0, "0", "Which?", kind, "free-form", "<answer>x</answer>", path=path, root=root)


def kind_of(call, *args, **kwargs):
    with pytest.raises(SampleError) as caught:
        call(*args, **kwargs)
    return caught.value.kind


def swap(path, target):
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize(("name", "kind"), [("a.mp4", "video"), ("a.png", "image")])
def test_a_file_that_became_a_symlink(system, places, name, kind):
    root, outside = places
    sample = sample_of(root / name, root, kind)
    before, key = load_media(sample, VIDEO), media_key(sample)
    assert key.version is not None
    swap(root / name, outside / name)
    assert kind_of(load_media, sample, VIDEO) == "outside_root"
    assert media_key(sample).version is None, "no cache may have it"
    swap(root / name, root / f"moved-{name}")
    write_video(root / "moved-a.mp4", coded_frames(20))
    Image.new("RGB", (60, 40), (40, 40, 40)).save(root / "moved-a.png")
    assert load_media(sample, VIDEO).patches.equal(before.patches), "a link within the root is followed"


def test_a_folder_that_became_a_symlink(system, places):
    root, outside = places
    (root / "inner").mkdir()
    path = (root / "a.mp4").rename(root / "inner" / "a.mp4")
    sample = sample_of(path, root)
    assert load_media(sample, VIDEO) is not None
    path.unlink()
    (root / "inner").rmdir()
    (root / "inner").symlink_to(outside)
    assert kind_of(load_media, sample, VIDEO) == "outside_root"


def test_images_of_a_folder(system, places):
    root, outside = places
    folder = root / "frames"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (60, 40), (number,) * 3).save(folder / f"{number}.png")
    assert len(read_frame_folder(folder, frames_per_second=3.0, root=root).frames) == 4
    swap(folder / "2.png", outside / "a.png")
    assert kind_of(read_frame_folder, folder, frames_per_second=3.0, root=root) == "outside_root"
    assert len(read_frame_folder(folder, frames_per_second=3.0).frames) == 4, "no root was given"


def test_a_swap_between_the_check_and_the_decoding(places, monkeypatch):
    """The path leads elsewhere as soon as the file is open: what was opened is decoded."""
    root, outside = places
    swapped = []
    init = MediaFile.__init__

    def swapping(self, path, *args):
        init(self, path, *args)
        if not swapped:
            swapped.append(path)
            swap(root / "a.mp4", outside / "a.mp4")

    expected = coded_numbers(read_frames(root / "a.mp4").frames)
    monkeypatch.setattr(MediaFile, "__init__", swapping)
    assert coded_numbers(read_frames(root / "a.mp4", root=root).frames) == expected
    assert swapped


def test_swapped_at_any_moment(system, places):
    """The path leads elsewhere from each line on that opens and checks a file: frames of the outside never come."""
    root, outside = places
    inside, path = root / "a.mp4", root / "link.mp4"
    targets = (inside, outside / "a.mp4")
    good = coded_numbers(read_frames(inside).frames)
    seen, lines = set(), 0

    def lead(target):
        (root / "spare").symlink_to(target)
        os.replace(root / "spare", path)

    def read(moment, before, after):
        """Return what is read where the link leads to another file from the ``moment``-th line on."""
        nonlocal lines
        lead(before)
        lines = 0

        def trace(frame, event, _):
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


def test_a_cache_does_not_give_what_lies_outside(places, tmp_path):
    """The outside file is cached by its own path; a link to it is refused all the same."""
    root, outside = places
    with Prefetcher(_load, workers=0, depth=1, timeout=60, cache_bytes=2**24, key=media_key) as ahead:
        ((_, found),) = ahead.iterate([sample_of(outside / "a.mp4", outside)])
        assert not isinstance(found, SampleError)
        swap(root / "a.mp4", outside / "a.mp4")
        ((_, refused),) = ahead.iterate([sample_of(root / "a.mp4", root)])
    assert refused.kind == "outside_root"


def _load(sample):
    return load_media(sample, VIDEO)


def test_samples_of_a_data_file_know_their_root(places):
    root, outside = places
    data = root / "data.jsonl"
    data.write_text(
        '{"problem": "Which?", "data_type": "video", "problem_type": "free-form", '
        '"solution": "<answer>x</answer>", "path": "a.mp4"}\n'
    )
    (sample,) = load_samples(data).samples
    assert sample.root == root.resolve()
    assert load_media(sample, VIDEO) is not None
    swap(root / "a.mp4", outside / "a.mp4")
    assert kind_of(load_media, sample, VIDEO) == "outside_root"


def test_thumbnails_stay_in_the_root(places):
    root, outside = places
    swap(root / "a.mp4", outside / "a.mp4")
    thumbnails = Thumbnails(10**6, 60.0)
    thumbnails.add(root / "a.mp4", "video", VIDEO, root)
    assert thumbnails.media[0]["frames"] == []
    assert "outside data.root" in thumbnails.media[0]["note"]


def test_what_is_no_file(tmp_path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    closed = tmp_path / "closed.mp4"
    closed.write_bytes(b"x")
    loop = tmp_path / "loop.mp4"
    loop.symlink_to(loop)
    for path, kind in (
        (pipe, "not_video"),
        (tmp_path, "not_video"),
        (loop, "missing_file"),
        (tmp_path / "a\0b", "missing_file"),
        (tmp_path / ("x" * 300), "not_video"),
        (closed / "inner.mp4", "missing_file"),
    ):
        assert kind_of(read_frames, path) == kind, path
    assert kind_of(read_image, pipe) == "image"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_no_file_stays_open(places):
    root, _ = places
    text = root / "text.mp4"
    text.write_text("no video")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_frames(root / "a.mp4", root=root)
        read_image(root / "a.png", root=root)
        kind_of(read_frames, text)
        kind_of(read_image, text)
        kind_of(read_frames, root / "a.mp4", root=root / "elsewhere")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_name_without_its_ending(tmp_path):
    """What a file is follows from its bytes; the name under which it is opened has no ending."""
    for name, codec, pix_fmt in (
        ("a.gif", "gif", "rgb8"),
        ("a.apng", "apng", "rgb24"),
        ("a.264", "libx264", "yuv420p"),
    ):
        path = write_video(
            tmp_path / name,
            coded_frames(10),
            codec=codec,
            pix_fmt=pix_fmt,
            container="h264" if ".264" in name else None,
        )
        numbers = coded_numbers(read_frames(path.rename(tmp_path / "plain")).frames)
        assert numbers == sorted(numbers)
        assert len(set(numbers)) == len(numbers)


def test_keys_within_a_root(places):
    root, outside = places
    inside = media_key(sample_of(root / "a.mp4", root))
    assert isinstance(inside, Key)
    assert inside == media_key(sample_of(root / "a.mp4", None))
    assert media_key(sample_of(outside / "a.mp4", root)).version is None
    assert np.isfinite(inside.format)
