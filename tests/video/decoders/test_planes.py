"""Planes are the decoder's own, to the bit, in their colour matrix, range and rotation; what has none comes as RGB."""

import av
import numpy as np
import pytest
import torch
from coded_videos import decoded_numbers
from media import coded_frames, coded_numbers, numbered_frames, write_video

from videor1.video import read_frames
from videor1.video.decoders.pyav import PyAvDecoder
from videor1_kernels.frames_to_patches import YuvFrames


def plane_arrays(path):
    """Return each plane as the decoder gives it: uint8 [F, height, width], with the width in bytes."""
    planes = ([], [], [])
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            width = {"yuv420p10le": 2}.get(frame.format.name, 1)
            for frames, plane in zip(planes, frame.planes, strict=True):
                lines = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
                frames.append(lines[:, : plane.width * width].copy())
    return [np.stack(frames) for frames in planes]


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
def test_planes_are_the_decoders(tmp_path, name):
    codec, pix_fmt, params, matrix, levels = COLOURS[name]
    noise = np.random.default_rng(0).integers(0, 256, (8, 34, 58, 3), dtype=np.uint8)
    options = {"x264-params": params} if params else {}
    path = write_video(tmp_path / "a.mkv", noise, codec=codec, pix_fmt=pix_fmt, options=options)
    decoder = PyAvDecoder(path)
    pixels = decoder.frames([6, 2], planes=True).pixels
    decoder.close()
    assert isinstance(pixels, YuvFrames)
    assert (pixels.matrix, pixels.range) == (matrix, levels)
    for plane, expected in zip(pixels.planes, plane_arrays(path), strict=True):
        assert np.array_equal(plane.numpy(), expected[[6, 2]])


def test_planes_of_odd_sizes(made):
    decoder = PyAvDecoder(made("odd size 4:2:0"))
    pixels = decoder.frames([1, 300], planes=True).pixels
    assert [list(plane.shape) for plane in pixels.planes] == [[2, 47, 81], [2, 24, 41], [2, 24, 41]]
    assert coded_numbers(pixels.planes[0]) == [1, 300]
    decoder.close()


def test_ten_bit_planes_lose_nothing(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mkv", noise, codec="ffv1", pix_fmt="yuv420p10le")
    decoder = PyAvDecoder(path)
    pixels = decoder.frames(range(4), planes=True).pixels
    decoder.close()
    assert [plane.dtype for plane in pixels.planes] == [torch.uint16] * 2
    Y, UV = (plane.numpy() for plane in pixels.planes)
    expected = [plane.view(np.uint16) for plane in plane_arrays(path)]
    assert expected[0].max() > 255
    assert np.array_equal(Y, expected[0] << 6)
    assert np.array_equal(UV, np.stack(expected[1:], -1) << 6)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "params"),
    [("libx264", "yuv444p", ""), ("libx264", "yuv420p", "colormatrix=smpte240m"), ("ffv1", "bgr0", "")],
)
def test_what_has_no_planes_comes_as_rgb(tmp_path, codec, pix_fmt, params):
    options = {"x264-params": params} if params else {}
    path = write_video(tmp_path / "a.mkv", numbered_frames(8), codec=codec, pix_fmt=pix_fmt, options=options)
    decoder = PyAvDecoder(path)
    pixels, rgb = (decoder.frames([1, 5], planes=planes).pixels for planes in (True, False))
    decoder.close()
    assert isinstance(pixels, torch.Tensor)
    assert torch.equal(pixels, rgb)


def test_pixel_formats_that_change_come_as_rgb(tmp_path):
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


def test_rotation_is_reported_and_applied(tmp_path):
    path = write_video(tmp_path / "r.mp4", coded_frames(20, 48, 80), rotation=90)
    decoder = PyAvDecoder(path)
    assert (decoder.probe().rotation, decoder.probe().height, decoder.probe().width) == (90, 48, 80)
    frames = decoder.frames([3, 17])
    decoder.close()
    assert frames.rotation == 90
    assert decoded_numbers(frames) == [3, 17]
    clip, planes = read_frames(path), read_frames(path, planes=True)
    assert (clip.rotation, planes.rotation) == (0, 90)
    assert clip.size == planes.size
    assert clip.frames.shape[1:3] == (80, 48)
    luma = planes.frames.planes[0]
    assert coded_numbers(luma) == coded_numbers(torch.rot90(clip.frames, -1, dims=(1, 2)))
