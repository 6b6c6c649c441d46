"""The packed row, its positions, its gradients and the sampler, against an unmodified transformers model."""

import warnings
from typing import Any

import peft
import pytest
import torch
from rollouts import answer, ask
from tiny import GRADIENT_ROUNDING, PROMPTS, hf_inputs, log_prob_rounding, make_lm, make_model, make_tokenizer
from torch import Tensor

import videor1.rollout
import videor1.rollout.local
import videor1.rollout.local.decode
import videor1_kernels.integrations.transformers
from videor1.config import LoraConfig
from videor1.model import VideoLM
from videor1.model.lm import set_checkpointing
from videor1.rollout import SamplingOptions
from videor1.training.passes import completion_logp, pack, predicting_states
from videor1.types import Prompt
from videor1_kernels import chosen_backend, prefix_attention


def repeated_rows(plain: torch.nn.Module, model: VideoLM, prompts: list[Prompt], answers: list[list[Tensor]]) -> Tensor:
    """Log-probs of the answers' tokens from one transformers forward per prompt and answer."""
    logps = []
    for prompt, group in zip(prompts, answers, strict=True):
        for ids in group:
            logits = plain(**hf_inputs(model, prompt, ids), use_cache=False).logits[0]
            start = len(prompt.input_ids) - 1
            rows = logits[start : start + len(ids)].float().log_softmax(-1)
            logps.append(rows.gather(-1, ids[:, None])[:, 0])
    return torch.cat(logps)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_row_equals_repeated_rows_with_gradients(checkpointing: bool) -> None:
    model, plain = make_lm(position_rule="transformers"), make_model()
    prompts = [PROMPTS[kind]() for kind in ("video", "image", "text", "slow video")]
    generator = torch.Generator().manual_seed(0)
    lengths = [[5, 1, 9], [4], [2, 7], [3, 3]]
    answers = [[torch.randint(0, 300, (n,), generator=generator) for n in group] for group in lengths]
    if checkpointing:
        set_checkpointing(model.hf, True)
        model.hf.train()
    packed = pack(model, prompts, answers)
    logp = completion_logp(model, packed)
    expected = repeated_rows(plain, model, prompts, answers)
    assert (logp - expected).abs().max() <= log_prob_rounding(expected)

    coefficients = torch.randn(len(logp), generator=generator)
    (logp * coefficients).sum().backward()
    (expected * coefficients).sum().backward()
    want = dict(plain.named_parameters())
    assert any(name.startswith("model.visual") for name in want)
    for name, parameter in model.hf.named_parameters():
        reference = want[name].grad
        assert parameter.grad is not None, name
        scale = reference.norm().clamp_min(1e-6)
        assert (parameter.grad - reference).norm() / scale <= GRADIENT_ROUNDING, name


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
    banned = [[token] for token in model.special.vision]
    longest = 0
    for prompt, group in zip(prompts, answers, strict=True):
        out = plain.generate(
            **hf_inputs(model, prompt),
            max_new_tokens=24,
            do_sample=False,
            bad_words_ids=banned,
            eos_token_id=[model.special.eos, model.special.pad],
            pad_token_id=model.special.pad,
        )[0, len(prompt.input_ids) :]
        longest = max(longest, len(out))
        for completion in group:
            assert completion.token_ids.tolist() == out.tolist()
    assert longest > 4


def test_sampled_logp_equals_the_training_pass() -> None:
    model = make_lm()
    prompts = [PROMPTS[kind]() for kind in ("video", "image", "text", "tall video")]
    options = SamplingOptions(20, temperature=1.3, top_p=0.9, top_k=50)
    answers = answer(model, [ask(model, p, 3, seed=7) for p in prompts], options)
    packed = pack(model, prompts, [[c.token_ids for c in group] for group in answers])
    logp = completion_logp(model, packed, temperature=1.3)
    sampled = torch.cat([c.logp for group in answers for c in group])
    assert (logp - sampled).abs().max() <= log_prob_rounding(logp)


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_in_bf16_gets_bf16_as_the_kernels_need_it(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 rotary tables make query and key fp32 under autocast; fp32 would take the reference on a GPU."""
    model = VideoLM(make_model(), make_tokenizer(), bf16=True)
    if frozen:
        model = model.frozen_copy()
    seen: list[torch.dtype] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.extend((q.dtype, k.dtype, v.dtype))
        return prefix_attention(q, k, v, *args, **options)

    prompts, ids = [make() for make in PROMPTS.values()], torch.arange(5)
    for place in (videor1_kernels.integrations.transformers, videor1.rollout.local.decode):
        monkeypatch.setattr(place, "prefix_attention", spy)
    logp = completion_logp(model, pack(model, prompts, [[ids]] * len(prompts)))
    assert logp.isfinite().all()
    answer(model, [ask(model, prompts[0], 2)], SamplingOptions(2))
    assert set(seen) == {torch.bfloat16}
    assert len(seen) >= 3 * 2 * model.hf.config.text_config.num_hidden_layers
    assert chosen_backend("prefix_attention", "cuda", dtype=torch.bfloat16) == "triton"


def test_adapters_are_made_without_the_warning_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transformers about a name that peft uses; all others are shown."""
    wrap = peft.get_peft_model

    def warn_too(*args: Any) -> Any:
        warnings.warn("another name is deprecated", FutureWarning, stacklevel=2)
        return wrap(*args)

    monkeypatch.setattr(peft, "get_peft_model", warn_too)
    model = make_lm()
    set_checkpointing(model.hf, True)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        model.add_lora(LoraConfig(rank=2), seed=0)
    assert [str(one.message) for one in shown if one.category is FutureWarning] == ["another name is deprecated"]
