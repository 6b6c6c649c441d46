"""Every family against transformers' own forward and ``generate``: packed rows with gradients, prefill and decode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import ask
from safetensors import safe_open
from tiny import greedy
from tiny_families import HYBRIDS, SHAPES, family_inputs, family_media, family_prompt, family_prompts, make_family_lm
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from videor1.config import LoraConfig
from videor1.model import VideoLM
from videor1.model.features import prompt_features, shuffled_features
from videor1.model.lm import set_checkpointing
from videor1.model.save import save_model
from videor1.rollout import LocalEngine, SamplingOptions
from videor1.side_by_side import as_on_a_card
from videor1.training.passes import completion_logp, pack
from videor1.types import Prompt

EVERY = [("qwen2_vl", ""), ("qwen2_5_vl", ""), *(("qwen3_vl", s) for s in SHAPES), *(("qwen3_5", s) for s in HYBRIDS)]


@pytest.fixture(scope="module", params=EVERY, ids=str)
def model(request: pytest.FixtureRequest) -> VideoLM:
    return make_family_lm(*request.param)


def plain_copy(model: VideoLM) -> nn.Module:
    """Its weights in an unmodified model of transformers."""
    config = type(model.hf.config).from_dict(model.hf.config.to_dict())
    hf = type(model.hf)._from_config(config, attn_implementation="sdpa")
    hf.load_state_dict(model.hf.state_dict())
    return hf.eval()


def answers(model: VideoLM, count: int) -> list[list[Tensor]]:
    """Three answers a prompt, of several lengths, the first of which may be one token."""
    generator = torch.Generator().manual_seed(3)
    return [[torch.randint(0, 300, (n,), generator=generator) for n in (1 + i, 7, 4)] for i in range(count)]


def test_a_packed_row_equals_repeated_rows(model: VideoLM) -> None:
    """Log-probs to 2e-6, and every gradient to 1e-5 of the whole, the tower's further mergers included.

    Held to transformers in fp64, and beyond the spacing of fp32 numbers at the log-prob: of -9 it is 1e-6 already.
    """
    prompts, plain = family_prompts(model), plain_copy(model).double()
    groups = answers(model, len(prompts))
    rows = []
    for prompt, group in zip(prompts, groups, strict=True):
        for answer in group:
            inputs = family_inputs(model, prompt, answer)
            # Pixels only: the seconds of a temporal patch stay fp32, in which transformers rounds positions.
            inputs |= {name: x.double() for name, x in inputs.items() if name.startswith("pixel_values")}
            logits = plain(**inputs, use_cache=False).logits[0]
            chosen = logits[len(prompt.input_ids) - 1 : -1].log_softmax(-1).gather(-1, answer[:, None])
            rows.append(chosen[:, 0])
    expected = torch.cat(rows)
    weights = torch.linspace(-1, 1, len(expected))
    (expected * weights).sum().backward()
    model.hf.zero_grad()
    got = completion_logp(model, pack(model, prompts, groups))
    (got * weights).sum().backward()
    assert ((got - expected).abs() - expected.abs() * torch.finfo(torch.float32).eps).max() <= 2e-6
    theirs = {name: p.grad for name, p in plain.named_parameters()}
    size = torch.stack([g.norm() for g in theirs.values() if g is not None]).norm()
    for name, parameter in model.hf.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().any(), name
        assert (parameter.grad - theirs[name]).norm() <= 1e-5 * (theirs[name].norm() + 1e-3 * size), name


def test_recomputed_activations_change_no_gradient(model: VideoLM) -> None:
    """Of the language model's layers and the tower's, whose further features leave it midway in some families."""
    prompts, gradients = family_prompts(model), []
    groups = answers(model, len(prompts))
    for on in (False, True):
        model.hf.zero_grad()
        model.hf.train()
        set_checkpointing(model.hf, on)
        completion_logp(model, pack(model, prompts, groups)).sum().backward()
        gradients.append({name: p.grad for name, p in model.hf.named_parameters()})
    set_checkpointing(model.hf, False)
    model.hf.eval()
    for name, plain in gradients[0].items():
        assert plain is not None, name
        torch.testing.assert_close(gradients[1][name], plain, rtol=0, atol=1e-5 * float(plain.norm()), msg=name)


# The first parts of the names in the published files, which transformers' older versions and vLLM know.
ON_DISK = {
    "qwen2_vl": {"visual", "model.embed_tokens", "model.layers", "model.norm"},
    "qwen2_5_vl": {"visual", "model.embed_tokens", "model.layers", "model.norm"},
    "qwen3_vl": {"model.visual", "model.language_model"},
    "qwen3_5": {"model.visual", "model.language_model"},
}


@pytest.mark.parametrize("rank", [0, 4])
def test_transformers_loads_what_was_trained(model: VideoLM, rank: int, tmp_path: Path) -> None:
    """By its own class, with nothing missing or left over, to the same log-probs, under the published names."""
    (tmp_path / "source").mkdir()
    trained = VideoLM(plain_copy(model), model.tokenizer, source=str(tmp_path / "source"), position_rule="transformers")
    if rank:
        trained.add_lora(LoraConfig(rank=rank), 0)
    prompts = family_prompts(trained)
    groups = answers(trained, len(prompts))
    optimizer = torch.optim.AdamW(trained.trainable().values(), lr=1e-3)
    for _ in range(2):
        (-completion_logp(trained, pack(trained, prompts, groups)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(trained, tmp_path / "saved")
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(loaded) is type(model.hf)
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    kind = model.family.model_type
    assert {next((start for start in ON_DISK[kind] if name.startswith(f"{start}.")), name) for name in names} == (
        ON_DISK[kind]
    )
    with trained.inference():
        live = completion_logp(trained, pack(trained, prompts, groups))
        before = completion_logp(model, pack(model, prompts, groups))
        theirs = []
        for prompt, group in zip(prompts, groups, strict=True):
            for answer in group:
                logits = loaded.eval()(**family_inputs(trained, prompt, answer)).logits[0, -len(answer) - 1 : -1]
                theirs.append(logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0])
    assert (torch.cat(theirs) - live).abs().max() <= 2e-5
    assert (before - live).abs().max() > 1e-3


def test_greedy_rollouts_equal_generate(model: VideoLM) -> None:
    plain, prompts = plain_copy(model), family_prompts(model)
    rollout = LocalEngine(model, SamplingOptions(24, temperature=0.0)).generate([ask(model, p, 2) for p in prompts])
    longest = 0
    for prompt, group in zip(prompts, rollout.groups, strict=True):
        out = greedy(plain, model, family_inputs(model, prompt), 24)
        longest = max(longest, len(out))
        assert group is not None
        assert [completion.token_ids.tolist() for completion in group.ordered] == 2 * [out.tolist()]
    assert longest > 4


@pytest.mark.parametrize("way", [contextlib.nullcontext, as_on_a_card])
@pytest.mark.parametrize("rank", [0, 4])
def test_prefill_and_decode_equal_the_full_forward(
    model: VideoLM, rank: int, way: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    """The log-probs at sampling are those of the training row, with adapters as well; layers in one call, and not."""
    if rank:
        model = VideoLM(plain_copy(model), model.tokenizer, source="tiny", position_rule="transformers")
        model.add_lora(LoraConfig(rank=rank), 0)
        for name, parameter in model.hf.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    prompts = family_prompts(model)
    with way():
        rollout = LocalEngine(model, SamplingOptions(12)).generate([ask(model, p, 3) for p in prompts])
    groups = [list(group.ordered) for group in rollout.groups if group is not None]
    with model.inference():
        trained = completion_logp(model, pack(model, prompts, [[c.token_ids for c in group] for group in groups]))
    sampled = torch.cat([c.logp for group in groups for c in group])
    assert (sampled - trained).abs().max() <= 1e-5


def reordered(model: VideoLM, prompt: Prompt, order: tuple[int, ...], unit: str) -> Tensor:
    features = prompt_features(model, [prompt], [order], unit=unit)[0]
    assert features is not None
    return features


def test_temporal_patches_move_behind_the_tower(model: VideoLM) -> None:
    """To the bit of another pass, with all that the tower gives, and without one."""
    prompt, order = family_prompt(model, family_media(model.family.model_type, grid=(3, 4, 8))), (2, 0, 1)
    with model.inference():
        ordered, calls = prompt_features(model, [prompt]), []
        handle = model.visual.register_forward_pre_hook(lambda *_: calls.append(1))
        (moved,) = shuffled_features(model, [prompt], [order], unit="temporal_patch", ordered=ordered)
        handle.remove()
        assert not calls
        assert moved is not None
        assert torch.equal(moved, reordered(model, prompt, order, "temporal_patch"))
        assert not torch.equal(moved, ordered[0])
        assert not torch.equal(reordered(model, prompt, (5, 3, 1, 0, 2, 4), "frame"), ordered[0])


def test_bf16_under_autocast(model: VideoLM) -> None:
    """Rollout and training compute the same but for rounding, and a reference model in bf16 likewise."""
    bf16 = VideoLM(plain_copy(model), model.tokenizer, bf16=True, source="tiny", position_rule="transformers")
    prompts = family_prompts(bf16)
    for lm in (bf16, bf16.frozen_copy()):
        rollout = LocalEngine(lm, SamplingOptions(6)).generate([ask(lm, p, 2) for p in prompts])
        groups = [[c.token_ids for c in group.ordered] for group in rollout.groups if group is not None]
        with lm.inference():
            trained = completion_logp(lm, pack(lm, prompts, groups))
            exact = completion_logp(model, pack(model, prompts, groups))
        sampled = torch.cat([c.logp for group in rollout.groups if group is not None for c in group.ordered])
        noise = float((trained - exact).abs().mean())
        assert float((sampled - trained).abs().mean()) <= 2 * noise + 1e-3


def test_the_dummy_loss_reaches_every_parameter(model: VideoLM) -> None:
    from videor1.training.passes import dummy_loss

    model.hf.zero_grad()
    dummy_loss(model).backward()
    missing: list[Any] = [name for name, p in model.hf.named_parameters() if p.grad is None]
    assert missing == []
