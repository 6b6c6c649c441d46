"""``python -m videor1.evaluate``: all six benchmarks, its figures, bad videos, options that cannot be."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import answers, results, run
from runs import entries, write_data

from videor1 import evaluate
from videor1.config import TrainConfig, cli
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.evaluation.intervals import mean_of_differences, mean_of_shares
from videor1.logs.jsonl import read_jsonl
from videor1.model import features
from videor1.rollout import SamplingOptions

COUNTS = {"mmvu": 1, "mvbench": 20, "tempcompass": 3, "videomme": 6, "videommmu": 4, "vsibench": 5}


def test_all_six(assets: Assets, benchmarks: Path, tmp_path: Path, oracle, capsys: pytest.CaptureFixture) -> None:
    oracle.say = staticmethod(lambda solution, index, shuffled, i: "<answer>?</answer>" if shuffled else solution)
    assert run(assets, tmp_path / "run", benchmark=",".join(COUNTS), data__root=benchmarks) == 0
    found = results(tmp_path / "run")
    assert list(found) == list(COUNTS)
    for name, count in COUNTS.items():
        overall = found[name]["overall"]
        assert (found[name]["asked"], overall["questions"]) == (count, count)
        assert [overall[figure]["value"] for figure in ("accuracy", "ordered", "shuffled", "gap")] == [
            1.0,
            1.0,
            0.0,
            1.0,
        ]
        assert (overall["finished"], overall["answered"], overall["shuffled_answered"]) == (1.0, 1.0, 1.0)
    assert found["vsibench"]["categories"]["question_type"]["object_rel_direction"]["questions"] == 2
    assert list(found["videomme"]["categories"]) == ["duration", "domain", "task_type", "sub_category"]
    assert found["tempcompass"]["left_out"] == {"captioning: a language model would have to judge the answers": 2}
    rows = answers(tmp_path / "run")
    assert len(rows) == sum(COUNTS.values())
    assert {row["benchmark"] for row in rows} == set(COUNTS)
    shown = capsys.readouterr()
    assert "tempcompass: 2 questions are left out (captioning: a language model" in shown.err
    assert "mmvu: 1 question is left out (open-ended" in shown.err
    assert re.search(r"^videomme +6 +100\.0 \[15\.8, 100\.0\] +0\.0 \[0\.0, 84\.2\] +100\.0 ", shown.out, re.MULTILINE)
    assert "  duration: short" in shown.out
    assert "ordered" not in shown.out  # the same as the accuracy, all being videos
    assert "gap: accuracy less shuffled; cut: " in shown.out
    table = shown.out.partition("vsibench: accuracy is")[0].split("\n\n")
    first = [re.split(r":|  ", part.lstrip())[0] for part in table]
    assert first[first.index("videomme") :][:4] == ["videomme", "duration", "task_type", "videommmu"]
    assert "vsibench: accuracy is the mean over the 8 tasks" in shown.out
    assert (tmp_path / "run" / "skipped.jsonl").read_text() == ""


def test_the_models_own_answers(assets: Assets, benchmarks: Path, tmp_path: Path) -> None:
    """Greedy, twice: the same; every question has an answer from both orders."""
    for name in ("one", "two"):
        assert run(assets, tmp_path / name, benchmark="videomme,vsibench", data__root=benchmarks) == 0
    assert (tmp_path / "one" / "answers.jsonl").read_bytes() == (tmp_path / "two" / "answers.jsonl").read_bytes()
    rows = answers(tmp_path / "one")
    assert all(isinstance(row["text"], str) and isinstance(row["shuffled_text"], str) for row in rows)
    assert any(row["text"] != row["shuffled_text"] for row in rows)
    settings = json.loads((tmp_path / "one" / "results.json").read_text())["settings"]
    assert settings["model_name_or_path"] == str(assets.model)
    assert settings["video.max_frames"] == 16


def test_figures_against_a_direct_computation(assets: Assets, benchmarks: Path, tmp_path: Path, oracle) -> None:
    rng = np.random.default_rng(0)
    right = rng.random((40, 2)) < 0.6
    oracle.say = staticmethod(
        lambda solution, index, shuffled, i: solution if right[index, int(shuffled)] else "<think>cut"
    )
    assert run(assets, tmp_path / "run", benchmark="videomme,mvbench,vsibench", data__root=benchmarks) == 0
    rows = [row for row in answers(tmp_path / "run") if row["benchmark"] == "videomme"]
    found = results(tmp_path / "run")
    overall = found["videomme"]["overall"]
    ordered, shuffled = right[:6, 0].astype(float), right[:6, 1].astype(float)
    assert [row["accuracy"] for row in rows] == list(ordered)
    videos = [row["path"] for row in rows]
    for figure, expected in (
        ("accuracy", mean_of_shares(list(ordered), videos)),
        ("ordered", mean_of_shares(list(ordered), videos)),
        ("shuffled", mean_of_shares(list(shuffled), videos)),
        ("gap", mean_of_differences(list(ordered - shuffled), videos)),
    ):
        assert (overall[figure]["value"], overall[figure]["low"]) == (expected.value, expected.low)
    assert overall["finished"] == overall["answered"] == ordered.mean()
    assert overall["shuffled_finished"] == shuffled.mean()
    short = found["videomme"]["categories"]["duration"]["short"]
    assert short["accuracy"]["value"] == ordered[:3].mean()
    assert (short["questions"], short["videos"], short["accuracy"]["low"]) == (3, 1, None)
    # VSI-Bench: counting, direction easy, direction hard, route, room; the two directions are one task.
    points = right[:5, 0].astype(float)
    assert found["vsibench"]["overall"]["accuracy"]["value"] == pytest.approx(
        (points[0] + (points[1] + points[2]) / 2 + points[3] + points[4]) / 4
    )
    direction = found["vsibench"]["categories"]["question_type"]["object_rel_direction"]
    assert direction["accuracy"]["value"] == pytest.approx((points[1] + points[2]) / 2)


def test_one_bad_video_counts_once(
    assets: Assets, benchmarks: Path, tmp_path: Path, oracle, capsys: pytest.CaptureFixture
) -> None:
    root = Path(shutil.copytree(benchmarks, tmp_path / "data"))
    bad = root / "videomme" / "data" / "mKjv93ACGo9.mkv"
    bad.write_bytes(b"no video" * 100)
    assert run(assets, tmp_path / "run", benchmark="videomme", data__root=root) == 0
    found = results(tmp_path / "run")["videomme"]
    assert found["unreadable"] == {"questions": 3, "videos": 1, "by_kind": {"not_video": 3}}
    assert found["asked"] == 6
    assert (found["overall"]["questions"], found["overall"]["accuracy"]["value"]) == (3, 1.0)
    assert found["accuracy_unanswered_as_wrong"]["value"] == 0.5
    skipped = read_jsonl(tmp_path / "run" / "skipped.jsonl")
    assert [(row["path"], row["kind"], row["index"]) for row in skipped] == [
        (str(bad), "not_video", i) for i in (3, 4, 5)
    ]
    out = capsys.readouterr().out
    assert "videomme: 1 video (3 questions) could not be read; 3 of 6 questions are answered; " in out
    assert "with the others counted as wrong, accuracy is 50.0" in out
    # Mended, the questions are asked: nothing of the bad video is left.
    shutil.copy(benchmarks / "videomme" / "data" / "mKjv93ACGo9.mkv", bad)
    assert run(assets, tmp_path / "run", benchmark="videomme", data__root=root, resume="auto") == 0
    found = results(tmp_path / "run")["videomme"]
    assert (found["unreadable"]["questions"], found["overall"]["questions"]) == (0, 6)
    assert (tmp_path / "run" / "skipped.jsonl").read_text() == ""


def test_a_question_that_is_too_long_is_no_fault_of_its_video(
    assets: Assets, tmp_path: Path, oracle, capsys: pytest.CaptureFixture
) -> None:
    given = entries(assets.dev)
    data = write_data(tmp_path / "dev.json", [*given, given[0] | {"problem": "word " * 5000}])
    assert run(assets, tmp_path / "run", dataset_name=data, data__root="/", max_prompt_length=2000) == 0
    found = results(tmp_path / "run")["dev"]
    assert found["unaskable"] == {"questions": 1, "videos": 1, "by_kind": {"too_long": 1}}
    assert found["unreadable"]["questions"] == 0
    assert "dev: 1 question could not be asked (too_long 1); 3 of 4 questions are answered" in capsys.readouterr().out


def test_nothing_answered_is_an_error(assets: Assets, benchmarks: Path, tmp_path: Path, capsys) -> None:
    assert run(assets, tmp_path / "run", benchmark="mmvu", data__root=benchmarks, max_prompt_length=3) == 1
    assert "none of the 1 questions could be answered" in capsys.readouterr().err


def test_images_and_text_count_in_the_accuracy_alone(assets: Assets, tmp_path: Path, oracle, capsys) -> None:
    text = {"problem": "2 + 2?", "data_type": "text", "problem_type": "numerical", "solution": "<answer>4</answer>"}
    given = entries(assets.dev)
    kinds = [entry["data_type"] for entry in given]
    oracle.say = staticmethod(lambda solution, index, shuffled, i: "" if index == len(kinds) else solution)
    assert (
        run(assets, tmp_path / "run", dataset_name=write_data(tmp_path / "d.json", [*given, text]), data__root="/") == 0
    )
    overall = results(tmp_path / "run")["d"]["overall"]
    assert overall["questions"] == len(given) + 1
    assert overall["videos"] == kinds.count("video")
    assert overall["accuracy"]["value"] == pytest.approx(len(given) / (len(given) + 1))
    assert overall["ordered"]["value"] == 1.0
    shown = capsys.readouterr().out
    assert re.search(r"questions +accuracy +ordered +shuffled +gap", shown)
    assert "accuracy: of all questions, frames in order; ordered, shuffled: of those on videos; gap: ordered" in shown
    assert answers(tmp_path / "run")[-1]["shuffled_accuracy"] is None


def test_several_sampled_answers(assets: Assets, benchmarks: Path, tmp_path: Path, oracle) -> None:
    oracle.say = staticmethod(lambda solution, index, shuffled, i: solution if i < (1 if shuffled else 2) else "cut")
    options = {"eval_temperature": 0.1, "eval_top_p": 0.001, "eval_num_samples": 3}
    assert run(assets, tmp_path / "run", benchmark="videomme", data__root=benchmarks, **options) == 0
    overall = results(tmp_path / "run")["videomme"]["overall"]
    assert overall["accuracy"]["value"] == pytest.approx(2 / 3)
    assert overall["gap"]["value"] == pytest.approx(1 / 3)
    assert overall["finished"] == pytest.approx(2 / 3)
    assert {len(row["texts"]) for row in answers(tmp_path / "run")} == {3}
    ((sampling, max_rows),) = oracle.made
    assert sampling == SamplingOptions(4, 0.1, 0.001)
    assert max_rows == 2 * 32 * 3
    assert {request.ordered.count for request in oracle.requests} == {3}


def test_frames_and_pixels_are_arguments(assets: Assets, benchmarks: Path, tmp_path: Path, oracle) -> None:
    options = {"video__max_frames": 4, "video__max_pixels": 56 * 84, "video__min_pixels": 28 * 28, "eval_samples": 2}
    assert run(assets, tmp_path / "run", benchmark="mvbench", data__root=benchmarks, **options) == 0
    assert len(oracle.requests) == 2  # eval_samples
    media = oracle.requests[0].prompt.media
    assert media.grid_thw[0] == 2
    assert (media.grid_thw[1] * media.grid_thw[2]) * 14 * 14 <= 56 * 84
    assert results(tmp_path / "run")["mvbench"]["asked"] == 2


def test_the_shuffle_belongs_to_the_seed_and_the_question(
    assets: Assets, benchmarks: Path, tmp_path: Path, oracle
) -> None:
    def orders(name: str, **options: Any) -> dict[int, Any]:
        oracle.requests.clear()
        assert run(assets, tmp_path / name, data__root=benchmarks, **options) == 0
        found = [r for r in oracle.requests if "videomme" in str(r.prompt.sample.path)]
        return {r.prompt.sample.index: r.shuffled.permutation for r in found}

    alone = orders("alone", benchmark="videomme")
    assert len(alone) == 6
    assert len(set(alone.values())) > 3
    assert orders("beside", benchmark="mvbench,videomme") == alone
    assert orders("top", benchmark="videomme", eval_samples=3) == {i: alone[i] for i in range(3)}
    assert orders("seed", benchmark="videomme", seed=1) != alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "benchmark (names) or dataset_name (a data file in the Video-R1 format), got neither"),
        ({"benchmark": "mmvu", "dataset_name": "x.json"}, "got both"),
        ({"benchmark": "mvbensh", "data__root": "."}, "got 'mvbensh'; did you mean 'mvbench'?"),
        ({"benchmark": "mmvu"}, "data.root: expected the folder that holds mmvu, got nothing"),
        ({"benchmark": "mmvu", "resume": "runs/x"}, "resume: expected auto"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture, options: dict[str, Any], message: str
) -> None:
    assert run(assets, tmp_path / "run", model_name_or_path="no/such/model", **options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_top_p": 0.5}, "eval_top_p: expected 1, or eval_temperature above 0"),
        ({"eval_num_samples": 4}, "eval_num_samples: expected 1, or eval_temperature above 0"),
        ({"eval_temperature": 0.5, "eval_top_p": 0.0}, "eval_top_p: expected in (0, 1], got 0.0"),
    ],
)
def test_greedy_takes_no_sampling_options(
    assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(assets, tmp_path / "run", benchmark="mmvu", **options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_resume_needs_a_folder_and_training_runs_are_left_alone(assets: Assets, tmp_path: Path, capsys) -> None:
    arguments = [f"--model_name_or_path={assets.model}", "--benchmark=mmvu", "--data.root=."]
    assert run_main(evaluate.main, [*arguments, "--resume=auto"]) == 2
    assert "resume: auto needs output_dir" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert run_main(evaluate.main, [*arguments, f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "is the folder of a training run" in capsys.readouterr().err


def test_a_vision_pass_takes_no_more_than_its_share(
    assets: Assets, benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"benchmark": "videomme", "data__root": benchmarks}
    assert run(assets, tmp_path / "one", **options) == 0
    monkeypatch.setattr(features, "PASS_PATCHES", 1)  # each video by itself
    assert run(assets, tmp_path / "two", **options) == 0
    assert (tmp_path / "one" / "answers.jsonl").read_bytes() == (tmp_path / "two" / "answers.jsonl").read_bytes()


def test_every_missing_benchmark_is_named_and_no_folder_is_left(
    assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(assets, tmp_path / "run", benchmark="mvbench,videomme", data__root=tmp_path) != 0
    told = capsys.readouterr().err
    assert "hf download OpenGVLab/MVBench" in told
    assert "hf download lmms-lab/Video-MME" in told
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_was_trained_otherwise_is_told_of(
    assets: Assets, tmp_path: Path, oracle, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "trained" / "checkpoints" / "step-7"
    shutil.copytree(assets.model, model)
    file = tmp_path / "trained" / "config.yaml"
    options = {"model_name_or_path": model, "dataset_name": assets.dev, "eval_samples": 1}

    def told(name: str) -> str:
        assert run(assets, tmp_path / name, **options) == 0
        found = [line for line in capsys.readouterr().err.splitlines() if "was trained otherwise" in line]
        return found[0] if found else ""

    assert told("no run") == ""
    sides = {"video.max_pixels": 3136, "video.min_pixels": 3136}
    images = {"video.image_max_pixels": 3136, "video.image_min_pixels": 3136}
    alike = cli.parse(
        TrainConfig,
        [f"--{k}={v}" for k, v in (sides | images | {"max_completion_length": 4}).items()],
        prog="",
        description="",
    )
    cli.save_config(alike, file)
    assert told("alike") == ""
    video = dataclasses.replace(alike.video, max_frames=4, min_pixels=None)
    cli.save_config(dataclasses.replace(alike, max_completion_length=9, video=video), file)
    assert told("other") == (
        f"{model} was trained otherwise; to ask it as in its training: --max_completion_length 9 --video.max_frames 4 "
        "--video.min_pixels null"
    )
    for text in ("[", "- 1", "video: 3", ""):
        file.write_text(text)
        assert told(f"broken {text}".replace(":", "").replace(" ", "-")) == ""
