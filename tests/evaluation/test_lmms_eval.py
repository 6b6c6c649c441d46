"""The model class for lmms-eval: what its requests become, and what it gives back.

lmms-eval cannot be installed beside this project's tests (it wants av < 16). Where it is found, its own classes are
used; else stand-ins with the fields and the signatures of version 0.7.3. That the evaluator itself runs with the model
is tested only where it is found.
"""

import dataclasses
import importlib
import importlib.util
import json
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from evaluations import Oracle, install_oracle
from media import numbered_frames, write_video
from PIL import Image

from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.evaluation.lmms_eval.plugin import manifest
from videor1.rollout import Request, SamplingOptions
from videor1.video.patches import num_media_tokens

REAL = importlib.util.find_spec("lmms_eval") is not None


class StandInModel:
    """``lmms_eval.api.model.lmms``, as far as a model sees it."""

    is_simple = True

    def __init__(self) -> None:
        self.cache_hook = types.SimpleNamespace(add_partial=lambda attr, req, res: None)
        self.task_dict: dict[str, Any] = {}


@pytest.fixture(scope="module")
def model_class() -> Iterator[type]:
    if REAL:
        yield importlib.import_module("videor1.evaluation.lmms_eval.model").VideoR1
        return
    below = ("", ".api", ".api.model", ".api.instance", ".models", ".models.registry_v2")
    modules = {name: types.ModuleType(name) for name in (f"lmms_eval{place}" for place in below)}
    instance = type("Instance", (types.SimpleNamespace,), {"args": property(lambda self: self.arguments)})
    record = dataclasses.make_dataclass
    for place, name, stand_in in (
        ("api.model", "lmms", StandInModel),
        ("api.instance", "Instance", instance),
        ("api.instance", "TokenCounts", record("TokenCounts", ["output_tokens"])),
        ("api.instance", "GenerationResult", record("GenerationResult", ["text", "token_counts"])),
        ("models.registry_v2", "ModelManifest", record("ModelManifest", ["model_id", "chat_class_path"])),
    ):
        setattr(modules[f"lmms_eval.{place}"], name, stand_in)
    with patch.dict(sys.modules, modules):
        yield importlib.import_module("videor1.evaluation.lmms_eval.model").VideoR1


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", numbered_frames(40, 32, 32), rate=10)


Make = Callable[..., Any]


@pytest.fixture
def make(model_class: type, assets: Assets) -> Make:
    common = {"pretrained": str(assets.model), "max_pixels": 3136, "workers": 0, "device": "cpu"}
    return lambda **options: model_class(**common, **options)


@pytest.fixture
def engine(model_class: type, monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    installed = install_oracle(monkeypatch, sys.modules[model_class.__module__])
    installed.say = staticmethod(lambda *_: "<think>so</think><answer>B</answer>")
    return installed


def requests(model: Any, contents: list[Any], **given: Any) -> list[Any]:
    """Generation requests as lmms-eval makes them of documents, here a document's content itself."""
    instance = sys.modules["lmms_eval.api.instance"].Instance
    model.task_dict = {"toy": {"test": contents}}

    def request(number: int) -> Any:
        options = {"max_new_tokens": 16, "temperature": 0} | given
        arguments = ("context", lambda content: [{"role": "user", "content": content}], options, number, "toy", "test")
        about = {"task": "toy", "doc_id": number, "repeats": 1}
        return instance(request_type="generate_until", arguments=arguments, idx=0, metadata=about)

    return [request(number) for number in range(len(contents))]


def ask(model: Any, contents: list[Any], **given: Any) -> list[str]:
    """The texts that answer these documents."""
    return [result.text for result in model.generate_until(requests(model, contents, **given))]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def clip(path: Path, **window: float) -> dict[str, Any]:
    return {"type": "video", "url": str(path)} | window


def image(source: Any) -> dict[str, Any]:
    return {"type": "image", "url": source}


def prompt_text(model: Any, request: Request) -> str:
    ids = request.prompt.input_ids
    kept = ids[(ids != model.model.special.video_pad) & (ids != model.model.special.image_pad)]
    return model.model.tokenizer.decode(kept)


def test_a_qwen3_vl(model_class: type, qwen3_assets: Assets, engine: type[Oracle], video: Path) -> None:
    """A video's times are text between its patches, wherever it stands in the prompt."""
    model = model_class(pretrained=str(qwen3_assets.model), max_pixels=4096, workers=0, device="cpu", fps=1.25)
    image_pads, contents = Image.new("L", (40, 40)), [[clip(video), text("Which?")], [text("Say:"), clip(video)]]
    assert ask(model, [*contents, [image(image_pads), text("What?")]]) == ["B"] * 3
    for request in engine.requests[:2]:
        media, special = request.prompt.media, model.model.special
        assert media is not None
        assert media.grid_thw[0] == 3  # of 5 frames
        shown = prompt_text(model, request)
        assert re.findall(r"<(\d+\.\d) seconds><\|vision_start\|><\|vision_end\|>", shown) == ["0.5", "2.5", "3.9"]
        assert int((request.prompt.input_ids == special.video_pad).sum()) == num_media_tokens(media.grid_thw)


def test_answers_come_back_in_order(make: Make, engine: type[Oracle], video: Path, tmp_path: Path) -> None:
    model, picture, told = make(), tmp_path / "picture.png", manifest()
    assert (told.model_id, told.chat_class_path) == ("videor1", f"{type(model).__module__}.{type(model).__qualname__}")
    assert model.is_simple is False  # else lmms-eval refuses a chat class
    Image.new("RGB", (64, 32), "red").save(picture)
    contents = [
        [clip(video), text("Which?\nA. one\nB. two")],
        [image(Image.new("L", (40, 40))), text("What?")],
        [text("2 + 2?")],
        [image(str(picture)), text("And this?")],
        [clip(video, start_time=1.0, end_time=2.0), text("Here?")],
    ]
    results = model.generate_until(requests(model, contents))
    assert [result.text for result in results] == 5 * ["B"]  # the answer tag's text
    assert [result.token_counts.output_tokens for result in results] == 5 * [7]
    prompts = [request.prompt for request in engine.requests]
    assert [prompt.media and prompt.media.kind for prompt in prompts] == ["video", "image", None, "image", "video"]
    pads = torch.tensor([model.model.special.video_pad, model.model.special.image_pad])
    for prompt in prompts:
        T, h, w = prompt.media.grid_thw if prompt.media else (0, 0, 0)
        assert int(torch.isin(prompt.input_ids, pads).sum()) == T * h * w // 4
    # 4 seconds at 2 frames a second, and the second in the window.
    assert [prompts[i].media.grid_thw[0] for i in (0, 4)] == [4, 2]
    first = prompt_text(model, engine.requests[0])
    assert "Which?\nA. one\nB. two\nReason between <think> and </think>" in first
    assert first.endswith("<|im_start|>assistant\n")
    # Thinking is an option.
    engine.requests.clear()
    engine.made.clear()
    model.think = False
    assert ask(model, contents[:1], until=["</think>"], max_new_tokens=9) == ["<think>so"]  # as it came, up to the stop
    assert "Reason between" not in prompt_text(model, engine.requests[0])
    model.think = True
    ask(model, contents[2:3], max_new_tokens=None)
    assert [options for options, _ in engine.made] == [SamplingOptions(9, 0.0), SamplingOptions(1024, 0.0)]
    engine.say = staticmethod(lambda *_: "no tags")
    assert ask(model, contents[2:3]) == ["no tags"]
    # What the chat template opened belongs to the answer, and is not given back as written.
    model.model.opened_text = "<think></think><answer>"
    engine.say = staticmethod(lambda *_: "B</answer>")
    assert ask(model, contents[2:3]) == ["B"]
    model.think = False
    assert ask(model, contents[2:3]) == ["B</answer>"]


def test_sampling_options_and_shuffled_frames(
    make: Make, engine: type[Oracle], caplog: pytest.LogCaptureFixture, video: Path
) -> None:
    model = make(max_new_tokens=5)
    mixed = requests(model, [[text("a")], [text("b")], [text("c")]])
    mixed[1].arguments[2].update({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "do_sample": True})
    with caplog.at_level(logging.WARNING):
        model.generate_until(mixed)
        ask(model, [[text("a")]], do_sample=False, temperature=0.7, repetition_penalty=1.1)
    greedy = SamplingOptions(5, 0.0)
    assert [options for options, _ in engine.made] == [greedy, SamplingOptions(5, 0.7, 0.9, 20), greedy]
    assert [request.ordered.names[2] for request in engine.requests] == [0, 2, 1, 0]
    assert "not used: repetition_penalty" in caplog.text
    with pytest.raises(ConfigError, match="num_beams"):
        ask(model, [[text("a")]], num_beams=4)
    # Repeated requests draw anew.
    engine.requests.clear()
    model.generate_until(2 * requests(model, [[text("a")]]))
    assert [asked.ordered.names for asked in engine.requests] == [("lmms-eval", "toy", 0, i) for i in range(2)]
    # Shuffled frames.
    engine.requests.clear()
    model, contents = make(), [[clip(video), text("Which?")], [text("2 + 2?")]]
    for shuffle in (False, True, True):
        model.shuffle = shuffle
        ask(model, contents)
    a, _, b, none, c, _ = (request.ordered for request in engine.requests)
    assert a.permutation is none.permutation is None
    assert sorted(b.permutation) == list(range(8))
    assert b.permutation == c.permutation
    assert not torch.equal(a.features, b.features)


def test_a_bad_video_is_counted(make: Make, engine: type[Oracle], video: Path, tmp_path: Path, caplog: Any) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    contents = [[clip(bad), text("a")], [clip(video), text("b")], [clip(tmp_path / "none.mp4"), text("c")]]
    with caplog.at_level(logging.WARNING):
        assert ask(make(max_prompt_length=400), [*contents, [text("d " * 500)]]) == ["", "B", "", ""]
    kinds = "(missing_file 1, not_video 1, too_long 1)"
    assert f"3 of 4 requests could not be read {kinds} and count as wrong" in caplog.text
    assert str(bad) in caplog.text
    assert "the limit is 400: raise it, or lower max_pixels, image_max_pixels or max_frames" in caplog.text


def test_what_it_cannot_take(make: Make, engine: type[Oracle], video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(shuffle=True)
    for content, message in (
        ([image("a.png"), image("b.png"), text("x")], r"got \['image', 'image'\]"),
        ([{"type": "audio", "url": "a.wav"}, text("x")], r"got \['audio'\]"),
        ([{"type": "video", "url": [1, 2]}, text("x")], "expected the path of a video, got list"),
    ):
        with pytest.raises(ConfigError, match=f"task toy: .*{message}"):
            ask(model, [content])
    # Text that reads as media is not asked.
    assert ask(model, [[clip(video), text("<|video_pad|>")], [text("<|image_pad|>")]]) == ["", ""]
    assert not engine.requests
    with pytest.raises(NotImplementedError, match="log-likelihoods"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several"):
        model.generate_until_multi_round([])
    with pytest.raises(ConfigError, match="batch_size: expected a whole number, got 'auto'"):
        make(batch_size="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        make()


def test_the_models_own_answers(make: Make, video: Path) -> None:
    """Greedy, from the real sampler: the same alone and among others, and as the trainer's prompt would have it."""
    model = make(max_new_tokens=6, think=False)
    contents = [[clip(video), text("Which?")], [text("2 + 2?")], [clip(video), text("Where?")]]
    together = ask(model, contents)
    assert len(set(together)) > 1
    for number, content in enumerate(contents):
        alone = requests(model, contents)[number]
        assert model.generate_until([alone])[0].text == together[number], content
    model.batch_size = 2
    assert ask(model, contents) == together


@pytest.mark.skipif(not REAL, reason="lmms-eval is not installed (it wants av < 16)")
def test_lmms_evals_own_evaluator_runs_it(assets: Assets, video: Path, tmp_path: Path) -> None:
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
