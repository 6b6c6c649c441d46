"""The held-out evaluation on the demo's clips: what is counted, what is skipped, and that it repeats."""

import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from evaluations import Oracle
from runs import write_data
from tiny import make_lm, make_prompt

from videor1.config import DataConfig, EvaluateConfig, TemporalConfig, VideoConfig
from videor1.data import Dataset, load_samples
from videor1.demo.assets import Assets
from videor1.evaluation import evaluator as evaluation
from videor1.evaluation.evaluator import Answered, Evaluation, Evaluator
from videor1.model import VideoLM
from videor1.types import Prompt
from videor1.video import media as video_media

SIDES = {"max_pixels": 56 * 56, "min_pixels": 56 * 56, "image_max_pixels": 56 * 56, "image_min_pixels": 28 * 28}
VIDEO = VideoConfig(max_frames=8, **SIDES)


def config(*, cache_mb: int = 64, **options: Any) -> EvaluateConfig:
    data = DataConfig(workers=0, cache_mb=cache_mb)
    return EvaluateConfig(data=data, video=VIDEO, max_completion_length=4, max_prompt_length=2000, **options)


@pytest.fixture(scope="module")
def model() -> VideoLM:
    return make_lm()


@pytest.fixture(scope="module")
def dataset(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A broken video; three videos, one image, one text; a missing video; a question that is too long."""
    root = Path(shutil.copytree(assets.folder / "clips", tmp_path_factory.mktemp("eval") / "clips")).parent
    (root / "clips" / "broken.mp4").write_bytes(b"no video at all" * 100)
    kept = json.loads(assets.train.read_text())
    assert sorted(e["data_type"] for e in kept) == ["image", "video", "video", "video"]
    text = {"problem": "2 + 2?", "data_type": "text", "problem_type": "numerical", "solution": "<answer>4</answer>"}
    video = next(e for e in kept if e["data_type"] == "video")
    broken, missing = (video | {"path": f"./clips/{name}.mp4"} for name in ("broken", "not-there"))
    write_data(root / "eval.json", [broken, *kept, text, missing, video | {"problem": "word " * 5000}])
    loaded = load_samples(root / "eval.json", root=root)
    assert not loaded.errors
    return loaded


def test_known_answers_give_known_accuracy(model: VideoLM, dataset: Dataset, oracle: type[Oracle]) -> None:
    """What cannot be read or asked is neither right nor wrong."""
    wrong, told = "<answer>no idea</answer>", []
    with Evaluator(dataset, config(), on_skip=told.append) as evaluator:
        oracle.say = staticmethod(lambda solution, index, shuffled, i: wrong if shuffled else solution)
        result = evaluator.run(model)
        oracle.say = staticmethod(lambda solution, index, shuffled, i: solution if shuffled else wrong)
        swapped = evaluator.run(model)
    assert (result.ordered, result.shuffled, swapped.ordered, swapped.shuffled) == (1.0, 0.0, 0.0, 1.0)
    expected = {"ordered": 1.0, "shuffled": 0.0, "gap": 1.0, "samples": 5, "skipped": 3, "image": 1.0, "malformed": 0}
    assert result.metrics() == {f"eval/{name}": value for name, value in expected.items()}
    assert swapped.metrics()["eval/image"] == 0.0
    good = dataset.samples[1:6]
    assert [a.sample for a in result.answers] == good
    assert [a.shuffled for a in result.answers] == [0.0 if s.data_type == "video" else None for s in good]
    for answered in result.answers:
        assert answered.text == answered.sample.solution
        assert answered.shuffled_text == (wrong if answered.shuffled is not None else None)
    assert result.skipped == swapped.skipped
    assert [error.kind for error in told[:3]] == [error.kind for error in told[3:]] == list(result.skipped)
    assert result.skipped["missing_file"] == result.skipped["too_long"] == 1
    assert [Path(error.path).name for error in told[:2]] == ["broken.mp4", "not-there.mp4"]
    # Images and text count in neither mean.
    sample = make_prompt(None).sample
    answers = [Answered(sample, *scores, "", None) for scores in ((0.5, 0.25), (0.0, 0.25), (1.0, None))]
    result = Evaluation(answers)
    assert (result.ordered, result.shuffled, result.metrics()["eval/image"]) == (0.25, 0.25, 1.0)
    assert "eval/image" not in Evaluation(answers[:2]).metrics()
    empty = Evaluation().metrics()
    assert math.isnan(empty["eval/ordered"])
    assert math.isnan(empty["eval/gap"])
    assert empty["eval/samples"] == 0


def test_requests_of_both_branches(model: VideoLM, dataset: Dataset, oracle: type[Oracle]) -> None:
    with Evaluator(dataset, config(seed=3)) as evaluator:
        evaluator.run(model)
    requests, good = oracle.requests, dataset.samples[1:6]
    assert [r.ordered.names for r in requests] == [("eval", s.index) for s in good]
    shuffled = [("eval-shuffled", s.index) if s.data_type == "video" else None for s in good]
    assert [r.shuffled.names if r.shuffled else None for r in requests] == shuffled
    assert {r.seed for r in requests} == {3}
    assert all(branch.count == 1 for r in requests for branch in (r.ordered, r.shuffled) if branch)
    assert [r.ordered.features is None for r in requests] == [s.data_type == "text" for s in good]
    assert all(r.judge is None for r in requests)  # every answer counts here
    for request in (request for request in requests if request.shuffled):
        assert request.shuffled.features.shape == request.ordered.features.shape
        assert not torch.equal(request.shuffled.features, request.ordered.features)


@pytest.mark.parametrize("unit", ["frame", "temporal_patch"])
def test_an_identity_order_answers_as_the_ordered_branch(model: VideoLM, dataset: Dataset, unit: Any) -> None:
    def identity(prompt: Prompt, unit: str, seed: int) -> tuple[int, ...] | None:
        if prompt.media is None or prompt.media.kind != "video":
            return None
        return tuple(range(prompt.media.grid_thw[0] * (2 if unit == "frame" else 1)))

    options = config(temporal=TemporalConfig(shuffle_unit=unit))
    with patch.object(evaluation, "draw_permutation", identity), Evaluator(dataset, options) as evaluator:
        result = evaluator.run(model)
    videos = [a for a in result.answers if a.shuffled is not None]
    assert len(videos) == 3
    assert all((a.text, a.accuracy) == (a.shuffled_text, a.shuffled) for a in videos)


def test_media_are_decoded_once_over_two_runs(model: VideoLM, dataset: Dataset, oracle: type[Oracle]) -> None:
    good = [s.path.name for s in dataset.samples[1:5] if s.path]
    for cache_mb, times in ((64, (1, 1)), (0, (1, 2))):
        with (
            patch.object(video_media, "read_frames", wraps=video_media.read_frames) as frames,
            patch.object(video_media, "read_image", wraps=video_media.read_image) as images,
            Evaluator(dataset, config(cache_mb=cache_mb, eval_samples=6)) as evaluator,
        ):
            for expected in times:
                evaluator.run(model)
                read = [call.args[0].name for call in frames.call_args_list + images.call_args_list]
                assert sorted(name for name in read if name != "broken.mp4") == sorted(expected * good)


def test_runs_repeat_whatever_the_chunks_and_other_models_answer_otherwise(model: VideoLM, dataset: Dataset) -> None:
    """And leave the model as it was."""
    model.hf.train()
    with Evaluator(dataset, config()) as greedy, Evaluator(dataset, config(eval_temperature=1.0)) as drawn:
        first, hot = greedy.run(model).answers, drawn.run(model).answers
        torch.manual_seed(5)
        with patch.object(evaluation, "_CHUNK", 2):
            assert greedy.run(model).answers == first
            assert drawn.run(model).answers == hot != first
        assert greedy.run(make_lm(seed=1)).answers != first
    assert model.hf.training
    for (name, parameter), fresh in zip(model.hf.named_parameters(), make_lm().hf.parameters(), strict=True):
        assert (parameter.grad, parameter.requires_grad) == (None, True)
        assert torch.equal(parameter, fresh), name
    model.hf.eval()
