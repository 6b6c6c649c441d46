"""Planes are the decoder's own, to the bit; what has none comes as RGB, which is within 3 levels of the formula."""

from collections.abc import Sequence
from pathlib import Path

import av
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


def test_planes_of_odd_sizes_and_of_ten_bit(made: Make, tmp_path: Path) -> None:
    frames = decode(made("odd size 4:2:0"), [1, 300], planes=True)
    assert [list(plane.shape) for plane in frames.pixels.planes] == [[2, 47, 81], [2, 24, 41], [2, 24, 41]]
    assert decoded_numbers(frames) == [1, 300]
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
    # Nor have formats that change.
    both = tmp_path / "both.264"
    for fmt in ("yuv420p", "yuv444p"):
        part = write_video(tmp_path / f"{fmt}.264", numbered_frames(20), pix_fmt=fmt, container="h264")
        both.write_bytes((both.read_bytes() if both.exists() else b"") + part.read_bytes())
    clip = read_frames(both, planes=True)
    assert clip.total_frames == 40
    assert isinstance(clip.frames, torch.Tensor)
    assert torch.equal(clip.frames, read_frames(both).frames)
    for fmt, bits in (("gray", 8), ("gray16le", 16), ("gray10le", 10)):  # untagged grey is of full range
        path = write_flat(tmp_path / f"{fmt}.mkv", fmt, bits, [round(0.8 * (2**bits - 1))], None)
        assert (read_frames(path).frames[0].int() - 204).abs().max() <= 1


LUMA = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 4: (0.3, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114)}
LUMA |= {7: (0.212, 0.087), 9: (0.2627, 0.0593)}  # AVColorSpace: the weights of red and blue; 2: untagged
FORMATS = {"yuv420p": 8, "yuv422p": 8, "yuv444p": 8, "yuv440p": 8, "yuv411p": 8, "yuv410p": 8}
FORMATS |= {"yuv420p10le": 10, "yuv422p10le": 10, "yuv444p10le": 10}


def write_flat(path: Path, pix_fmt: str, bits: int, levels: Sequence[int], tags: tuple[int, int] | None) -> Path:
    """Write four frames of one colour, given as levels of each plane; ``tags``: colour matrix and range."""
    dtype = np.uint16 if bits > 8 else np.uint8
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for number in range(4):
            frame = av.VideoFrame(64, 48, pix_fmt)
            if tags:
                for tagged in (stream.codec_context, frame) if number == 0 else (frame,):
                    tagged.colorspace, tagged.color_range = tags
            for level, plane in zip(levels, frame.planes, strict=True):
                plane.update(np.full(plane.buffer_size // dtype().itemsize, level, dtype).tobytes())
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def formula(levels: Sequence[int], matrix: int, full: bool, bits: int) -> np.ndarray:
    (red, blue), unit, top = LUMA[matrix], 2.0 ** (bits - 8), 2**bits - 1
    y, u, v = levels
    luma = y * 255 / top if full else (y - 16 * unit) * 255 / (219 * unit)
    u, v = ((c - 128 * unit) * 255 / (top if full else 224 * unit) for c in (u, v))
    green = luma - (2 * blue * (1 - blue) * u + 2 * red * (1 - red) * v) / (1 - red - blue)
    return np.array([luma + 2 * (1 - red) * v, green, luma + 2 * (1 - blue) * u])


@pytest.mark.grid(pix_fmt=list(FORMATS), matrix=list(LUMA), full=[False, True])
def test_rgb_is_the_formulas(tmp_path: Path, pix_fmt: str, matrix: int, full: bool) -> None:
    bits = FORMATS[pix_fmt]
    levels = [level * 2 ** (bits - 8) for level in (110, 150, 105)]
    path = write_flat(tmp_path / "a.mkv", pix_fmt, bits, levels, (matrix, 2 if full else 1))
    expected = formula(levels, matrix, full, bits)
    assert expected.min() > 0
    assert expected.max() < 255
    rgb, planes = read_frames(path).frames, read_frames(path, planes=True).frames
    if isinstance(planes, YuvFrames):
        assert planes.range == ("full" if full else "limited")
        planes = planes.to_rgb(0, 1, torch.float32).permute(0, 2, 3, 1)
    for frames in (rgb, planes):
        assert np.abs(frames[0, 20, 20].double().numpy() - expected).max() <= 3
