"""``python -m videor1.evaluate``: all six benchmarks, its figures, bad videos, options that cannot be."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import Evaluate, Oracle
from runs import entries, write_data

from videor1.config import TrainConfig, cli
from videor1.demo.assets import Assets
from videor1.evaluation.intervals import mean_of_differences, mean_of_shares
from videor1.logs.jsonl import read_jsonl
from videor1.model import lm
from videor1.rollout import SamplingOptions

COUNTS = {"mmvu": 1, "mvbench": 20, "tempcompass": 3, "videomme": 6, "videommmu": 4, "vsibench": 5}
FIGURES = ("accuracy", "ordered", "shuffled", "gap")


def test_all_six(evaluate: Evaluate, oracle: type[Oracle]) -> None:
    oracle.say = staticmethod(lambda solution, index, shuffled, i: "<answer>?</answer>" if shuffled else solution)
    made = evaluate(benchmark=",".join(COUNTS))
    found, out = made.results, made.out
    assert list(found) == list(COUNTS)
    for name, count in COUNTS.items():
        overall = found[name]["overall"]
        assert (found[name]["asked"], overall["questions"]) == (count, count)
        assert [overall[figure]["value"] for figure in FIGURES] == [1.0, 1.0, 0.0, 1.0]
        assert (overall["finished"], overall["answered"], overall["shuffled_answered"]) == (1.0, 1.0, 1.0)
    assert found["vsibench"]["categories"]["question_type"]["object_rel_direction"]["questions"] == 2
    assert list(found["videomme"]["categories"]) == ["duration", "domain", "task_type", "sub_category"]
    assert found["tempcompass"]["left_out"] == {"captioning: a language model would have to judge the answers": 2}
    assert [row["benchmark"] for row in made.answers] == [name for name in COUNTS for _ in range(COUNTS[name])]
    assert "tempcompass: 2 questions are left out (captioning: a language model" in made.err
    assert "mmvu: 1 question is left out (open-ended" in made.err
    overall = r"^videomme +6 +100\.0 \[15\.8, 100\.0\] +0\.0 \[0\.0, 84\.2\] +100\.0 .* 0\.0 +0\.0 *$"
    assert re.search(overall, out, re.MULTILINE)
    assert "  duration: short" in out
    assert "ordered" not in out  # the same as the accuracy, all being videos
    assert "gap: accuracy less shuffled; cut: " in out
    table = out.partition("vsibench: accuracy is")[0].split("\n\n")
    first = [re.split(r":|  ", part.lstrip())[0] for part in table]
    assert first[first.index("videomme") :][:4] == ["videomme", "duration", "task_type", "videommmu"]
    assert "vsibench: accuracy is the mean over the 8 tasks" in out
    assert made.bytes("skipped.jsonl") == b""


def test_the_models_own_answers(evaluate: Evaluate, assets: Assets) -> None:
    """From both orders to every question."""
    made = evaluate(benchmark="videomme,vsibench")
    assert all(isinstance(row["text"], str) and isinstance(row["shuffled_text"], str) for row in made.answers)
    assert any(row["text"] != row["shuffled_text"] for row in made.answers)
    settings = json.loads(made.bytes("results.json"))["settings"]
    assert (settings["model_name_or_path"], settings["video.max_frames"]) == (str(assets.model), 16)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_other_families(family: str, evaluate: Evaluate, family_assets: Callable[[str], Assets]) -> None:
    """Asked about benchmarks and a data file with images, with the times of frames in the prompts."""
    assets = family_assets(family)
    pixels = dict.fromkeys(["video__max_pixels", "video__min_pixels", "video__image_max_pixels"], 4096)
    model = assets.model
    made = evaluate(benchmark="videomme,vsibench", model_name_or_path=model, **pixels)
    assert all(isinstance(row["text"], str) and isinstance(row["shuffled_text"], str) for row in made.answers)
    made = evaluate("data", dataset_name=assets.dev, model_name_or_path=model, **pixels)
    assert made.results["dev"]["overall"]["questions"] == 3


def test_answers_that_the_template_opened(
    evaluate: Evaluate, oracle: type[Oracle], thinking_assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are the whole answer's; the file says what was opened and what was written."""
    pixels = dict.fromkeys(["video__max_pixels", "video__min_pixels", "video__image_max_pixels"], 4096)
    options = pixels | {"dataset_name": thinking_assets.dev, "model_name_or_path": thinking_assets.model}
    oracle.say = staticmethod(lambda solution, *_: f"so</think>{solution}")
    made = evaluate("thinking", **options)
    assert {(row["opened"], row["text"], row["accuracy"], row["answered"]) for row in made.answers} == {
        ("<think>\n", f"so</think>{row['solution']}", 1.0, 1.0) for row in made.answers
    }
    opened = "<think></think><answer>"  # which changes what an answer says
    monkeypatch.setattr(lm, "opened_text", lambda *_: opened)
    oracle.say = staticmethod(lambda solution, *_: solution.removeprefix("<answer>"))
    made = evaluate("answering", **options)
    assert {(row["opened"], row["accuracy"], row["answered"]) for row in made.answers} == {(opened, 1.0, 1.0)}
    assert {row["shuffled_answered"] for row in made.answers} == {1.0, None}


def test_figures_against_a_direct_computation(evaluate: Evaluate, oracle: type[Oracle]) -> None:
    right = np.random.default_rng(0).random((40, 2)) < 0.6
    oracle.say = staticmethod(lambda solution, index, shuffled, i: solution if right[index, +shuffled] else "cut")
    made = evaluate(benchmark="videomme,vsibench")
    rows = [row for row in made.answers if row["benchmark"] == "videomme"]
    overall = made.results["videomme"]["overall"]
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
    short = made.results["videomme"]["categories"]["duration"]["short"]
    assert short["accuracy"]["value"] == ordered[:3].mean()
    assert (short["questions"], short["videos"], short["accuracy"]["low"]) == (3, 1, None)
    # VSI-Bench: counting, direction easy, direction hard, route, room; the two directions are one task.
    counting, easy, hard, route, room = right[:5, 0].astype(float)
    vsibench = made.results["vsibench"]
    tasks = (counting + (easy + hard) / 2 + route + room) / 4
    assert vsibench["overall"]["accuracy"]["value"] == pytest.approx(tasks)
    direction = vsibench["categories"]["question_type"]["object_rel_direction"]
    assert direction["accuracy"]["value"] == pytest.approx((easy + hard) / 2)


def test_one_bad_video_counts_once(evaluate: Evaluate, oracle: type[Oracle], benchmarks: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(benchmarks / "videomme", tmp_path / "data" / "videomme")).parent
    bad = root / "videomme" / "data" / "mKjv93ACGo9.mkv"
    bad.write_bytes(b"no video" * 100)
    made = evaluate(benchmark="videomme", data__root=root)
    found = made.results["videomme"]
    assert found["unreadable"] == {"questions": 3, "videos": 1, "by_kind": {"not_video": 3}}
    assert (found["asked"], found["overall"]["questions"], found["overall"]["accuracy"]["value"]) == (6, 3, 1.0)
    assert found["accuracy_unanswered_as_wrong"]["value"] == 0.5
    skipped = [(row["path"], row["kind"], row["index"]) for row in read_jsonl(made.folder / "skipped.jsonl")]
    assert skipped == [(str(bad), "not_video", i) for i in (3, 4, 5)]
    assert "videomme: 1 video (3 questions) could not be read; 3 of 6 questions are answered; " in made.out
    assert "with the others counted as wrong, accuracy is 50.0" in made.out
    # Mended, the questions are asked: nothing of the bad video is left.
    shutil.copy(benchmarks / "videomme" / "data" / "mKjv93ACGo9.mkv", bad)
    made = evaluate(benchmark="videomme", data__root=root, resume="auto")
    found = made.results["videomme"]
    assert (found["unreadable"]["questions"], found["overall"]["questions"]) == (0, 6)
    assert made.bytes("skipped.jsonl") == b""


def test_a_data_file(evaluate: Evaluate, oracle: type[Oracle], assets: Assets, tmp_path: Path) -> None:
    """Images and text count in the accuracy alone; a question that is too long is no fault of its video."""
    text = {"problem": "2 + 2?", "data_type": "text", "problem_type": "numerical", "solution": "<answer>4</answer>"}
    given = entries(assets.dev)
    kinds, count = [entry["data_type"] for entry in given], len(given)
    data = write_data(tmp_path / "d.json", [*given, text, given[0] | {"problem": "word " * 5000}])
    oracle.say = staticmethod(lambda solution, index, shuffled, i: "" if index == count else solution)
    made = evaluate(dataset_name=data, data__root="/", max_prompt_length=2000)
    found = made.results["d"]
    overall = found["overall"]
    assert (overall["questions"], overall["videos"]) == (count + 1, kinds.count("video"))
    assert overall["accuracy"]["value"] == pytest.approx(count / (count + 1))
    assert overall["ordered"]["value"] == 1.0
    assert made.answers[-1]["shuffled_accuracy"] is None
    assert re.search(r"questions +accuracy +ordered +shuffled +gap", made.out)
    words = "accuracy: of all questions, frames in order; ordered, shuffled: of those on videos; gap: ordered"
    assert words in made.out
    assert found["unaskable"] == {"questions": 1, "videos": 1, "by_kind": {"too_long": 1}}
    assert found["unreadable"]["questions"] == 0
    told = f"d: 1 question could not be asked (too_long 1); {count + 1} of {count + 2} questions are answered"
    assert told in made.out


def test_options_of_the_answers_and_of_the_media(evaluate: Evaluate, oracle: type[Oracle]) -> None:
    oracle.say = staticmethod(lambda solution, index, shuffled, i: solution if i < (1 if shuffled else 2) else "cut")
    made = evaluate(benchmark="videomme", eval_temperature=0.1, eval_top_p=0.001, eval_num_samples=3)
    overall = made.results["videomme"]["overall"]
    assert [overall[name]["value"] for name in ("accuracy", "gap")] == pytest.approx([2 / 3, 1 / 3])
    assert overall["finished"] == pytest.approx(2 / 3)
    assert {len(row["texts"]) for row in made.answers} == {3}
    assert oracle.made == [(SamplingOptions(4, 0.1, 0.001), 2 * 32 * 3)]
    assert {request.ordered.count for request in oracle.requests} == {3}
    # Frames and pixels are arguments.
    oracle.requests.clear()
    options = {"video__max_frames": 4, "video__max_pixels": 56 * 84, "video__min_pixels": 28 * 28, "eval_samples": 2}
    made = evaluate("small", benchmark="mvbench", **options)
    assert len(oracle.requests) == made.results["mvbench"]["asked"] == 2  # eval_samples
    frames, height, width = oracle.requests[0].prompt.media.grid_thw
    assert frames == 2
    assert height * width * 14 * 14 <= 56 * 84

    # The shuffle belongs to the seed and the question.
    def orders(name: str, benchmark: str = "videomme", **options: Any) -> dict[int, Any]:
        oracle.requests.clear()
        evaluate(name, benchmark=benchmark, **options)
        found = [r for r in oracle.requests if "videomme" in str(r.prompt.sample.path)]
        return {r.prompt.sample.index: r.shuffled.permutation for r in found}

    alone = orders("alone")
    assert len(alone) == 6
    assert len(set(alone.values())) > 3
    assert orders("beside", "mmvu,videomme") == alone
    assert orders("top", eval_samples=3) == {i: alone[i] for i in range(3)}
    assert orders("seed", seed=1) != alone


GIVEN = {"benchmark": "mmvu"}
ASKED = GIVEN | {"model_name_or_path": "no/such/model"}  # told before it is loaded
NEITHER = ASKED | {"benchmark": None}
MISTAKES: list[tuple[int, dict[str, Any], str]] = [
    (2, NEITHER, "benchmark (names) or dataset_name (a data file in the Video-R1 format), got neither"),
    (2, ASKED | {"dataset_name": "x.json"}, "got both"),
    (2, ASKED | {"benchmark": "mvbensh"}, "got 'mvbensh'; did you mean 'mvbench'?"),
    (2, ASKED | {"data__root": None}, "data.root: expected the folder that holds mmvu, got no"),
    (2, ASKED | {"resume": "runs/x"}, "resume: expected auto"),
    (2, GIVEN | {"resume": "auto", "output_dir": None}, "resume: auto needs output_dir"),
    (2, GIVEN | {"eval_top_p": 0.5}, "eval_top_p: expected 1, or eval_temperature above 0"),
    (2, GIVEN | {"eval_num_samples": 4}, "eval_num_samples: expected 1, or eval_temperature above 0"),
    (2, GIVEN | {"eval_temperature": 0.5, "eval_top_p": 0.0}, "eval_top_p: expected in (0, 1], got 0.0"),
    (1, GIVEN | {"max_prompt_length": 3}, "none of the 1 questions could be answered"),
]


def test_what_cannot_be(evaluate: Evaluate, tmp_path: Path) -> None:
    for code, options, message in MISTAKES:
        assert message in evaluate(code=code, **options).err
    # No folder is made where benchmarks are missing, every one of which is named; a training run's is left alone.
    told = evaluate("new", code=1, benchmark="mvbench,videomme", data__root=tmp_path).err
    assert "hf download OpenGVLab/MVBench" in told
    assert "hf download lmms-lab/Video-MME" in told
    assert not (tmp_path / "new").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("{}\n")
    assert "is the folder of a training run" in evaluate("other", code=2, benchmark="mmvu").err


def test_a_checkpoint_trained_otherwise(evaluate: Evaluate, oracle: Any, assets: Assets, tmp_path: Path) -> None:
    model = tmp_path / "trained" / "checkpoints" / "step-7"
    shutil.copytree(assets.model, model)
    file = tmp_path / "trained" / "config.yaml"

    def told(name: str) -> str:
        made = evaluate(name, model_name_or_path=model, dataset_name=assets.dev, eval_samples=1)
        return "".join(line for line in made.err.splitlines() if "was trained otherwise" in line)

    assert told("no run") == ""
    sides = ("max_pixels", "min_pixels", "image_max_pixels", "image_min_pixels")
    options = ["--max_completion_length=4", *(f"--video.{side}=3136" for side in sides)]
    alike = cli.parse(TrainConfig, options, prog="", description="")
    cli.save_config(alike, file)
    assert told("alike") == ""
    video = dataclasses.replace(alike.video, max_frames=4, min_pixels=None)
    cli.save_config(dataclasses.replace(alike, max_completion_length=9, video=video), file)
    assert told("other") == (
        f"{model} was trained otherwise; to ask it as in its training: --max_completion_length 9 --video.max_frames 4 "
        "--video.min_pixels null"
    )
    for number, text in enumerate(("[", "- 1", "video: 3", "")):
        file.write_text(text)
        assert told(f"broken {number}") == ""
