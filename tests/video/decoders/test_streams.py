"""The stream that is read is the one that FFmpeg considers the best, with every decoder; cover art is never a video."""

from __future__ import annotations

import av
import pytest
from media import coded_frames, coded_numbers

from videor1.types import SampleError
from videor1.video import read_frames
from videor1.video.decoders import open_decoder
from videor1.video.decoders.container import best_stream, open_video

DEFAULT = av.stream.Disposition.default
COUNT = 40


def write_streams(path, *kinds):
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
    "impaired first": [(COUNT, 100, 1, av.stream.Disposition.visual_impaired), (COUNT, 0, 1, 0)],
}


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("case", CASES)
def test_the_best_stream(tmp_path, case, suffix):
    streams = CASES[case]
    path = write_streams(tmp_path / f"a{suffix}", *streams)
    with av.open(str(path)) as container:
        best = container.streams.best("video").index
        expected = coded_numbers([f.to_ndarray(format="gray") for f in container.decode(container.streams[best])])
    clip = read_frames(path, max_frames=64, fps=100.0)
    assert coded_numbers(clip.frames) == expected[: len(clip.frames)]
    if suffix == ".mkv" or case not in ("equal", "none is default", "impaired first", "few frames first"):
        assert expected[0] == 0, "an MP4 has other defaults"
    with open_video(path) as (_, stream):
        assert stream.index == best


class Stream:
    """A stream of a fake container."""

    def __init__(self, index, disposition=0, frames=100, bit_rate=1000, decoder=True):
        self.index, self.disposition, self.frames = index, av.stream.Disposition(disposition), frames
        self.codec_context = type("Context", (), {"bit_rate": bit_rate})() if decoder else None


class Container:
    """A fake container of which FFmpeg considers one stream the best."""

    def __init__(self, best, *videos):
        self.streams = self
        self.video = list(videos)
        self.best = lambda kind: self.video[best] if best is not None else None


ATTACHED = av.stream.Disposition.attached_pic


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        (Container(0, Stream(0, DEFAULT), Stream(1, DEFAULT)), 0),
        (Container(1, Stream(0), Stream(1, DEFAULT)), 1),
        (Container(0, Stream(0, ATTACHED | DEFAULT), Stream(1)), 1),
        (Container(0, Stream(0, ATTACHED | DEFAULT), Stream(1), Stream(2, DEFAULT)), 2),
        (Container(0, Stream(0, ATTACHED | DEFAULT), Stream(1), Stream(2)), 1),
        (Container(0, Stream(0, ATTACHED | DEFAULT), Stream(1, bit_rate=None), Stream(2, bit_rate=9)), 2),
        (Container(0, Stream(0, ATTACHED | DEFAULT), Stream(1, frames=1), Stream(2)), 2),
        (Container(0, Stream(0, DEFAULT, decoder=False), Stream(1)), 1),
        (Container(0, Stream(0, decoder=False)), 0),
        (Container(0, Stream(0, ATTACHED | DEFAULT)), None),
        (Container(None), None),
    ],
)
def test_cover_art_is_never_the_video(container, expected):
    found = best_stream(container)
    assert (None if found is None else found.index) == expected


def test_decord_refuses_several_streams(tmp_path):
    """It has another FFmpeg inside, which does not ask for the default."""
    pytest.importorskip("decord")
    decoder = open_decoder(write_streams(tmp_path / "a.mkv", *CASES["preview first"]), backend="decord")
    with pytest.raises(SampleError, match="2 video streams, and it cannot be told which to read"):
        decoder.frames([0])
    decoder.close()
    decoder = open_decoder(write_streams(tmp_path / "b.mkv", (COUNT, 0, 1, 0)), backend="decord")
    assert coded_numbers(decoder.frames([0, 7, 30]).pixels) == [0, 7, 30]
    decoder.close()
