"""Samples of several media: loaded and cached one by one, bounded as a whole, and lost as a whole with the path of the
one at fault; and videos that are images with timestamps."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from media import frame_numbers, numbered_frames, write_video
from PIL import Image

from videor1.config import TrainConfig, VideoConfig
from videor1.data import load_samples
from videor1.data.cache import DiskCache, disk_cache
from videor1.data.prefetch import Prefetcher
from videor1.data.source import Source
from videor1.types import Media, MediaItem, Sample, SampleError
from videor1.video.frame_folder import read_frame_files, read_frame_folder
from videor1.video.media import join_media, load_media, media_key, media_parts
from videor1.video.patches import media_from_clip

VIDEO = VideoConfig(max_frames=8, max_pixels=56 * 56, min_pixels=56 * 56, image_max_pixels=56 * 56)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name, count in (("a.mp4", 20), ("b.mp4", 30)):
        write_video(folder / name, numbered_frames(count), rate=10)
    for number, frame in enumerate(numbered_frames(6)):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder


def item(path: Path, **fields: Any) -> MediaItem:
    return MediaItem("image" if path.suffix == ".png" else "video", path, **fields)


def sample_of(*items: MediaItem, index: int = 0) -> Sample:
    return Sample(index, "0", "Which?", "video", "free-form", "<answer>x</answer>", items[0].named, media=items)


def ahead(folder: Path | None = None, *, workers: int = 0, memory: int = 2**24, **limits: Any) -> Prefetcher[Any, Any]:
    return Prefetcher(
        functools.partial(load_media, video=VIDEO),
        workers=workers,
        depth=4,
        timeout=limits.get("timeout", 60),
        cache_bytes=memory,
        key=media_key,
        disk=disk_cache(str(folder), 64, VIDEO) if folder else None,
        parts=media_parts,
        join=functools.partial(join_media, max_decoded_mb=limits.get("max_decoded_mb", 1024)),
    )


def same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.patches, b.patches) and (a.kind, a.grid_thw, a.times) == (b.kind, b.grid_thw, b.times)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_each_medium_is_cached_by_itself(folder: Path, tmp_path: Path, workers: int) -> None:
    a, b, still = item(folder / "a.mp4"), item(folder / "b.mp4", start=1.0), item(folder / "0.png")
    samples = [sample_of(a, b), sample_of(a), sample_of(still, b, a, b), sample_of(b, still)]
    alone = {one: load_media(sample_of(one), VIDEO) for one in (a, b, still)}
    plain = Sample(0, "0", "?", "video", "free-form", "<answer>x</answer>", folder / "a.mp4")
    assert media_key(plain) == media_key(sample_of(a)), "an entry that lists one file shares its cache"
    with ahead(tmp_path / "cache", workers=workers) as prefetcher:
        given = [next(prefetcher.iterate([sample]))[1] for sample in samples]
        assert (prefetcher.stats.loaded, prefetcher.stats.disk_hits, prefetcher.stats.cache_hits) == (3, 0, 2)
    for sample, got in zip(samples, given, strict=True):
        assert same(got if isinstance(got, tuple) else (got,), [alone[one] for one in sample.items])
        again = load_media(sample, VIDEO)
        assert same(again if isinstance(again, tuple) else (again,), [alone[one] for one in sample.items])
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    with ahead(tmp_path / "cache", workers=workers, memory=0) as prefetcher:
        (got,) = [media for _, media in prefetcher.iterate([samples[2]])]
        assert (prefetcher.stats.loaded, prefetcher.stats.disk_hits) == (0, 3)
        assert same(got, [alone[one] for one in samples[2].items])
    # What a medium takes to decode is kept with it.
    cache = disk_cache(str(tmp_path / "cache"), 64, VIDEO)
    assert isinstance(cache, DiskCache)
    stored = cache.read(media_key(sample_of(a))).media  # type: ignore[arg-type]
    assert stored is not None
    assert isinstance(alone[a], Media)
    assert stored.decoded_bytes == alone[a].decoded_bytes > 32 * 2**20


def test_a_changed_medium_is_decoded_again_and_the_others_are_not(folder: Path, tmp_path: Path) -> None:
    path = write_video(tmp_path / "c.mp4", numbered_frames(20), rate=10)
    sample = sample_of(item(folder / "a.mp4"), item(path))
    reports: list[str] = []
    with ahead() as prefetcher:
        prefetcher.on_report = reports.append
        before = next(prefetcher.iterate([sample]))[1]
        write_video(path, numbered_frames(30)[::-1], rate=10)
        after = next(prefetcher.iterate([sample]))[1]
        assert (prefetcher.stats.loaded, prefetcher.stats.changed_files) == (3, 1)
    assert torch.equal(before[0].patches, after[0].patches)
    assert not torch.equal(before[1].patches, after[1].patches)
    assert [str(path) in report for report in reports] == [True]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_that_cannot_be_read_fails_the_sample(folder: Path, tmp_path: Path, workers: int, place: int) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    good = [item(folder / "a.mp4"), item(folder / "b.mp4"), item(folder / "0.png")]
    for path, kind in ((broken, "not_video"), (tmp_path / "gone.mp4", "missing_file")):
        items = list(good)
        items[place] = item(path)
        with ahead(workers=workers) as prefetcher:
            (bad, fine) = [outcome for _, outcome in prefetcher.iterate([sample_of(*items), sample_of(*good)])]
            assert isinstance(bad, SampleError)
            assert (bad.kind, bad.path) == (kind, str(path))
            assert prefetcher.stats.errors == {kind: 1}
            assert len(fine) == 3
        with pytest.raises(SampleError) as raised:
            load_media(sample_of(*items), VIDEO)
        assert (raised.value.kind, raised.value.path) == (kind, str(path))


@pytest.mark.parametrize("cached", [False, True])
def test_memory_is_bounded_for_the_sample_as_a_whole(folder: Path, cached: bool) -> None:
    """The same, whether or not some of it lay in a cache: what a run skips does not depend on that."""
    items = [item(folder / "a.mp4"), item(folder / "b.mp4")]
    alone = [load_media(sample_of(one), VIDEO) for one in items]
    needed = [one.decoded_bytes / 2**20 for one in alone if isinstance(one, Media)]
    assert all(30 < one < 64 for one in needed)
    limit = int(sum(needed))  # a little less than both take
    with ahead(max_decoded_mb=limit) as prefetcher:
        if cached:
            assert all(isinstance(media, Media) for _, media in prefetcher.iterate(map(sample_of, items)))
        (outcome,) = [outcome for _, outcome in prefetcher.iterate([sample_of(*items)])]
        assert isinstance(outcome, SampleError)
        assert (outcome.kind, outcome.path) == ("too_large", str(folder / "b.mp4"))
        assert f"2 media of one sample take about {sum(needed):,.0f} MiB together" in outcome.message
        assert f"data.max_decoded_mb ({limit})" in outcome.message
        assert prefetcher.stats.errors == {"too_large": 1}
    with pytest.raises(SampleError, match="2 media of one sample"):
        load_media(sample_of(*items), VIDEO, limit)
    assert len(load_media(sample_of(*items), VIDEO, limit + 1)) == 2  # type: ignore[arg-type]


def slow(sample: Sample) -> Media:
    time.sleep(0.8)
    return Media("image", torch.zeros(4, 1176, dtype=torch.uint8), (1, 2, 2), 0.0, 0.0)


def test_time_is_bounded_for_the_sample_as_a_whole(folder: Path) -> None:
    """Each of three media stays below the limit, all together do not."""
    items = [item(folder / f"{number}.png") for number in range(3)]
    with Prefetcher(slow, workers=1, depth=1, timeout=2.0, key=media_key, parts=media_parts) as prefetcher:
        (one, whole) = [outcome for _, outcome in prefetcher.iterate([sample_of(items[0]), sample_of(*items)])]
    assert isinstance(one, Media)
    assert isinstance(whole, SampleError)
    assert whole.kind == "timeout"


def test_a_source_gives_the_media_in_order(folder: Path) -> None:
    data = folder / "data.json"
    entry = {"problem": "Which?", "problem_type": "free-form", "solution": "<answer>red</answer>"}
    media = [{"path": "b.mp4", "kind": "video"}, {"path": "0.png", "kind": "image"}, {"path": "a.mp4", "kind": "video"}]
    data.write_text(json.dumps([entry | {"media": media}, entry | {"data_type": "text"}]))
    config = TrainConfig(video=VIDEO, data=replace(TrainConfig().data, workers=0, shuffle=False))
    skipped: list[Any] = []

    def build(sample: Sample, loaded: Any, draw: int) -> Sequence[str]:
        return [] if loaded is None else [one.kind for one in loaded]

    source = Source(load_samples(data), config, build, on_skip=lambda *error: skipped.append(error))
    assert source.take(3) == [["video", "image", "video"], [], ["video", "image", "video"]]
    source.close()
    assert skipped == []


def test_images_with_timestamps_are_a_video(folder: Path) -> None:
    files = [folder / f"{number}.png" for number in range(6)]
    times = [0.0, 1.0, 2.0, 4.0, 5.0, 9.0]
    clip = read_frame_files(files, name=folder, timestamps=times, max_frames=8, fps=10.0)
    assert frame_numbers(clip.frames) == list(range(6))
    assert clip.timestamps == tuple(times)
    assert clip.source_fps == pytest.approx(5 / 9)
    assert media_from_clip(clip, "video").times == pytest.approx((0.5, 3.0, 7.0))
    part = read_frame_files(files, name=folder, timestamps=times, start=1.0, end=4.0, fps=10.0)
    assert part.numbers == (1, 3)  # three frames in the window, of which an even number is taken
    # Seconds count from the beginning of the video, not from the first image.
    late = read_frame_files(files, name=folder, timestamps=[10.0 + second for second in times], start=11.5, fps=10.0)
    assert late.numbers == (2, 3, 4, 5)
    # Times that are even are those of a constant rate.
    rated, timed = (
        read_frame_files(files, name=folder, **given, fps=10.0)
        for given in ({"frames_per_second": 2.0}, {"timestamps": [0.5 * i for i in range(6)]})
    )
    assert (rated.fps, rated.numbers) == (pytest.approx(timed.fps), timed.numbers)
    for images in ("path", "frames"):
        where: dict[str, Any] = {"path": folder} if images == "path" else {"path": None, "frames": tuple(files)}
        media = load_media(sample_of(MediaItem("video", timestamps=tuple(times), fps=10.0, **where)), VIDEO)
        assert isinstance(media, Media)
        assert (media.kind, media.times) == ("video", pytest.approx((0.5, 3.0, 7.0)))
    keys = {
        media_key(sample_of(MediaItem("video", **given)))
        for given in (
            {"frames": tuple(files), "timestamps": tuple(times)},
            {"frames": tuple(files), "timestamps": (0.0, 1.0, 2.0, 4.0, 5.0, 8.0)},
            {"frames": tuple(files[::-1]), "timestamps": tuple(times)},
            {"frames": tuple(files), "frames_per_second": 1.0},
            {"path": folder, "timestamps": tuple(times)},
            {"frames": tuple(files), "timestamps": tuple(times), "fps": 3.0},
            {"frames": tuple(files), "timestamps": tuple(times), "max_frames": 4},
            {"frames": tuple(files), "timestamps": tuple(times), "max_pixels": 5000},
        )
    }
    assert len(keys) == 8
    assert all(key is not None and key.version is not None for key in keys)
    for given, kind in (
        ({"frames": (*files, folder / "gone.png"), "timestamps": (*times, 10.0)}, "missing_file"),
        ({"path": folder, "timestamps": (0.0, 1.0)}, "timestamps"),
        ({"path": folder / "a.mp4", "timestamps": (0.0, 1.0)}, "missing_file"),
        ({"frames": tuple(files), "timestamps": tuple(times), "root": folder / "x"}, "outside_root"),
        ({"frames": tuple(files), "timestamps": tuple(times), "max_pixels": 100}, "max_pixels"),
        ({"frames": tuple(files), "timestamps": tuple(times), "start": 20.0}, "too_few_frames"),
    ):
        with pytest.raises(SampleError) as raised:
            load_media(sample_of(MediaItem("video", **given)), VIDEO)  # type: ignore[arg-type]
        assert raised.value.kind == kind, raised.value
    with pytest.raises(ValueError, match="ascending"):
        read_frame_folder(folder, timestamps=[1.0, 0.0])


def test_own_limits_of_a_medium(folder: Path) -> None:
    """They take the place of the run's, and the others' stay."""
    few = load_media(sample_of(item(folder / "a.mp4", max_frames=4), item(folder / "a.mp4", fps=1.0)), VIDEO)
    large = load_media(sample_of(item(folder / "a.mp4", max_pixels=112 * 112)), replace(VIDEO, min_pixels=None))
    assert isinstance(few, tuple)
    assert isinstance(large, Media)
    assert [one.grid_thw[0] for one in few] == [2, 2]
    assert large.grid_thw[1] * large.grid_thw[2] > few[0].grid_thw[1] * few[0].grid_thw[2]
