"""T-GRPO and SFT losses of a packed row against plain transformers: repeated rows, whole logits, autograd, in fp64."""

from __future__ import annotations

import copy
import dataclasses
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


def perturbed(module: nn.Module, scale: float, seed: int) -> nn.Module:
    """A copy with noise on every weight, in proportion to its size."""
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (scale * parameter.abs().mean() * noise).to(parameter.dtype)
    return module


def fp64_inputs(prompt: Prompt, answer: Tensor) -> dict[str, Tensor]:
    """What transformers' own forward takes for a prompt and an answer."""
    inputs = hf_inputs(HELPER, prompt, answer)
    for name in inputs.keys() & {"pixel_values", "pixel_values_videos"}:
        assert prompt.media is not None
        inputs[name] = normalize_patches(prompt.media.patches, torch.float64)
    return inputs


def naive_logps(plain: nn.Module) -> list[Tensor]:
    """Per answer, the log-probs of its tokens: a forward of prompt and answer, softmax over the whole vocabulary."""
    rows = []
    for prompt, group in zip(PROMPTS, ANSWERS, strict=True):
        for answer in group:
            logits = plain(**fp64_inputs(prompt, answer), use_cache=False).logits[0, len(prompt.input_ids) - 1 : -1]
            rows.append((logits / TEMPERATURE).log_softmax(-1).gather(-1, answer[:, None])[:, 0])
    return rows


@dataclasses.dataclass
class Naive:
    """transformers' model, two that are near it, and the log-probs of each, with a graph for the first."""

    plain: nn.Module
    others: dict[str, nn.Module]
    new: list[Tensor]
    logps: dict[str, list[Tensor]]


@pytest.fixture(scope="module")
def naive() -> Naive:
    plain = make_model().double()
    others = {"old": perturbed(plain, 0.02, seed=1), "ref": perturbed(plain, 0.1, seed=2)}
    with torch.no_grad():
        logps = {name: naive_logps(other) for name, other in others.items()}
    return Naive(plain, others, naive_logps(plain), logps)


def wrap(plain: nn.Module) -> VideoLM:
    """The same weights in the trainer's model."""
    model = make_model().double()
    model.load_state_dict(plain.state_dict())
    return VideoLM(model, make_tokenizer(), position_rule="transformers")


def naive_loss(
    config: TrainConfig, new: list[Tensor], old: list[Tensor] | None, ref: list[Tensor] | None, num_tokens: int
) -> Tensor:
    """Token by token, as the formulas are written."""
    per_answer = []
    for s in range(S):
        log_ratio = new[s] - (new[s].detach() if old is None else old[s])
        if config.importance_level == "sequence":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        terms = []
        for t in range(len(new[s])):
            ratio = log_ratio[t].exp()
            low = None if config.clip_low is None else 1 - config.clip_low
            high = None if config.clip_high is None else 1 + config.clip_high
            clipped = ratio if low is None and high is None else ratio.clamp(low, high)
            term = -torch.minimum(ratio * ADVANTAGES[s], clipped * ADVANTAGES[s])
            if ref is not None:
                x = (ref[s][t] - new[s][t]).clamp(-config.kl_clamp, config.kl_clamp)
                term = term + config.beta * (x.exp() - x - 1)
            terms.append(term)
        per_answer.append(torch.stack(terms))
    if config.loss_type == "grpo":
        return torch.stack([terms.mean() for terms in per_answer]).mean()
    sizes = {"bnpo": N, "dr_grpo": S * config.max_completion_length, "dapo": num_tokens}
    return torch.cat(per_answer).sum() / sizes[config.loss_type]


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


@pytest.mark.grid(scenario=SCENARIOS, loss_type=["grpo", "bnpo", "dr_grpo", "dapo"], level=["token", "sequence"])
def test_value_and_gradients_of_a_naive_loss(naive: Naive, scenario: str, loss_type: str, level: str) -> None:
    options = {"loss_type": loss_type, "importance_level": level, "temperature": TEMPERATURE} | SCENARIOS[scenario]
    old = naive.logps["old"] if options.pop("old", False) else None
    config = TrainConfig(max_completion_length=50, **options)
    ref = naive.logps["ref"] if config.beta else None

    naive.plain.zero_grad()
    want = naive_loss(config, naive.new, old, ref, num_tokens=3 * N)
    want.backward(retain_graph=True)

    model = wrap(naive.plain)
    given = {"old_logp": None if old is None else torch.cat(old), "ref_logp": None if ref is None else torch.cat(ref)}
    got = tgrpo_loss(model, pack(model, PROMPTS, ANSWERS), ADVANTAGES, config, num_tokens=3 * N, **given)
    got.loss.backward()

    new = torch.cat(naive.new).detach()
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(got.logp, new, rtol=0, atol=1e-9)
    assert_same_gradients(model.hf, naive.plain, 1e-7)
    if ref is not None:
        x = (torch.cat(ref) - new).clamp(-config.kl_clamp, config.kl_clamp)
        assert got.kl.item() == pytest.approx((x.exp() - x - 1).mean().item(), rel=1e-7)
        assert (x.abs() == config.kl_clamp).any() == (scenario == "kl clamped")
    assert (got.clip_fraction > 0) == ("clipped" in scenario)


def test_log_probs_of_another_model_over_the_same_row(naive: Naive) -> None:
    """What a trainer feeds in as old and reference log-probs, each from its own packed pass."""
    packed = pack(wrap(naive.plain), PROMPTS, ANSWERS)
    for name, other in naive.others.items():
        with torch.no_grad():
            got = completion_logp(wrap(other), packed, temperature=TEMPERATURE)
        assert torch.allclose(got, torch.cat(naive.logps[name]), rtol=0, atol=1e-9)


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


def test_sft_loss_is_transformers_own_with_labels(naive: Naive) -> None:
    model, plain = wrap(naive.plain), copy.deepcopy(naive.plain)
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


def test_reference_with_lora_is_the_base_model(naive: Naive) -> None:
    base, model = wrap(naive.plain), wrap(naive.plain)
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
