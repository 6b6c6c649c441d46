"""What would take too much memory is refused before it is decoded, and what is decoded takes no more than was said."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from media import coded_frames, write_video
from PIL import Image

import videor1.video
from videor1.config import TrainConfig, VideoConfig
from videor1.types import Sample, SampleError
from videor1.video import read_frames, read_image
from videor1.video.frame_folder import read_frame_folder
from videor1.video.limits import MAX_DECODED_MB, most_pixels
from videor1.video.media import load_media


def refused(call, *args, **kwargs):
    with pytest.raises(SampleError) as caught:
        call(*args, **kwargs)
    assert caught.value.kind == "too_large", caught.value
    assert "data.max_decoded_mb" in caught.value.message
    assert caught.value.path == str(args[0])
    return caught.value.message


def flat_png(path, width, height):
    """Write a grey PNG of a few kilobytes, whatever its size, without holding its pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(9), b"\0" + b"\x80" * width
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def test_the_option_is_the_default_of_the_functions():
    assert TrainConfig().data.max_decoded_mb == MAX_DECODED_MB


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_image(tmp_path):
    side = 11_000  # above the size of which Pillow warns, and below that which it refuses
    path = flat_png(tmp_path / "a.png", side, side)
    assert path.stat().st_size < 200_000
    message = refused(read_image, path)
    assert f"{side}x{side} pixels" in message
    sample = Sample(0, "0", "Which?", "image", "free-form", "<answer>x</answer>", path=path)
    refused_by_loader = refused(lambda _: load_media(sample, VideoConfig()), path)
    assert refused_by_loader == message


def test_pillows_own_limit_is_the_same_kind(tmp_path):
    path = tmp_path / "a.png"
    data = bytearray(flat_png(path, 8, 8).read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(SampleError) as caught:
        read_image(path, max_decoded_mb=10**6)
    assert caught.value.kind == "too_large"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff"])
def test_every_format_of_images(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (1200, 900), (10, 20, 30)).save(path)
    assert "1200x900" in refused(read_image, path, max_decoded_mb=4)
    assert read_image(path, max_decoded_mb=24).frames.shape == (1, 900, 1200, 3)


def test_many_frames_of_a_large_size(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.zeros((40, 480, 640, 3), np.uint8))
    assert "16 frames of 640x480" in refused(read_frames, path, max_decoded_mb=40, max_frames=16, fps=10.0)
    assert len(read_frames(path, max_decoded_mb=40, max_frames=4, planes=True).frames) == 4
    assert len(read_frames(path, max_decoded_mb=64, max_frames=16, fps=10.0).frames) == 16


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_frames_that_the_header_states(tmp_path, suffix):
    """A container's header, which may lie, and the coded stream's own, in which FFmpeg believes."""
    path = write_video(tmp_path / f"a{suffix}", coded_frames(6, 480, 640), codec="mpeg4")
    assert "640x480" in refused(read_frames, path, max_decoded_mb=28)
    assert most_pixels(28) < 640 * 480 < most_pixels(64)


def test_frames_that_grow_within_the_video(tmp_path):
    small = write_video(tmp_path / "s.264", coded_frames(20, 32, 48), container="h264")
    large = write_video(tmp_path / "l.264", coded_frames(6, 960, 1280), container="h264")
    both = tmp_path / "both.264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(SampleError) as caught:
        read_frames(both, max_decoded_mb=40)
    assert caught.value.kind in ("too_large", "decode")


def test_a_stream_that_says_16384x16384(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(4):
            out.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        out.mux(stream.encode())
    data = path.read_bytes()
    for name in (b"\xb0\x81\x10", b"\xba\x81\x10"):  # PixelWidth and PixelHeight, of one byte
        assert data.count(name) == 1
        data = data.replace(name, name[:1] + b"\x82\x40\x00"[:2] + b"\x40")
    big = tmp_path / "big.mkv"
    big.write_bytes(data)
    with pytest.raises(SampleError):
        read_frames(big)


def test_a_folder_of_large_images(tmp_path):
    for number in range(8):
        Image.new("RGB", (640, 480), (number,) * 3).save(tmp_path / f"{number}.png")
    message = refused(read_frame_folder, tmp_path, frames_per_second=2.0, max_decoded_mb=8)
    assert "8 images of 640x480" in message
    assert len(read_frame_folder(tmp_path, frames_per_second=2.0, max_decoded_mb=16).frames) == 8


PEAK = """
import sys
from pathlib import Path
from videor1.video import read_frames, read_image

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

kind, small, large, planes = sys.argv[1:]
read = read_image if kind == "image" else lambda path: read_frames(path, planes=planes == "1", threads=1, fps=100.0)
read(Path(small))
before = peak()
clip = read(Path(large))
print(peak() - before)
"""


def peak_megabytes(kind, small, large, planes=False):
    command = [sys.executable, "-c", PEAK, kind, str(small), str(large), str(int(planes))]
    environment = {**os.environ, "PYTHONPATH": str(Path(videor1.video.__file__).parents[2])}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        (".png", "RGB", {}),
        (".png", "RGBA", {}),
        (".png", "P", {}),
        (".jpg", "RGB", {"quality": 90}),
        (".jpg", "RGB", {"progressive": True, "subsampling": 0}),
        (".jpg", "RGB", {"exif": 6}),
        (".webp", "RGB", {"quality": 50}),
        (".gif", "P", {}),
        (".bmp", "RGB", {}),
        (".tiff", "RGB", {"compression": "tiff_lzw"}),
    ],
)
def test_an_image_takes_what_was_said(tmp_path, suffix, mode, options):
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {"exif": exif}
    Image.new("RGB", (40, 30)).convert(mode).save(small, **options)
    noise = Image.effect_noise((2000, 1500), 30).convert("RGB").convert(mode)
    noise.save(large, **options)
    message = refused(read_image, large, max_decoded_mb=1)
    estimate = float(message.partition("about ")[2].partition(" MiB")[0])
    took = peak_megabytes("image", small, large)
    assert took <= estimate + 8, f"{took:.0f} MB, estimated {estimate}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("planes", [False, True])
def test_a_video_takes_what_was_said(tmp_path, planes):
    small = write_video(tmp_path / "small.mp4", coded_frames(6))
    frames = np.random.default_rng(0).integers(0, 256, (16, 90, 160, 3), dtype=np.uint8).repeat(12, 1).repeat(12, 2)
    large = write_video(tmp_path / "large.mp4", frames, options={"preset": "ultrafast"})
    message = refused(read_frames, large, planes=planes, fps=100.0, max_decoded_mb=90)
    estimate = float(message.partition("about ")[2].partition(" MiB")[0])
    took = peak_megabytes("video", small, large, planes)
    assert took <= estimate, f"{took:.0f} MB, estimated {estimate:.0f}"
    read_frames(large, planes=planes, fps=100.0, max_decoded_mb=int(estimate) + 1)
