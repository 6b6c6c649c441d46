"""Video and image files to frames: which frames, upright, exact; and every kind of bad file."""

import math
import random
import tracemalloc
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from media import (
    cut,
    frame_numbers,
    numbered_frames,
    real_video,
    rgb_of,
    set_matrix,
    shift_edit_list,
    write_sound,
    write_video,
)
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from videor1.config import IMAGE_MAX_PIXELS, VIDEO_MAX_PIXELS
from videor1.errors import ConfigError
from videor1.types import SampleError
from videor1.video import check_backend, read_frames, read_image, sample_indices, smart_resize, video_pixel_cap
from videor1.video.decoders.truncation import missing_bytes
from videor1.video.reading import IMAGE_MIN_PIXELS

B_FRAMES = {"bf": "3", "b-adapt": "0", "sc_threshold": "0"}


def packet_pts(path):
    with av.open(str(path)) as container:
        return [packet.pts for packet in container.demux(video=0) if packet.size]


def kind_of(call, *args, **kwargs):
    with pytest.raises(SampleError) as caught:
        call(*args, **kwargs)
    assert caught.value.path == str(args[0]), "an error must name its file"
    return caught.value.kind


@pytest.mark.parametrize(
    ("total", "source_fps", "expected"),
    [
        (325, 25.0, [0, 22, 43, 65, 86, 108, 130, 151, 173, 194, 216, 238, 259, 281, 302, 324]),  # 26 -> 16
        (125, 25.0, [0, 14, 28, 41, 55, 69, 83, 96, 110, 124]),  # 10
        (145, 25.0, [0, 16, 32, 48, 64, 80, 96, 112, 128, 144]),  # 11.6 -> 11 -> 10
        (10, 10.0, [0, 3, 6, 9]),  # 2 -> at least 4
        (5, 1.0, [0, 1, 3, 4]),  # 10 -> the file's 5 -> 4; 4/3 and 8/3 to the nearest
        (3, 30.0, [0, 2]),
        (2, 30.0, [0, 1]),
        (1, 30.0, []),
    ],
)
def test_sampling_rule(total, source_fps, expected):
    assert sample_indices(total, source_fps, max_frames=16, fps=2.0) == expected


def test_sampling_options():
    assert len(sample_indices(1000, 10.0, max_frames=32, fps=2.0)) == 32
    assert len(sample_indices(1000, 10.0, max_frames=7, fps=2.0)) == 6
    assert sample_indices(1000, 10.0, max_frames=2, fps=2.0) == [0, 999]
    assert len(sample_indices(40, 10.0, max_frames=16, fps=1.0)) == 4
    assert len(sample_indices(40, 10.0, max_frames=16, fps=3.0)) == 12


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (280, 364)),
        (1080, 1920, (224, 420)),
        (720, 1280, (224, 420)),
        (240, 320, (280, 392)),
        (1920, 1080, (420, 224)),
        (56, 56, (336, 336)),
    ],
)
def test_video_sizes_are_the_references(height, width, expected):
    cap = video_pixel_cap(VIDEO_MAX_PIXELS, VIDEO_MAX_PIXELS)
    assert cap == 105369
    assert smart_resize(height, width, min_pixels=VIDEO_MAX_PIXELS, max_pixels=cap) == expected


def test_smart_resize_rounds_half_to_even():
    assert smart_resize(42, 70, min_pixels=1, max_pixels=10**6) == (56, 56)  # 1.5 -> 2, 2.5 -> 2
    assert smart_resize(10, 1000, min_pixels=1, max_pixels=10**6) == (28, 1008)  # no side of 0


def test_smart_resize_equals_transformers():
    rng = random.Random(0)
    for _ in range(3000):
        height, width = rng.randint(15, 3000), rng.randint(15, 3000)
        low = rng.randint(1, 200_000)
        high = rng.randint(low, 400_000)
        if max(height, width) / min(height, width) <= 200:
            ours = smart_resize(height, width, min_pixels=low, max_pixels=high)
            assert ours == hf_smart_resize(height, width, min_pixels=low, max_pixels=high)


def test_smart_resize_refuses():
    with pytest.raises(ValueError, match="ratio"):
        smart_resize(10, 2001, min_pixels=1, max_pixels=100)
    with pytest.raises(ValueError, match="min_pixels"):
        smart_resize(100, 100, min_pixels=200, max_pixels=100)


def test_frames_are_the_sampled_ones(tmp_path):
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


def test_options_reach_the_clip(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(40, 56, 56), rate=10)
    clip = read_frames(path, max_frames=32, fps=5.0, max_pixels=56 * 56)
    assert len(clip.frames) == 20
    assert clip.size == (56, 56), "a small max_pixels must not lose against the default minimum"
    clip = read_frames(path, min_pixels=84 * 84, max_pixels=300 * 300, backend="pyav")
    assert clip.size == (84, 84)


def test_lossless_frames_are_exact_at_odd_sizes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 33, 57, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mkv", pixels, codec="ffv1", pix_fmt="bgr0")
    clip = read_frames(path)
    assert torch.equal(clip.frames, torch.from_numpy(pixels[[0, 2, 3, 5]]))


@pytest.mark.parametrize("name", ["b.mp4", "b.mkv", "b.ts", "b.flv"])
def test_b_frames(tmp_path, name):
    path = write_video(tmp_path / name, numbered_frames(40), options=B_FRAMES)
    stamps = packet_pts(path)
    assert any(later < earlier for earlier, later in pairwise(stamps)), "the clip must decode out of order"
    clip = read_frames(path)
    expected = sample_indices(40, 10.0, max_frames=16, fps=2.0)
    assert frame_numbers(clip.frames) == expected
    start = clip.timestamps[0]
    assert [t - start for t in clip.timestamps] == pytest.approx([i / 10 for i in expected], abs=2e-3)


def test_frames_without_usable_pts(tmp_path):
    path = write_video(tmp_path / "raw.264", numbered_frames(40), options=B_FRAMES, container="h264")
    assert set(packet_pts(path)) == {None}
    clip = read_frames(path)  # a raw stream has no frame rate either: FFmpeg says 25
    assert clip.total_frames == 40
    assert frame_numbers(clip.frames) == sample_indices(40, clip.source_fps, max_frames=16, fps=2.0)


def test_variable_frame_rate(tmp_path):
    # 20 frames 0.1 s apart, then 20 frames 0.5 s apart: frames are counted, not times.
    times = [100 * i for i in range(20)] + [2000 + 500 * i for i in range(20)]
    path = write_video(tmp_path / "vfr.mkv", numbered_frames(40), pts_ms=times, options=B_FRAMES)
    clip = read_frames(path)
    numbers = frame_numbers(clip.frames)
    assert clip.source_fps == pytest.approx(39 / 11.5, rel=0.02)
    assert numbers == sample_indices(40, clip.source_fps, max_frames=16, fps=2.0)
    assert clip.timestamps == pytest.approx([times[n] / 1000 for n in numbers])


def test_a_lying_frame_rate_in_the_header_is_not_believed(tmp_path):
    times = [1000 * i for i in range(20)]  # one frame a second
    path = write_video(tmp_path / "lie.mkv", numbered_frames(20), rate=50, pts_ms=times)
    clip = read_frames(path)
    assert clip.source_fps == pytest.approx(1.0)
    assert len(clip.frames) == 16  # 20 s of video, not 0.4 s


def test_edit_list_hides_frames(tmp_path):
    path = write_video(tmp_path / "e.mp4", numbered_frames(40), options={"bf": "0", "g": "40"})
    shift_edit_list(path, 1.0)
    clip = read_frames(path)
    assert clip.total_frames == 30
    assert frame_numbers(clip.frames) == [10 + i for i in sample_indices(30, 10.0, max_frames=16, fps=2.0)]


def corners(frame):
    """Return the strongest channel (0 to 2) of a frame's corners: top left, top right, bottom left."""
    H, W = frame.shape[:2]
    return tuple(int(frame[y, x].argmax()) for y, x in ((4, 4), (4, W - 5), (H - 5, 4)))


def coloured_corners():
    """Return frames whose top left quarter is red, the top right one green and the bottom left one blue."""
    pixels = np.full((4, 32, 64, 3), 16, np.uint8)
    pixels[:, :16, :32, 0] = pixels[:, :16, 32:, 1] = pixels[:, 16:, :32, 2] = 230
    return pixels


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((0, 1, -1, 0), (2, 0, None)),  # clockwise: the bottom left goes to the top left, the top left to the top right
        ((-1, 0, 0, -1), (None, 2, 1)),  # half a turn
        ((0, -1, 1, 0), (1, None, 0)),  # anticlockwise
    ],
)
def test_rotation_tag(tmp_path, matrix, upright):
    path = set_matrix(write_video(tmp_path / "r.mp4", coloured_corners()), matrix)
    clip = read_frames(path)
    assert clip.frames.shape[1:3] == ((64, 32) if matrix[0] == 0 else (32, 64))
    for got, expected in zip(corners(clip.frames[0]), upright, strict=True):
        assert expected is None or got == expected


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx265", "yuv420p10le"),
        ("a.mov", "prores_ks", "yuv422p10le"),
        ("a.mkv", "ffv1", "gray"),
        ("a.mp4", "libx264", "yuv444p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.avi", "mpeg4", "yuv420p"),
    ],
)
def test_codecs_and_pixel_formats(tmp_path, name, codec, pix_fmt):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(tmp_path / name, numbered_frames(40, 64, 96), codec=codec, pix_fmt=pix_fmt, options=options)
    clip = read_frames(path)
    assert clip.total_frames == 40
    assert clip.source_fps == pytest.approx(10)
    assert frame_numbers(clip.frames) == pytest.approx(sample_indices(40, 10.0, max_frames=16, fps=2.0), abs=1)


@pytest.mark.parametrize(
    ("name", "shape", "size", "total", "source_fps"),
    [
        ("nasa.mp4", (16, 270, 480, 3), (224, 420), 390, 30000 / 1001),
        ("pancake.mkv", (16, 240, 426, 3), (224, 420), 310, 30),
        ("av1.mkv", (10, 360, 640, 3), (224, 420), 125, 25),
        ("hevc.mp4", (4, 128, 128, 3), (336, 336), 10, 10),
        ("rotated_90.mov", (2, 568, 320, 3), (420, 224), 3, 30),
    ],
)
def test_real_videos(name, shape, size, total, source_fps):
    path = real_video(name)
    clip = read_frames(path)
    assert clip.frames.shape == shape
    assert (clip.size, clip.total_frames, clip.source_fps) == (size, total, source_fps)
    wanted = sample_indices(total, source_fps, max_frames=16, fps=2.0)
    with av.open(str(path)) as container:
        decoded = [frame for i, frame in enumerate(container.decode(container.streams.best("video"))) if i in wanted]
    assert clip.timestamps == pytest.approx([frame.time for frame in decoded])
    if name != "rotated_90.mov":
        assert all(
            np.array_equal(ours, rgb_of(frame)) for ours, frame in zip(clip.frames.numpy(), decoded, strict=True)
        )


def test_real_corrupt_video_is_an_error_not_a_shorter_clip():
    assert kind_of(read_frames, real_video("corrupted.mp4")) == "decode"


def missing_from(path):
    with path.open("rb") as file:
        return missing_bytes(file)


@pytest.mark.parametrize("name", ["nasa.mp4", "pancake.mkv", "av1.mkv", "hevc.mp4", "rotated_90.mov"])
def test_whole_files_miss_nothing(tmp_path, name):
    path = real_video(name)
    assert missing_from(path) == 0
    size = path.stat().st_size
    assert missing_from(cut(path, tmp_path / name, 0.5)) >= size // 2 - 64 * 1024


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.98])
@pytest.mark.parametrize(
    ("name", "mux_options"),
    [
        ("a.mp4", {}),  # the index at the end is lost
        ("a.mp4", {"movflags": "faststart"}),  # the index is there, and promises frames that are not
        ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("a.mkv", {}),  # FFmpeg ends such a file without an error
        ("a.webm", {}),
        ("a.avi", {}),
    ],
)
def test_cut_file(tmp_path, name, mux_options, fraction):
    codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
    frames = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), dtype=np.uint8)
    whole = write_video(tmp_path / name, frames, codec=codec, mux_options=mux_options, options={"g": "5"})
    assert read_frames(whole).total_frames == 30
    assert kind_of(read_frames, cut(whole, tmp_path / f"cut-{name}", fraction)) == "truncated"


def test_live_matroska_of_unknown_size_is_read(tmp_path):
    path = write_video(tmp_path / "live.mkv", numbered_frames(40), mux_options={"live": "1"})
    assert missing_from(path) == 0
    assert read_frames(path).total_frames == 40


def test_damaged_middle(tmp_path, capfd):
    frames = np.random.default_rng(0).integers(0, 256, (30, 64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", frames)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(data)
    capfd.readouterr()
    assert kind_of(read_frames, path) == "decode"
    assert capfd.readouterr() == ("", ""), "FFmpeg's messages stay out of the progress bar"


def test_a_size_that_changes_is_an_error(tmp_path):
    small = write_video(tmp_path / "s.264", numbered_frames(20, 32, 48), container="h264")
    large = write_video(tmp_path / "l.264", numbered_frames(20, 48, 64), container="h264")
    both = tmp_path / "both.264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    assert kind_of(read_frames, both) == "decode"


def test_files_that_are_no_video(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video\n" * 100)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    picture = tmp_path / "picture.mp4"
    Image.new("RGB", (64, 48), "red").save(picture, format="PNG")
    write_video(tmp_path / "good.mp4", numbered_frames(10))
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n")
    concat = tmp_path / "concat.mp4"
    concat.write_text("ffconcat version 1.0\nfile good.mp4\n")
    sound = write_sound(tmp_path / "sound.mp4")
    for path in (text, empty, folder, picture, playlist, concat, sound):
        assert kind_of(read_frames, path) == "not_video", path.name
    assert kind_of(read_frames, tmp_path / "nowhere.mp4") == "missing_file"


def test_a_name_with_a_colon_is_a_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_frames(10)).rename(tmp_path / "concat:12:30.mp4")
    assert read_frames(path).total_frames == 10


def test_a_title_in_another_encoding(tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered_frames(10))
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"L\xe4vf"))
    assert read_frames(path).total_frames == 10


def test_too_few_frames(tmp_path):
    assert kind_of(read_frames, write_sound(tmp_path / "none.mkv", with_empty_video=True)) == "zero_frames"
    assert kind_of(read_frames, write_video(tmp_path / "1.mp4", numbered_frames(1))) == "too_few_frames"
    for count, expected in ((2, [0, 1]), (3, [0, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4])):
        clip = read_frames(write_video(tmp_path / f"{count}.mp4", numbered_frames(count)))
        assert frame_numbers(clip.frames) == expected


def test_extreme_aspect_ratio(tmp_path):
    Image.new("RGB", (2010, 10)).save(tmp_path / "wide.png")
    assert kind_of(read_image, tmp_path / "wide.png") == "aspect_ratio"
    path = write_video(tmp_path / "wide.mkv", np.zeros((4, 4, 1000, 3), np.uint8), codec="ffv1", pix_fmt="bgr0")
    assert kind_of(read_frames, path) == "aspect_ratio"


def test_options_are_checked(tmp_path):
    for check in (check_backend, lambda backend: read_frames(tmp_path / "a.mp4", backend=backend)):
        with pytest.raises(ConfigError, match="'nonsense' is none of auto, pyav, pyav-nvdec, decord"):
            check("nonsense")
        with pytest.raises(ConfigError, match="did you mean 'pyav'"):
            check("pyaav")
    with pytest.raises(ValueError, match="max_frames"):
        read_frames(tmp_path / "a.mp4", max_frames=1)
    path = write_video(tmp_path / "a.mp4", numbered_frames(10))
    with pytest.raises(ValueError, match="min_pixels"):
        read_frames(path, min_pixels=200_000, max_pixels=100_000)


def test_a_long_video_keeps_only_the_wanted_frames(tmp_path):
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


def test_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    clip = read_image(tmp_path / "a.png")
    assert torch.equal(clip.frames, torch.from_numpy(pixels)[None])
    assert clip.size == smart_resize(120, 200, min_pixels=IMAGE_MIN_PIXELS, max_pixels=IMAGE_MAX_PIXELS) == (112, 196)
    assert (clip.fps, clip.source_fps, clip.total_frames, clip.timestamps) == (0.0, 0.0, 1, (0.0,))
    assert read_image(tmp_path / "a.png", max_pixels=56 * 56).size == (28, 56)
    assert math.prod(read_image(tmp_path / "a.png", min_pixels=40_000, max_pixels=60_000).size) >= 40_000


def test_image_orientation(tmp_path):
    pixels = coloured_corners()[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    frame = read_image(tmp_path / "turned.jpg").frames[0]
    assert frame.shape == (64, 32, 3)
    assert corners(frame)[:2] == (2, 0)


def first_pixel(path):
    return tuple(read_image(path).frames[0, 0, 0].tolist())


def test_image_modes(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(path)
    assert first_pixel(path) == (255, 255, 255), "transparent lies on white"
    Image.new("RGBA", (40, 30), (255, 0, 0, 255)).save(path)
    assert first_pixel(path) == (255, 0, 0)
    Image.new("L", (40, 30), 77).save(path)
    assert first_pixel(path) == (77, 77, 77)
    Image.new("LA", (40, 30), (77, 0)).save(path)
    assert first_pixel(path) == (255, 255, 255)
    Image.fromarray(np.full((30, 40), 0x4D80, np.uint16)).save(path)
    assert first_pixel(path) == (77, 77, 77), "16 bits are scaled, not clipped"
    Image.new("RGB", (40, 30), (10, 200, 30)).quantize(4).save(path)
    assert first_pixel(path) == pytest.approx((10, 200, 30), abs=4)
    Image.new("1", (40, 30), 1).save(path)
    assert first_pixel(path) == (255, 255, 255)
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert first_pixel(tmp_path / "a.jpg") == pytest.approx((255, 0, 0), abs=4)
    Image.new("F", (40, 30), 0.5).save(tmp_path / "a.tiff")
    assert kind_of(read_image, tmp_path / "a.tiff") == "image"


def test_bad_images(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)).save(good)
    text = tmp_path / "text.png"
    text.write_text("no image")
    empty = tmp_path / "empty.png"
    empty.touch()
    broken = tmp_path / "broken.png"
    Image.new("RGB", (64, 64), "red").save(broken)
    data = bytearray(broken.read_bytes())
    data[50] ^= 0xFF
    broken.write_bytes(data)
    video = write_video(tmp_path / "v.jpg", numbered_frames(4), container="mp4")
    for path in (text, empty, broken, cut(good, tmp_path / "cut.jpg"), video, tmp_path):
        assert kind_of(read_image, path) == "image", path.name
    assert kind_of(read_image, tmp_path / "nowhere.png") == "missing_file"
