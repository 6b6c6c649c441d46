"""The report page: what it says of a run, whatever the run's folder holds by now. In a browser: test_report_browser."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, Page, drawn, eval_row, lines, make_run, report, rollout_row, small_video, step_row
from runs import largest_file, sft_trainer, trainer

import videor1.report
from videor1.config import SFTConfig
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError, DataError
from videor1.report import report_line, write_report
from videor1.report.__main__ import main
from videor1.report.cards import visible
from videor1.report.overview import silence, state
from videor1.report.run import load_run

CHARTS = (
    "held-out accuracy reward bonus kl entropy length clipped skipped variance mismatch ess loss grad rate speed times"
)


def assert_says(page: Page, *sentences: str) -> None:
    assert [words for words in sentences if words not in page.words] == []


def test_a_run_in_one_page(tmp_path: Path) -> None:
    video = small_video(tmp_path / "data" / "one.mp4")
    rows = [rollout_row(step, video, problem=HOSTILE) for step in (1, 15, 30)]
    run = make_run(tmp_path / "a run", steps=30, rollouts=rows, beta=0.2)
    assert write_report(run) == run / "report.html"
    made = Page(run / "report.html")
    assert_says(
        made,
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
    )
    assert " ".join(made.figures) == CHARTS
    assert len(made.rollouts["cards"]) == 3
    assert "Nothing was logged" not in made.words
    # It needs no network.
    assert made.loads() == ["data:,"]  # the icon
    assert all(tag not in ("iframe", "object", "embed", "base") for tag, _ in made.elements)
    assert all(uri.startswith("data:image/jpeg;base64,") for clip in made.rollouts["media"] for uri in clip["frames"])


def test_text_is_never_markup(tmp_path: Path) -> None:
    """Completions, questions, options, paths, reasons and names as an attacker would have them."""
    hostile = dict.fromkeys(["problem", "solution", "problem_id"], HOSTILE)
    row = rollout_row(1, None, **hostile, options=[HOSTILE, "B"], prompt=HOSTILE)
    folder, data = tmp_path / "<script>window.hit = 1<", HOSTILE.replace("\x00", "")
    run = make_run(folder, rollouts=[row], run_name="x", dataset_name=data)
    skip = {"step": 1, "split": "train", "draw": 0, "kind": "<b>kind", "path": HOSTILE, "message": HOSTILE}
    lines(run / "skipped.jsonl", [skip])
    other = make_run(tmp_path / "plain")
    for made in (report(run), report(run, other)):
        tags = [tag for tag, _ in made.elements]
        assert (tags.count("script"), tags.count("b"), tags.count("img")) == (4, 0, 0)
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
    assert_says(made, "sft SFT", "No rollouts to show.")
    assert "Not measured in sft." in report(tmp_path / "rl", tmp_path / "sft").words


def test_a_run_in_progress(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=12, max_steps=40, rollouts=[rollout_row(1, None)])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(run / name, "ab") as file:
            file.write(b'{"step": 13, "loss": 0.')
    os.utime(run / "metrics.jsonl", (1.7e9, 1.7e9))
    made = report(run)
    last = "The last line of metrics.jsonl is not whole (yet)"
    assert_says(made, "12 of 40 steps", "written 2023-11-14 22:13:20 UTC", last)
    assert "finished" not in made.words
    assert len(made.rollouts["cards"]) == 1


def test_before_the_first_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0)
    (run / "rollouts.jsonl").unlink()
    (run / "skipped.jsonl").unlink()
    made = report(run)
    assert_says(made, "no step done yet", "No step has been logged yet.")
    assert made.figures == {}


def test_values_that_are_missing_null_or_nan(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=[])
    text = ['{"step": 1, "loss": NaN, "kl": Infinity}', '{"step": 2, "loss": 0.5, "kl": null, "reward": "high"}']
    (run / "metrics.jsonl").write_text("\n".join([*text, "", '{"step": 3, "loss": 0.25}']) + "\n")
    made = report(run)
    assert set(made.figures) == {"loss"}
    assert drawn(made.figures["loss"], "loss") == ([2, 3], [0.5, 0.25])
    assert "Nothing was logged for: Held-out accuracy, Accuracy while training: p and p~, Reward" in made.words
    # A run that was evaluated only.
    made = report(make_run(tmp_path / "evaluated", rows=[eval_row(0)]))
    assert set(made.figures) == {"held-out"}
    assert "Held-out accuracy, frames in order 0.500 at step 0" in made.words


def test_without_videos_or_a_reference(tmp_path: Path) -> None:
    none = dict.fromkeys(["temporal/p", "temporal/p_shuffled"]) | {"kl": 0.0}
    none |= {f"rollout/shuffled_{name}": 0 for name in ("asked", "skipped", "stopped")}
    rows = [step_row(step) | none for step in range(1, 31)]
    made = report(make_run(tmp_path / "run", rows=rows, beta=0.0, rollouts=[rollout_row(1, None)]))
    assert {"accuracy", "skipped", "held-out"}.isdisjoint(made.figures)
    (card,) = made.rollouts["cards"]
    assert (card["media"], card["asked"], card["bonus"], card["kind"]) == (None, 0, None, "text")


def test_options_of_another_version_and_none_that_are_known(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rollouts=[rollout_row(1, small_video(tmp_path / "one.mp4"))])
    with open(run / "config.yaml", "a") as file:
        file.write("forgotten: {choice: 3}\nvideo.colour: true\n")
    made = report(run)
    assert "forgotten.choice 3 (unknown option)" in made.words
    assert len(made.rollouts["media"][0]["frames"]) == 4
    for text in (b"- a list", b"a: [", b"\x80", None):
        (run / "config.yaml").write_bytes(text) if text else (run / "config.yaml").unlink()
        made = report(run)
        unknown = "config.yaml cannot be read, so the options are not known"
        assert_says(made, unknown, "The options are not known.")
        assert len(made.rollouts["media"][0]["frames"]) == 4


def test_several_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rollouts=[rollout_row(1, None), rollout_row(2, None)])
    lines(run / "rank-1" / "rollouts.jsonl", [rollout_row(1, None, problem_id="other")])
    skip = {"split": "train", "draw": 3, "kind": "decode", "path": "x.mp4", "message": "x.mp4: broken"}
    lines(run / "skipped.jsonl", [{"step": step} | skip for step in (1, 2)])
    lines(run / "rank-1" / "skipped.jsonl", [{"step": 1} | skip | {"kind": "timeout"}])
    made = report(run)
    assert_says(made, "2 ranks", "train decode 2 train timeout 1", "Samples left out 3")
    assert [card["problem"] for card in made.rollouts["cards"]] == ["901", "other", "902"]


def test_many_samples_left_out_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = [{"step": i, "split": "train", "kind": "decode", "path": None, "message": f"clip {i}."} for i in range(250)]
    lines(run / "skipped.jsonl", rows)
    with open(run / "skipped.jsonl", "a") as file:
        file.write('{"step": 1}\nno json\n{"half')
    made = report(run)
    unread = "2 lines of skipped.jsonl cannot be read; they are not counted."
    assert_says(made, "train decode 250", "clip 99.", "150 more are in skipped.jsonl.", unread)
    assert "clip 100." not in made.words


def test_the_state_of_a_run_without_a_number_of_steps(tmp_path: Path) -> None:
    last = eval_row(20)["eval/ordered"]
    early, late = (SFTConfig(max_steps=300, stop_at_accuracy=last + more) for more in (0.01, 0.0))
    cases: list[tuple[dict[str, Any], tuple[str, bool]]] = [
        ({"steps": 20, "max_steps": -1}, ("20 of about 100 steps", False)),
        ({"steps": 100, "max_steps": -1}, ("finished: 100 steps", True)),
        ({"steps": 20, "config": early}, ("20 of at most 300 steps", False)),
        ({"steps": 20, "config": late}, (f"finished: 20 steps, until accuracy {last:g} was reached", True)),
    ]
    for i, (options, told) in enumerate(cases):
        assert state(load_run(make_run(tmp_path / str(i), **options))) == told


def test_a_run_that_fell_silent(tmp_path: Path) -> None:
    cases = [
        # (steps done, seconds of each, logging_steps, seconds of silence, how it is told)
        (20, 1.0, 1, 110, ""),
        (20, 1.0, 1, 3000, "50 minutes"),
        (20, 40.0, 1, 390, ""),  # ten steps
        (20, 40.0, 1, 411, "7 minutes"),
        (20, 40.0, 5, 1900, ""),
        (20, 40.0, 5, 200_000, "2 days"),
        (0, 1.0, 1, 500, ""),  # a large model is being read
        (0, 1.0, 1, 7500, "2 hours"),
    ]
    for i, (steps, seconds, logging, age, said) in enumerate(cases):
        rows = [step_row(step) | {"time/step": seconds} for step in range(1, steps + 1)]
        run = make_run(tmp_path / str(i), rows=rows, max_steps=30, logging_steps=logging)
        assert_silent(run, age, said)
    rows = [step_row(1), eval_row(1) | {"time/eval": 1000.0}]
    run = make_run(tmp_path / "evaluating", max_steps=30, rows=rows)
    assert_silent(run, 2800, "")  # an evaluation is no silence
    assert_silent(run, 3100, "52 minutes")
    words = "Nothing was written for 52 minutes before this page was made"
    assert_says(report(run), words, f"python -m videor1.train --resume auto --output_dir {shlex.quote(str(run))}")
    os.utime(make_run(tmp_path / "finished") / "metrics.jsonl", (1e9, 1e9))
    assert "Nothing was written for" not in report(tmp_path / "finished").words


def assert_silent(run: Path, age: float, said: str) -> None:
    then = time.time() - age
    os.utime(run / "metrics.jsonl", (then, then))
    told = silence(load_run(run))
    expected = [f"Nothing was written for {said}"] * bool(said)
    assert [sentence.partition(" before this")[0] for sentence in told] == expected


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
    for arguments, out in (
        ([str(one)], str(one / "report.html")),
        ([str(one), str(other)], "report.html"),
        ([str(one), "--out", "named.html", "--rollouts", "0"], "named.html"),
    ):
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"{out}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other", "report.html", "named.html"}
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--rollouts" in capsys.readouterr().out


def test_a_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "evaluation"):
        Path(name).mkdir()
    Path("file").write_text("")
    Path("evaluation", "results.json").write_text("{}")
    run = make_run(Path("run"))
    for arguments, message in (
        (["empty"], "no metrics.jsonl in it; expected the folder that videor1.train or videor1.sft wrote"),
        (["evaluation"], "an evaluation's folder: its tables are in evaluation/results.json, and it has no page"),
        (["gone"], "expected the folder of a run, but there is no such folder"),
        (["file"], "expected the folder of a run, but it is a file"),
        (["run", "run/../run"], "given twice"),
        (["run", "--rollouts", "-1"], "rollouts: expected 0 (none) or more, got -1"),
        (["run", "--out", str(tmp_path)], "expected the file to write, got a folder"),
        (["run", "--out", "."], "expected the file to write, got a folder"),
        (["run", "--out", "no/page.html"], "cannot be written"),
    ):
        assert run_main(main, arguments) == 2
        assert message in capsys.readouterr().err
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1}\n{"step": 99}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:34: expected a JSON object with a whole number step"):
        write_report(run)
    with pytest.raises(ConfigError, match="at least one"):
        write_report([])


def test_a_report_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the page that was there, and does not fail its run."""
    run = make_run(tmp_path / "run")
    assert report_line(run) == f"Report: {run / 'report.html'}"
    before = (run / "report.html").read_bytes()
    with largest_file(2**20), pytest.raises(ConfigError, match="File too large"):
        write_report(run, rollouts=1)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".report*"))

    def broken(*_: object) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(videor1.report, "write_report", broken)
    told = f"The report could not be written (RuntimeError: no room); python -m videor1.report {shlex.quote(str(run))}"
    assert report_line(run) == told
