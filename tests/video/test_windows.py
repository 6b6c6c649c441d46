"""Parts of videos, and videos that are folders of images: which frames are seen, what is refused, what caches keep."""

import functools
import os
from pathlib import Path

import pytest
import torch
from media import frame_numbers, numbered_frames, refusal, sample_of, write_video
from PIL import Image

from videor1.config import VideoConfig
from videor1.data.cache import disk_cache
from videor1.data.prefetch import Prefetcher
from videor1.types import Clip
from videor1.video import frames_between, read_frames
from videor1.video.frame_folder import folder_key, read_frame_folder
from videor1.video.media import load_media, media_key

VIDEO = VideoConfig(max_frames=8, max_pixels=56 * 56, min_pixels=56 * 56)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty frames, frame i at second i / 10."""
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", numbered_frames(50), rate=10)


def write_images(folder: Path, count: int = 12, name: str = "{:05d}.png") -> Path:
    folder.mkdir()
    for i, frame in enumerate(numbered_frames(count), start=1):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


def numbers(clip: Clip) -> list[int]:
    return frame_numbers(clip.frames)


@pytest.mark.parametrize("backend", ["pyav", "auto"])
def test_only_the_window_is_seen(video: Path, tmp_path: Path, backend: str) -> None:
    clip = read_frames(video, start=1.0, end=3.0, fps=2.0, backend=backend)
    assert numbers(clip) == [10, 17, 23, 30]  # linspace over frames 10 to 30, both included
    assert clip.timestamps == pytest.approx((1.0, 1.7, 2.3, 3.0))
    assert clip.fps == pytest.approx(4 / 21 * 10)
    assert clip.total_frames == 50
    assert numbers(read_frames(video, start=4.55, fps=10.0)) == [46, 47, 48, 49]
    assert numbers(read_frames(video, end=0.3, fps=10.0)) == [0, 1, 2, 3]
    for whole in ({"end": 99.0}, {"start": 0.0, "end": 4.9}):
        assert numbers(read_frames(video, **whole)) == numbers(read_frames(video))
    # Seconds count from the first frame.
    times = [3000 + 100 * i for i in range(30)]
    path = write_video(tmp_path / "late.mkv", numbered_frames(30), rate=10, pts_ms=times)
    assert read_frames(path).timestamps[0] == pytest.approx(3.0)
    assert numbers(read_frames(path, start=1.0, end=2.0, fps=2.0)) == [10, 13, 17, 20]
    # By time, not by number.
    uneven = [10.0, 10.1, 10.2, 12.0, 14.0, 14.1]
    assert frames_between(path, uneven, 0.1, 2.0) == range(1, 4)
    assert frames_between(path, uneven, None, None) == range(6)
    assert frames_between(path, [], 1.0, 2.0) == range(0)
    # A frame at a bound is in, however its time, and the bound's, were rounded.
    for first in (0.0, 0.08, 0.1, 1.4, 1 / 30):
        shown = [first + i / 10 for i in range(100)]
        for i in range(98):
            assert frames_between(path, shown, i / 10, (i + 1) / 10) == range(i, i + 2)


def test_windows_and_folders_that_are_none(video: Path, tmp_path: Path) -> None:
    for start, end in ((5.0, 6.0), (1.01, 1.09), (1.0, 1.05)):
        error = refusal(read_frames, video, start=start, end=end)
        assert error.kind == "too_few_frames"
        assert f"from second {start:g} to {end:g} there are " in error.message
        assert "its last frame is at 4.90" in error.message
    assert "to the end there are 1 " in refusal(read_frames, video, start=4.85).message
    for start, end in ((-1.0, 2.0), (2.0, 2.0), (3.0, 1.0), (None, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="0 <= start < end"):
            read_frames(video, start=start, end=end)
    # Folders that are none.
    broken, mixed = write_images(tmp_path / "broken", 6), write_images(tmp_path / "mixed", 6)
    (broken / "00003.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(mixed / "00006.png")
    (tmp_path / "empty").mkdir()
    for folder, kind, options in (
        (tmp_path / "nothing", "missing_file", {}),
        (video, "missing_file", {}),
        (tmp_path / "empty", "zero_frames", {}),
        (write_images(tmp_path / "one", 1), "too_few_frames", {}),
        (write_images(tmp_path / "short", 6), "too_few_frames", {"start": 5.0, "end": 6.0}),
        (mixed, "decode", {}),
    ):
        assert refusal(read_frame_folder, folder, frames_per_second=3.0, **options).kind == kind
    named = broken / "00003.png"
    assert refusal(lambda _: read_frame_folder(broken, frames_per_second=3.0), named).kind == "image"
    with pytest.raises(ValueError, match="frames_per_second"):
        read_frame_folder(mixed, frames_per_second=0.0)


def test_images_of_a_folder_are_a_video(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clip", name="frame_{}.png")  # in order of their numbers: 10 comes after 9
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    assert numbers(read_frame_folder(folder, frames_per_second=1.0, max_frames=12)) == list(range(12))
    clip = read_frame_folder(folder, frames_per_second=3.0, fps=2.0)
    assert numbers(clip) == [0, 2, 3, 5, 6, 8, 9, 11]  # 12 frames at 3 a second: 4 seconds
    assert clip.timestamps == pytest.approx([i / 3 for i in (0, 2, 3, 5, 6, 8, 9, 11)])
    assert clip.fps == pytest.approx(8 / 4)
    part = read_frame_folder(folder, frames_per_second=3.0, start=1.0, end=2.0, fps=3.0)
    assert numbers(part) == [3, 4, 5, 6]
    same = read_frames(write_video(tmp_path / "same.mp4", numbered_frames(12), rate=3), fps=2.0)
    assert (same.size, same.fps, numbers(same)) == (clip.size, clip.fps, numbers(clip))


def test_media_and_caches_keep_windows_apart(tmp_path: Path, video: Path) -> None:
    folder = write_images(tmp_path / "clip")
    windows = ({}, {"start": 1.0, "end": 3.0}, {"end": 3.0}, {"start": 1.0})
    samples = [*(sample_of(video, **window) for window in windows), sample_of(folder, frames_per_second=3.0)]
    fresh = [load_media(sample, VIDEO) for sample in samples]
    assert (fresh[-1].kind, fresh[-1].grid_thw[0]) == ("video", 4)
    assert fresh[1].patches.double().mean() < fresh[0].patches.double().mean()
    assert len({media_key(sample).name for sample in samples}) == 5
    for memory in (2**20, 0):
        with Prefetcher(
            functools.partial(load_media, video=VIDEO),
            workers=0,
            depth=4,
            timeout=10,
            cache_bytes=memory,
            key=media_key,
            disk=disk_cache(str(tmp_path / "cache"), 16, VIDEO),
        ) as prefetcher:
            given = [media for _, media in prefetcher.iterate(samples + samples)]
        assert all(torch.equal(got.patches, known.patches) for got, known in zip(given, fresh + fresh, strict=True))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 5
    # A folder that changes is another version.
    before = folder_key("video", folder)
    assert folder_key("video", folder) == before
    os.utime(folder / "00002.png", (1, 1))
    changed = folder_key("video", folder)
    assert changed.name == before.name
    assert changed.version != before.version
    assert folder_key("video", tmp_path / "nothing").version is None
