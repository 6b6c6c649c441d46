"""T-GRPO and SFT of a tiny Qwen3-VL and Qwen3.5 on the demonstration's data, to checkpoints that transformers loads."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from media import numbered_frames, write_video
from PIL import Image
from runs import last_metrics, run_lines, sft_trainer, trainer
from tiny_families import HYBRIDS, family_inputs, make_qwen3, make_qwen3_5
from transformers import AutoModelForImageTextToText, AutoTokenizer

from videor1.data.samples import load_samples
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import load_model
from videor1.model.prompts import build_input_ids
from videor1.training.passes import completion_logp, pack
from videor1.types import Prompt
from videor1.video.media import load_media

PIXELS: dict[str, Any] = dict.fromkeys(("video.max_pixels", "video.image_max_pixels"), 64 * 64)
PIXELS |= {"video.min_pixels": 2048, "video.image_min_pixels": 1024}
PROCESSOR = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor"}


def make_folder(family: str, assets: Assets, path: Path) -> Path:
    """A model folder as on the hub, with the demonstration's tokenizer, which has <think> and <answer> as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    hybrid = next(iter(HYBRIDS))
    model = make_qwen3_5(hybrid, tokenizer=tokenizer) if family == "qwen3_5" else make_qwen3(tokenizer=tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (path / name).write_text(json.dumps(PROCESSOR))
    return path


@pytest.fixture(scope="module")
def folder(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("qwen3_vl", assets, tmp_path_factory.mktemp("qwen3") / "model")


@pytest.fixture(scope="module")
def hybrid(family_assets: Callable[[str], Assets], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the template of its demonstration, which opens <think>."""
    return make_folder("qwen3_5", family_assets("qwen3_5"), tmp_path_factory.mktemp("qwen3_5") / "model")


OPTIONS = (
    {"lora.rank": 0, "beta": 0.04},
    {"lora.rank": 4, "temporal.shuffle_unit": "temporal_patch"},
    {"lora.rank": 0, "freeze_vision": True, "gradient_checkpointing": True},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["folder", "hybrid"])
def test_tgrpo(
    options: dict[str, Any], family: str, assets: Assets, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(family)
    run = trainer(assets, tmp_path, model_name_or_path=folder, max_steps=2, **PIXELS, **options)
    before = {name: p.detach().clone() for name, p in run.model.trainable().items()}
    tower = {name for name in before if "visual" in name}
    whole = not options["lora.rank"] and "beta" in options
    assert any("deepstack_merger_list" in name for name in tower) == (whole and family == "folder")
    if family == "hybrid":
        parts = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
        assert all(any(f"linear_attn.{part}" in name for name in before) for part in parts)
    assert bool(tower) == any("merger" in name for name in tower)
    frozen = {name: p.detach().clone() for name, p in run.model.hf.named_parameters() if not p.requires_grad}
    checkpoint = run.train()
    assert last_metrics(tmp_path)["step"] == 2
    changed = [name for name, p in run.model.trainable().items() if not torch.equal(p, before[name])]
    assert len(changed) > len(before) / 2
    assert all(torch.equal(p, frozen[name]) for name, p in run.model.hf.named_parameters() if name in frozen)
    assert any("<0.2 seconds>" in json.dumps(line) for line in run_lines(tmp_path, "rollouts.jsonl"))
    model, report = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    sample = load_samples(assets.train).samples[0]
    media = load_media(sample, run.config.video, rules=run.model.family.frames)
    ids = build_input_ids(run.model.tokenizer, sample, media, max_prompt_length=4096, family=run.model.family)
    prompt, answer = Prompt(sample, ids, media, 0), torch.arange(20, 30)
    with run.model.inference():
        live = completion_logp(run.model, pack(run.model, [prompt], [[answer]]))
    with torch.no_grad():
        logits = model.eval()(**family_inputs(run.model, prompt, answer)).logits[0, -len(answer) - 1 : -1]
    torch.testing.assert_close(logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0], live, rtol=0, atol=2e-5)
    again = load_model(trainer(assets, tmp_path / "again", model_name_or_path=checkpoint, **PIXELS).config)
    assert again.family is run.model.family


@pytest.mark.parametrize("family", ["folder", "hybrid"])
def test_sft(family: str, assets: Assets, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    run = sft_trainer(assets, tmp_path, model_name_or_path=folder, max_steps=2, **PIXELS)
    run.train()
    assert last_metrics(tmp_path)["step"] == 2


ODD: dict[str, tuple[str, str | None, tuple[int, ...]]] = {  # name: (kind, what it is skipped for, frames and sides)
    "one frame": ("video", "too_few_frames", (1, 64, 64)),
    "three frames": ("video", None, (3, 64, 64)),
    "smaller than a block": ("video", None, (5, 16, 16)),
    "wide": ("video", None, (6, 16, 1600)),
    "thin": ("image", None, (10, 1900)),
    "too thin": ("image", "aspect_ratio", (10, 2200)),
    "a pixel": ("image", None, (1, 1)),
    "text": ("text", None, ()),
}


@pytest.mark.parametrize("names", [list(ODD), ["text"]], ids=["mixed", "text alone"])
def test_odd_media(names: list[str], folder: Path, assets: Assets, tmp_path: Path) -> None:
    """In one batch; what cannot be is skipped and counted by its kind."""
    rows = []
    for number, name in enumerate(names):
        kind, _, size = ODD[name]
        path = tmp_path / (f"{name}.mp4" if kind == "video" else f"{name}.png")
        if kind == "video":
            write_video(path, numbered_frames(*size), rate=4)
        elif kind == "image":
            Image.new("RGB", size[::-1], (200, 30, 30)).save(path)
        row = {"problem_id": number, "problem": "What comes first?", "data_type": kind, "problem_type": "free-form"}
        rows.append(row | {"solution": "<answer>red</answer>"} | ({"path": path.name} if size else {}))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    skipped = [kind for kind in (ODD[name][1] for name in names) if kind]
    run = trainer(
        assets,
        tmp_path / "run",
        model_name_or_path=folder,
        dataset_name=tmp_path / "data.json",
        max_steps=1,
        per_device_train_batch_size=len(names) - len(skipped),
        **PIXELS,
    )
    run.train()
    lines = run_lines(tmp_path / "run", "skipped.jsonl") if skipped else []
    assert sorted(line["kind"] for line in lines) == sorted(skipped)
    last = last_metrics(tmp_path / "run")
    assert (last["step"], math.isfinite(last["loss"])) == (1, True)
    assert {row["problem_id"] for row in run_lines(tmp_path / "run", "rollouts.jsonl")} == {
        str(number) for number, name in enumerate(names) if not ODD[name][1]
    }


def test_a_template_that_opens_what_no_qwen3_vl_knows_is_not_trained_with(
    folder: Path, assets: Assets, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template += "{{ '<think>\\n\\n</think>' if add_generation_prompt }}"
    tokenizer.save_pretrained(model)
    trainer(assets, tmp_path / "plain", model_name_or_path=folder, **PIXELS)
    for make in (trainer, sft_trainer):
        with pytest.raises(
            ConfigError, match=r"opens an answer with '<think>.*expected of a Qwen3-VL model: nothing, '<think>"
        ):
            make(assets, tmp_path / make.__name__, model_name_or_path=model, **PIXELS)


def test_a_video_over_the_budget_is_skipped_and_counted(folder: Path, assets: Assets, tmp_path: Path) -> None:
    """Never cut: what is left to train on are images."""
    options = PIXELS | {"video.total_pixels": 1024, "video.min_pixels": 1024}
    run = trainer(assets, tmp_path, model_name_or_path=folder, max_steps=2, **options)
    run.train()
    lines = run_lines(tmp_path, "skipped.jsonl")
    assert {line["kind"] for line in lines} == {"over_budget"}
    assert all("the limit is 1024: raise video.total_pixels" in line["message"] for line in lines)
    assert last_metrics(tmp_path)["data/skipped/over_budget"] == len(lines) > 0
