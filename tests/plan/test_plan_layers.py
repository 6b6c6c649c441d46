"""How many layers recompute, chosen from the free memory of a GPU: the line between two plans, and what is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2_5_VLConfig

from videor1.config import TrainConfig
from videor1.config.cli import parse
from videor1.plan.layers import MARGIN, LayerPlans, choose_layers
from videor1.plan.plan import GIB, count_parameters, plan
from videor1.plan.setup import Target, build_policy, shape_of
from videor1.train import main as train

LAYERS = 5
FLAGS = ["--max_completion_length", "96", "--video.max_frames", "2", "--video.max_pixels", "12544"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Activations take most of the memory. Where the options name no device, a plan is of a GPU."""
    folder = tmp_path_factory.mktemp("shape")
    text: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 1024}
    text |= {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 128}
    Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]}).save_pretrained(folder)
    flags = ["--model_name_or_path", str(folder), "--gradient_checkpointing", "--rollout.keep_cache", "false", *FLAGS]
    return parse(TrainConfig, flags, prog="plan", description="")


@pytest.fixture(scope="module")
def plans(config: TrainConfig) -> LayerPlans:
    return LayerPlans.of(config)


def test_the_line_lies_nowhere_below_the_plan(config: TrainConfig, plans: LayerPlans) -> None:
    """And above it by less than the activations of a layer."""
    layer = (plans.total(0) - plans.total(LAYERS)) / LAYERS
    assert layer > 0.05 * plans.none.peak
    for n in range(LAYERS + 1):
        real = plan(dataclasses.replace(config, checkpoint_layers=n)).total
        assert real <= plans.total(n) <= real + layer * (0 < n < LAYERS)


def test_as_few_layers_recompute_as_memory_needs(config: TrainConfig, plans: LayerPlans) -> None:
    needs = [plans.total(n) / (1 - MARGIN) for n in range(LAYERS + 1)]
    assert needs == sorted(needs, reverse=True)
    for n, need in enumerate(needs):
        assert plans.choose(int(need) + 1) == needs.index(need)
        assert plans.choose(int(need) - 1) == min(n + 1, LAYERS)
    assert plans.choose(0) == LAYERS
    layers, why = choose_layers(config, int(needs[2]) + 1)
    assert layers == 2
    for words in (f"2 of {LAYERS} layers", f"{plans.total(2) / GIB:.1f} GiB", "less 10%", "one layer fewer would take"):
        assert words in why
    assert "fewer" not in choose_layers(config, 2 * int(needs[0]))[1]


@pytest.mark.parametrize("demo", [None, "qwen3_vl", "qwen3_5"])
def test_the_demonstration_that_is_planned_is_the_one_asked_for(demo: str | None) -> None:
    config = parse(TrainConfig, ["--gradient_checkpointing", *FLAGS], prog="plan", description="")
    config.demo = demo
    plans, family = LayerPlans.of(config), demo or "qwen2_5_vl"
    for made in (plans.none, plans.every):
        assert made.parameters == count_parameters(
            build_policy(shape_of(None, family), config, Target.of(config), "meta")
        )


def test_several_processes_are_planned_as_one(config: TrainConfig) -> None:
    several = dataclasses.replace(config, distributed=dataclasses.replace(config.distributed, engine="deepspeed"))
    assert choose_layers(several, 2**36) == choose_layers(config, 2**36)


def test_without_a_plan_all_layers_recompute(tmp_path: Path, config: TrainConfig) -> None:
    layers, why = choose_layers(dataclasses.replace(config, model_name_or_path=str(tmp_path)), 2**36)
    assert layers is None
    assert "all layers recompute, since their memory cannot be planned: model_name_or_path" in why


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        (["--gradient_checkpointing"], True),
        (["--gradient_checkpointing", "--checkpoint_layers", "1"], False),
        ([], False),
        (["--gradient_checkpointing", "--device", "cpu"], False),
    ],
    ids=str,
)
def test_the_plan_shows_the_choice(
    more: list[str], shown: bool, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["--plan", "--model_name_or_path", str(config.model_name_or_path), *FLAGS, *more]) == 0
    line = (
        f"Layers that recompute, of {LAYERS} (checkpoint_layers; above: all), chosen by free memory: 24 GB 0, 48 GB 0"
    )
    assert (line in capsys.readouterr().out) == shown
