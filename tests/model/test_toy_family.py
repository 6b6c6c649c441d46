"""A family that is not there: one record and one line in the table, and all of the model runs with it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import ask
from tiny_families import family_media, family_prompt, make_qwen3, make_qwen3_tokenizer, opening
from transformers import Qwen3VLMoeConfig

from videor1.config import LoraConfig, TrainConfig
from videor1.config.files import RECIPES
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import VideoLM, load_model
from videor1.model.families import FAMILIES, family_of
from videor1.model.load import check_processor
from videor1.plan.plan import plan
from videor1.rollout import LocalEngine, SamplingOptions, make_engine
from videor1.training.passes import completion_logp, pack

# A Qwen3-VL whose videos bring their number instead of their times, without deepstack, and adapters on two layers.
TOY = dataclasses.replace(
    FAMILIES["qwen3_vl"],
    model_type="toy_vl",
    name="Toy-VL",
    video_text=lambda media, place: "".join(f"frame {number}: {place}" for number in range(media.grid_thw[0])),
    features=lambda output: output.pooler_output,
    layer_inputs=lambda further, at: {},
    lora_targets=("q_proj", "down_proj"),
    server_video=None,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> VideoLM:
    monkeypatch.setitem(FAMILIES, "toy_vl", TOY)
    hf: Any = make_qwen3()
    hf.config.model_type = "toy_vl"
    return VideoLM(hf, make_qwen3_tokenizer(), source="toy")


def test_one_record_and_one_line(toy: VideoLM) -> None:
    media = dataclasses.replace(family_media("qwen3_vl", grid=(3, 4, 4)), times=())
    prompt = family_prompt(toy, media)
    text = toy.tokenizer.decode(prompt.input_ids)
    assert [text.count(f"frame {number}: <|vision_start|>") for number in range(4)] == [1, 1, 1, 0]
    assert toy.positions(prompt)[0].shape == (3, len(prompt.input_ids))
    rollout = LocalEngine(toy, SamplingOptions(8)).generate([ask(toy, prompt, 3)])
    (group,) = rollout.groups
    assert group is not None
    with toy.inference():
        logp = completion_logp(toy, pack(toy, [prompt], [[c.token_ids for c in group.ordered]]))
    assert (torch.cat([c.logp for c in group.ordered]) - logp).abs().max() <= 1e-5
    assert toy.vision_features([media])[0].shape == (3 * 4, 64)
    toy.add_lora(LoraConfig(rank=2), 0)
    adapted = {name.split(".")[-4] for name in toy.trainable()}
    assert adapted == {"q_proj", "down_proj"}
    with pytest.raises(ConfigError, match=r"rollout.engine: server: not with Toy-VL yet"):
        make_engine(TrainConfig(rollout=dataclasses.replace(TrainConfig().rollout, engine="server")), toy, Path())


@pytest.mark.parametrize("opened", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_it_may_open_its_answers(opened: str, toy: VideoLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what its record lists; a completion holds what the model writes, up to as many tokens as are asked for."""
    tokenizer = opening(make_qwen3_tokenizer(), opened)
    monkeypatch.setitem(FAMILIES, "toy_vl", dataclasses.replace(TOY, opened=("<I>",)))
    with pytest.raises(
        ConfigError, match=r"template of toy opens an answer .* expected of a Toy-VL model: nothing, '<I>"
    ):
        VideoLM(toy.hf, tokenizer, source="toy")
    monkeypatch.setitem(FAMILIES, "toy_vl", dataclasses.replace(TOY, opened=("<I>", opened)))
    model = VideoLM(toy.hf, tokenizer, source="toy")
    assert (model.opened_text, toy.opened_text) == (opened, "")
    prompt, plain = family_prompt(model, None), family_prompt(toy, None)
    assert tokenizer.decode(prompt.input_ids) == tokenizer.decode(plain.input_ids) + opened
    (group,) = LocalEngine(model, SamplingOptions(8)).generate([ask(model, prompt, 3)]).groups
    assert group is not None
    for completion in group.ordered:
        assert completion.finished or len(completion.token_ids) == 8
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_no_family() -> None:
    known = r"expected one of qwen2_vl \(Qwen2-VL\), qwen2_5_vl \(Qwen2.5-VL\), qwen3_vl \(Qwen3-VL\)"
    for given in ("toy_vl", None):
        with pytest.raises(ConfigError, match=f"'somewhere' is a model of type {given!r}, {known}"):
            family_of(given, "somewhere")


def test_experts_are_refused_with_what_is_missing(assets: Assets, tmp_path: Path) -> None:
    """A Qwen3-VL with experts is not loaded, planned or trained in half."""
    Qwen3VLMoeConfig().save_pretrained(tmp_path)
    config = TrainConfig(model_name_or_path=str(tmp_path), device="cpu")
    missing = "type 'qwen3_vl_moe', refused: its experts are fused tensors, which adapters do not reach"
    for load in (load_model, plan):
        with pytest.raises(ConfigError, match=missing):
            load(config)


@pytest.mark.parametrize("model_type", ["qwen3", "no_such_type"])
def test_a_folder_of_another_type(model_type: str, assets: Assets, tmp_path: Path) -> None:
    """Whether transformers knows it or not."""
    shutil.copytree(assets.model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": model_type}))
    with pytest.raises(ConfigError, match=f"is a model of type '{model_type}', expected one of qwen2_vl"):
        load_model(TrainConfig(model_name_or_path=str(tmp_path / "model"), device="cpu"))


def test_processor_files_of_another_family(assets: Assets, tmp_path: Path) -> None:
    check_processor(str(assets.model), FAMILIES["qwen2_5_vl"])
    with pytest.raises(ConfigError, match=r"preprocessor_config.json of .* says patch_size 14, expected 16"):
        check_processor(str(assets.model), FAMILIES["qwen3_vl"])
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ConfigError, match=r"says image_mean \[0.5, 0.5, 0.5\], expected \[0.48"):
        check_processor(str(tmp_path), FAMILIES["qwen2_5_vl"])
    (tmp_path / "preprocessor_config.json").unlink()
    parts = {"image_processor": {"patch_size": 14}, "video_processor": {"patch_size": 16}, "processor_class": "any"}
    (tmp_path / "processor_config.json").write_text(json.dumps(parts))
    with pytest.raises(ConfigError, match=r"processor_config.json of .* says patch_size 16, expected 14"):
        check_processor(str(tmp_path), FAMILIES["qwen2_5_vl"])
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"preprocessor_config.json of .* is no JSON"):
        check_processor(str(tmp_path), FAMILIES["qwen2_5_vl"])


def test_recipes_are_there() -> None:
    for family in FAMILIES.values():
        for name in family.recipes:
            assert (RECIPES / f"{name}.yaml").is_file(), name


def test_no_other_file_asks_for_a_models_type() -> None:
    root = Path(__file__).parents[2]
    asking = re.compile(r"model_type\s*(==|!=|in\b)")
    found = {str(p.relative_to(root)) for p in (root / "videor1").rglob("*.py") if asking.search(p.read_text("utf-8"))}
    assert found == set()
