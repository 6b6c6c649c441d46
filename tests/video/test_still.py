"""Images are what their bytes say: only the formats that are meant to be read are opened, whatever a file's name."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from media import refusal
from PIL import Image, features

from videor1.video import read_image
from videor1.video.still import FORMATS, rgb_of

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n% a program\nshowpage\n"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps", "a"])
def test_an_eps_starts_no_interpreter(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(EPS)
    with patch("PIL.EpsImagePlugin.Ghostscript") as one, patch("subprocess.check_call") as other:
        assert refusal(read_image, tmp_path / name).kind == "image"
    assert not one.called
    assert not other.called


@pytest.mark.parametrize("form", ["EPS", "PPM", "TGA", "PCX", "ICO", "SGI", "JPEG2000", "PDF", "IM", "DDS", "XBM"])
def test_other_formats_are_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.png"
    try:
        PICTURE.convert("1" if form == "XBM" else "RGB").save(path, form)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"this Pillow does not write {form}: {error}")
    assert refusal(read_image, path).kind == "image"


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
def test_the_formats(tmp_path: Path, form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "no-ending"
    options = {"lossless": True} if form == "WEBP" else {"save_all": True} if form == "MPO" else {}
    PICTURE.save(path, form, **options)
    pixels = read_image(path).frames[0].numpy()
    assert pixels.shape == (24, 24, 3)
    assert form not in ("PNG", "WEBP", "BMP", "TIFF") or np.array_equal(pixels, np.asarray(PICTURE))


def test_strips_are_the_whole(tmp_path: Path) -> None:
    """Larger than what is converted at once, and of every mode that is converted."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1100, 1000, 4), dtype=np.uint8))
    for stored in (image, *(image.convert("RGB").convert(mode) for mode in ("RGB", "L", "P"))):
        stored.save(tmp_path / "a.png", compress_level=1)
        if stored is image:
            stored = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        assert np.array_equal(read_image(tmp_path / "a.png").frames[0].numpy(), np.asarray(stored.convert("RGB")))


def test_an_image_that_others_have_opened(tmp_path: Path) -> None:
    """As lmms-eval's tasks hold them: undecoded, of any format."""
    path, eps, name = tmp_path / "a.png", tmp_path / "a.eps", Path("image")
    PICTURE.save(eps, "EPS")
    with Image.open(eps) as image:
        assert refusal(lambda path: rgb_of(image, path), name).kind == "image"
    exif = Image.Exif()
    exif[0x0112] = 5  # mirrored about the diagonal
    stored = Image.new("RGB", (30, 20))
    stored.putpixel((29, 0), (255, 0, 0))
    stored.save(path, exif=exif)
    with Image.open(path) as image:
        pixels = rgb_of(image, name)
        assert pixels.shape == (30, 20, 3)
        assert pixels[29, 0].tolist() == [255, 0, 0]
        assert image.size == (30, 20), "it stays as it is"
        assert np.array_equal(rgb_of(image, name), pixels)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert rgb_of(clear, name)[0, 0].tolist() == [255, 255, 255]
    large = Image.new("RGB", (3000, 3000))
    assert refusal(lambda path: rgb_of(large, path, max_decoded_mb=64), name).kind == "too_large"
