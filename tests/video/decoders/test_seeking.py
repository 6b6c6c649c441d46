"""Seeking decodes no more than it needs, and every difference between the index or a seek and the file is noticed."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import av
import numpy as np
import pytest
from coded_videos import COUNT, X264, Make, decode, decoded_numbers
from media import coded_numbers, cut, numbered_frames, packets_of, refusal, write_sound, write_video

from videor1.types import SampleError
from videor1.video import read_frames
from videor1.video.decoders.index import FrameIndex, read_index
from videor1.video.decoders.protocol import FramesChangedError
from videor1.video.decoders.pyav import PyAvDecoder, _SegmentCheck, _UnreliableError
from videor1.video.decoders.seeking import Planner


def test_seeking_decodes_few_frames(made: Make) -> None:
    with closing(PyAvDecoder(made("b-frames"))) as decoder:
        assert decoder.frames(range(COUNT)).decoded == COUNT
        assert decoder.frames([0]).decoded == 1
        assert decoder.frames([24 * 8]).decoded <= 2, "a key frame needs nothing else"
        # Of the 21 up to this one, 10 are pictures that nothing refers to.
        assert decoder.frames([24 * 5 + 20]).decoded <= 14
        assert decoder.frames([10, 200, 310]).decoded <= 3 * 14


def keys_of(index: FrameIndex) -> list[int]:
    return [position for position, key in enumerate(index.key) if key]


def test_a_leading_picture_needs_the_key_frame_before(made: Make) -> None:
    index = read_index(made("open gop"))
    planner, keys = Planner(index), keys_of(index)
    leading = [s for p, s in enumerate(index.pts) if keys[3] < p < keys[4] and s < index.pts[keys[3]]]
    assert leading, "the file must have leading pictures"
    for stamp in leading:
        (segment,) = planner.plan([stamp])
        assert (segment.start, segment.since) == (keys[2], index.pts[keys[2]])
    (segment,) = planner.plan([index.pts[keys[3]]])
    assert segment.start == keys[3]


@pytest.mark.parametrize("lands", ["later", "earlier", "nowhere", "error"])
def test_seeks_that_land_elsewhere(made: Make, lands: str) -> None:
    path = made("b-frames mkv")
    last = read_index(path).pts[-1]

    def seek(stamp: int, *, stream: Any) -> None:
        if lands == "error":
            raise av.error.PermissionError(1, "no seeking here")
        container.seek({"later": last, "earlier": 0, "nowhere": 10 * last}[lands], stream=stream)

    with closing(PyAvDecoder(path)) as decoder:
        decoder.probe()
        container = decoder._reader.container
        astray = decoder._reader.container = Mock(wraps=container, seek=Mock(side_effect=seek))
        frames = decoder.frames([30, 150, 280])
    assert decoded_numbers(frames) == [30, 150, 280]
    assert astray.seek.called
    assert frames.decoded < 60


@dataclass
class Frame:
    """A decoded frame, as a segment's check sees it."""

    pts: int
    is_corrupt: bool = False


def test_damaged_leading_pictures_are_no_error(made: Make) -> None:
    """Pictures shown before the key frame that decoding began at may come out damaged, or not at all."""
    index = read_index(made("open gop"))
    start = keys_of(index)[3]
    (segment,) = Planner(index).plan([index.pts[start]])
    segment = replace(segment, stop=start + 5, last=start + 4)
    packets = index.pts[start : segment.stop]
    leading, shown = ([s for s in packets if (s < packets[0]) == before] for before in (True, False))
    assert leading

    def check(frames: Iterable[Frame]) -> list[int]:
        segment_check = _SegmentCheck(index, segment)
        for position, stamp in enumerate(packets, start):
            segment_check.add_packet(position, stamp, skipped=False)
        kept = [frame.pts for frame in frames if segment_check.add_frame(frame)]
        segment_check.finish()
        return kept

    assert check([Frame(stamp, stamp in leading) for stamp in sorted(packets)]) == sorted(shown)
    assert check([Frame(stamp) for stamp in sorted(shown)]) == sorted(shown)
    for frames in (
        [Frame(stamp, stamp == shown[0]) for stamp in sorted(packets)],  # damaged
        [Frame(stamp) for stamp in sorted(packets) if stamp != shown[1]],  # lost
        [Frame(stamp) for stamp in (*sorted(packets), max(index.pts))],  # a frame of no packet of the segment
    ):
        with pytest.raises(_UnreliableError):
            check(frames)


def test_hidden_frames_are_not_counted(tmp_path: Path, made: Make) -> None:
    path, hidden = tmp_path / "a.webm", (30, 31, 150)
    data = made("vp8").read_bytes()
    packets = [bytes(packet) for packet in packets_of(made("vp8"))]
    for packet in (packets[number] for number in hidden):
        assert data.count(packet) == 1
        data = data.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:])  # without the bit that shows it
    path.write_bytes(data)
    shown = [number for number in range(COUNT) if number not in hidden]
    assert read_index(path).info.num_frames == len(shown)
    assert decoded_numbers(decode(path, [5, 100, 200])) == [shown[5], shown[100], shown[200]]
    # Where the index cannot tell, it shows when a hidden picture is decoded.
    hides = patch("videor1.video.decoders.index._is_hidden_vp8", return_value=False)
    with hides, closing(PyAvDecoder(path)) as decoder:
        assert decoder.probe().num_frames == COUNT
        with pytest.raises(FramesChangedError, match=f"{len(shown)} frames, not the {COUNT}"):
            decoder.frames([3, 32])
        assert decoder.probe().num_frames == len(shown)
        assert decoded_numbers(decoder.frames([5, 100, 200])) == [shown[5], shown[100], shown[200]]
    with hides:
        clip = read_frames(path, max_frames=100)
    assert clip.total_frames == len(shown)
    assert coded_numbers(clip.frames)[-1] == COUNT - 1


def test_a_file_that_is_not_what_was_indexed(made: Make) -> None:
    """Packets out of step with the index are noticed; a file that decodes differently each time is an error."""
    index = read_index(made("gop 12"))
    pts = [stamp + (number == 100) for number, stamp in enumerate(index.pts)]  # as if the file had changed since
    stale = patch("videor1.video.decoders.pyav.index_packets", return_value=replace(index, pts=tuple(pts)))
    with stale, closing(PyAvDecoder(made("gop 12"))) as decoder:
        frames = decoder.frames([105])
    assert decoded_numbers(frames) == [105]
    assert frames.decoded >= COUNT, "the whole file is decoded"
    with closing(PyAvDecoder(made("no times"))) as decoder:  # always decoded whole
        index = decoder._indexed()
        decoder._index = index.reindexed(index.stamps[:-1])
        with pytest.raises(FramesChangedError):
            decoder.frames([0])
        assert len(decoder.frames([0]).pixels) == 1
        decoder._index = index.reindexed(index.stamps[:-2])
        with pytest.raises(SampleError, match="two passes"):
            decoder.frames([0])


def test_damage_is_an_error_where_it_is_decoded(made: Make, tmp_path: Path) -> None:
    """With one thread, and with several."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", noise, options=X264 | {"g": "10", "bf": "0"})
    assert read_index(path).info.key_frames == (0, 10, 20, 30, 40, 50)
    damaged, data = packets_of(path)[35], bytearray(path.read_bytes())
    data[damaged.pos : damaged.pos + damaged.size] = b"\xff" * damaged.size
    path.write_bytes(data)
    for numbers in ([36], [0, 35], [10, 39, 50]):
        assert refusal(decode, path, numbers).kind == "decode"
    assert len(decode(path, [0, 29, 34, 40, 59]).pixels) == 5, "what is not decoded is not checked"

    def outcome(threads: int) -> object:
        try:
            return read_frames(path, max_frames=4, threads=threads).total_frames
        except SampleError as error:
            return error.kind

    path, outcomes = tmp_path / "cut.264", []
    for part in range(20):
        cut(made("no times"), path, 0.6 + part / 1000)
        outcomes.append(outcome(1))
        assert outcome(4) == outcomes[-1]
    assert "decode" in outcomes


def test_index(made: Make, tmp_path: Path) -> None:
    index = read_index(made("b-frames"))
    info = index.info
    assert (info.num_frames, info.fps, info.width, info.height) == (COUNT, 10.0, 80, 48)
    assert (info.codec, info.pix_fmt, info.rotation) == ("h264", "yuv420p", 0)
    assert info.key_frames == tuple(range(0, COUNT, 24))
    assert info.seconds == pytest.approx([i / 10 for i in range(COUNT)])
    assert sorted(index.pts) == list(index.stamps) != list(index.pts)
    hidden = read_index(made("edit list"))
    assert (hidden.info.num_frames, sum(hidden.shown), len(hidden.pts)) == (COUNT - 30, COUNT - 30, COUNT - 24)
    raw = read_index(made("no times"))
    assert (raw.by_pts, raw.info.num_frames, raw.info.key_frames) == (False, COUNT, (0,))
    assert read_index(write_video(tmp_path / "1.mp4", numbered_frames(1))).info.num_frames == 1
    assert read_index(write_sound(tmp_path / "none.mkv", with_empty_video=True)).info.num_frames == 0
    for path, kind in (
        (write_sound(tmp_path / "sound.mp4"), "not_video"),
        (tmp_path / "nowhere.mp4", "missing_file"),
        (cut(made("gop 12"), tmp_path / "cut.mp4"), "truncated"),
    ):
        assert refusal(read_index, path).kind == kind
