"""The rollouts of the report: which are chosen, what is shown of them, and their frames."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media import coded_numbers, real_video
from PIL import Image
from report_runs import HOSTILE, LOGPS, TOKENS, Page, lines, make_run, report, rollout_row, small_video

from videor1.config import DataConfig, VideoConfig
from videor1.report import choose, page
from videor1.report.cards import visible
from videor1.report.choose import choose_lines


def pictures(uris: list[str]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]


def places(made: Page) -> list[tuple[int, int]]:
    return [(card["run"], card["step"]) for card in made.rollouts["cards"]]


def texts(count: int) -> list[dict]:
    return [rollout_row(step, None) for step in range(1, count + 1)]


def test_a_rollout_says_everything(tmp_path: Path) -> None:
    video = small_video(tmp_path / "clips" / "one.mp4")
    (card,) = report(make_run(tmp_path / "run", rollouts=[rollout_row(7, video)])).rollouts["cards"]
    first, second = card["completions"]
    assert (first["tokens"], first["logps"]) == (TOKENS, LOGPS)
    assert "text" not in first
    assert (first["accuracy"], first["reward"], first["advantage"], first["length"]) == (1.0, 2.2, 0.7071, 11)
    assert (first["right"], second["right"], first["cut"], second["cut"]) == (True, False, False, True)
    assert (card["step"], card["question"], card["solution"]) == (7, "What comes first in 7?", "B")
    assert (card["right"], card["count"], card["bonus"]) == ("some", [1, 2], 0.2)
    assert (card["p"], card["p_shuffled"], card["asked"]) == (0.5, None, 2)  # one of two was skipped
    assert [completion["text"] for completion in card["shuffled"]] == ["<answer>A</answer>"]
    assert card["permutation"] == [3, 0, 2, 1]
    assert "source" not in first
    brought = rollout_row(7, None, sources=[None, "teacher\u202e"])
    (card,) = report(make_run(tmp_path / "brought", rollouts=[brought])).rollouts["cards"]
    assert [completion.get("source") for completion in card["completions"]] == [None, "teacher[U+202E]"]
    (card,) = report(make_run(tmp_path / "opened", rollouts=[rollout_row(7, None, opened="<think>\u202e")])).rollouts[
        "cards"
    ]
    assert card["opened"] == "<think>[U+202E]"


def test_rollouts_of_an_older_run(tmp_path: Path) -> None:
    """Without tokens, question, options, and the number of shuffled completions."""
    new = ("tokens", "logps", "problem", "options", "data_type", "finished", "p", "p_shuffled", "shuffled_asked")
    row = {name: value for name, value in rollout_row(1, Path("x.mp4")).items() if name not in new}
    (card,) = report(make_run(tmp_path / "run", rollouts=[row])).rollouts["cards"]
    assert card["question"] == "What comes first?"
    assert (card["asked"], card["kind"], card["tokens"], card["opened"]) == (2, "video", False, "")
    assert card["completions"][1]["text"] == visible(HOSTILE)


def test_the_frames_are_the_ones_that_were_asked_about(tmp_path: Path) -> None:
    video, options = small_video(tmp_path / "one.mp4"), VideoConfig(max_frames=6, fps=8)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "one.png")
    rows = [*(rollout_row(step, video) for step in (1, 2, 3)), rollout_row(4, tmp_path / "one.png")]
    made = report(make_run(tmp_path / "run", rollouts=rows, video=options))
    clip, image = made.rollouts["media"]  # once, for three rollouts
    assert clip["times"] == [0.0, 0.12, 0.38, 0.5, 0.75, 0.88]
    frames = pictures(clip["frames"])
    assert [frame.size for frame in frames] == [(144, 86)] * 6
    assert coded_numbers(np.stack([np.asarray(frame) for frame in frames])) == [0, 1, 3, 4, 6, 7]
    assert len(image["frames"]) == 1
    assert made.rollouts["cards"][3]["permutation"] is None


@pytest.mark.parametrize(("rules", "count"), [("qwen3_vl", 5), ("qwen2_vl", 4), (None, 4)])
def test_frames_are_sampled_by_the_rules_of_the_model(rules: str | None, count: int, tmp_path: Path) -> None:
    """Qwen3-VL takes an odd number of frames, and the last one twice, as the permutation counts them."""
    rollout = rollout_row(1, small_video(tmp_path / "one.mp4"), **({"frames": rules} if rules else {}))
    made = report(make_run(tmp_path / "run", rollouts=[rollout], video=VideoConfig(max_frames=8, fps=5)))
    (media,) = made.rollouts["media"]
    assert len(media["frames"]) == len(media["times"]) == count + count % 2
    assert (media["frames"][-1] == media["frames"][-2]) == bool(count % 2)


def test_videos_of_others(tmp_path: Path) -> None:
    videos = [real_video(name) for name in ("nasa.mp4", "av1.mkv", "rotated_90.mov")]
    made = report(make_run(tmp_path / "run", rollouts=[rollout_row(i, video) for i, video in enumerate(videos)]))
    shown = [clip["frames"] for clip in made.rollouts["media"]]
    assert [len(frames) for frames in shown] == [4, 4, 2]
    sizes = [picture.size for frames in shown for picture in pictures(frames[:1])]
    assert [max(size) for size in sizes] == [144] * 3
    assert [height > width for width, height in sizes] == [False, False, True]


def test_media_that_cannot_be_shown_leave_a_note(tmp_path: Path) -> None:
    data = tmp_path / "data"
    broken, outside = small_video(data / "broken.mp4"), small_video(tmp_path / "outside.mp4")
    broken.write_bytes(broken.read_bytes()[:500])
    (data / "train.json").write_text("[]")
    rows = [rollout_row(i, path) for i, path in enumerate([data / "gone.mp4", broken, outside], start=1)]
    made = report(make_run(tmp_path / "run", rollouts=rows, dataset_name=str(data / "train.json")))
    gone, cut, elsewhere = made.rollouts["media"]
    assert "[missing_file]" in gone["note"]
    assert cut["note"]
    assert "outside of data.root" in elsewhere["note"]
    assert [clip["frames"] for clip in (gone, cut, elsewhere)] == [[], [], []]
    assert [clip["name"] for clip in (gone, cut, elsewhere)] == ["gone.mp4", "broken.mp4", "outside.mp4"]


def test_pictures_and_text_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [rollout_row(i, small_video(tmp_path / f"{i}.mp4")) for i in (1, 2)]
    run = make_run(tmp_path / "run", rollouts=rows)
    for limit, value, words in (("PICTURE_BYTES", 1, "room"), ("DECODE_SECONDS", 1e-9, "seconds")):
        with monkeypatch.context() as patched:
            patched.setattr(page, limit, value)
            first, second = report(run).rollouts["media"]
        assert (len(first["frames"]), second["frames"]) == (4, [])
        assert words in second["note"]
    run = make_run(tmp_path / "long", rollouts=texts(20))
    size = len(json.dumps(report(run, rollouts=1).rollouts["cards"][0]))
    monkeypatch.setattr(page, "TEXT_BYTES", 5.5 * size)
    made = report(run)
    assert [step for _, step in places(made)] == [1, 5, 9, 13, 17]
    assert "5 of 20 rollouts are shown" in made.words


def test_how_many_rollouts(tmp_path: Path) -> None:
    run, other = (make_run(tmp_path / f"run-{count}", rollouts=texts(count)) for count in (100, 3))
    none = make_run(tmp_path / "none")  # leaves its share to the other
    assert places(report(run, rollouts=5)) == [(0, step) for step in (1, 21, 41, 61, 81)]
    assert places(report(run, rollouts=0)) == []
    assert places(report(run, other, rollouts=4)) == [(0, 1), (0, 51), (1, 1), (1, 3)]
    assert places(report(none, run, rollouts=2)) == [(1, 1), (1, 51)]
    assert len(places(report(run))) == 40


def test_rows_that_are_not_rollouts_are_counted(tmp_path: Path) -> None:
    bad = [{"step": 2}, rollout_row(3, None, rewards=[1.0]), rollout_row(4, None, accuracy=["high", 0.0])]
    made = report(make_run(tmp_path / "run", rollouts=[rollout_row(1, None), *bad]))
    assert places(made) == [(0, 1)]
    assert "run/rollouts.jsonl: 3 of the lines chosen cannot be read; they are not shown." in made.words


def test_lines_with_tokens_are_preferred(tmp_path: Path) -> None:
    rows = texts(12)
    for row in rows:
        if row["step"] % 4 != 3:
            del row["tokens"]
    lines(tmp_path / "rollouts.jsonl", rows)
    assert [row["step"] for row in choose_lines(tmp_path / "rollouts.jsonl", 3).rows] == [3, 7, 11]
    assert [row["step"] for row in choose_lines(tmp_path / "rollouts.jsonl", 50).rows] == list(range(1, 13))
    assert choose_lines(tmp_path / "none.jsonl", 3).rows == []


def test_a_huge_file_is_read_in_places_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly over the steps, whatever stands in the other lines; a line with tokens is found near by."""
    assert 2**20 <= choose.LOOK <= choose.SCAN / 16 <= 2**22
    monkeypatch.setattr(choose, "SCAN", 2**18)  # of 2.8 MB
    monkeypatch.setattr(choose, "LOOK", 2**14)
    read: list[int] = []

    class Counted(io.BufferedReader):
        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline(size)
            read.append(len(line))
            return line

    monkeypatch.setattr(choose, "open", lambda path, mode: Counted(io.FileIO(path)), raising=False)
    path, pad = tmp_path / "rollouts.jsonl", "x" * 1000
    with open(path, "w") as file:
        for step in range(2800):
            tokens = ', "tokens": [["a"]]' if step % 7 == 3 else ""
            file.write(f'{{"step": {step}, "pad": "{pad}"{tokens}}}\n')
        file.write('{"step": 99999, "pad": "')
    tracemalloc.start()
    chosen = choose_lines(path, 40)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    steps = [row["step"] for row in chosen.rows]
    assert len(steps) == 40
    assert all(step % 7 == 3 for step in steps)
    assert all(abs(step - 70 * i) <= 8 for i, step in enumerate(steps))
    assert sum(read) < path.stat().st_size / 2
    assert peak < path.stat().st_size / 4
    # Where no line has tokens, the first of each stretch.
    path.write_text(path.read_text().replace("tokens", "words "))
    chosen = choose_lines(path, 40)
    assert chosen.unreadable == 0
    assert all(abs(row["step"] - 70 * i) <= 2 for i, row in enumerate(chosen.rows))


def test_lines_too_long_or_broken_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "LONGEST", 100)
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n\nno json\n[]\n{"step": 2}\n{"step": "' + "x" * 200 + '"}\n')
    chosen = choose_lines(tmp_path / "a.jsonl", 9)
    assert ([row["step"] for row in chosen.rows], chosen.unreadable, chosen.too_long) == ([1, 2], 2, 1)


def test_several_media_have_their_own_frames_and_orders(tmp_path: Path) -> None:
    """Each medium of a row is shown as the data name it, a part of a clip and a list of images included."""
    first, second = small_video(tmp_path / "one.mp4"), small_video(tmp_path / "two.mp4")
    stills = [tmp_path / f"{i}.png" for i in range(3)]
    for still in stills:
        Image.new("RGB", (30, 20), "red").save(still)
    media: list[dict[str, Any]] = [
        {"kind": "video", "path": str(first), "start": 0.5, "max_frames": 2},
        {"kind": "image", "path": str(stills[0])},
        {"kind": "video", "frames": [str(still) for still in stills], "timestamps": [0.0, 2.0, 3.0]},
        {"kind": "video", "path": str(tmp_path / "gone.mp4")},
    ]
    orders = [[1, 0], None, [1, 0], [3, 2, 1, 0]]
    rows = [rollout_row(1, first, media=media, permutation=orders), rollout_row(2, second)]
    rows.append(rollout_row(3, first, media=media[:1], permutation=[1, 0]))
    rows += [rollout_row(4, first, media=bad) for bad in (3, [{}], [{"kind": "video"}], [{"path": "a", "what": 1}])]
    rows.append(rollout_row(5, first, media=media, permutation=[1, 0]))  # not one for each
    made = report(make_run(tmp_path / "run", rollouts=rows))
    whole, plain, alone = made.rollouts["cards"]
    assert whole["permutation"] == orders
    assert whole["kinds"] == ["video", "image", "video", "video"]
    shown = [made.rollouts["media"][index] for index in whole["media"]]
    assert [len(one["frames"]) for one in shown] == [2, 1, 2, 0]
    assert shown[0]["times"][0] == 0.5
    assert shown[2]["times"] == [0.0, 3.0]
    assert "missing_file" in shown[3]["note"]
    assert plain["media"] not in whole["media"]
    assert (alone["media"], alone["permutation"]) == (whole["media"][0], [1, 0])
    assert "5 of the lines chosen cannot be read" in made.text
    # Each path must lie in the run's root.
    run = make_run(tmp_path / "rooted", rollouts=rows[:1], data=DataConfig(root=str(tmp_path / "run")))
    assert all("outside of data.root" in one["note"] for one in report(run).rollouts["media"])
