"""Generate media: H.264 clips that show four plain colors or four shapes in turn, and still images that show one.

Nothing moves within a segment. Each segment begins with a key frame, and no frame refers to frames before its segment's
key frame. All frames of a segment therefore decode to the same pixels, and neither a single frame nor two neighboring
frames of a segment reveal the order.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Literal

import av
import numpy as np
from PIL import Image

Topic = Literal["color", "shape"]

RGB = {"blue": (40, 70, 220), "green": (40, 170, 60), "red": (220, 40, 40), "yellow": (230, 210, 50)}
PALETTES: dict[Topic, tuple[str, ...]] = {"color": tuple(RGB), "shape": ("circle", "cross", "square", "triangle")}

SEGMENTS = 4
FRAMES_PER_SEGMENT = 8
FPS = 8
VIDEO_SIDE = 112  # pixels
IMAGE_SIDE = 56  # pixels

_DARK, _LIGHT = 30, 230
_JITTER = 20  # levels of brightness
_X264 = {
    "preset": "ultrafast",
    "bf": "0",
    "g": str(FRAMES_PER_SEGMENT),
    "keyint_min": str(FRAMES_PER_SEGMENT),
    "sc_threshold": "0",
    # Key frames are encoded so much more finely than other frames that these have nothing left to refine, and all
    # frames of a segment decode to the same pixels.
    "qp": "20",
    "x264-params": "ipratio=3",
}


def write_video(path: Path, topic: Topic, order: tuple[str, ...], rng: Random) -> None:
    """Write a clip of 4 seconds that shows the colors or shapes named in ``order`` in turn, for one second each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=_X264)
        stream.width = stream.height = VIDEO_SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for segment, word in enumerate(order):
            pixels = draw(topic, word, VIDEO_SIDE, rng)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            for number in range(FRAMES_PER_SEGMENT):
                frame.pts = segment * FRAMES_PER_SEGMENT + number
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_image(path: Path, topic: Topic, word: str, rng: Random) -> None:
    """Write a still image (PNG) of one color or shape."""
    Image.fromarray(draw(topic, word, IMAGE_SIDE, rng)).save(path)


def draw(topic: Topic, word: str, side: int, rng: Random) -> np.ndarray:
    """Draw a frame filled with one color, or a large light shape near the middle of a dark frame.

    The brightness, and the size and place of a shape, vary a little.

    Returns:
        uint8 [side, side, 3].
    """
    brighter = rng.randint(-_JITTER, _JITTER)
    image = np.empty((side, side, 3), np.uint8)
    image[:] = np.clip(np.array(RGB[word] if topic == "color" else _DARK) + brighter, 0, 255)
    if topic == "shape":
        image[_shape(word, side, rng)] = _LIGHT + brighter
    return image


def _shape(word: str, side: int, rng: Random) -> np.ndarray:
    """Return the mask of a shape, bool [side, side]."""
    radius = side * rng.uniform(0.36, 0.45)
    y, x = np.mgrid[:side, :side] + 0.5
    x -= side * (0.5 + rng.uniform(-0.05, 0.05))
    y -= side * (0.5 + rng.uniform(-0.05, 0.05))
    if word == "circle":  # This is a ring, since a full disc is hard to tell from a square at this size.
        squared = x * x + y * y
        return (squared <= radius**2) & (squared >= 0.5 * radius**2)
    if word == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9 * radius
    if word == "triangle":
        return (y >= -radius) & (y <= 0.8 * radius) & (abs(x) <= 0.6 * (y + radius))
    assert word == "cross", word
    return (np.minimum(abs(x), abs(y)) <= 0.25 * radius) & (np.maximum(abs(x), abs(y)) <= radius)
