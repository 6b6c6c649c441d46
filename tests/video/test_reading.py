"""Video and image files to frames: which frames, upright, exact; and every kind of bad file."""

import math
import random
import tracemalloc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from coded_videos import picks
from media import (
    cut,
    ffmpeg_frames,
    frame_numbers,
    numbered_frames,
    real_video,
    refusal,
    rgb_of,
    write_sound,
    write_video,
)
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from videor1.config import IMAGE_MAX_PIXELS, VIDEO_MAX_PIXELS
from videor1.errors import ConfigError
from videor1.video import check_backend, read_frames, read_image, sample_indices, smart_resize, video_pixel_cap
from videor1.video.decoders.pyav import PyAvDecoder
from videor1.video.decoders.truncation import missing_bytes
from videor1.video.reading import IMAGE_MIN_PIXELS


def test_sampling_rule() -> None:
    for total, source_fps, expected in (
        (325, 25.0, [0, 22, 43, 65, 86, 108, 130, 151, 173, 194, 216, 238, 259, 281, 302, 324]),  # 26 -> 16
        (125, 25.0, [0, 14, 28, 41, 55, 69, 83, 96, 110, 124]),  # 10
        (145, 25.0, [0, 16, 32, 48, 64, 80, 96, 112, 128, 144]),  # 11.6 -> 11 -> 10
        (10, 10.0, [0, 3, 6, 9]),  # 2 -> at least 4
        (5, 1.0, [0, 1, 3, 4]),  # 10 -> the file's 5 -> 4; 4/3 and 8/3 to the nearest
        *((3, 30.0, [0, 2]), (2, 30.0, [0, 1]), (1, 30.0, [])),
    ):
        assert sample_indices(total, source_fps, max_frames=16, fps=2.0) == expected
    counts = {(1000, 32, 2.0): 32, (1000, 7, 2.0): 6, (40, 16, 1.0): 4, (40, 16, 3.0): 12}
    for (frames, most, fps), count in counts.items():
        assert len(sample_indices(frames, 10.0, max_frames=most, fps=fps)) == count
    assert sample_indices(1000, 10.0, max_frames=2, fps=2.0) == [0, 999]


def test_smart_resize() -> None:
    """The reference's sizes of videos; equal to transformers', half to even, no side of 0, and what it refuses."""
    cap = video_pixel_cap(VIDEO_MAX_PIXELS, VIDEO_MAX_PIXELS)
    assert cap == 105369
    sizes = {(480, 640): (280, 364), (1080, 1920): (224, 420), (720, 1280): (224, 420)}
    sizes |= {(240, 320): (280, 392), (1920, 1080): (420, 224), (56, 56): (336, 336)}
    for size, expected in sizes.items():
        assert smart_resize(*size, min_pixels=VIDEO_MAX_PIXELS, max_pixels=cap) == expected
    for size, expected in {(42, 70): (56, 56), (10, 1000): (28, 1008)}.items():  # 1.5 -> 2, 2.5 -> 2
        assert smart_resize(*size, min_pixels=1, max_pixels=10**6) == expected
    rng = random.Random(0)
    for _ in range(3000):
        size, low = (rng.randint(15, 3000), rng.randint(15, 3000)), rng.randint(1, 200_000)
        bounds = {"min_pixels": low, "max_pixels": rng.randint(low, 400_000)}
        if max(size) / min(size) <= 200:
            assert smart_resize(*size, **bounds) == hf_smart_resize(*size, **bounds)
    for size, least, message in (((10, 2001), 1, "ratio"), ((100, 100), 200, "min_pixels")):
        with pytest.raises(ValueError, match=message):
            smart_resize(*size, min_pixels=least, max_pixels=100)


def test_a_clip(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(45), rate=10)
    clip = read_frames(path)
    expected = sample_indices(45, 10.0, max_frames=16, fps=2.0)  # 9 -> 8 frames
    assert frame_numbers(clip.frames) == expected
    assert clip.timestamps == pytest.approx([i / 10 for i in expected])
    assert (clip.total_frames, clip.source_fps, clip.backend) == (45, 10.0, "pyav")
    assert clip.fps == pytest.approx(8 / 4.5)  # frames / duration
    assert clip.frames.dtype == torch.uint8
    assert clip.frames.shape == (8, 32, 48, 3)
    assert clip.size == (280, 392)
    assert clip.path == str(path)
    clip = read_frames(path, max_frames=32, fps=5.0, max_pixels=56 * 84)
    assert len(clip.frames) == 22
    assert clip.size == (56, 84), "a small max_pixels must not lose against the default minimum"
    assert read_frames(path, min_pixels=84 * 112, max_pixels=300 * 300, backend="pyav").size == (84, 140)
    # Lossless frames are exact at odd sizes; a name that reads as a protocol, and a title in another encoding.
    pixels = np.random.default_rng(0).integers(0, 256, (6, 33, 57, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mkv", pixels, codec="ffv1", pix_fmt="bgr0").rename(tmp_path / "concat:12:30.mkv")
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"L\xe4vf"))
    assert torch.equal(read_frames(path).frames, torch.from_numpy(pixels[[0, 2, 3, 5]]))


REAL = {
    "nasa.mp4": ((16, 270, 480, 3), (224, 420), 390, 30000 / 1001),
    "pancake.mkv": ((16, 240, 426, 3), (224, 420), 310, 30),
    "av1.mkv": ((10, 360, 640, 3), (224, 420), 125, 25),
    "hevc.mp4": ((4, 128, 128, 3), (336, 336), 10, 10),
    "rotated_90.mov": ((2, 568, 320, 3), (420, 224), 3, 30),
}


@pytest.mark.parametrize("name", REAL)
def test_real_videos(tmp_path: Path, name: str) -> None:
    """Frames are those of a whole decode, however few of them are asked for."""
    path, (shape, size, total, source_fps) = real_video(name), REAL[name]
    clip = read_frames(path)
    assert clip.frames.shape == shape
    assert (clip.size, clip.total_frames, clip.source_fps) == (size, total, source_fps)
    wanted, frames = sample_indices(total, source_fps, max_frames=16, fps=2.0), ffmpeg_frames(path)
    whole = np.stack([rgb_of(frame) for frame in frames])
    assert clip.timestamps == pytest.approx([frames[i].time for i in wanted])
    assert np.array_equal(clip.frames.numpy(), np.rot90(whole[wanted], frames[0].rotation // 90, (1, 2)))
    with closing(PyAvDecoder(path)) as decoder:
        for indices in picks(total) if total > 60 else ([0], [total - 1], list(range(total))):
            assert np.array_equal(decoder.frames(indices).pixels.numpy(), whole[indices])
    half = path.stat().st_size // 2
    with path.open("rb") as file, cut(path, tmp_path / name, 0.5).open("rb") as part:
        assert missing_bytes(file) == 0
        assert missing_bytes(part) >= half - 64 * 1024


# The index at the end is lost, or it is there, and promises frames that are not. FFmpeg ends an MKV without an error.
CUT = [("a.mp4", {"movflags": flags} if flags else {}) for flags in ("", "faststart", "frag_keyframe+empty_moov")]


@pytest.mark.parametrize(("name", "mux_options"), [*CUT, ("a.mkv", {}), ("a.webm", {}), ("a.avi", {})])
def test_cut_file(tmp_path: Path, name: str, mux_options: dict[str, str]) -> None:
    codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
    frames = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), dtype=np.uint8)
    whole = write_video(tmp_path / name, frames, codec=codec, mux_options=mux_options, options={"g": "5"})
    assert read_frames(whole).total_frames == 30
    for fraction in (0.3, 0.6, 0.98):
        part = cut(whole, tmp_path / f"cut-{name}", fraction)
        assert refusal(read_frames, part).kind == "truncated"
    with whole.open("rb") as file:
        assert missing_bytes(file) == 0
    if name == "a.avi":
        with cut(whole, tmp_path / "little.avi", 1 - 5 / whole.stat().st_size).open("rb") as file:
            assert missing_bytes(file) == 5


def test_damage_is_an_error_not_a_shorter_clip(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (30, 64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", frames)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(data)
    capfd.readouterr()
    assert refusal(read_frames, path).kind == "decode"
    assert capfd.readouterr() == ("", ""), "FFmpeg's messages stay out of the progress bar"
    assert refusal(read_frames, real_video("corrupted.mp4")).kind == "decode"


def test_files_that_make_no_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", numbered_frames(10))
    for name, content in (
        ("text.mp4", "not a video\n" * 100),
        ("empty.mp4", ""),
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n"),
        ("concat.mp4", "ffconcat version 1.0\nfile good.mp4\n"),
    ):
        (tmp_path / name).write_text(content)
        assert refusal(read_frames, tmp_path / name).kind == "not_video", name
    Image.new("RGB", (64, 48), "red").save(tmp_path / "picture.mp4", format="PNG")
    for path in (tmp_path / "picture.mp4", tmp_path, write_sound(tmp_path / "sound.mp4")):
        assert refusal(read_frames, path).kind == "not_video", path.name
    assert refusal(read_frames, tmp_path / "nowhere.mp4").kind == "missing_file"
    wide = write_video(tmp_path / "wide.mkv", np.zeros((4, 4, 1000, 3), np.uint8), codec="ffv1", pix_fmt="bgr0")
    assert refusal(read_frames, wide).kind == "aspect_ratio"
    # A size that changes is an error, and so are too few frames.
    small = write_video(tmp_path / "s.264", numbered_frames(20, 32, 48), container="h264")
    for size, limit, kinds in (((48, 64), 1024, {"decode"}), ((960, 1280), 40, {"decode", "too_large"})):
        both = write_video(tmp_path / "l.264", numbered_frames(6, *size), container="h264")
        both.write_bytes(small.read_bytes() + both.read_bytes())
        assert refusal(read_frames, both, max_decoded_mb=limit).kind in kinds
    assert refusal(read_frames, write_sound(tmp_path / "none.mkv", with_empty_video=True)).kind == "zero_frames"
    assert refusal(read_frames, write_video(tmp_path / "1.mp4", numbered_frames(1))).kind == "too_few_frames"
    for count, expected in ((2, [0, 1]), (3, [0, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4])):
        clip = read_frames(write_video(tmp_path / f"{count}.mp4", numbered_frames(count)))
        assert frame_numbers(clip.frames) == expected


def test_options_are_checked_before_a_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.mp4"
    for check in (check_backend, lambda backend: read_frames(path, backend=backend)):
        with pytest.raises(ConfigError, match="'nonsense' is none of auto, pyav, pyav-nvdec, decord"):
            check("nonsense")
        with pytest.raises(ConfigError, match="did you mean 'pyav'"):
            check("pyaav")
    for name, options in (("max_frames", {"max_frames": 1}), ("min_pixels", {"min_pixels": 200, "max_pixels": 100})):
        with pytest.raises(ValueError, match=name):
            read_frames(path, **options)


def test_a_long_video_keeps_only_the_wanted_frames(tmp_path: Path) -> None:
    frames = np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (1500, 120, 160, 3))
    path = write_video(tmp_path / "long.mp4", frames, options={"preset": "ultrafast"})
    tracemalloc.start()
    try:
        clip = read_frames(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert clip.total_frames == 1500
    assert peak < 3 * clip.frames.nbytes, f"{peak} bytes for {clip.frames.nbytes} bytes of frames"


def test_image_modes(tmp_path: Path) -> None:
    size, white, grey = (40, 30), [255, 255, 255], [77, 77, 77]
    for image, expected in (
        (Image.new("RGBA", size, (255, 0, 0, 0)), white),  # transparent lies on white
        (Image.new("RGBA", size, (255, 0, 0, 255)), [255, 0, 0]),
        (Image.new("L", size, 77), grey),
        (Image.new("LA", size, (77, 0)), white),
        (Image.fromarray(np.full((30, 40), 0x4D80, np.uint16)), grey),  # scaled, not clipped
        (Image.new("RGB", size, (10, 200, 30)).quantize(4), [10, 200, 30]),
        (Image.new("1", size, 1), white),
        (Image.new("CMYK", size, (0, 255, 255, 0)), [255, 0, 0]),
    ):
        image.save(path := tmp_path / ("a.jpg" if image.mode == "CMYK" else "a.png"))
        close = 4 if image.mode in ("P", "CMYK") else 0
        assert read_image(path).frames[0, 0, 0].tolist() == pytest.approx(expected, abs=close), image.mode


def test_images(tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    good, broken = tmp_path / "good.jpg", tmp_path / "broken.png"
    for file in (path, good):
        Image.fromarray(pixels).save(file)
    clip = read_image(path)
    assert torch.equal(clip.frames, torch.from_numpy(pixels)[None])
    assert clip.size == smart_resize(120, 200, min_pixels=IMAGE_MIN_PIXELS, max_pixels=IMAGE_MAX_PIXELS) == (112, 196)
    assert (clip.fps, clip.source_fps, clip.total_frames, clip.timestamps) == (0.0, 0.0, 1, (0.0,))
    assert read_image(path, max_pixels=56 * 56).size == (28, 56)
    assert math.prod(read_image(path, min_pixels=40_000, max_pixels=60_000).size) >= 40_000
    Image.new("RGB", (64, 64), "red").save(broken)
    data = bytearray(broken.read_bytes())
    data[50] ^= 0xFF
    broken.write_bytes(data)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("F", (40, 30), 0.5).save(tmp_path / "range.tiff")  # of no defined range
    written = [tmp_path / name for name in ("text.png", "empty.png", "range.tiff")]
    video = write_video(tmp_path / "v.jpg", numbered_frames(4), container="mp4")
    for path in (*written, broken, cut(good, tmp_path / "cut.jpg"), video, tmp_path):
        assert refusal(read_image, path).kind == "image", path.name
    assert refusal(read_image, tmp_path / "nowhere.png").kind == "missing_file"
    Image.new("RGB", (2010, 10)).save(tmp_path / "wide.png")
    assert refusal(read_image, tmp_path / "wide.png").kind == "aspect_ratio"
