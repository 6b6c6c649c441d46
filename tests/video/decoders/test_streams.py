"""The stream that is read is the one that FFmpeg considers the best, with every decoder; cover art is never a video."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from media import coded_frames, coded_numbers, ffmpeg_frames

from videor1.types import SampleError
from videor1.video import read_frames
from videor1.video.decoders import open_decoder
from videor1.video.decoders.container import best_stream, open_video

KINDS = av.stream.Disposition
DEFAULT, ATTACHED = KINDS.default, KINDS.attached_pic
COUNT = 40


def write_streams(path: Path, *kinds: tuple[int, int, int, Any]) -> Path:
    """Write a file with a stream for each (number of frames, first number that they show, scale, disposition)."""
    with av.open(str(path), "w") as out:
        streams = []
        for _, _, scale, disposition in kinds:
            stream = out.add_stream("libx264", rate=10, options={"preset": "veryfast", "g": "12"})
            stream.height, stream.width, stream.pix_fmt = 48 * scale, 80 * scale, "yuv420p"
            stream.disposition = getattr(disposition, "value", disposition)
            streams.append(stream)
        for stream, (count, first, scale, _) in zip(streams, kinds, strict=True):
            for pixels in coded_frames(first + count, 48 * scale, 80 * scale)[first:]:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            out.mux(stream.encode())
    return path


CASES = {  # streams of which the second or the first shows 0, 1, 2, ... and is the best of a Matroska file
    "preview first": [(4, 500, 1, 0), (COUNT, 0, 1, DEFAULT)],
    "default first": [(COUNT, 0, 1, DEFAULT), (COUNT, 100, 1, 0)],
    "default small": [(COUNT, 100, 3, 0), (COUNT, 0, 1, DEFAULT)],
    "equal": [(COUNT, 0, 1, DEFAULT), (COUNT, 100, 1, DEFAULT)],
    "none is default": [(COUNT, 0, 1, 0), (COUNT, 100, 1, 0)],
    "few frames first": [(2, 500, 1, 0), (COUNT, 0, 1, 0)],
    "impaired first": [(COUNT, 100, 1, KINDS.visual_impaired), (COUNT, 0, 1, 0)],
}


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("case", CASES)
def test_the_best_stream(tmp_path: Path, case: str, suffix: str) -> None:
    path = write_streams(tmp_path / f"a{suffix}", *CASES[case])
    expected = coded_numbers(np.stack([frame.to_ndarray(format="gray") for frame in ffmpeg_frames(path)]))
    clip = read_frames(path, max_frames=64, fps=100.0)
    assert coded_numbers(clip.frames) == expected[: len(clip.frames)]
    if suffix == ".mkv" or case not in ("equal", "none is default", "impaired first", "few frames first"):
        assert expected[0] == 0, "an MP4 has other defaults"
    with av.open(str(path)) as container, open_video(path) as (_, stream):
        assert stream.index == container.streams.best("video").index


class Stream:
    """A stream of a fake container."""

    def __init__(
        self, disposition: Any = 0, frames: int = 100, bit_rate: int | None = 1000, decoder: bool = True
    ) -> None:
        self.disposition, self.frames = KINDS(disposition), frames
        self.codec_context = type("Context", (), {"bit_rate": bit_rate})() if decoder else None


class Container:
    """A fake container of which FFmpeg considers one stream the best."""

    def __init__(self, best: int | None, *videos: Stream) -> None:
        self.streams, self.video = self, list(videos)
        for index, stream in enumerate(videos):
            stream.index = index  # type: ignore[attr-defined]
        self.best = lambda kind: None if best is None else videos[best]


COVER = ATTACHED | DEFAULT


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        (Container(0, Stream(DEFAULT), Stream(DEFAULT)), 0),
        (Container(1, Stream(), Stream(DEFAULT)), 1),
        (Container(0, Stream(COVER), Stream()), 1),
        (Container(0, Stream(COVER), Stream(), Stream(DEFAULT)), 2),
        (Container(0, Stream(COVER), Stream(), Stream()), 1),
        (Container(0, Stream(COVER), Stream(bit_rate=None), Stream(bit_rate=9)), 2),
        (Container(0, Stream(COVER), Stream(frames=1), Stream()), 2),
        (Container(0, Stream(DEFAULT, decoder=False), Stream()), 1),
        (Container(0, Stream(decoder=False)), 0),
        (Container(0, Stream(COVER)), None),
        (Container(None), None),
    ],
)
def test_cover_art_is_never_the_video(container: Any, expected: int | None) -> None:
    found = best_stream(container)
    assert (None if found is None else found.index) == expected


def test_decord_refuses_several_streams(tmp_path: Path) -> None:
    """It has another FFmpeg inside, which does not ask for the default."""
    pytest.importorskip("decord")
    several = write_streams(tmp_path / "a.mkv", *CASES["preview first"])
    with (
        closing(open_decoder(several, backend="decord")) as decoder,
        pytest.raises(SampleError, match="2 video streams, and it cannot be told which to read"),
    ):
        decoder.frames([0])
    clip = read_frames(write_streams(tmp_path / "b.mkv", (COUNT, 0, 1, 0)), backend="decord", max_frames=4)
    assert coded_numbers(clip.frames) == [0, 13, 26, 39]
