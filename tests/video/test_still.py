"""Images are what their bytes say: only the formats that are meant to be read are opened, whatever a file's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from videor1.types import SampleError
from videor1.video import read_image
from videor1.video.frame_folder import read_frame_folder
from videor1.video.still import FORMATS, rgb_of

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 30
%%EndComments
% a program
showpage
"""


def kind_of(call, *args, **kwargs):
    with pytest.raises(SampleError) as caught:
        call(*args, **kwargs)
    return caught.value.kind


def picture(side=24):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps", "a"])
def test_an_eps_starts_no_interpreter(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(EPS)
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: started.append(args))
    assert kind_of(read_image, path) == "image"
    assert not started


@pytest.mark.parametrize("form", ["EPS", "PPM", "TGA", "PCX", "ICO", "SGI", "JPEG2000", "PDF", "IM", "DDS", "XBM"])
def test_other_formats_are_refused(tmp_path, form):
    path = tmp_path / "a.png"
    try:
        picture().convert("1" if form == "XBM" else "RGB").save(path, form)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"this Pillow does not write {form}: {error}")
    assert kind_of(read_image, path) == "image"


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
def test_the_formats(tmp_path, form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "no-ending"
    options = {"lossless": True} if form == "WEBP" else {"save_all": True} if form == "MPO" else {}
    picture().save(path, form, **options)
    frames = read_image(path).frames[0].numpy().astype(int)
    assert frames.shape == (24, 24, 3)
    if form in ("PNG", "WEBP", "BMP", "TIFF"):
        assert np.array_equal(frames, np.asarray(picture()))


def test_images_of_a_folder_too(tmp_path):
    for number in range(4):
        picture().save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(EPS)
    assert kind_of(read_frame_folder, tmp_path, frames_per_second=1.0) == "image"


def test_an_image_that_others_have_opened(tmp_path):
    """As lmms-eval's tasks hold them: undecoded, of any format."""
    eps = tmp_path / "a.eps"
    picture().save(eps, "EPS")
    with Image.open(eps) as image:
        assert kind_of(rgb_of, image, Path("image")) == "image"
    exif = Image.Exif()
    exif[0x0112] = 5  # mirrored about the diagonal
    path = tmp_path / "a.png"
    upright = Image.new("RGB", (30, 20))
    upright.putpixel((29, 0), (255, 0, 0))
    upright.save(path, exif=exif)
    with Image.open(path) as image:
        pixels = rgb_of(image, Path("image"))
        assert pixels.shape == (30, 20, 3)
        assert pixels[29, 0].tolist() == [255, 0, 0]
        assert image.size == (30, 20), "it stays as it is"
        assert np.array_equal(rgb_of(image, Path("image")), pixels)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert rgb_of(clear, Path("image"))[0, 0].tolist() == [255, 255, 255]
    with pytest.raises(SampleError) as caught:
        rgb_of(Image.new("RGB", (3000, 3000)), Path("image"), max_decoded_mb=64)
    assert caught.value.kind == "too_large"


def test_strips_are_the_whole(tmp_path):
    """Larger than what is converted at once, and of every mode that is converted."""
    shape = (1500, 1100)
    values = np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)
    for mode, array in (("RGB", values[..., :3]), ("RGBA", values), ("L", values[..., 0]), ("P", None)):
        path = tmp_path / f"{mode}.png"
        image = Image.fromarray(values[..., :3]).quantize(16) if array is None else Image.fromarray(array)
        image.save(path, compress_level=1)
        frame = read_image(path).frames[0].numpy()
        if mode == "RGBA":
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        assert np.array_equal(frame, np.asarray(image.convert("RGB"))), mode


@pytest.mark.skipif(shutil.which("gs") is None, reason="there is no Ghostscript here")
def test_ghostscript_would_have_run(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(EPS)
    with Image.open(path) as image:
        image.load()
    assert kind_of(read_image, path) == "image"
