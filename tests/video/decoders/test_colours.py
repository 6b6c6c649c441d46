"""RGB by every supported PyAV is within 3 levels of the formula, for every matrix, range and subsampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from videor1.video import read_frames
from videor1_kernels.frames_to_patches import YuvFrames

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


@pytest.mark.parametrize(("pix_fmt", "bits"), [("gray", 8), ("gray16le", 16), ("gray10le", 10)])
def test_untagged_grey_is_of_full_range(tmp_path: Path, pix_fmt: str, bits: int) -> None:
    path = write_flat(tmp_path / "a.mkv", pix_fmt, bits, [round(0.8 * (2**bits - 1))], None)
    assert (read_frames(path).frames[0].int() - 204).abs().max() <= 1
