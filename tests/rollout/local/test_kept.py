"""What an engine keeps between calls is never stale: whatever changed, it answers as a fresh one does."""

from typing import Any

import torch
from rollouts import IMAGE, TEXT, VIDEO, ask, tokens
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


def test_new_weights_are_taken_without_a_new_capture(graphed: list[str]) -> None:
    """Until they are in other memory, or what was kept is given back."""
    model = fresh_model()
    engine, requests = LocalEngine(model, OPTIONS, keep_cache=True, backend="triton"), [ask(model, TEXT, 2)]
    check(engine, model, requests)
    graphed.clear()
    for name in ["q_proj", "down_proj", "input_layernorm", "embed_tokens"]:
        shift(model, name, 0.3)
    check(engine, model, requests)
    moved = model.hf.model.language_model.layers[0]
    moved.mlp.up_proj.weight.data = -2 * moved.mlp.up_proj.weight.data
    moved.self_attn.v_proj.weight = torch.nn.Parameter(2 * moved.self_attn.v_proj.weight.detach())
    check(engine, model, [ask(model, TEXT, 2, seed=5)])
    assert not graphed, "what was captured is replayed"
    moved.input_layernorm.weight = torch.nn.Parameter(2 * moved.input_layernorm.weight.detach())
    check(engine, model, requests)
    assert graphed == CAPTURE
    engine.close()
    check(engine, model, requests)
    assert graphed == CAPTURE * 2


def scaled(model: VideoLM, by: float) -> None:
    for module in model.hf.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= by


def test_nothing_stale_is_replayed(graphed: list[str]) -> None:
    """Whatever changes between two calls, the answers are those of an engine that was just made, bit for bit."""
    model = fresh_model(lora=True)
    small, large = [ask(model, TEXT, 2)], [ask(model, VIDEO, 3), ask(model, IMAGE, 1)]
    engine = LocalEngine(model, SamplingOptions(2, top_p=0.9), keep_cache=True, backend="triton")

    def same(requests: list[Any], replayed: bool) -> list[list[float]]:
        graphed.clear()
        ours = answers(engine.generate(requests))
        assert replayed == (not graphed)
        fresh = LocalEngine(model, engine.options, cuda_graphs=False, backend="triton").generate(requests)
        assert tokens(ours) == tokens(answers(fresh))
        pairs = zip((c for g in ours for c in g), (c for g in answers(fresh) for c in g), strict=True)
        assert all(torch.equal(one.logp, other.logp) for one, other in pairs)
        return [c.logp.tolist() for group in ours for c in group]

    seen = [same(small, False)]
    for names in (["lora_"], ["base_layer.weight", "base_layer.bias"], ["norm", "embed_tokens"]):
        for name in names:
            shift(model, name, 0.2)
        seen.append(same(small, True))
    scaled(model, -2.0)
    seen.append(same(small, True))
    with model.peft.disable_adapter():
        seen.append(same(small, False))
        assert same(small, True) == seen[-1]
    assert same(small, False) == seen[-2]
    for options in (SamplingOptions(2, temperature=0.7, top_k=9), SamplingOptions(3)):
        engine.options = options
        seen.append(same(small, False))
    same(large, False)  # in a larger cache, with a larger batch
    same([ask(model, TEXT, 4)], True)  # in a part of that
    assert len({str(logp) for logp in seen}) == len(seen), "each change changes the answers"


def test_sizes_that_grow_and_shrink(graphed: list[str]) -> None:
    """A larger batch, a longer prompt; then what fits is replayed in the larger memory."""
    model = fresh_model()
    engine = LocalEngine(model, OPTIONS, keep_cache=True, backend="triton")
    small, large = [ask(model, TEXT, 1)], [ask(model, VIDEO, 2), ask(model, IMAGE, 1)]
    for requests in (small, large, small):
        check(engine, model, requests)
    assert graphed == CAPTURE * 3  # for 1; for 4, in a larger cache; for 1 in that


def test_nothing_is_kept_unless_it_is_asked_for(graphed: list[str]) -> None:
    model = fresh_model()
    for keep in ("auto", False):  # auto: on a GPU, where there is room
        engine = LocalEngine(model, OPTIONS, keep_cache=keep, backend="triton")
        engine.generate([ask(model, TEXT, 1)])
        assert engine.kept is None
