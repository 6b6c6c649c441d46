"""The eight orientations of videos and photographs, and turns by any angle, are shown as FFmpeg's command line does."""

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import ORIENTATIONS, remux, sample_of, set_matrix, turned, write_video
from PIL import Image

from videor1.config import VideoConfig
from videor1.report.thumbnails import Thumbnails
from videor1.types import MediaItem
from videor1.video import read_frames, read_image
from videor1.video.decoders import open_decoder
from videor1.video.media import load_media, media_key
from videor1.video.orientation import Orientation, matrix_orientation
from videor1_kernels import frames_to_patches
from videor1_kernels.frames_to_patches import YuvFrames

EXIF = {1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True)}
EXIF |= {5: (90, True), 6: (270, False), 7: (270, True), 8: (90, False)}
TURN = tuple[int, bool]
# The codec and options of each pixel format, and how many planes its frames have.
FORMATS: dict[str, tuple[dict[str, Any], int]] = {
    "yuv420p": ({"options": {"qp": "4"}}, 3),
    "yuv420p10le": ({"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none"}}, 2),
    "yuv444p": ({}, 0),
}
Stored = Callable[..., Path]


def tiles(height: int = 4, width: int = 6, side: int = 16) -> np.ndarray:
    """One picture [1, ...] of random tiles: no turn and no mirror image of it is like another."""
    small = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    return small.repeat(side, 1).repeat(side, 2)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Copies of one video of the tiles, each with the matrix of its orientation."""
    folder, made = tmp_path_factory.mktemp("stored"), {}

    def make(orientation: TURN = (0, False), pix_fmt: str = "yuv420p") -> Path:
        path = folder / f"{orientation}{pix_fmt}.mp4"
        if pix_fmt not in made:
            plain = write_video(path, np.repeat(tiles(), 6, 0), pix_fmt=pix_fmt, **FORMATS[pix_fmt][0])
            made[pix_fmt] = plain.read_bytes()
        path.write_bytes(made[pix_fmt])
        return set_matrix(path, ORIENTATIONS[orientation])

    return make


# Clockwise degrees: FFmpeg rounds them to whole ones, and takes no notice of the first.
ANGLES = {0.4: 0, -0.4: 0, 1.4: 0, 1.6: 358, 30: 330, 45.4: 315, 89.6: 270, 90.4: 270, 91: 269, 135: 225, 179.6: 180}
ANGLES |= {180.4: 180, 200: 160, 269.6: 90, -90.4: 90, 300: 60, 359: 1, -0.6: 1}


def test_matrices() -> None:
    def read(*values: float, moved: tuple[int, int] = (0, 0)) -> Orientation:
        a, b, c, d = (round(value * 65536) for value in values)
        return matrix_orientation([a, b, 0, c, d, 0, *moved, 1 << 30])

    for orientation, (a, b, c, d) in ORIENTATIONS.items():
        assert read(a, b, c, d) == read(3 * a, 3 * b, c / 2, d / 2, moved=(640, 480)) == orientation
    for degrees, expected in ANGLES.items():
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        assert read(cosine, sine, -sine, cosine) == (expected, False), degrees
    for without_an_angle in ((0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 1)):
        assert read(*without_an_angle) == Orientation()


def test_what_is_left_after_a_turn() -> None:
    for rotation, mirrored in ORIENTATIONS:
        for done in (0, 90, 180, 270):
            left = Orientation(rotation, mirrored).after(done)
            twice = turned(turned(tiles(), done, False), left.rotation, left.mirrored)
            assert np.array_equal(twice, turned(tiles(), rotation, mirrored))


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_videos(stored: Stored, orientation: TURN, backend: str) -> None:
    if backend == "decord":
        pytest.importorskip("decord")
    plain, clip = read_frames(stored()), read_frames(stored(orientation), backend=backend)
    assert (clip.rotation, clip.mirrored, clip.backend) == (0, False, backend)
    assert clip.timestamps == plain.timestamps
    expected = turned(plain.frames.numpy(), *orientation)
    assert clip.frames.shape == expected.shape
    # decord turns planes before it makes RGB of them, which blurs the chroma of the tiles' edges otherwise.
    inner = np.s_[:, 4:-4, 4:-4]
    difference = np.abs(clip.frames.numpy().astype(int) - expected.astype(int))
    assert difference.max() == 0 if backend == "pyav" else np.median(difference[inner]) <= 1
    assert (clip.size[0] > clip.size[1]) == (expected.shape[1] > expected.shape[2])


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_other_containers_carry_it(stored: Stored, tmp_path: Path, orientation: TURN, suffix: str) -> None:
    copy = remux(stored(orientation), tmp_path / f"copy{suffix}", lambda packet: None)
    with closing(open_decoder(copy)) as decoder:
        info = decoder.probe()
    assert (info.height, info.width) == (64, 96), "as stored"
    # Matroska stores angles alone, and FFmpeg writes none where a matrix mirrors.
    assert suffix == ".mkv" or (info.rotation, info.mirrored) == orientation
    assert info.orientation == (info.rotation, info.mirrored)


@pytest.mark.parametrize("pix_fmt", FORMATS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_planes_become_the_patches_of_the_upright_picture(stored: Stored, orientation: TURN, pix_fmt: str) -> None:
    clip, planes = read_frames(stored(orientation, pix_fmt), planes=True), FORMATS[pix_fmt][1]
    plain = read_frames(stored())
    assert (len(clip.frames.planes) if isinstance(clip.frames, YuvFrames) else 0) == planes
    assert (clip.rotation, clip.mirrored) == (orientation if planes else (0, False))
    assert plain.size == ((clip.size[1], clip.size[0]) if orientation[0] % 180 else clip.size)
    size = (56, 84) if clip.size[0] < clip.size[1] else (84, 56)
    made = frames_to_patches(clip.frames, size=size, rotation=clip.rotation, mirrored=clip.mirrored, dtype=torch.uint8)
    upright = np.ascontiguousarray(turned(plain.frames.numpy(), *orientation))
    expected = frames_to_patches(torch.from_numpy(upright), size=size, dtype=torch.uint8)
    assert (made.int() - expected.int()).abs().float().mean() < 6, "of the codec, and of chroma at the tiles' edges"


def test_a_turn_by_any_angle_stays_in_the_frame(tmp_path: Path) -> None:
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


def test_a_mirrored_video_has_patches_and_thumbnails_of_its_own(stored: Stored) -> None:
    samples, thumbnails = [sample_of(path) for path in (stored(), stored((0, True)))], Thumbnails(10**6, 60.0)
    straight, flipped = (load_media(sample, VideoConfig(max_pixels=84 * 56)).patches for sample in samples)
    assert (straight.int() - flipped.int()).abs().float().mean() > 20
    assert media_key(samples[0]).format > 1, "patches of before are not taken from a cache"
    for sample in samples:
        thumbnails.add(MediaItem("video", sample.path), VideoConfig())
    first, second = (entry["frames"][0] for entry in thumbnails.media)
    assert first != second


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("number", "orientation"), EXIF.items())
def test_photographs(tmp_path: Path, number: int, orientation: TURN, form: str) -> None:
    exif, path = Image.Exif(), tmp_path / "a"
    exif[0x0112] = number
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(tiles()[0]).save(path, form, exif=exif, **options)
    expected = turned(tiles(), *orientation)
    frames = read_image(path).frames.numpy()
    assert frames.shape == expected.shape
    assert np.abs(frames.astype(int) - expected.astype(int)).max() <= (40 if form == "JPEG" else 0)
