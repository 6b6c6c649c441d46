"""The held-out evaluation on the demo's clips: what is counted, what is skipped, and that it repeats."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import make_lm, make_prompt

from videor1.config import DataConfig, EvaluateConfig, TemporalConfig, VideoConfig
from videor1.data import Dataset, load_samples
from videor1.demo.assets import Assets
from videor1.evaluation import evaluator as evaluation
from videor1.evaluation.evaluator import Answered, Evaluation, Evaluator
from videor1.model import VideoLM
from videor1.rollout import Request, Rollout, SamplingOptions
from videor1.types import Completion, Group, SampleError
from videor1.video import media as video_media

VIDEO = VideoConfig(
    max_frames=8, max_pixels=56 * 56, min_pixels=56 * 56, image_max_pixels=56 * 56, image_min_pixels=28 * 28
)


def config(**options: object) -> EvaluateConfig:
    data = DataConfig(workers=0, cache_mb=int(options.pop("cache_mb", 64)))  # type: ignore[call-overload]
    return EvaluateConfig(data=data, video=VIDEO, **{"max_completion_length": 4, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> VideoLM:
    return make_lm()


@pytest.fixture
def entries(assets: Assets) -> list[dict]:
    """Three videos, one image, one text, of the demo's training split."""
    kept = json.loads(assets.train.read_text())
    assert [e["data_type"] for e in kept].count("video") == 3
    text = {"problem": "2 + 2?", "data_type": "text", "problem_type": "numerical", "solution": "<answer>4</answer>"}
    return [*kept, text]


@pytest.fixture
def dataset(assets: Assets, entries: list[dict], tmp_path: Path) -> Dataset:
    return load(assets.folder, entries, tmp_path)


def load(root: Path, entries: list[dict], folder: Path) -> Dataset:
    (folder / "eval.json").write_text(json.dumps(entries))
    loaded = load_samples(folder / "eval.json", root=root)
    assert not loaded.errors
    return loaded


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths decoded, in order."""
    decoded: list[str] = []
    for name in ("read_frames", "read_image"):
        read = getattr(video_media, name)

        def noted(path: Path, read=read, **options: object):
            decoded.append(Path(path).name)
            return read(path, **options)

        monkeypatch.setattr(video_media, name, noted)
    return decoded


class Oracle:
    """Stands in for the sampler: right from frames in order, right from shuffled frames where told."""

    right_when_shuffled = False
    right_in_order = True
    requests: list[Request] = []  # noqa: RUF012 (set by each test)

    def __init__(self, model: VideoLM, options: SamplingOptions, *, max_rows: int, backend: str) -> None:
        self.max_rows = max_rows

    def generate(self, requests: list[Request]) -> Rollout:
        assert len(requests) <= self.max_rows
        self.requests.extend(requests)
        groups: list[Group | None] = []
        for request in requests:
            texts = [
                request.prompt.sample.solution if right else "<answer>no idea</answer>"
                for right in (self.right_in_order, self.right_when_shuffled)
            ]
            ordered, shuffled = ((Completion(torch.zeros(1), torch.zeros(1), True, text),) for text in texts)
            groups.append(Group(request.prompt, ordered, shuffled if request.shuffled else ()))
        return Rollout(groups)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Oracle]]:
    class Fresh(Oracle):
        requests: list[Request] = []  # noqa: RUF012

    monkeypatch.setattr(evaluation, "LocalEngine", Fresh)
    return Fresh


def test_known_answers_give_known_accuracy(model: VideoLM, dataset: Dataset, oracle: type[Oracle]) -> None:
    with Evaluator(dataset, config()) as evaluator:
        result = evaluator.run(model)
        assert (result.ordered, result.shuffled) == (1.0, 0.0)
        oracle.right_when_shuffled, oracle.right_in_order = True, False
        swapped = evaluator.run(model)
    assert (swapped.ordered, swapped.shuffled) == (0.0, 1.0)
    assert result.metrics() == {
        "eval/ordered": 1.0,
        "eval/shuffled": 0.0,
        "eval/gap": 1.0,
        "eval/samples": 5,
        "eval/skipped": 0,
        "eval/image": 1.0,
    }
    assert swapped.metrics()["eval/image"] == 0.0
    assert [a.sample for a in result.answers] == dataset.samples
    assert [a.shuffled for a in result.answers] == [0.0 if s.data_type == "video" else None for s in dataset.samples]
    for answered in result.answers:
        assert answered.text == answered.sample.solution
        assert answered.shuffled_text == ("<answer>no idea</answer>" if answered.shuffled is not None else None)


def test_images_and_text_count_in_neither_mean() -> None:
    sample = make_prompt(None).sample
    answers = [Answered(sample, *scores, "", None) for scores in ((0.5, 0.25), (0.0, 0.25), (1.0, None))]
    result = Evaluation(answers)
    assert (result.ordered, result.shuffled) == (0.25, 0.25)
    assert result.metrics()["eval/image"] == 1.0
    without = Evaluation(answers[:2]).metrics()
    assert "eval/image" not in without
    empty = Evaluation().metrics()
    assert math.isnan(empty["eval/ordered"])
    assert math.isnan(empty["eval/gap"])
    assert empty["eval/samples"] == 0


def test_requests_of_both_branches(model: VideoLM, dataset: Dataset, oracle: type[Oracle]) -> None:
    with Evaluator(dataset, config(seed=3)) as evaluator:
        evaluator.run(model)
    kinds = [s.data_type for s in dataset.samples]
    videos = [i for i, kind in enumerate(kinds) if kind == "video"]
    requests = oracle.requests
    assert [r.ordered.names for r in requests] == [("eval", i) for i in range(5)]
    assert [r.shuffled.names if r.shuffled else None for r in requests] == [
        ("eval-shuffled", i) if i in videos else None for i in range(5)
    ]
    assert {r.seed for r in requests} == {3}
    assert all(branch.count == 1 for r in requests for branch in (r.ordered, r.shuffled) if branch)
    assert [r.ordered.features is None for r in requests] == [kind == "text" for kind in kinds]
    assert all(r.judge is None for r in requests)  # every answer counts here
    for request in requests:
        if request.shuffled:
            assert request.ordered.features is not None
            assert request.shuffled.features is not None
            assert request.shuffled.features.shape == request.ordered.features.shape
            assert not torch.equal(request.shuffled.features, request.ordered.features)


@pytest.mark.parametrize("unit", ["frame", "temporal_patch"])
def test_an_identity_order_answers_as_the_ordered_branch(
    model: VideoLM, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    def identity(prompt, unit: str, seed: int):
        if prompt.media is None or prompt.media.kind != "video":
            return None
        return tuple(range(prompt.media.grid_thw[0] * (2 if unit == "frame" else 1)))

    monkeypatch.setattr(evaluation, "draw_permutation", identity)
    with Evaluator(dataset, config(temporal=TemporalConfig(shuffle_unit=unit))) as evaluator:  # type: ignore[arg-type]
        result = evaluator.run(model)
    videos = [a for a in result.answers if a.shuffled is not None]
    assert len(videos) == 3
    assert all(a.text == a.shuffled_text and a.accuracy == a.shuffled for a in videos)


def test_media_are_decoded_once_over_two_runs(model: VideoLM, dataset: Dataset, oracle, loads: list[str]) -> None:
    paths = [s.path.name for s in dataset.samples if s.path]
    with Evaluator(dataset, config()) as evaluator:
        evaluator.run(model)
        assert loads == paths
        evaluator.run(model)
    assert loads == paths
    with Evaluator(dataset, config(cache_mb=0)) as evaluator:
        evaluator.run(model)
        evaluator.run(model)
    assert loads == 3 * paths


def test_two_runs_give_the_same_answers_and_another_model_others(model: VideoLM, dataset: Dataset) -> None:
    def texts(result: Evaluation) -> list[tuple[str, str | None]]:
        return [(a.text, a.shuffled_text) for a in result.answers]

    sampled = config(eval_temperature=1.0)
    with Evaluator(dataset, config()) as greedy, Evaluator(dataset, sampled) as drawn:
        first = texts(greedy.run(model))
        torch.manual_seed(5)
        assert texts(greedy.run(model)) == first
        assert texts(greedy.run(make_lm(seed=1))) != first
        hot = texts(drawn.run(model))
        assert texts(drawn.run(model)) == hot
        assert hot != first


def test_bad_files_are_neither_right_nor_wrong(
    model: VideoLM, assets: Assets, entries: list[dict], tmp_path: Path, oracle: type[Oracle]
) -> None:
    shutil.copytree(assets.folder / "clips", tmp_path / "clips")
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no video at all" * 100)
    video = next(e for e in entries if e["data_type"] == "video")
    bad = [
        {**video, "path": "./clips/broken.mp4"},
        {**video, "path": "./clips/not-there.mp4"},
        {**video, "problem": "word " * 5000},
    ]
    told: list[SampleError] = []
    dataset = load(tmp_path, [bad[0], *entries, *bad[1:]], tmp_path)
    with Evaluator(dataset, config(max_prompt_length=2000), on_skip=told.append) as evaluator:
        result = evaluator.run(model)
        again = evaluator.run(model)
    assert (result.ordered, result.shuffled) == (1.0, 0.0)
    assert len(result.answers) == 5
    assert sum(result.skipped.values()) == 3
    assert result.skipped == again.skipped
    assert [error.kind for error in told[:3]] == [error.kind for error in told[3:]] == list(result.skipped)
    assert result.skipped["missing_file"] == result.skipped["too_long"] == 1
    assert [Path(error.path).name for error in told[:2] if error.path] == ["broken.mp4", "not-there.mp4"]
    assert result.metrics()["eval/skipped"] == 3


def test_eval_samples_takes_the_top_of_the_file(model: VideoLM, dataset: Dataset, oracle, loads: list[str]) -> None:
    with Evaluator(dataset, config(eval_samples=2)) as evaluator:
        result = evaluator.run(model)
    assert [a.sample for a in result.answers] == dataset.samples[:2]
    assert len(loads) == 2
    with Evaluator(dataset, config(eval_samples=0)) as evaluator:
        assert len(evaluator.run(model).answers) == 5


def test_chunks_do_not_show(model: VideoLM, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with Evaluator(dataset, config()) as evaluator:
        whole = evaluator.run(model)
        monkeypatch.setattr(evaluation, "_CHUNK", 2)
        assert evaluator.run(model).answers == whole.answers


def test_an_evaluation_leaves_the_model_as_it_was(dataset: Dataset) -> None:
    model = make_lm()
    model.hf.train()
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    with Evaluator(dataset, config(eval_samples=2)) as evaluator:
        evaluator.run(model)
    assert model.hf.training
    for name, parameter in model.hf.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])
