"""Seeking decodes no more than it needs, and every difference between the index or a seek and the file is noticed."""

from dataclasses import replace

import av
import numpy as np
import pytest
from coded_videos import COUNT, MADE, X264, decoded_numbers
from media import coded_numbers, cut, numbered_frames, write_sound, write_video

from videor1.types import SampleError
from videor1.video import read_frames
from videor1.video.decoders.index import read_index
from videor1.video.decoders.protocol import FramesChangedError
from videor1.video.decoders.pyav import PyAvDecoder, _SegmentCheck, _UnreliableError
from videor1.video.decoders.seeking import Planner


def test_seeking_decodes_few_frames(made):
    decoder = PyAvDecoder(made("b-frames"))
    everything = decoder.frames(range(COUNT)).decoded
    assert everything == COUNT
    assert decoder.frames([0]).decoded == 1
    assert decoder.frames([24 * 8]).decoded <= 2, "a key frame needs nothing else"
    # Of the 21 up to this one, 10 are pictures that nothing refers to.
    assert decoder.frames([24 * 5 + 20]).decoded <= 14
    assert decoder.frames([10, 200, 310]).decoded <= 3 * 14
    decoder.close()


def test_a_leading_picture_needs_the_key_frame_before(made):
    index = read_index(made("open gop"))
    planner = Planner(index)
    keys = [position for position, key in enumerate(index.key) if key]
    leading = [s for p, s in enumerate(index.pts) if keys[3] < p < keys[4] and s < index.pts[keys[3]]]
    assert leading, "the file must have leading pictures"
    for stamp in leading:
        (segment,) = planner.plan([stamp])
        assert (segment.start, segment.since) == (keys[2], index.pts[keys[2]])
    (segment,) = planner.plan([index.pts[keys[3]]])
    assert segment.start == keys[3]


@pytest.mark.parametrize("lands", ["later", "earlier", "nowhere", "error"])
def test_seeks_that_land_elsewhere(made, lands):
    class Astray:
        """A container whose seeks land at a wrong position."""

        def __init__(self, container):
            self.container, self.sought = container, 0

        def seek(self, stamp, *, stream):
            self.sought += 1
            if lands == "error":
                raise av.error.PermissionError(1, "no seeking here")
            last = index.pts[-1]
            self.container.seek({"later": last, "earlier": 0, "nowhere": 10 * last}[lands], stream=stream)

        def __getattr__(self, name):
            return getattr(self.container, name)

    path = made("b-frames mkv")
    index = read_index(path)
    decoder = PyAvDecoder(path)
    decoder.probe()
    astray = decoder._reader.container = Astray(decoder._reader.container)
    frames = decoder.frames([30, 150, 280])
    assert decoded_numbers(frames) == [30, 150, 280]
    assert astray.sought
    assert frames.decoded < 60
    decoder.close()


def test_damaged_leading_pictures_are_no_error(made):
    """Pictures shown before the key frame that decoding began at may come out damaged, or not at all."""

    class Frame:
        def __init__(self, pts, is_corrupt=False):
            self.pts, self.is_corrupt = pts, is_corrupt

    index = read_index(made("open gop"))
    start = [position for position, key in enumerate(index.key) if key][3]
    (segment,) = Planner(index).plan([index.pts[start]])
    segment = replace(segment, stop=start + 5, last=start + 4)
    packets = index.pts[start : segment.stop]
    leading = [stamp for stamp in packets if stamp < packets[0]]
    assert leading

    def check(frames):
        segment_check = _SegmentCheck(index, segment)
        for position, stamp in enumerate(packets, start):
            segment_check.add_packet(position, stamp, skipped=False)
        kept = [frame.pts for frame in frames if segment_check.add_frame(frame)]
        segment_check.finish()
        return kept

    shown = [stamp for stamp in packets if stamp >= packets[0]]
    assert check([Frame(stamp, stamp in leading) for stamp in sorted(packets)]) == sorted(shown)
    assert check([Frame(stamp) for stamp in sorted(shown)]) == sorted(shown)
    for frames in (
        [Frame(stamp, stamp == shown[0]) for stamp in sorted(packets)],  # damaged
        [Frame(stamp) for stamp in sorted(packets) if stamp != shown[1]],  # lost
        [Frame(stamp) for stamp in (*sorted(packets), max(index.pts))],  # a frame of no packet of the segment
    ):
        with pytest.raises(_UnreliableError):
            check(frames)


def test_packets_out_of_step_with_the_index_are_noticed(made):
    index = read_index(made("gop 12"))
    decoder = PyAvDecoder(made("gop 12"))
    decoder.probe()
    pts = list(index.pts)
    pts[100] += 1  # as if the file had changed since
    decoder._index = replace(index, pts=tuple(pts))
    decoder._planner = Planner(decoder._index)
    frames = decoder.frames([105])
    assert decoded_numbers(frames) == [105]
    assert frames.decoded >= COUNT, "the whole file is decoded"
    decoder.close()


def hide_vp8_frames(path, hidden):
    """Clear the bit of these packets' headers that lets them be shown."""
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for number in hidden:
        packet = packets[number]
        assert data.count(packet) == 1
        data = data.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:])
    path.write_bytes(data)


def test_hidden_frames_are_not_counted(tmp_path, monkeypatch):
    path = MADE["vp8"].write(tmp_path)
    hidden = (30, 31, 150)
    hide_vp8_frames(path, hidden)
    shown = [number for number in range(COUNT) if number not in hidden]
    decoder = PyAvDecoder(path)
    assert decoder.probe().num_frames == len(shown)
    assert decoded_numbers(decoder.frames([5, 100, 200])) == [shown[5], shown[100], shown[200]]
    decoder.close()
    # Where the index cannot tell, it shows when a hidden picture is decoded.
    monkeypatch.setattr("videor1.video.decoders.index._is_hidden_vp8", lambda packet: False)
    decoder = PyAvDecoder(path)
    assert decoder.probe().num_frames == COUNT
    with pytest.raises(FramesChangedError, match=f"{len(shown)} frames, not the {COUNT}"):
        decoder.frames([3, 32])
    assert decoder.probe().num_frames == len(shown)
    assert decoded_numbers(decoder.frames([5, 100, 200])) == [shown[5], shown[100], shown[200]]
    decoder.close()
    clip = read_frames(path, max_frames=100)
    assert clip.total_frames == len(shown)
    assert coded_numbers(clip.frames)[-1] == COUNT - 1


def test_a_file_that_decodes_differently_each_time_is_an_error(made):
    decoder = PyAvDecoder(made("no times"))  # always decoded whole
    index = decoder._indexed()
    decoder._index = index.reindexed(index.stamps[:-1])
    with pytest.raises(FramesChangedError):
        decoder.frames([0])
    assert len(decoder.frames([0]).pixels) == 1
    decoder._index = index.reindexed(index.stamps[:-2])
    with pytest.raises(SampleError, match="two passes"):
        decoder.frames([0])
    decoder.close()


def test_damage_is_an_error_where_it_is_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", noise, options=X264 | {"g": "10", "bf": "0"})
    index = read_index(path)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    at, size = places[35]
    data[at : at + size] = b"\xff" * size
    path.write_bytes(data)
    assert index.info.key_frames[:5] == (0, 10, 20, 30, 40)
    for numbers in ([36], [0, 35], [10, 39, 50]):
        decoder = PyAvDecoder(path)
        with pytest.raises(SampleError) as caught:
            decoder.frames(numbers)
        assert (caught.value.kind, caught.value.path) == ("decode", str(path))
        decoder.close()
    decoder = PyAvDecoder(path)
    assert len(decoder.frames([0, 29, 34, 40, 59]).pixels) == 5, "what is not decoded is not checked"
    decoder.close()


def test_several_threads_miss_no_damage(made, tmp_path):
    def outcome(threads):
        try:
            return read_frames(path, max_frames=4, threads=threads).total_frames
        except SampleError as error:
            return error.kind

    path = tmp_path / "cut.264"
    outcomes = []
    for part in range(20):
        cut(made("no times"), path, 0.6 + part / 1000)
        outcomes.append(outcome(1))
        assert outcome(4) == outcomes[-1]
    assert "decode" in outcomes


def test_index(made, tmp_path):
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
        with pytest.raises(SampleError) as caught:
            read_index(path)
        assert (caught.value.kind, caught.value.path) == (kind, str(path))
