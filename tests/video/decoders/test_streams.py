"""The stream that is read is the one that FFmpeg considers the best, with every decoder; cover art is never a video."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from coded_videos import decode, decoded_numbers
from media import coded_frames, coded_numbers, ffmpeg_frames, refusal

from videor1.video import read_frames
from videor1.video.decoders.container import best_stream, open_video
from videor1.video.decoders.decord import DecordDecoder

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


def stream(disposition: Any = 0, frames: int = 100, bit_rate: int | None = 1000, decoder: bool = True) -> Any:
    """A stream of a fake container."""
    context = SimpleNamespace(bit_rate=bit_rate) if decoder else None
    return SimpleNamespace(disposition=KINDS(disposition), frames=frames, codec_context=context)


def container(best: int | None, *videos: Any) -> Any:
    """A fake container of which FFmpeg considers one stream the best."""
    for index, video in enumerate(videos):
        video.index = index
    streams = SimpleNamespace(video=videos, best=lambda kind: None if best is None else videos[best])
    return SimpleNamespace(streams=streams)


COVER, IS_DEFAULT, PLAIN, SHORT = {"disposition": ATTACHED | DEFAULT}, {"disposition": DEFAULT}, {}, {"frames": 1}
# Streams of which FFmpeg considers one the best, and the one that is read.
CONTAINERS: list[tuple[int | None, list[dict[str, Any]], int | None]] = [
    *((0, [IS_DEFAULT, IS_DEFAULT], 0), (1, [PLAIN, IS_DEFAULT], 1), (0, [COVER, PLAIN], 1)),
    *((0, [COVER, PLAIN, IS_DEFAULT], 2), (0, [COVER, PLAIN, PLAIN], 1), (0, [COVER, SHORT, PLAIN], 2)),
    (0, [COVER, {"bit_rate": None}, {"bit_rate": 9}], 2),
    *(
        (0, [IS_DEFAULT | {"decoder": False}, PLAIN], 1),
        (0, [{"decoder": False}], 0),
        (0, [COVER], None),
        (None, [], None),
    ),
]


@pytest.mark.parametrize(("best", "streams", "expected"), CONTAINERS)
def test_cover_art_is_never_the_video(best: int | None, streams: list[Any], expected: int | None) -> None:
    found = best_stream(container(best, *(stream(**told) for told in streams)))
    assert (None if found is None else found.index) == expected


def test_decord_refuses_several_streams(tmp_path: Path) -> None:
    """It has another FFmpeg inside, which does not ask for the default."""
    pytest.importorskip("decord")
    several = write_streams(tmp_path / "a.mkv", *CASES["preview first"])
    assert "2 video streams, and it cannot be told which" in refusal(decode, several, [0], by=DecordDecoder).message
    single = write_streams(tmp_path / "b.mkv", (COUNT, 0, 1, 0))
    assert decoded_numbers(decode(single, [0, 7, 30], by=DecordDecoder)) == [0, 7, 30]
