"""Checkpoints are plain Hugging Face folders: transformers loads them unmodified and gives the same logits."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import trainer, weights
from spies import spy, wrap
from tiny import hf_inputs
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from videor1.config import LoraConfig, TrainConfig
from videor1.data import load_samples
from videor1.demo.assets import Assets
from videor1.model import VideoLM, load_model
from videor1.model.prompts import build_input_ids
from videor1.model.save import base_digest, save_model
from videor1.training.checkpoint import CheckpointError, checkpoints, find_resume, save
from videor1.training.optim import make_optimizer
from videor1.training.passes import completion_logp, pack
from videor1.training.tgrpo import Trainer
from videor1.types import Prompt
from videor1.video.media import load_media

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora__rank": 4, "lora__dropout": 0.2, "learning_rate": 1e-2},
    "bf16": {"bf16": True},
    "frozen": {"freeze_vision": True},
    "lora, bf16": {"lora__rank": 4, "bf16": True},
}
Trained = Callable[[str], tuple[Trainer, Path]]


@pytest.fixture(scope="module")
def trained(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Ended runs and their last checkpoints; read only."""
    made: dict[str, tuple[Trainer, Path]] = {}

    def train(variant: str) -> tuple[Trainer, Path]:
        if variant not in made:
            run = trainer(assets, tmp_path_factory.mktemp("run"), max_steps=3, **VARIANTS[variant])
            made[variant] = run, run.train()
        return made[variant]

    return train


def load_plain(folder: Path, dtype: torch.dtype | str = torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.mark.parametrize("variant", ["full", "lora", "bf16", "frozen"])
def test_transformers_loads_it_with_the_same_logits(variant: str, assets: Assets, trained: Trained) -> None:
    run, final = trained(variant)
    assert weights(final).keys() == weights(assets.model).keys()
    sample = load_samples(assets.train).samples[0]
    assert sample.data_type == "video"
    media = load_media(sample, TrainConfig().video)
    ids = build_input_ids(run.model.tokenizer, sample, media, max_prompt_length=4096)
    prompt, answer = Prompt(sample, ids, media, 0), torch.arange(20, 44)
    with run.model.inference():
        live = completion_logp(run.model, pack(run.model, [prompt], [[answer]]))

    def plain(folder: Path) -> Tensor:
        with torch.no_grad():
            logits = load_plain(folder)(**hf_inputs(run.model, prompt, answer)).logits[0, -len(answer) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]

    # bf16: the live model computes in bf16 from fp32 weights, the checkpoint holds their bf16 rounding.
    tolerance = 0.15 if variant == "bf16" else 2e-5
    torch.testing.assert_close(plain(final), live, rtol=0, atol=tolerance)
    assert (plain(assets.model) - live).abs().max() > 0.2  # so that the comparison means something


def test_names_on_disk_are_those_of_the_hub(assets: Assets, trained: Trained) -> None:
    """Qwen2.5-VL's own files, and vLLM, know visual.* and model.layers.*; a tied head is not stored."""
    _, final = trained("full")
    names = weights(final).keys()
    assert {name.split(".")[0] for name in names} == {"visual", "model"}
    assert {name.split(".")[1] for name in names if name.startswith("model.")} == {"embed_tokens", "layers", "norm"}
    config = json.loads((final / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl"
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    original = json.loads((assets.model / "config.json").read_text())
    for part in (config, original, *(c[name] for c in (config, original) for name in ("text_config", "vision_config"))):
        part.pop("dtype", None)
        part.pop("transformers_version", None)
    assert config.pop("videor1_positions") == "paper"  # all that is ours
    assert config == original
    _, final = trained("lora")
    ours, theirs = AutoTokenizer.from_pretrained(final), AutoTokenizer.from_pretrained(assets.model)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template != ""
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (final / name).read_bytes() == (assets.model / name).read_bytes()
    generation, original_generation = map(GenerationConfig.from_pretrained, (final, assets.model))
    assert generation.eos_token_id == original_generation.eos_token_id
    assert not list(final.glob("adapter*"))


def test_bf16_weights_are_the_rounded_masters(trained: Trained) -> None:
    """And nothing of it is pickled."""
    run, final = trained("bf16")
    assert all(p.dtype == torch.float32 for p in run.model.trainable().values())
    config = json.loads((final / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert load_plain(final, "auto").dtype == torch.bfloat16
    for name, parameter in load_plain(final, torch.bfloat16).named_parameters():
        assert torch.equal(parameter, run.model.hf.get_parameter(name).to(torch.bfloat16)), name
    assert {path.suffix for path in final.rglob("*") if path.is_file()} == {".json", ".safetensors", ".jinja"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_plain(final)


def test_saving_leaves_the_live_model_alone(trained: Trained, tmp_path: Path) -> None:
    model = trained("lora, bf16")[0].model
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    dtype = model.hf.config.dtype
    save_model(model, tmp_path / "again")
    after = model.hf.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.hf.config.dtype == dtype
    assert model.hf.training


def load_demo(folder: Path) -> VideoLM:
    return load_model(TrainConfig(model_name_or_path=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def model(assets: Assets) -> VideoLM:
    """Read only."""
    return load_demo(assets.model)


def test_oldest_are_deleted_and_leftovers_cleaned(model: VideoLM, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".partial-step-7", ".partial-old-step-3"):  # of runs killed while saving and while deleting
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half")
    (folder / "notes").mkdir()
    for step in (2, 9, 10, 100):
        assert save(tmp_path, step, model, None, {}, keep=2).is_dir()
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 100]
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "step-10", "step-100"]
    assert find_resume("auto", tmp_path) == folder / "step-100"
    save(tmp_path, 101, model, None, {}, keep=None)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 100, 101]


def test_the_same_step_again_replaces_it(model: VideoLM, tmp_path: Path) -> None:
    first = save(tmp_path, 4, model, None, {})
    (first / "stray").write_text("")
    second = save(tmp_path, 4, model, make_optimizer(model.trainable(), TrainConfig()), {"position": 1})
    assert second == first
    assert not (first / "stray").exists()
    assert json.loads((first / "trainer" / "state.json").read_text()) == {"position": 1, "step": 4}
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="step-4 could not be written"):
        save(tmp_path, 4, model, None, {})


def test_the_digest_does_not_tell_folders_or_adapters_apart(assets: Assets, tmp_path: Path) -> None:
    model = load_demo(assets.model)
    digest = base_digest(model)
    save_model(model, tmp_path / "moved")
    moved = load_demo(tmp_path / "moved")
    assert base_digest(moved) == digest
    moved.add_lora(LoraConfig(rank=2), seed=0)
    assert base_digest(moved) == digest


def test_files_are_flushed_before_they_get_their_name_and_as_readable_as_others(
    model: VideoLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = lambda _, descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: E731
    flushed = spy(monkeypatch, os, "fsync", name)

    def renamed(rename: Any, source: Path, target: Path) -> None:
        names = {path.name for path in Path(source).rglob("*") if path.is_file()}
        assert names <= set(flushed)
        assert "checkpoints" not in flushed
        rename(source, target)

    (tmp_path / "beside").touch()
    wrap(monkeypatch, os, "replace", renamed)
    folder = save(tmp_path, 1, model, make_optimizer(model.trainable(), TrainConfig()), {})
    assert flushed[-1] == "checkpoints"
    for path in folder.rglob("*"):
        assert path.is_dir() or path.stat().st_mode == (tmp_path / "beside").stat().st_mode, path


def test_a_kill_between_the_two_renames_loses_nothing(
    model: VideoLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(save(tmp_path, 1, model, None, {})).keys()

    def killed(rename: Any, source: Path, target: Path) -> None:
        if Path(target).name == "step-1":
            raise KeyboardInterrupt  # stands for the kill: the new checkpoint does not get its name
        rename(source, target)

    with monkeypatch.context() as patch:
        wrap(patch, os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, model, None, {})
    assert checkpoints(tmp_path) == []
    assert find_resume("auto", tmp_path) == tmp_path / "checkpoints" / "step-1"
    assert weights(tmp_path / "checkpoints" / "step-1").keys() == whole
