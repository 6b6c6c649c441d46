"""Planes are the decoder's own, to the bit, in their colour matrix and range; what has none comes as RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from coded_videos import Make, decode, decoded_numbers
from media import ffmpeg_frames, numbered_frames, write_video

from videor1.video import read_frames
from videor1_kernels.frames_to_patches import YuvFrames


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 34, 58, 3), dtype=np.uint8)


def plane_arrays(path: Path, dtype: type = np.uint8) -> list[np.ndarray]:
    """Each plane as the decoder gives it, [F, height, width]."""
    planes = zip(*(frame.planes for frame in ffmpeg_frames(path)), strict=True)
    return [np.stack([np.frombuffer(p, dtype).reshape(p.height, -1)[:, : p.width] for p in plane]) for plane in planes]


COLOURS = {
    "untagged": ("libx264", "yuv420p", "", "601", "limited"),
    "709": ("libx264", "yuv420p", "colormatrix=bt709", "709", "limited"),
    "470bg": ("libx264", "yuv420p", "colormatrix=bt470bg", "601", "limited"),
    "170m": ("libx264", "yuv420p", "colormatrix=smpte170m", "601", "limited"),
    "2020": ("libx264", "yuv420p", "colormatrix=bt2020nc", "2020", "limited"),
    "full range": ("libx264", "yuv420p", "fullrange=on:colormatrix=bt709", "709", "full"),
    "yuvj": ("mjpeg", "yuvj420p", "", "601", "full"),
}


@pytest.mark.parametrize("name", COLOURS)
def test_planes_are_the_decoders(tmp_path: Path, name: str) -> None:
    codec, pix_fmt, params, matrix, levels = COLOURS[name]
    options = {"x264-params": params} if params else {}
    path = write_video(tmp_path / "a.mkv", noise(8), codec=codec, pix_fmt=pix_fmt, options=options)
    pixels = decode(path, [6, 2], planes=True).pixels
    assert isinstance(pixels, YuvFrames)
    assert (pixels.matrix, pixels.range) == (matrix, levels)
    for plane, expected in zip(pixels.planes, plane_arrays(path), strict=True):
        assert np.array_equal(plane.numpy(), expected[[6, 2]])


def test_planes_of_odd_sizes(made: Make) -> None:
    frames = decode(made("odd size 4:2:0"), [1, 300], planes=True)
    assert [list(plane.shape) for plane in frames.pixels.planes] == [[2, 47, 81], [2, 24, 41], [2, 24, 41]]
    assert decoded_numbers(frames) == [1, 300]


def test_ten_bit_planes_lose_nothing(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", noise(4), codec="ffv1", pix_fmt="yuv420p10le")
    planes = decode(path, range(4), planes=True).pixels.planes
    assert [plane.dtype for plane in planes] == [torch.uint16] * 2
    Y, U, V = plane_arrays(path, np.uint16)
    assert Y.max() > 255
    assert np.array_equal(planes[0].numpy(), Y << 6)
    assert np.array_equal(planes[1].numpy(), np.stack((U, V), -1) << 6)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "params"),
    [("libx264", "yuv444p", ""), ("libx264", "yuv420p", "colormatrix=smpte240m"), ("ffv1", "bgr0", "")],
)
def test_what_has_no_planes_comes_as_rgb(tmp_path: Path, codec: str, pix_fmt: str, params: str) -> None:
    options = {"x264-params": params} if params else {}
    path = write_video(tmp_path / "a.mkv", numbered_frames(8), codec=codec, pix_fmt=pix_fmt, options=options)
    pixels, rgb = (decode(path, [1, 5], planes=planes).pixels for planes in (True, False))
    assert isinstance(pixels, torch.Tensor)
    assert torch.equal(pixels, rgb)


def test_pixel_formats_that_change_come_as_rgb(tmp_path: Path) -> None:
    parts = [
        write_video(tmp_path / f"{fmt}.264", numbered_frames(20), pix_fmt=fmt, container="h264").read_bytes()
        for fmt in ("yuv420p", "yuv444p")
    ]
    path = tmp_path / "both.264"
    path.write_bytes(b"".join(parts))
    clip = read_frames(path, planes=True)
    assert clip.total_frames == 40
    assert isinstance(clip.frames, torch.Tensor)
    assert torch.equal(clip.frames, read_frames(path).frames)
