"""Decoding ahead: results and failures in their order, how far ahead, and the cache in memory."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import numbered_frames, write_video
from patience import PATIENCE
from PIL import Image
from prefetchers import Work, prefetcher, results, sample, wait_until

from videor1.config import VideoConfig
from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video import read_frames
from videor1.video.media import load_media, media_key
from videor1.video.patches import media_from_clip


def test_order_and_failures_in_their_place() -> None:
    work = {
        "slow": 0,
        "square": 9,
        "raise": "decode",
        "exit": "worker_died",
        "hang": "timeout",
        "sys.exit": "decode",
        "kill": "worker_died",
        "bad": "missing_file",
        "cheap": 9,
    }
    items = [Work(name, 3 if result == 9 else 0) for name, result in work.items()]
    with prefetcher(workers=2, depth=5, timeout=1.5) as ahead:
        out = list(ahead.iterate(items))
        stats = ahead.stats
    assert [item for item, _ in out] == items
    assert [getattr(result, "kind", result) for _, result in out] == list(work.values())
    errors = {item.name: result for item, result in out if isinstance(result, SampleError)}
    assert {error.path for error in errors.values()} == {"/data/clip.mp4"}
    assert "KeyError: 'something'" in errors["raise"].message
    assert "exit code 7" in errors["exit"].message
    assert "exit code -9" in errors["kill"].message
    assert "longer than 1.5 s" in errors["hang"].message
    assert stats.errors == {"decode": 2, "worker_died": 2, "timeout": 1, "missing_file": 1}
    assert stats.loaded == 3
    assert stats.load_seconds >= 0.3 + 1.5
    assert 1.0 < stats.waited_seconds < PATIENCE
    assert (stats.retries, stats.restarts) == (1, 0), "a kill is tried again, a crash is not"
    assert stats.worker_deaths == 4


def test_inline_without_workers() -> None:
    drawn = []

    def source() -> Iterator[Work]:
        for i in range(4):
            drawn.append(i)
            yield Work("square" if i != 2 else "raise", i)

    out = []
    with prefetcher(workers=0, depth=2) as ahead:
        for item, result in ahead.iterate(source()):
            out.append(result.kind if isinstance(result, SampleError) else result)
            assert len(drawn) <= item.number + 1 + 2
    assert out == [0, 1, "decode", 9]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_option_that_cannot_work_is_raised_not_counted_as_a_bad_sample(workers: int) -> None:
    with prefetcher(workers) as ahead, pytest.raises(ConfigError, match=r"video\.backend: no"):
        list(ahead.iterate([Work("option")]))


def test_depth_bounds_what_is_drawn_from_an_endless_source(tmp_path: Path) -> None:
    log, drawn = tmp_path / "log", []

    def source() -> Iterator[Work]:
        for i in itertools.count():
            drawn.append(i)
            yield Work("write", i, str(log))

    with prefetcher(depth=3) as ahead:
        stream = ahead.iterate(source())
        for consumed in range(1, 6):
            next(stream)
            assert len(drawn) == consumed + 3
        wait_until(lambda: len(log.read_text().split()) == 8)  # the rest is made ready while nobody waits
        time.sleep(0.3)
        assert len(log.read_text().split()) == len(drawn) == 8
        stream.close()
        assert results(ahead, [Work("square", 3)]) == [9]


@pytest.mark.parametrize("cache_bytes", [0, 1000])
def test_what_is_loaded_once_is_handed_out_again(cache_bytes: int, tmp_path: Path) -> None:
    """From the cache; without one, to equal items that are on their way together. Errors are not kept."""
    log = tmp_path / "log"
    items = [Work("write", i % 3 if cache_bytes else 5, str(log)) for i in range(12 if cache_bytes else 4)]
    with prefetcher(workers=2, cache_bytes=cache_bytes) as ahead:
        assert results(ahead, items) == [item.number**2 for item in items]
        assert sorted(log.read_text().split()) == (["0", "1", "2"] if cache_bytes else ["5"])
        if cache_bytes:
            assert (ahead.stats.loaded, ahead.stats.cache_hits) == (3, 9)
            list(ahead.iterate(items))
            assert len(log.read_text().split()) == 3
        assert [results(ahead, [Work("bad")]) for _ in range(2)] == [["missing_file"]] * 2
        assert ahead.stats.errors == {"missing_file": 2}


@pytest.mark.parametrize("options", [{"workers": -1}, {"depth": 0}, {"timeout": 0.0}, {"cache_bytes": -1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Prefetcher: expected"):
        prefetcher(**options)


def test_load_media(tmp_path: Path) -> None:
    config = VideoConfig(max_frames=4, max_pixels=56 * 56)  # the minimum goes down with it
    video = write_video(tmp_path / "v.mp4", numbered_frames(30, 56, 56))
    media: Any = load_media(sample(video), config)
    clip = read_frames(video, max_frames=4, max_pixels=56 * 56, min_pixels=56 * 56, planes=True)
    expected = media_from_clip(clip, "video")
    assert torch.equal(media.patches, expected.patches)
    assert media.grid_thw == expected.grid_thw == (2, 4, 4)
    assert media.second_per_grid == pytest.approx(2 * 3 / 4)
    assert media.seconds > 0
    Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(tmp_path / "i.png")
    small = VideoConfig(image_max_pixels=28 * 56, image_min_pixels=784)
    image: Any = load_media(sample(tmp_path / "i.png", "image"), small)
    assert (image.kind, image.grid_thw, image.second_per_grid) == ("image", (1, 2, 2), 0.0)
    assert load_media(sample(None, "text"), config) is None
    with pytest.raises(SampleError, match="no path"):
        load_media(sample(None), config)
    with pytest.raises(ConfigError, match="backend"):
        load_media(sample(video), VideoConfig(backend="vlc"))
    assert media_key(sample(None, "text")) is None
    assert media_key(sample(video)) == media_key(sample(video, index=9)) != media_key(sample(video, "image"))
