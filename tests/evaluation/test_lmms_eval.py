"""The model class for lmms-eval: what its requests become, and what it gives back.

lmms-eval cannot be installed beside this project's tests (it wants av < 16). Where it is found, its own classes are
used; else stand-ins with the fields and the signatures of version 0.7.3. That the evaluator itself runs with the model
is tested only where it is found.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from media import numbered_frames, write_video
from PIL import Image

from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.evaluation.lmms_eval.plugin import manifest
from videor1.rollout import Request, Rollout, SamplingOptions
from videor1.types import Completion, Group

REAL = importlib.util.find_spec("lmms_eval") is not None


class StandInModel:
    """``lmms_eval.api.model.lmms``, as far as a model sees it."""

    is_simple = True

    def __init__(self) -> None:
        self.cache_hook = types.SimpleNamespace(add_partial=lambda attr, req, res: None)
        self.task_dict: dict[str, Any] = {}


@dataclass
class StandInCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class StandInResult:
    text: str
    token_counts: StandInCounts | None = None


@dataclass
class StandInInstance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class StandInManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def model_class() -> Iterator[type]:
    if REAL:
        yield importlib.import_module("videor1.evaluation.lmms_eval.model").VideoR1
        return
    names = (
        "lmms_eval",
        "lmms_eval.api",
        "lmms_eval.api.model",
        "lmms_eval.api.instance",
        "lmms_eval.models",
        "lmms_eval.models.registry_v2",
    )
    modules = {name: types.ModuleType(name) for name in names}
    modules["lmms_eval.api.model"].lmms = StandInModel  # type: ignore[attr-defined]
    instance = modules["lmms_eval.api.instance"]
    instance.Instance, instance.GenerationResult = StandInInstance, StandInResult  # type: ignore[attr-defined]
    instance.TokenCounts = StandInCounts  # type: ignore[attr-defined]
    modules["lmms_eval.models.registry_v2"].ModelManifest = StandInManifest  # type: ignore[attr-defined]
    sys.modules |= modules
    try:
        yield importlib.import_module("videor1.evaluation.lmms_eval.model").VideoR1
    finally:
        for name in [*names, "videor1.evaluation.lmms_eval.model"]:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", numbered_frames(40, 32, 32), rate=10)


class Engine:
    """Stands in for the sampler; notes what it is asked."""

    reply = "<think>so</think><answer>B</answer>"
    options: list[SamplingOptions] = []  # noqa: RUF012
    requests: list[Request] = []  # noqa: RUF012

    def __init__(self, model: object, options: SamplingOptions, *, max_rows: int, backend: str) -> None:
        self.options.append(options)
        self.max_rows = max_rows

    def generate(self, requests: list[Request]) -> Rollout:
        assert len(requests) <= self.max_rows
        self.requests.extend(requests)
        completion = Completion(torch.zeros(7), torch.zeros(7), True, self.reply)
        return Rollout([Group(request.prompt, (completion,)) for request in requests])


@pytest.fixture
def engine(model_class: type, monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    class Fresh(Engine):
        options: list[SamplingOptions] = []  # noqa: RUF012
        requests: list[Request] = []  # noqa: RUF012

    monkeypatch.setattr(sys.modules[model_class.__module__], "LocalEngine", Fresh)
    return Fresh


@pytest.fixture
def make(model_class: type, assets: Assets) -> Callable[..., Any]:
    def build(**options: Any) -> Any:
        return model_class(pretrained=str(assets.model), max_pixels=3136, workers=0, device="cpu", **options)

    return build


def requests(model: Any, contents: list[Any], task: str = "toy", **given: Any) -> list[Any]:
    """Generation requests as lmms-eval makes them of documents, here a document's content itself."""
    instance = sys.modules["lmms_eval.api.instance"].Instance
    model.task_dict = {task: {"test": contents}}
    options = {"max_new_tokens": 16, "temperature": 0} | given

    def to_messages(content: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": content}]

    return [
        instance(
            request_type="generate_until",
            arguments=("context", to_messages, dict(options), number, task, "test"),
            idx=0,
            metadata={"task": task, "doc_id": number, "repeats": 1},
        )
        for number in range(len(contents))
    ]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def clip(path: Path, **window: float) -> dict[str, Any]:
    return {"type": "video", "url": str(path)} | window


def prompt_text(model: Any, request: Request) -> str:
    ids = request.prompt.input_ids
    kept = ids[(ids != model.model.special.video_pad) & (ids != model.model.special.image_pad)]
    return model.model.tokenizer.decode(kept)


def test_the_manifest_names_the_class(model_class: type) -> None:
    found = manifest()
    assert found.model_id == "videor1"
    assert found.chat_class_path == f"{model_class.__module__}.{model_class.__qualname__}"
    assert model_class.is_simple is False  # else lmms-eval refuses a chat class


def test_answers_come_back_in_order(make, engine, video: Path, tmp_path: Path) -> None:
    model = make()
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 32), "red").save(picture)
    contents = [
        [clip(video), text("Which?\nA. one\nB. two")],
        [{"type": "image", "url": Image.new("L", (40, 40))}, text("What?")],
        [text("2 + 2?")],
        [{"type": "image", "url": str(picture)}, text("And this?")],
        [clip(video, start_time=1.0, end_time=2.0), text("Here?")],
    ]
    results = model.generate_until(requests(model, contents))
    assert [result.text for result in results] == 5 * ["B"]  # the answer tag's text
    assert [result.token_counts.output_tokens for result in results] == 5 * [7]
    prompts = [request.prompt for request in engine.requests]
    assert [prompt.media and prompt.media.kind for prompt in prompts] == ["video", "image", None, "image", "video"]
    pads = [model.model.special.video_pad, model.model.special.image_pad]
    for prompt in prompts:
        count = sum(int((prompt.input_ids == pad).sum()) for pad in pads)
        T, h, w = prompt.media.grid_thw if prompt.media else (0, 0, 0)
        assert count == T * h * w // 4
    whole, window = prompts[0].media, prompts[4].media
    assert whole.grid_thw[0] == 4  # 4 seconds at 2 frames a second
    assert window.grid_thw[0] == 2
    first = prompt_text(model, engine.requests[0])
    assert "Which?\nA. one\nB. two\nReason between <think> and </think>" in first
    assert first.endswith("<|im_start|>assistant\n")


def test_thinking_is_an_option(make, engine, video: Path) -> None:
    model = make(think=False)
    results = model.generate_until(
        requests(model, [[clip(video), text("Which?")]], until=["</think>"], max_new_tokens=9)
    )
    assert "Reason between" not in prompt_text(model, engine.requests[0])
    assert engine.options == [SamplingOptions(9, 0.0)]
    assert results[0].text == "<think>so"  # as it came, up to the stop
    engine.options.clear()
    model.think = True
    model.generate_until(requests(model, [[text("Which?")]]))
    assert engine.options == [SamplingOptions(1024, 0.0)]
    engine.reply = "no tags"
    assert model.generate_until(requests(model, [[text("Which?")]]))[0].text == "no tags"


def test_sampling_options_of_the_task(make, engine, caplog: pytest.LogCaptureFixture) -> None:
    model = make(max_new_tokens=5)
    hot = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "do_sample": True}
    mixed = requests(model, [[text("a")], [text("b")], [text("c")]])
    mixed[1].arguments[2].update(hot)
    with caplog.at_level(logging.WARNING):
        model.generate_until(mixed)
        model.generate_until(requests(model, [[text("a")]], do_sample=False, temperature=0.7, repetition_penalty=1.1))
    assert engine.options == [SamplingOptions(5, 0.0), SamplingOptions(5, 0.7, 0.9, 20), SamplingOptions(5, 0.0)]
    assert [request.ordered.names[2] for request in engine.requests] == [0, 2, 1, 0]
    assert "not used: repetition_penalty" in caplog.text
    with pytest.raises(ConfigError, match="num_beams"):
        model.generate_until(requests(model, [[text("a")]], num_beams=4))


def test_repeated_requests_draw_anew(make, engine) -> None:
    model = make()
    (request,) = requests(model, [[text("a")]])
    model.generate_until([request, request])
    assert [asked.ordered.names for asked in engine.requests] == [("lmms-eval", "toy", 0, i) for i in range(2)]


def test_shuffled_frames(make, engine, video: Path) -> None:
    ordered, shuffled = make(), make(shuffle=True)
    contents = [[clip(video), text("Which?")], [text("2 + 2?")]]
    for model in (ordered, shuffled, shuffled):
        model.generate_until(requests(model, contents))
    a, _, b, none, c, _ = engine.requests
    assert a.ordered.permutation is None
    assert sorted(b.ordered.permutation) == list(range(8))
    assert b.ordered.permutation == c.ordered.permutation
    assert none.ordered.permutation is None
    assert not torch.equal(a.ordered.features, b.ordered.features)


def test_a_bad_video_is_counted(make, engine, video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make(max_prompt_length=400)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    contents = [
        [clip(bad), text("a")],
        [clip(video), text("b")],
        [clip(tmp_path / "none.mp4"), text("c")],
        [text("d " * 500)],
    ]
    with caplog.at_level(logging.WARNING):
        results = model.generate_until(requests(model, contents))
    assert [result.text for result in results] == ["", "B", "", ""]
    assert (
        "3 of 4 requests could not be read (missing_file 1, not_video 1, too_long 1) and count as wrong" in caplog.text
    )
    assert str(bad) in caplog.text
    assert "the limit is 400: raise it, or lower max_pixels, image_max_pixels or max_frames" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"type": "image", "url": "a.png"}, {"type": "image", "url": "b.png"}, text("x")],
            r"got \['image', 'image'\]",
        ),
        ([{"type": "audio", "url": "a.wav"}, text("x")], r"got \['audio'\]"),
        ([{"type": "video", "url": [1, 2]}, text("x")], "expected the path of a video, got list"),
    ],
)
def test_what_it_cannot_take_is_refused(make, engine, content: list[Any], message: str) -> None:
    model = make()
    with pytest.raises(ConfigError, match=f"task toy: .*{message}"):
        model.generate_until(requests(model, [content]))


def test_text_that_reads_as_media_is_not_asked(make, engine, video: Path) -> None:
    model = make()
    results = model.generate_until(requests(model, [[clip(video), text("<|video_pad|>")], [text("<|image_pad|>")]]))
    assert [result.text for result in results] == ["", ""]
    assert not engine.requests


def test_unfit_tasks_and_launches(make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with pytest.raises(NotImplementedError, match="log-likelihoods"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several"):
        model.generate_until_multi_round([])
    with pytest.raises(ConfigError, match="batch_size: expected a whole number, got 'auto'"):
        make(batch_size="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        make()


def test_the_models_own_answers(make, video: Path) -> None:
    """Greedy, from the real sampler: the same alone and among others, and as the trainer's prompt would have it."""
    model = make(max_new_tokens=6, think=False)
    contents = [[clip(video), text("Which?")], [text("2 + 2?")], [clip(video), text("Where?")]]
    together = [result.text for result in model.generate_until(requests(model, contents))]
    assert len(set(together)) > 1
    for number, content in enumerate(contents):
        alone = requests(model, contents)[number]
        assert model.generate_until([alone])[0].text == together[number], content
    model.batch_size = 2
    assert [result.text for result in model.generate_until(requests(model, contents))] == together


@pytest.mark.skipif(not REAL, reason="lmms-eval is not installed (it wants av < 16)")
def test_lmms_evals_own_evaluator_runs_it(assets: Assets, video: Path, tmp_path: Path) -> None:
    import json

    from lmms_eval import evaluator, models
    from lmms_eval.tasks import TaskManager

    rows = [{"path": str(video), "question": "Which?", "answer": "A"} for _ in range(3)]
    (tmp_path / "docs.json").write_text(json.dumps(rows))
    (tmp_path / "utils.py").write_text(
        "def visual(doc):\n    return [doc['path']]\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n\n\n"
        "def process(doc, results):\n    return {'acc': float(isinstance(results[0], str))}\n"
    )
    (tmp_path / "toy.yaml").write_text(
        "task: videor1_toy\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'docs.json'}\n"
        "test_split: train\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        "doc_to_text: !function utils.text\ndoc_to_target: answer\n"
        "generation_kwargs:\n  max_new_tokens: 6\n  temperature: 0\nprocess_results: !function utils.process\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    found = evaluator.simple_evaluate(
        model="videor1",
        model_args=f"pretrained={assets.model},max_pixels=3136,workers=0,max_new_tokens=6",
        tasks=["videor1_toy"],
        device="cpu",
        batch_size=1,
        cli_args=None,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False, model_name="videor1"),
    )
    assert found["results"]["videor1_toy"]["acc,none"] == 1.0
