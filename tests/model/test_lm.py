"""What a model computes once and in which dtype, and its greedy answers against an unmodified transformers model."""

import warnings
from typing import Any
from unittest.mock import Mock, patch

import peft
import pytest
import torch
from rollouts import answer, ask
from tiny import PROMPTS, greedy, hf_inputs, make_lm, make_media, make_model, make_prompt, make_tokenizer

from videor1.config import LoraConfig, ModelConfig
from videor1.model import VideoLM, load
from videor1.model.lm import set_checkpointing
from videor1.rollout import SamplingOptions
from videor1.training.passes import completion_logp, pack, predicting_states
from videor1_kernels import chosen_backend, prefix_attention


def test_the_head_sees_completions_only_and_the_tower_each_video_once() -> None:
    model, patches, prompts = make_lm(), [], [PROMPTS["video"](), PROMPTS["text"]()]
    model.visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    packed = pack(model, prompts, [[torch.arange(5), torch.arange(3)], [torch.arange(2)]])
    assert predicting_states(model, packed).shape[0] == 10
    assert packed.labels.tolist() == [*range(5), *range(3), *range(2)]
    assert patches == [len(prompts[0].media.patches)]


@pytest.mark.parametrize("training", [False, True])
def test_inference_leaves_the_model_as_it_was(training: bool) -> None:
    model = make_lm()
    model.hf.train(training)
    with model.inference():
        assert not model.hf.training
        assert not torch.is_grad_enabled()
    assert model.hf.training == training


def test_greedy_answers_equal_generate_token_for_token() -> None:
    model, plain = make_lm(position_rule="transformers"), make_model()
    prompts = [make() for make in PROMPTS.values()]
    requests = [ask(model, p, 2) for p in prompts]
    answers = answer(model, requests, SamplingOptions(24, temperature=0.0), max_rows=6)
    longest = 0
    for prompt, group in zip(prompts, answers, strict=True):
        out = greedy(plain, model, hf_inputs(model, prompt), 24)
        longest = max(longest, len(out))
        for completion in group:
            assert completion.token_ids.tolist() == out.tolist()
    assert longest > 4


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_in_bf16_gets_bf16_as_the_kernels_need_it(frozen: bool) -> None:
    """fp32 rotary tables make query and key fp32 under autocast; fp32 would take the reference on a GPU."""
    model = VideoLM(make_model(), make_tokenizer(), bf16=True)
    if frozen:
        model = model.frozen_copy()
    prompts, ids = [make() for make in PROMPTS.values()], torch.arange(5)
    spy = Mock(side_effect=prefix_attention)
    places = ("videor1_kernels.integrations.transformers", "videor1.rollout.local.decode")
    with patch(f"{places[0]}.prefix_attention", spy), patch(f"{places[1]}.prefix_attention", spy):
        logp = completion_logp(model, pack(model, prompts, [[ids]] * len(prompts)))
        answer(model, [ask(model, prompts[0], 2)], SamplingOptions(2))
    assert logp.isfinite().all()
    assert {tensor.dtype for call in spy.call_args_list for tensor in call.args[:3]} == {torch.bfloat16}
    assert spy.call_count >= 2 * model.hf.config.text_config.num_hidden_layers
    assert chosen_backend("prefix_attention", "cuda", dtype=torch.bfloat16) == "triton"


def test_adapters_are_made_without_the_warning_that_is_not_ours() -> None:
    """Of transformers about a name that peft uses; all others are shown."""
    wrap = peft.get_peft_model

    def warn_too(*args: Any) -> Any:
        warnings.warn("another name is deprecated", FutureWarning, stacklevel=2)
        return wrap(*args)

    model = make_lm()
    set_checkpointing(model.hf, True)
    with patch.object(peft, "get_peft_model", warn_too), warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        model.add_lora(LoraConfig(rank=2), seed=0)
    assert [str(one.message) for one in shown if one.category is FutureWarning] == ["another name is deprecated"]


@pytest.mark.parametrize("layers", [None, 0, 1])
def test_so_many_layers_are_computed_again(layers: int | None) -> None:
    """The first ones, and all of the tower's; the gradients stay the same."""
    gradients, counts = [], []
    for on in (False, True):
        model = make_lm()
        model.hf.train()
        set_checkpointing(model.hf, on, layers)
        passes = [0] * len(model.hf.model.language_model.layers)

        def count(i: int, passes: list[int]) -> Any:
            def before(*args: Any) -> None:
                passes[i] += 1

            return before

        for i, layer in enumerate(model.hf.model.language_model.layers):
            layer.self_attn.register_forward_pre_hook(count(i, passes))
        packed = pack(model, [make_prompt(make_media())], [[torch.arange(5)]])
        completion_logp(model, packed).sum().backward()
        gradients.append([p.grad for p in model.hf.parameters()])
        counts.append(passes)
    assert counts == [[1, 1], [2 if layers is None or i < layers else 1 for i in range(2)]]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("asked", "installed", "used"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_liger_is_used_on_a_gpu_where_it_is_installed(
    asked: bool | None, installed: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(load, "use_liger", calls.append)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    for device in ("cpu", "cuda"):
        load._use_libraries("a model", ModelConfig(liger=asked), torch.device(device))
    assert calls == (["a model"] if used else [])
