"""The eight orientations of videos and photographs, and turns by any angle, are shown as FFmpeg's command line does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from media import ORIENTATIONS, remux, set_matrix, turned, write_video
from PIL import Image

from videor1.config import VideoConfig
from videor1.report.thumbnails import Thumbnails
from videor1.types import Sample
from videor1.video import read_frames, read_image
from videor1.video.decoders import open_decoder
from videor1.video.media import load_media, media_key
from videor1.video.orientation import Orientation, matrix_orientation
from videor1_kernels import frames_to_patches
from videor1_kernels.frames_to_patches import YuvFrames

EXIF = {1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True)}
EXIF |= {5: (90, True), 6: (270, False), 7: (270, True), 8: (90, False)}


def tiles(height=4, width=6, side=16):
    """One picture [1, ...] of random tiles: no turn and no mirror image of it is like another."""
    small = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    return small.repeat(side, 1).repeat(side, 2)


def write(path, orientation=(0, False), **options):
    video = write_video(path, np.repeat(tiles(), 6, 0), **options)
    return set_matrix(video, ORIENTATIONS[orientation])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_matrix_of_each(orientation):
    a, b, c, d = (value * 65536 for value in ORIENTATIONS[orientation])
    assert matrix_orientation([a, b, 0, c, d, 0, 0, 0, 1 << 30]) == orientation
    assert matrix_orientation([3 * a, 3 * b, 0, c // 2, d // 2, 0, 640, 480, 1 << 30]) == orientation, (
        "scaled and moved"
    )


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        *((0.4, 0), (-0.4, 0), (1.4, 0), (1.6, 358), (30, 330), (45.4, 315), (89.6, 270), (90.4, 270), (91, 269)),
        *((135, 225), (179.6, 180), (180.4, 180), (200, 160), (269.6, 90), (-90.4, 90), (300, 60), (359, 1), (-0.6, 1)),
    ],
)
def test_angles_between(degrees, expected):
    """Clockwise angles; FFmpeg rounds them to whole degrees, and takes no notice of the first."""
    cosine, sine = (round(65536 * f(math.radians(degrees))) for f in (math.cos, math.sin))
    assert matrix_orientation([cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 30]) == (expected, False)


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 1)])
def test_a_matrix_without_an_angle(matrix):
    a, b, c, d = (value * 65536 for value in matrix)
    assert matrix_orientation([a, b, 0, c, d, 0, 0, 0, 1 << 30]) == Orientation()


def test_what_is_left_after_a_turn():
    picture = tiles()
    for rotation, mirrored in ORIENTATIONS:
        for done in (0, 90, 180, 270):
            left = Orientation(rotation, mirrored).after(done)
            twice = turned(turned(picture, done, False), left.rotation, left.mirrored)
            assert np.array_equal(twice, turned(picture, rotation, mirrored))


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_videos(tmp_path, orientation, backend):
    if backend == "decord":
        pytest.importorskip("decord")
    clip = read_frames(write(tmp_path / "a.mp4", orientation, options={"qp": "4"}), backend=backend)
    assert (clip.rotation, clip.mirrored) == (0, False)
    stored = read_frames(write(tmp_path / "b.mp4", options={"qp": "4"}))
    expected = turned(stored.frames.numpy(), *orientation)
    assert clip.frames.shape == expected.shape
    # decord turns planes before it makes RGB of them, which blurs the chroma of the tiles' edges otherwise.
    inner = np.s_[:, 4:-4, 4:-4]
    difference = np.abs(clip.frames.numpy().astype(int) - expected.astype(int))
    assert difference.max() == 0 if backend == "pyav" else np.median(difference[inner]) <= 1
    height, width = expected.shape[1:3]
    assert (clip.size[0] > clip.size[1]) == (height > width)


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_other_containers_carry_it(tmp_path, orientation, suffix):
    source = write(tmp_path / "a.mp4", orientation)
    copy = remux(source, tmp_path / f"copy{suffix}", lambda packet: None)
    decoder = open_decoder(copy)
    info = decoder.probe()
    decoder.close()
    # Matroska stores angles alone, and FFmpeg writes none where a matrix mirrors.
    assert suffix == ".mkv" or (info.rotation, info.mirrored) == orientation
    assert info.orientation == (info.rotation, info.mirrored)


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "planes"),
    [("yuv420p", "libx264", 3), ("yuv420p10le", "libx265", 2), ("yuv444p", "libx264", 0)],
)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_planes_become_the_patches_of_the_upright_picture(tmp_path, orientation, pix_fmt, codec, planes):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write(tmp_path / "a.mp4", orientation, pix_fmt=pix_fmt, codec=codec, options=options)
    clip, stored = read_frames(path, planes=True), read_frames(write(tmp_path / "b.mp4"), planes=True)
    assert (len(clip.frames.planes) if isinstance(clip.frames, YuvFrames) else 0) == planes
    assert (clip.rotation, clip.mirrored) == (orientation if planes else (0, False))
    size = (56, 84) if clip.size[0] < clip.size[1] else (84, 56)
    made = frames_to_patches(clip.frames, size=size, rotation=clip.rotation, mirrored=clip.mirrored, dtype=torch.uint8)
    upright = np.ascontiguousarray(turned(read_frames(write(tmp_path / "c.mp4")).frames.numpy(), *orientation))
    expected = frames_to_patches(torch.from_numpy(upright), size=size, dtype=torch.uint8)
    assert stored.size == ((clip.size[1], clip.size[0]) if orientation[0] % 180 else clip.size)
    assert (made.int() - expected.int()).abs().float().mean() < 6, "of the codec, and of chroma at the tiles' edges"


def test_nv12_planes_mirrored():
    picture = torch.from_numpy(np.random.default_rng(1).integers(16, 235, (2, 34, 50), dtype=np.uint8))
    chroma = torch.from_numpy(np.random.default_rng(2).integers(16, 240, (2, 17, 25, 2), dtype=np.uint8))
    frames = YuvFrames((picture, chroma))
    rgb = torch.cat([frames.to_rgb(i, i + 1, torch.float32) for i in range(2)]).round().byte().permute(0, 2, 3, 1)
    for rotation, mirrored in ORIENTATIONS:
        made = frames_to_patches(frames, size=(28, 56), rotation=rotation, mirrored=mirrored, dtype=torch.uint8)
        upright = torch.from_numpy(np.ascontiguousarray(turned(rgb.numpy(), rotation, mirrored)))
        expected = frames_to_patches(upright, size=(28, 56), dtype=torch.uint8)
        assert (made.int() - expected.int()).abs().max() <= 1, (rotation, mirrored)


def test_a_turn_by_any_angle_stays_in_the_frame(tmp_path):
    """Levels of FFmpeg 5.1's command line at five pixels: corner, edge, and around the middle."""
    pixels = np.full((6, 64, 96, 3), 16, np.uint8)
    pixels[:, :32, :48, 0] = pixels[:, :32, 48:, 1] = pixels[:, 32:, :48, 2] = 230
    path = write_video(tmp_path / "a.mp4", pixels, pix_fmt="yuv444p", options={"qp": "0"}, rotation=-30)
    clip = read_frames(path)
    assert clip.frames.shape[1:] == (64, 96, 3)
    seen = [clip.frames[0, y, x].tolist() for y, x in ((0, 0), (2, 60), (20, 50), (30, 20), (50, 40))]
    assert seen == [[0, 0, 0], [230, 16, 16], [230, 16, 16], [17, 16, 230], [16, 16, 16]]
    planes = read_frames(path, planes=True)
    assert (planes.rotation, planes.mirrored) == (0, False)


@pytest.mark.parametrize(("suffix", "form"), [(".jpg", "JPEG"), (".png", "PNG"), (".tiff", "TIFF"), (".webp", "WEBP")])
@pytest.mark.parametrize("number", EXIF)
def test_photographs(tmp_path, number, suffix, form):
    picture = tiles()[0]
    exif = Image.Exif()
    exif[0x0112] = number
    path = tmp_path / f"a{suffix}"
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(picture).save(path, form, exif=exif, **options)
    expected = turned(picture[None], *EXIF[number])
    frames = read_image(path).frames.numpy()
    assert frames.shape == expected.shape
    assert np.abs(frames.astype(int) - expected.astype(int)).max() <= (40 if form == "JPEG" else 0)


def test_a_mirrored_video_has_patches_thumbnails_and_a_key_of_its_own(tmp_path):
    plain, mirrored = write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4", (0, True))
    samples = [
        Sample(0, "0", "Which?", "video", "free-form", "<answer>x</answer>", path=path) for path in (plain, mirrored)
    ]
    video = VideoConfig(max_pixels=84 * 56)
    straight, flipped = (load_media(sample, video).patches for sample in samples)
    assert (straight.int() - flipped.int()).abs().float().mean() > 20
    assert media_key(samples[0]) != media_key(samples[1])
    assert media_key(samples[0]).format > 1, "patches of before are not taken from a cache"
    thumbnails = Thumbnails(10**6, 60.0)
    for path in (plain, mirrored):
        thumbnails.add(path, "video", VideoConfig())
    first, second = (entry["frames"][0] for entry in thumbnails.media)
    assert first != second
