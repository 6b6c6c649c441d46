"""Rollouts through linear attention: states are forked from the prompt's, stepped in place, and nobody else's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rollouts import answer, ask, rig, tokens
from test_engine import answers, assert_same, both
from test_graph import graphed  # noqa: F401  (a fixture)
from tiny_families import HYBRIDS, family_inputs, family_prompts, make_family_lm

from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.rollout import LocalEngine, Request, SamplingOptions
from videor1.rollout.local.kv_cache import Capacity, KVCache, Sizes, plan_capacity
from videor1.side_by_side import as_on_a_card
from videor1.training.passes import completion_logp, pack
from videor1_kernels import last_backend

STATE = 4 * (4 * 16 * 24 + 3 * (2 * 2 * 16 + 4 * 24))  # bytes of one layer's, of the first of HYBRIDS, in fp32


@pytest.fixture(scope="module", params=HYBRIDS)
def model(request: pytest.FixtureRequest) -> VideoLM:
    return make_family_lm("qwen3_5", request.param)


def requests_of(model: VideoLM) -> list[Request]:
    """All kinds of prompts, with shuffled branches, all of whose answers end at different lengths."""
    prompts = family_prompts(model)
    return [both(model, prompts[0], 3, 2), ask(model, prompts[4], 4), both(model, prompts[3], 2, 1)]


def test_200_tokens_equal_the_full_forward(model: VideoLM) -> None:
    """Token for token: the log-prob at sampling is that of the training row, and that of transformers' own forward."""
    prompt = family_prompts(model)[0]
    sampled = (answer(model, [ask(model, prompt, 1, seed)], SamplingOptions(200))[0][0] for seed in range(99))
    completion = next(one for one in sampled if len(one.token_ids) == 200)
    exact = make_family_lm("qwen3_5", shape_of(model))
    exact.hf.double()
    exact.compute_dtype = torch.float64
    ids = completion.token_ids
    with exact.inference():
        trained = completion_logp(exact, pack(exact, [prompt], [[ids]]))
        exact.hf.model.language_model.set_attn_implementation("sdpa")
        inputs = family_inputs(exact, prompt, ids)
        inputs |= {name: x.double() for name, x in inputs.items() if name.startswith("pixel_values")}
        logits = exact.hf(**inputs, use_cache=False).logits[0, -201:-1]
    theirs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert (completion.logp - trained).abs().max() <= 1e-5
    assert (completion.logp - theirs).abs().max() <= 1e-5


def shape_of(model: VideoLM) -> str:
    kinds = "".join(kind[0] for kind in model.hf.config.text_config.layer_types)
    return next(shape for shape, (layers, *_) in HYBRIDS.items() if layers == kinds)


@pytest.mark.parametrize("room", [{"max_rows": 1}, {"max_rows": 6, "eager": True}, {"kv_bytes": 460_000}], ids=str)
def test_answers_do_not_depend_on_who_runs_beside_them(model: VideoLM, room: dict[str, int]) -> None:
    """Few rows or little memory: slots are given to others as answers end, with the states that were in them."""
    model = rig(make_family_lm("qwen3_5", shape_of(model)), model.special.eos, 4.0)
    options, requests = SamplingOptions(12), requests_of(model)
    every = answers(LocalEngine(model, options).generate(requests))
    assert len({len(completion.token_ids) for group in every for completion in group}) > 4
    small = LocalEngine(model, options, **room).generate(requests)
    assert small.stats.decode_steps > LocalEngine(model, options).generate(requests).stats.decode_steps
    assert_same(answers(small), every)
    alone = [answers(LocalEngine(model, options).generate([request]))[0] for request in requests]
    assert_same(alone, every)
    assert_same(answers(LocalEngine(model, options).generate(requests[::-1]))[::-1], every)


def test_a_row_that_fills_a_batch_up_steps_no_ones_states(graphed: list[str]) -> None:  # noqa: F811
    """Copies of a row in a graph's batch would step its states again: they have a slot of their own."""
    model = make_family_lm("qwen3_5", next(iter(HYBRIDS)))
    requests = [ask(model, family_prompts(model)[4], 3)]  # rows in a batch of 4
    plain = LocalEngine(model, SamplingOptions(4), cuda_graphs=False).generate(requests)
    with as_on_a_card():
        replayed = LocalEngine(model, SamplingOptions(4), backend="triton").generate(requests)
    assert {last_backend(op) for op in ("gated_delta_step", "causal_conv_step", "gated_rms_norm")} == {"triton"}
    assert "capture" in graphed
    assert_same(answers(replayed), answers(plain))


@pytest.mark.parametrize("keep", [False, True])
def test_changed_weights_are_used_at_once(model: VideoLM, keep: bool) -> None:
    """All that a step of linear attention reads, between two calls of one engine; to the bit of a new engine's."""
    model = make_family_lm("qwen3_5", shape_of(model))
    requests = [ask(model, family_prompts(model)[4], 3)]
    options = SamplingOptions(6)
    engine = LocalEngine(model, options, keep_cache=keep)
    before = tokens(answers(engine.generate(requests)))
    layers = model.hf.model.language_model.layers
    mixer = next(layer.linear_attn for layer in layers if hasattr(layer, "linear_attn"))
    for parameter in (mixer.A_log, mixer.dt_bias, mixer.conv1d.weight, mixer.norm.weight, mixer.in_proj_a.weight):
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=float(parameter.abs().mean()))
        ours, new = (e.generate(requests).groups[0] for e in (engine, LocalEngine(model, options)))
        assert ours is not None
        assert new is not None
        for one, other in zip(ours.ordered, new.ordered, strict=True):
            assert torch.equal(one.token_ids, other.token_ids)
            assert torch.equal(one.logp, other.logp)
    assert before != tokens(answers(engine.generate(requests)))


def test_states_are_counted_and_do_not_grow() -> None:
    """In the budget of the cache and in what it allocates; twice the answer takes as much."""
    config = make_family_lm("qwen3_5", next(iter(HYBRIDS))).hf.config.text_config
    sizes = Sizes.of(config, torch.float32)
    assert sizes == (2 * 1 * 2 * 32 * 4, 3 * STATE)  # K and V of one layer, 2 heads of 32; states of three
    capacity = Capacity(3, 7, 5, *sizes, spare=1)
    cache = KVCache(capacity, config, torch.float32, torch.device("cpu"))
    held = [*cache.prefix_k, *cache.prefix_v, *cache.suffix_k, *cache.suffix_v]
    held += [x for states in cache.states.values() for x in states]
    assert sum(x.numel() * x.element_size() for x in held) == capacity.bytes
    assert dataclasses.replace(capacity, new_tokens=10).all_states == capacity.all_states == 4 * 3 * STATE
    least = (100 + 8 * 50) * sizes.token + 8 * sizes.state
    assert plan_capacity([(100, 8)], 50, sizes, max_rows=64, budget=least).slots == 8
    with pytest.raises(ConfigError, match=rf"need .* MiB of KV cache \(512 bytes a token and {3 * STATE} a completion"):
        plan_capacity([(100, 8)], 50, sizes, max_rows=64, budget=least - 1)
    half = torch.bfloat16  # whose states are fp32 still
    assert Sizes.of(config, half).state == 3 * (4 * 4 * 16 * 24 + 2 * 3 * (2 * 2 * 16 + 4 * 24))
