"""Reading a still image as RGB pixels, whatever its format, mode and orientation, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from videor1.types import SampleError
from videor1.video.limits import MAX_DECODED_MB, check_image
from videor1.video.opened import MediaFile

# The formats that are opened. Others are refused: Pillow's readers of some start other programs (EPS), and a file is
# what its bytes say, whatever its name.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_STRIP_PIXELS = 1 << 20  # pixels that are converted to RGB at once


def read_rgb(path: Path, *, root: Path | None = None, max_decoded_mb: int = MAX_DECODED_MB) -> np.ndarray:
    """Return a still image's pixels as ``video.read_image`` does, uint8 RGB [height, width, 3].

    Args:
        path: the file.
        root: a folder, with its symlinks resolved, that the opened file must lie in; None: anywhere.
        max_decoded_mb: most memory in MiB that decoding may take, estimated from the header before it begins.

    Raises:
        SampleError: ``missing_file``; ``image`` if the file is no image, or is broken or cut; ``too_large``;
            ``outside_root``.
    """
    return read_still(path, root=root, max_decoded_mb=max_decoded_mb)[0]


def read_still(path: Path, *, root: Path | None, max_decoded_mb: int) -> tuple[np.ndarray, int]:
    """Return a still image as ``read_rgb`` does, and the bytes that decoding it takes, about."""
    with MediaFile(path, "image", root) as file, file.reader() as reader:
        try:
            with Image.open(reader, formats=FORMATS) as image:
                needed = _check(image, path, max_decoded_mb)
                ImageOps.exif_transpose(image, in_place=True)
                return _rgb_pixels(image), needed
        except SampleError:
            raise
        except Image.DecompressionBombError as error:  # above a limit of Pillow's own
            raise SampleError("too_large", str(error), path) from error
        except Exception as error:  # Pillow's readers raise many types on broken bytes
            raise SampleError("image", f"cannot read the image: {error}", path) from error


def rgb_of(image: Image.Image, path: Path, *, max_decoded_mb: int = MAX_DECODED_MB) -> np.ndarray:
    """Return the pixels of an image that others opened or made with Pillow, as ``read_rgb`` does.

    Args:
        image: the image, decoded or not; it stays as it is.
        path: a name for errors.
        max_decoded_mb: most memory in MiB that decoding may take.

    Raises:
        SampleError: ``image`` for a file of another format, or of broken or undefined pixels; ``too_large``.
    """
    try:
        _check(image, path, max_decoded_mb)
        return _rgb_pixels(ImageOps.exif_transpose(image))
    except SampleError:
        raise
    except Exception as error:
        raise SampleError("image", f"cannot read the image: {error}", path) from error


def _check(image: Image.Image, path: Path, max_decoded_mb: int) -> int:
    """Raise ``image`` for a file of another format than those that are read, or ``too_large``.

    Returns:
        The bytes that decoding it takes, about.
    """
    form = image.format or ""  # none: it was made, not opened
    if form and form not in (*FORMATS, "MPO"):  # MPO: a JPEG that holds further pictures
        raise SampleError("image", f"expected one of {', '.join(FORMATS)}, got {form}", path)
    return check_image(path, *image.size, form, limit_mb=max_decoded_mb)


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels of an upright image as uint8 RGB [height, width, 3]."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):  # a conversion of the whole image would hold it several times
        pixels[top : top + rows] = np.asarray(_to_rgb(image.crop((0, top, width, min(top + rows, height)))))
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, transparency on white. Raises ValueError for a mode of undefined range."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # Pillow would silently clip these to 0..255
        raise ValueError(f"pixels of mode {image.mode} have no defined range")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
