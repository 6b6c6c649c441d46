"""T-GRPO and SFT losses of a packed row against plain transformers: repeated rows, whole logits, autograd, in fp64."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import hf_inputs, make_lm, make_media, make_model, make_prompt, make_tokenizer
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from videor1.config import LoraConfig, TrainConfig
from videor1.model import VideoLM
from videor1.model.features import prompt_features
from videor1.model.prompts import build_sft_ids
from videor1.training.passes import completion_logp, pack, sft_loss, tgrpo_loss
from videor1.types import Prompt
from videor1.video.patches import normalize_patches
from videor1_kernels import grpo_loss

PROMPTS = [
    make_prompt(make_media("video", (2, 4, 4), seed=1), draw=1),
    make_prompt(None, "Two and two?", draw=2),
    make_prompt(make_media("image", (1, 4, 4), seed=2), "What is this?", draw=3),
]
GENERATOR = torch.Generator().manual_seed(0)
ANSWERS = [[torch.randint(0, 300, (n,), generator=GENERATOR) for n in group] for group in ([5, 1, 3], [4, 2], [2])]
N, S = 17, 6  # tokens and answers
ADVANTAGES = torch.tensor([1.2, -0.4, 0.0, -1.5, 0.8, -0.6], dtype=torch.float64)
TEMPERATURE = 1.3
HELPER = make_lm()  # knows the special tokens


@pytest.fixture(autouse=True, scope="module")
def _norms_in_fp64() -> Iterator[None]:
    """transformers takes them in fp32 whatever the weights are: rounding that would hide what is looked for here."""

    def forward(self: Qwen2_5_VLRMSNorm, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2_5_VLRMSNorm, "forward", forward)
        yield


def fp64_inputs(prompt: Prompt, answer: Tensor) -> dict[str, Tensor]:
    """What transformers' own forward takes for a prompt and an answer."""
    inputs = hf_inputs(HELPER, prompt, answer)
    for name in inputs.keys() & {"pixel_values", "pixel_values_videos"}:
        assert prompt.media is not None
        inputs[name] = normalize_patches(prompt.media.patches, torch.float64)
    return inputs


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return make_model().double()


@pytest.fixture(scope="module")
def naive(plain: nn.Module) -> Tensor:
    """The log-probs of the answers' tokens, with their graph: a forward of each prompt and answer, whole logits."""
    rows = []
    for prompt, group in zip(PROMPTS, ANSWERS, strict=True):
        for answer in group:
            logits = plain(**fp64_inputs(prompt, answer), use_cache=False).logits[0, len(prompt.input_ids) - 1 : -1]
            rows.append((logits / TEMPERATURE).log_softmax(-1).gather(-1, answer[:, None])[:, 0])
    return torch.cat(rows)


def wrap(plain: nn.Module) -> VideoLM:
    """The same weights in the trainer's model."""
    model = make_model().double()
    model.load_state_dict(plain.state_dict())
    return VideoLM(model, make_tokenizer(), position_rule="transformers")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(got: nn.Module, want: nn.Module, tolerance: float) -> None:
    ours, theirs = gradients(got), gradients(want)
    assert ours.keys() == theirs.keys()
    assert any("visual" in name for name in ours)
    size = torch.stack([g.norm() for g in theirs.values()]).norm()
    assert size > 0
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-6 * size), name


SCENARIOS: dict[str, dict[str, Any]] = {
    "on policy": {"beta": 0.0},
    "kl": {"beta": 0.04},
    "kl clamped": {"beta": 0.5, "kl_clamp": 0.05},
    "off policy": {"beta": 0.0, "old": True},
    "off policy, clipped, kl": {"beta": 0.1, "old": True, "clip_low": 0.02, "clip_high": 0.03},
    "clipped above": {"beta": 0.0, "old": True, "clip_high": 0.01},
}


@pytest.mark.grid(scenario=list(SCENARIOS), loss_type=["grpo", "bnpo", "dr_grpo", "dapo"], level=["token", "sequence"])
def test_value_and_gradients_of_the_loss(
    plain: nn.Module, naive: Tensor, scenario: str, loss_type: str, level: str
) -> None:
    """Of the kernels' reference, which tests/kernels holds against its formula, on log-probs of plain transformers."""
    options = {"beta": 0.0, "kl_clamp": 10.0, "clip_low": None, "clip_high": None} | SCENARIOS[scenario]
    generator = torch.Generator().manual_seed(1)
    noise = [0.1 * torch.randn(N, generator=generator, dtype=torch.float64) for _ in range(2)]
    noise[0][:5] = -noise[0][:5].abs()  # the first answer, of a positive advantage, has a ratio to be clipped
    old = naive.detach() + noise[0] if options.pop("old", False) else None
    ref = naive.detach() + noise[1] if options["beta"] else None
    options |= {"loss_type": loss_type, "importance_level": level, "max_completion_length": 50}
    given: dict[str, Any] = {"old_logp": old, "ref_logp": ref, "num_tokens": 3 * N}

    plain.zero_grad()
    ends = torch.tensor([0, *itertools.accumulate(len(answer) for group in ANSWERS for answer in group)])
    want = grpo_loss(naive, ADVANTAGES, ends.int(), **options, **given, backend="reference")
    want.loss.backward(retain_graph=True)

    model, config = wrap(plain), TrainConfig(temperature=TEMPERATURE, **options)
    got = tgrpo_loss(model, pack(model, PROMPTS, ANSWERS), ADVANTAGES, config, **given)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(got.logp, naive.detach(), rtol=0, atol=1e-9)
    assert_same_gradients(model.hf, plain, 1e-7)
    if ref is not None:
        assert got.kl.item() == pytest.approx(want.kl.item(), rel=1e-7)
        assert ((ref - naive).abs() > config.kl_clamp).any() == (scenario == "kl clamped")
    assert (got.clip_fraction > 0) == ("clipped" in scenario)


def test_features_computed_before_give_the_same_loss_and_no_gradient_to_the_tower() -> None:
    model = make_lm()
    model.visual.requires_grad_(False)
    packed = pack(model, PROMPTS, ANSWERS)
    with torch.no_grad():
        features = [f for f in prompt_features(model, PROMPTS) if f is not None]
    losses = []
    for given in (None, features):
        model.hf.zero_grad()
        config = TrainConfig(beta=0.0)
        loss = tgrpo_loss(model, packed, ADVANTAGES.float(), config, num_tokens=N, features=given).loss
        loss.backward()
        losses.append((loss.item(), gradients(model.hf)))
    assert losses[0][0] == losses[1][0]
    for name, gradient in losses[0][1].items():
        assert torch.equal(gradient, losses[1][1][name]), name
    assert not any("visual" in name for name in losses[1][1])


def test_sft_loss_is_transformers_own_with_labels(plain: nn.Module) -> None:
    model = wrap(plain)
    prompts, answers, want, lengths = [], [], torch.zeros((), dtype=torch.float64), []
    for prompt, process in zip(PROMPTS, ("red square", "2", "a thing, I think"), strict=True):
        sample = dataclasses.replace(prompt.sample, process=f"<think>{process}</think>")
        ids, in_answer = build_sft_ids(model.tokenizer, sample, prompt.media, 4096)
        prompts.append(Prompt(sample, ids[~in_answer], prompt.media, prompt.draw))
        answers.append(ids[in_answer])
        lengths.append(len(answers[-1]))
    assert len(set(lengths)) > 1
    got = sft_loss(model, pack(model, prompts, [[answer] for answer in answers]), 2 * sum(lengths))
    got.backward()
    plain.zero_grad()
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = fp64_inputs(prompt, answer)
        labels = inputs["input_ids"].clone()
        labels[:, : len(prompt.input_ids)] = -100
        loss = plain(**inputs, labels=labels, use_cache=False).loss.double()
        want = want + loss * len(answer) / (2 * sum(lengths))
    want.backward()
    # transformers takes its loss in fp32 whatever the weights are.
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same_gradients(model.hf, plain, 1e-5)


def test_reference_with_lora_is_the_base_model(plain: nn.Module) -> None:
    base, model = wrap(plain), wrap(plain)
    model.add_lora(LoraConfig(rank=4), seed=0)
    packed = pack(model, PROMPTS, ANSWERS)
    with torch.no_grad():
        expected = completion_logp(base, packed)
        for name, parameter in model.trainable().items():
            assert "lora" in name
            parameter += 0.1
        trained = completion_logp(model, packed)
    assert not torch.allclose(trained, expected, atol=1e-3)
    model.hf.train()
    with model.as_reference(None) as reference:
        assert not torch.is_grad_enabled()
        assert not model.hf.training
        assert torch.equal(completion_logp(reference, packed), expected)
    assert model.hf.training
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(completion_logp(model, packed), trained)
    # Gradients after it: of the adapters, and of nothing else.
    completion_logp(model, packed).sum().backward()
    assert set(gradients(model.hf)) == set(model.trainable())


def test_reference_as_a_frozen_copy_does_not_move() -> None:
    """And has no KL while the policy is untrained."""
    model = make_lm()
    model.hf.train()
    packed = pack(model, PROMPTS, ANSWERS)
    frozen = model.frozen_copy()
    with model.as_reference(frozen) as reference:
        before = completion_logp(reference, packed, temperature=0.8)
    config = TrainConfig(beta=1.0, temperature=0.8)
    result = tgrpo_loss(model, packed, torch.zeros(S), config, num_tokens=N, ref_logp=before)
    assert result.kl.item() == result.loss.item() == 0.0
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(1.1)
        after = completion_logp(model, packed, temperature=0.8)
    assert not torch.allclose(before, after, atol=1e-3)
    with model.as_reference(frozen) as reference:
        logp = completion_logp(reference, packed, temperature=0.8)
    assert torch.equal(logp, before)
    assert not logp.requires_grad
    assert not frozen.trainable()
    assert not {p.data_ptr() for p in frozen.hf.parameters()} & {p.data_ptr() for p in model.hf.parameters()}
    assert model.hf.training
    with pytest.raises(ValueError, match="frozen copy, or LoRA"), HELPER.as_reference(None):
        pass


@pytest.mark.parametrize("loss", ["sft", "tgrpo"])
def test_the_gradient_of_fp32_weights_is_not_rounded_to_bf16_at_the_head(loss: str) -> None:
    """A whole model in bf16 computes under autocast; the head's gradient is summed in fp32, and stays it."""
    hf = make_model()
    hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach().clone())  # not the embedding, which has a gradient too
    model = VideoLM(hf, make_tokenizer(), bf16=True, position_rule="transformers")
    packed = pack(model, PROMPTS, ANSWERS)
    if loss == "sft":
        sft_loss(model, packed, N).backward()
    else:
        config = TrainConfig(beta=0.0, model_name_or_path="x", dataset_name="x")
        tgrpo_loss(model, packed, ADVANTAGES.float(), config, num_tokens=N).loss.backward()
    grad = model.hf.lm_head.weight.grad
    assert grad is not None
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.bfloat16().float())
