"""What would take too much memory is refused before it is decoded, and what is decoded takes no more than was said."""

import functools
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media import coded_frames, refusal, sample_of, write_video
from PIL import Image

from videor1.config import TrainConfig, VideoConfig
from videor1.video import read_frames, read_image
from videor1.video.frame_folder import read_frame_folder
from videor1.video.limits import MAX_DECODED_MB, most_pixels
from videor1.video.media import load_media

ROOT = Path(__file__).resolve().parents[2]


def refused(call: Callable[..., object], path: Path, **options: Any) -> str:
    """The message of an error that says which option sets the limit."""
    error = refusal(call, path, **options)
    assert error.kind == "too_large"
    assert "data.max_decoded_mb" in error.message
    return error.message


def estimate(message: str) -> float:
    return float(message.partition("about ")[2].partition(" MiB")[0].replace(",", ""))


def png_that_says(path: Path, side: int) -> Path:
    """A PNG of 8 x 8 pixels whose header states others."""
    Image.new("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_image(tmp_path: Path) -> None:
    assert TrainConfig().data.max_decoded_mb == MAX_DECODED_MB
    side = 11_000  # above the size of which Pillow warns, and below that which it refuses
    path = png_that_says(tmp_path / "a.png", side)
    message = refused(read_image, path)
    assert f"{side}x{side} pixels" in message
    assert refused(lambda path: load_media(sample_of(path, "image"), VideoConfig()), path) == message
    bomb = png_that_says(tmp_path / "bomb.png", 30_000)
    assert refusal(read_image, bomb, max_decoded_mb=10**6).kind == "too_large", "Pillow's own limit"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_frames_that_the_header_states(tmp_path: Path, suffix: str) -> None:
    """A container's header, which may lie, and the coded stream's own, in which FFmpeg believes."""
    path = write_video(tmp_path / f"a{suffix}", coded_frames(6, 480, 640), codec="mpeg4")
    assert "640x480" in refused(read_frames, path, max_decoded_mb=28)
    assert most_pixels(28) < 640 * 480 < most_pixels(64)


def test_a_folder_of_large_images(tmp_path: Path) -> None:
    for number in range(8):
        Image.new("RGB", (640, 480), (number,) * 3).save(tmp_path / f"{number}.png")
    message = refused(read_frame_folder, tmp_path, frames_per_second=2.0, max_decoded_mb=8)
    assert "8 images of 640x480" in message
    assert len(read_frame_folder(tmp_path, frames_per_second=2.0, max_decoded_mb=16).frames) == 8


def test_a_stream_that_says_16384x16384(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", np.zeros((4, 16, 16, 3), np.uint8), codec="ffv1")
    data = path.read_bytes()
    for name in (b"\xb0", b"\xba"):  # PixelWidth and PixelHeight, of one byte
        assert data.count(name + b"\x81\x10") == 1
        data = data.replace(name + b"\x81\x10", name + b"\x82\x40")
    path.write_bytes(data)
    refusal(read_frames, path)


# Forks for each pair of files that it is given, so that nothing is in a child's memory that it reads into.
PEAK = """
import json, os, sys
from pathlib import Path
from videor1.video import read_frames, read_image

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

for line in sys.stdin:
    small, large, options = json.loads(line)
    if os.fork() == 0:
        read = read_image if options is None else lambda path: read_frames(path, threads=1, **options)
        read(Path(small))
        before = peak()
        clip = read(Path(large))
        print(peak() - before, flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        print("nan", flush=True)
"""


@pytest.fixture(scope="module")
def megabytes_taken() -> Iterator[Callable[..., float]]:
    """How much memory grows by reading a file, in a process that has read a small one."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with subprocess.Popen([sys.executable, "-c", PEAK], text=True, **pipes) as process:

        def ask(small: Path, large: Path, options: dict[str, Any] | None = None) -> float:
            print(json.dumps([str(small), str(large), options]), file=process.stdin, flush=True)
            return float(process.stdout.readline())

        yield ask
        process.stdin.close()


FAST, TURNED = {"compress_level": 1}, Image.Exif()
TURNED[0x0112] = 6
IMAGES = [
    *((".png", mode, FAST) for mode in ("RGB", "RGBA", "P")),
    *((".jpg", "RGB", options) for options in ({"quality": 90}, {"progressive": True, "subsampling": 0})),
    *((".jpg", "RGB", {"exif": TURNED}), (".webp", "RGB", {"quality": 50, "method": 0}), (".gif", "P", {})),
    *((".bmp", "RGB", {}), (".tiff", "RGB", {"compression": "tiff_lzw"})),
]
NOISE = functools.cache(lambda: Image.effect_noise((2000, 1500), 30).convert("RGB"))


@pytest.mark.parametrize(("suffix", "mode", "options"), IMAGES)
def test_an_image_takes_what_was_said(
    tmp_path: Path, megabytes_taken: Callable[..., float], suffix: str, mode: str, options: dict[str, Any]
) -> None:
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    Image.new("RGB", (40, 30)).convert(mode).save(small, **options)
    NOISE().convert(mode).save(large, **options)
    message = refused(read_image, large, max_decoded_mb=1)
    assert "an image of 2000x1500" in message
    assert megabytes_taken(small, large) <= estimate(message) + 8
    read_image(large, max_decoded_mb=int(estimate(message)) + 1)


def test_a_video_takes_what_was_said(tmp_path: Path, megabytes_taken: Callable[..., float]) -> None:
    small = write_video(tmp_path / "small.mp4", coded_frames(6))
    frames = np.random.default_rng(0).integers(0, 256, (16, 90, 160, 3), dtype=np.uint8).repeat(12, 1).repeat(12, 2)
    large = write_video(tmp_path / "large.mp4", frames, options={"preset": "ultrafast"})
    for planes in (False, True):
        options = {"planes": planes, "fps": 100.0}
        message = refused(read_frames, large, max_decoded_mb=90, **options)
        assert "16 frames of 1920x1080" in message
        assert megabytes_taken(small, large, options) <= estimate(message)
        read_frames(large, max_decoded_mb=int(estimate(message)) + 1, **options)
        read_frames(large, max_decoded_mb=100, max_frames=4, **options)
