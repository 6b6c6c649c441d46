"""What an engine keeps between calls is never stale: whatever changed, it answers as a fresh one does."""

from typing import Any

import pytest
import torch
from rollouts import IMAGE, TEXT, VIDEO, ask
from test_engine import answers, assert_same
from test_graph import graphed
from tiny import make_model, make_tokenizer

from videor1.config import LoraConfig
from videor1.model import VideoLM
from videor1.rollout import LocalEngine, SamplingOptions

__all__ = ["graphed"]  # the fixture
OPTIONS = SamplingOptions(3, top_p=0.9)
CAPTURE = ["warm-up", "capture"]


def fresh_model(lora: bool = False) -> VideoLM:
    model = VideoLM(make_model(num_hidden_layers=1), make_tokenizer(), source="tiny", position_rule="paper")
    if lora:
        model.add_lora(LoraConfig(rank=4, alpha=6), seed=0)
        shift(model, "lora_B", 0.2)
    return model


def shift(model: VideoLM, name: str, by: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for found, parameter in model.hf.named_parameters():
            if name in found:
                parameter += by * torch.randn(parameter.shape, generator=generator)


def check(engine: LocalEngine, model: VideoLM, requests: list[Any]) -> None:
    """The engine answers as one that has kept nothing."""
    plain = LocalEngine(model, OPTIONS, cuda_graphs=False).generate(requests)
    assert_same(answers(engine.generate(requests)), answers(plain))


@pytest.mark.parametrize("lora", [False, True])
def test_new_weights_are_taken_without_a_new_capture(lora: bool, graphed: list[str]) -> None:
    model = fresh_model(lora)
    engine, requests = LocalEngine(model, OPTIONS, keep=True, backend="triton"), [ask(model, TEXT, 2)]
    check(engine, model, requests)
    graphed.clear()
    for name in ["lora_A", "lora_B"] if lora else ["q_proj", "down_proj", "input_layernorm", "embed_tokens"]:
        shift(model, name, 0.3)
    check(engine, model, requests)
    check(engine, model, [ask(model, TEXT, 2, seed=5)])
    if lora:
        for module in model.hf.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= -2
        check(engine, model, requests)
    assert not graphed, "what was captured is replayed"
    engine.close()
    check(engine, model, requests)
    assert graphed == CAPTURE


def test_adapters_that_are_switched_and_parameters_that_move(graphed: list[str]) -> None:
    model = fresh_model(lora=True)
    engine, requests = LocalEngine(model, OPTIONS, keep=True, backend="triton"), [ask(model, TEXT, 2)]
    check(engine, model, requests)
    with model.peft.disable_adapter():
        check(engine, model, requests)
    check(engine, model, requests)
    moved = model.hf.model.language_model.layers[0].input_layernorm
    moved.weight = torch.nn.Parameter(2 * moved.weight.detach())
    check(engine, model, requests)
    moved.weight.data = 0.5 * moved.weight.data
    check(engine, model, requests)


def test_sizes_that_grow_and_shrink(graphed: list[str]) -> None:
    """A larger batch, a longer prompt; then what fits is replayed in the larger memory."""
    model = fresh_model()
    engine = LocalEngine(model, OPTIONS, keep=True, backend="triton")
    small, large = [ask(model, TEXT, 1)], [ask(model, VIDEO, 2), ask(model, IMAGE, 1)]
    for requests in (small, large, small):
        check(engine, model, requests)
    assert graphed == CAPTURE * 3  # for 1; for 4, in a larger cache; for 1 in that


def test_nothing_is_kept_unless_it_is_asked_for(graphed: list[str]) -> None:
    model = fresh_model()
    for keep in (None, False):  # None: on a GPU, where there is room
        engine = LocalEngine(model, OPTIONS, keep=keep, backend="triton")
        engine.generate([ask(model, TEXT, 1)])
        assert engine.kept is None
