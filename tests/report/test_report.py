"""The report page: what it says of a run, whatever the run's folder holds by now. In a browser: test_report_browser."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, Page, drawn, eval_row, lines, make_run, report, rollout_row, small_video, step_row
from runs import sft_trainer, trainer

import videor1.report
from videor1.config import SFTConfig
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError, DataError
from videor1.report import report_line, write_report
from videor1.report.__main__ import main
from videor1.report.cards import visible
from videor1.report.overview import state
from videor1.report.run import load_run


def test_a_run_in_one_page(tmp_path: Path) -> None:
    video = small_video(tmp_path / "data" / "one.mp4")
    run = make_run(tmp_path / "a run", steps=30, rollouts=[rollout_row(step, video) for step in (1, 15, 30)], beta=0.2)
    assert write_report(run) == run / "report.html"
    made = Page(run / "report.html")
    for words in (
        "a run T-GRPO",
        "finished: 30 of 30 steps",
        "Held-out accuracy, frames in order 0.550 → 0.650",
        "Held-out accuracy, frames shuffled 0.300 → 0.300",
        "Temporal gap, held out 0.250 → 0.350 step 10 → 30",
        "Seconds a step 4.15",
        "Tokens seen 30,000",
        "beta 0.2 0.04",
        "video.max_frames 4 16",
        "max_steps 30 -1",
    ):
        assert words in made.words
    assert list(made.figures) == [
        "held-out",
        "accuracy",
        "reward",
        "bonus",
        "kl",
        "entropy",
        "length",
        "clipped",
        "skipped",
        "variance",
        "loss",
        "grad",
        "rate",
        "speed",
        "times",
    ]
    assert len(made.rollouts["cards"]) == 3
    assert "Nothing was logged" not in made.words


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    video = small_video(tmp_path / "one.mp4")
    made = report(make_run(tmp_path / "run", rollouts=[rollout_row(1, video, problem=HOSTILE)]))
    assert made.loads() == ["data:,"]  # the icon
    assert all(tag not in ("iframe", "object", "embed", "base") for tag, _ in made.elements)
    assert all(uri.startswith("data:image/jpeg;base64,") for clip in made.rollouts["media"] for uri in clip["frames"])


def test_text_is_never_markup(tmp_path: Path) -> None:
    """Completions, questions, options, paths, reasons and names as an attacker would have them."""
    hostile = dict.fromkeys(["problem", "solution", "problem_id"], HOSTILE)
    row = rollout_row(1, None, **hostile, options=[HOSTILE, "B"], prompt=HOSTILE)
    run = make_run(
        tmp_path / "<script>window.hit = 1<", rollouts=[row], run_name="x", dataset_name=HOSTILE.replace("\x00", "")
    )
    skip = {"step": 1, "split": "train", "draw": 0, "kind": "<b>kind", "path": HOSTILE, "message": HOSTILE}
    lines(run / "skipped.jsonl", [skip])
    other = make_run(tmp_path / "plain")
    for made in (report(run), report(run, other)):
        tags = [tag for tag, _ in made.elements]
        assert tags.count("script") == 4
        assert "b" not in tags
        assert "img" not in tags
        assert "<script>window.hit = 1<" in made.text
        assert "{{ 7 * 7 }}" in made.text
        assert "[U+202E]right to left[U+202C] [U+0000][U+0007] [U+2028]" in made.text
        assert all(ord(character) >= 32 or character in "\n\t" for character in made.text)
        (card,) = made.rollouts["cards"]
        assert card["completions"][1]["tokens"] == ["x", visible(HOSTILE)]
        assert card["question"] == card["problem"] == visible(HOSTILE)
        names = {t["name"] for figure in made.figures.values() for t in figure["data"]}
        assert not any("<" in name for name in names)  # plotly reads tags in names


def test_visible_text() -> None:
    assert visible("a\tb\n\u00e9 \U0001f469\u200d\U0001f467") == "a\tb\n\u00e9 \U0001f469\u200d\U0001f467"
    assert visible("\x1b\x7f\u061c\u2066\ud800") == "[U+001B][U+007F][U+061C][U+2066][U+D800]"


def test_what_the_trainers_write_is_read(assets: Assets, tmp_path: Path) -> None:
    trainer(assets, tmp_path / "rl", max_steps=2, temporal__skip_shuffled=False).train()
    sft_trainer(assets, tmp_path / "sft", max_steps=2).train()
    made = report(tmp_path / "rl")
    cards, media = made.rollouts["cards"], made.rollouts["media"]
    assert [card["step"] for card in cards] == [1, 2]
    for card in cards:
        assert all(len(completion["tokens"]) == len(completion["logps"]) for completion in card["completions"])
        assert len(card["permutation"]) == len(media[card["media"]]["frames"])
        assert card["asked"] == len(card["shuffled"]) == 1
        assert card["p_shuffled"] is not None
    assert "finished: 2 of 2 steps" in made.words
    made = report(tmp_path / "sft")
    assert set(made.figures) == {"loss", "grad", "rate", "speed", "times"}
    assert "sft SFT" in made.words
    assert "No rollouts to show." in made.words
    made = report(tmp_path / "rl", tmp_path / "sft")
    assert "Not measured in sft." in made.words


def test_a_run_in_progress(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=12, max_steps=40, rollouts=[rollout_row(1, None)])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(run / name, "ab") as file:
            file.write(b'{"step": 13, "loss": 0.')
    os.utime(run / "metrics.jsonl", (1.7e9, 1.7e9))
    made = report(run)
    assert "12 of 40 steps" in made.words
    assert "finished" not in made.words
    assert "written 2023-11-14 22:13:20 UTC" in made.words
    assert "The last line of metrics.jsonl is not whole (yet)" in made.words
    assert len(made.rollouts["cards"]) == 1


def test_before_the_first_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0)
    (run / "rollouts.jsonl").unlink()
    (run / "skipped.jsonl").unlink()
    made = report(run)
    assert "no step done yet" in made.words
    assert "No step has been logged yet." in made.words
    assert made.figures == {}


def test_an_evaluation_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"an evaluation's folder: its tables are in .*results\.json, and it has no"):
        write_report(tmp_path)


def test_values_that_are_missing_null_or_nan(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=[])
    text = ['{"step": 1, "loss": NaN, "kl": Infinity}', '{"step": 2, "loss": 0.5, "kl": null, "reward": "high"}']
    (run / "metrics.jsonl").write_text("\n".join([*text, "", '{"step": 3, "loss": 0.25}']) + "\n")
    made = report(run)
    assert set(made.figures) == {"loss"}
    assert drawn(made.figures["loss"], "loss") == ([2, 3], [0.5, 0.25])
    assert "Nothing was logged for: Held-out accuracy, Accuracy while training: p and p~, Reward" in made.words


def test_without_videos_or_a_reference(tmp_path: Path) -> None:
    rows = [
        step_row(step)
        | {"temporal/p_shuffled": None, "temporal/p": None, "rollout/shuffled_asked": 0}
        | {"rollout/shuffled_skipped": 0, "rollout/shuffled_stopped": 0, "kl": 0.0}
        for step in range(1, 31)
    ]
    made = report(make_run(tmp_path / "run", rows=rows, beta=0.0, rollouts=[rollout_row(1, None)]))
    assert {"accuracy", "skipped", "held-out"}.isdisjoint(made.figures)
    (card,) = made.rollouts["cards"]
    assert (card["media"], card["asked"], card["bonus"], card["kind"]) == (None, 0, None, "text")


def test_without_a_usable_config(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rollouts=[rollout_row(1, small_video(tmp_path / "one.mp4"))])
    for text in (None, "- a list", "a: [", "\udc80"):
        if text is None:
            (run / "config.yaml").unlink()
        else:
            (run / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
        made = report(run)
        assert "config.yaml cannot be read, so the options are not known" in made.words
        assert "The options are not known." in made.words
        assert len(made.rollouts["media"][0]["frames"]) == 4


def test_an_option_of_another_version(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rollouts=[rollout_row(1, small_video(tmp_path / "one.mp4"))])
    with open(run / "config.yaml", "a") as file:
        file.write("forgotten: {choice: 3}\nvideo.colour: true\n")
    made = report(run)
    assert "forgotten.choice 3 (unknown option)" in made.words
    assert len(made.rollouts["media"][0]["frames"]) == 4


def test_several_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rollouts=[rollout_row(1, None), rollout_row(2, None)])
    lines(run / "rank-1" / "rollouts.jsonl", [rollout_row(1, None, problem_id="other")])
    skip = {"split": "train", "draw": 3, "kind": "decode", "path": "x.mp4", "message": "x.mp4: broken"}
    lines(run / "skipped.jsonl", [{"step": step} | skip for step in (1, 2)])
    lines(run / "rank-1" / "skipped.jsonl", [{"step": 1} | skip | {"kind": "timeout"}])
    made = report(run)
    assert "2 ranks" in made.words
    assert [card["problem"] for card in made.rollouts["cards"]] == ["901", "other", "902"]
    assert "train decode 2 train timeout 1" in made.words
    assert "Samples left out 3" in made.words


def test_many_samples_left_out_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = [{"step": i, "split": "train", "kind": "decode", "path": None, "message": f"clip {i}."} for i in range(250)]
    lines(run / "skipped.jsonl", rows)
    with open(run / "skipped.jsonl", "a") as file:
        file.write('{"step": 1}\nno json\n{"half')
    made = report(run)
    assert "train decode 250" in made.words
    assert "clip 99." in made.words
    assert "clip 100." not in made.words
    assert "150 more are in skipped.jsonl." in made.words
    assert "2 lines of skipped.jsonl cannot be read; they are not counted." in made.words


def test_the_state_of_a_run_without_a_number_of_steps(tmp_path: Path) -> None:
    def told(name: str, **options: Any) -> tuple[str, bool]:
        return state(load_run(make_run(tmp_path / name, **options)))

    assert told("a", steps=20, max_steps=-1) == ("20 of about 100 steps", False)
    assert told("b", steps=100, max_steps=-1) == ("finished: 100 steps", True)
    last = eval_row(20)["eval/ordered"]
    early = SFTConfig(max_steps=300, stop_at_accuracy=last + 0.01)
    assert told("c", steps=20, config=early) == ("20 of at most 300 steps", False)
    late = SFTConfig(max_steps=300, stop_at_accuracy=last)
    text = f"finished: 20 steps, until accuracy {last:g} was reached"
    assert told("d", steps=20, config=late) == (text, True)


@pytest.mark.parametrize(
    ("steps", "seconds", "logging", "age", "said"),
    [
        (20, 1.0, 1, 110, ""),
        (20, 1.0, 1, 3000, "50 minutes"),
        (20, 40.0, 1, 390, ""),  # ten steps
        (20, 40.0, 1, 411, "7 minutes"),
        (20, 40.0, 5, 1990, ""),
        (20, 40.0, 5, 200_000, "2 days"),
        (0, 1.0, 1, 590, ""),  # a large model is being read
        (0, 1.0, 1, 7500, "2 hours"),
        (30, 1.0, 1, 10**6, ""),  # finished
    ],
)
def test_a_run_that_fell_silent(
    tmp_path: Path, steps: int, seconds: float, logging: int, age: float, said: str
) -> None:
    rows = [step_row(step) | {"time/step": seconds} for step in range(1, steps + 1)]
    run = make_run(tmp_path / "run", rows=rows, max_steps=30, logging_steps=logging)
    then = time.time() - age
    os.utime(run / "metrics.jsonl", (then, then))
    made = report(run)
    told = f"Nothing was written for {said} before this page was made" if said else "Nothing was written for"
    assert (told in made.words) == bool(said)
    assert (f"python -m videor1.train --resume auto --output_dir {run}" in made.words) == bool(said)


def test_an_evaluation_is_no_silence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20, max_steps=30, rows=[step_row(1), eval_row(1) | {"time/eval": 1000.0}])
    for age, silent in ((2900, False), (3100, True)):
        then = time.time() - age
        os.utime(run / "metrics.jsonl", (then, then))
        assert ("Nothing was written for" in report(run).words) == silent


def test_the_demonstrations_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summary = {"before": {"ordered": 0.5, "shuffled": 0.25}, "after": {"ordered": 0.875, "shuffled": None}}
    (run / "summary.json").write_text(json.dumps(summary | {"chance": 0.3}))
    assert "frames in order 0.500 0.875 0.300 frames shuffled 0.250 — 0.300" in report(run).words
    (run / "summary.json").write_text("[")
    assert "summary.json cannot be read" in report(run).words


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert main([str(one)]) == 0
    assert capsys.readouterr().out == f"{one / 'report.html'}\n"
    assert main([str(one), str(other)]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert main([str(one), "--out", "named.html", "--rollouts", "0"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other", "report.html", "named.html"}
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--rollouts" in capsys.readouterr().out


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    run = make_run(tmp_path / "run")
    for arguments, message in (
        (["empty"], "no metrics.jsonl in it; expected the folder that videor1.train or videor1.sft wrote"),
        (["gone"], "expected the folder of a run, but there is no such folder"),
        (["file"], "expected the folder of a run, but it is a file"),
        (["run", "run/../run"], "given twice"),
        (["run", "--rollouts", "-1"], "rollouts: expected 0 (none) or more, got -1"),
        (["run", "--out", str(tmp_path)], "cannot be written"),
        (["run", "--out", str(tmp_path / "no" / "page.html")], "cannot be written"),
    ):
        given = [str(tmp_path / word) if word[:3] in ("emp", "gon", "fil", "run") else word for word in arguments]
        assert run_main(main, given) == 2
        assert message in capsys.readouterr().err
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1}\n{"step": 99}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:34: expected a JSON object with a whole number step"):
        write_report(run)
    with pytest.raises(ConfigError, match="at least one"):
        write_report([])


def test_a_report_that_fails_does_not_fail_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    assert report_line(run) == f"Report: {run / 'report.html'}"

    def broken(*_: object) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(videor1.report, "write_report", broken)
    assert report_line(run) == (
        f"The report could not be written (RuntimeError: no room); python -m videor1.report {run}"
    )


def test_an_older_page_stays_where_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    before = write_report(run).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_report(run, rollouts=1)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".report*"))


def test_the_series_of_a_run_that_was_evaluated_only(tmp_path: Path) -> None:
    made = report(make_run(tmp_path / "run", rows=[eval_row(0)]))
    assert set(made.figures) == {"held-out"}
    assert "Held-out accuracy, frames in order 0.500 at step 0" in made.words
