"""The rollouts of the report: which are chosen, what is shown of them, and their frames."""

from __future__ import annotations

import base64
import io
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from media import coded_numbers, real_video
from PIL import Image
from report_runs import HOSTILE, LOGPS, TOKENS, lines, make_run, report, rollout_row, small_video

from videor1.config import VideoConfig
from videor1.report import choose, page
from videor1.report.cards import visible
from videor1.report.choose import choose_lines


def test_a_rollout_says_everything(tmp_path: Path) -> None:
    video = small_video(tmp_path / "clips" / "one.mp4")
    made = report(make_run(tmp_path / "run", rollouts=[rollout_row(7, video)]))
    (card,) = made.rollouts["cards"]
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


def test_the_frames_are_the_ones_that_were_asked_about(tmp_path: Path) -> None:
    video, options = small_video(tmp_path / "one.mp4"), VideoConfig(max_frames=6, fps=8)
    made = report(make_run(tmp_path / "run", rollouts=[rollout_row(step, video) for step in (1, 2, 3)], video=options))
    (clip,) = made.rollouts["media"]  # once, for three rollouts
    assert clip["times"] == [0.0, 0.12, 0.38, 0.5, 0.75, 0.88]
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in clip["frames"]]
    assert [picture.size for picture in pictures] == [(144, 86)] * 6
    assert coded_numbers(np.stack([np.asarray(picture) for picture in pictures])) == [0, 1, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("name", "count", "tall"), [("nasa.mp4", 4, False), ("av1.mkv", 4, False), ("rotated_90.mov", 2, True)]
)
def test_videos_of_others(name: str, count: int, tall: bool, tmp_path: Path) -> None:
    video = real_video(name)
    made = report(make_run(tmp_path / "run", rollouts=[rollout_row(1, video)]))
    (clip,) = made.rollouts["media"]
    assert len(clip["frames"]) == count
    with Image.open(io.BytesIO(base64.b64decode(clip["frames"][0].partition(",")[2]))) as picture:
        assert max(picture.size) == 144
        assert (picture.height > picture.width) == tall


def test_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "one.png")
    made = report(make_run(tmp_path / "run", rollouts=[rollout_row(1, tmp_path / "one.png")]))
    assert len(made.rollouts["media"][0]["frames"]) == 1
    assert made.rollouts["cards"][0]["permutation"] is None


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


@pytest.mark.parametrize(
    ("limit", "value", "words"), [("PICTURE_BYTES", 1, "room"), ("DECODE_SECONDS", 1e-9, "seconds")]
)
def test_pictures_are_bounded(
    limit: str, value: float, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, limit, value)
    videos = [small_video(tmp_path / f"{i}.mp4") for i in range(2)]
    made = report(make_run(tmp_path / "run", rollouts=[rollout_row(1, videos[0]), rollout_row(2, videos[1])]))
    first, second = made.rollouts["media"]
    assert len(first["frames"]) == 4
    assert second["frames"] == []
    assert words in second["note"]


def test_text_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", rollouts=[rollout_row(step, None) for step in range(1, 21)])
    size = len(json.dumps(report(run, rollouts=1).rollouts["cards"][0]))
    monkeypatch.setattr(page, "TEXT_BYTES", 5.5 * size)
    made = report(run)
    assert [card["step"] for card in made.rollouts["cards"]] == [1, 5, 9, 13, 17]
    assert "5 of 20 rollouts are shown" in made.words


def test_how_many_rollouts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rollouts=[rollout_row(step, None) for step in range(1, 101)])
    other = make_run(tmp_path / "other", rollouts=[rollout_row(step, None) for step in range(1, 4)])
    assert [card["step"] for card in report(run, rollouts=5).rollouts["cards"]] == [1, 21, 41, 61, 81]
    assert report(run, rollouts=0).rollouts["cards"] == []
    assert [(c["run"], c["step"]) for c in report(run, other, rollouts=4).rollouts["cards"]] == [
        (0, 1),
        (0, 51),
        (1, 1),
        (1, 3),
    ]
    assert len(report(run).rollouts["cards"]) == 40
    none = make_run(tmp_path / "none")  # leaves its share to the other
    assert [(c["run"], c["step"]) for c in report(none, run, rollouts=2).rollouts["cards"]] == [(1, 1), (1, 51)]


def test_rows_that_are_not_rollouts_are_counted(tmp_path: Path) -> None:
    bad = [{"step": 2}, rollout_row(3, None, rewards=[1.0]), rollout_row(4, None, accuracy=["high", 0.0])]
    made = report(make_run(tmp_path / "run", rollouts=[rollout_row(1, None), *bad]))
    assert len(made.rollouts["cards"]) == 1
    assert "run/rollouts.jsonl: 3 of the lines chosen cannot be read; they are not shown." in made.words


def test_rollouts_of_an_older_run(tmp_path: Path) -> None:
    """Without tokens, question, options, and the number of shuffled completions."""
    new = ("tokens", "logps", "problem", "options", "data_type", "finished", "p", "p_shuffled", "shuffled_asked")
    row = {name: value for name, value in rollout_row(1, Path("x.mp4")).items() if name not in new}
    (card,) = report(make_run(tmp_path / "run", rollouts=[row])).rollouts["cards"]
    assert card["question"] == "What comes first?"
    assert (card["asked"], card["kind"], card["tokens"]) == (2, "video", False)
    assert card["completions"][1]["text"] == visible(HOSTILE)


def test_lines_with_tokens_are_preferred(tmp_path: Path) -> None:
    rows = [rollout_row(step, None) for step in range(1, 13)]
    for row in rows:
        if row["step"] % 4 != 3:
            del row["tokens"]
    lines(tmp_path / "rollouts.jsonl", rows)
    assert [row["step"] for row in choose_lines(tmp_path / "rollouts.jsonl", 3).rows] == [3, 7, 11]
    assert [row["step"] for row in choose_lines(tmp_path / "rollouts.jsonl", 50).rows] == list(range(1, 13))
    assert choose_lines(tmp_path / "none.jsonl", 3).rows == []


def test_a_huge_file_is_read_in_places_only(tmp_path: Path) -> None:
    """Of 140 MB, evenly over the steps, whatever stands in the other lines; a line with tokens is found near by."""
    path, pad = tmp_path / "rollouts.jsonl", "x" * 50_000
    with open(path, "w") as file:
        for step in range(2800):
            tokens = ', "tokens": [["a"]]' if step % 7 == 3 else ""
            file.write(f'{{"step": {step}, "pad": "{pad}"{tokens}}}\n')
        file.write('{"step": 99999, "pad": "')
    assert path.stat().st_size > 2 * choose.SCAN
    tracemalloc.start()
    started = time.process_time()
    chosen = choose_lines(path, 40)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    steps = [row["step"] for row in chosen.rows]
    assert len(steps) == 40
    assert all(step % 7 == 3 for step in steps)
    assert all(abs(step - 70 * i) <= 8 for i, step in enumerate(steps))
    assert seconds < 10
    assert peak < 16e6


def test_lines_too_long_or_broken_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "LONGEST", 100)
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n\nno json\n[]\n{"step": 2}\n{"step": "' + "x" * 200 + '"}\n')
    chosen = choose_lines(tmp_path / "a.jsonl", 9)
    assert ([row["step"] for row in chosen.rows], chosen.unreadable, chosen.too_long) == ([1, 2], 2, 1)
