"""Decoder layers as one function each on a CPU: against transformers in fp64, and what they are not for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import SHAPES, family_prompts, make_family_lm
from torch import Tensor, nn

from videor1.config import LoraConfig
from videor1.model import VideoLM, cpu_layers
from videor1.model.cpu_layers import use_cpu_layers
from videor1.model.lm import set_checkpointing
from videor1.side_by_side import as_on_a_card
from videor1.training.passes import completion_logp, pack
from videor1_kernels import last_backend
from videor1_kernels.testing import assert_no_worse, poisoned_memory

needs_native = pytest.mark.skipif(isinstance(cpu_layers._functions(), str), reason="there is no C++ compiler")
EVERY = [("qwen2_vl", ""), ("qwen2_5_vl", ""), *(("qwen3_vl", shape) for shape in SHAPES)]
pytestmark = needs_native


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each layer's forward passes by the function."""
    made: list[int] = []
    forward = cpu_layers._DecoderLayer.forward

    def counted(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        made.append(len(x))
        return forward(ctx, x, *rest)

    monkeypatch.setattr(cpu_layers._DecoderLayer, "forward", staticmethod(counted))
    return made


def with_cpu_layers(family: tuple[str, str] = EVERY[1]) -> VideoLM:
    model = make_family_lm(*family)
    assert use_cpu_layers(model.hf, model.family) == len(model.hf.model.language_model.layers)
    return model


def run(model: VideoLM, backend: str = "auto") -> dict[str, Tensor]:
    """Log-probs of a few completions of each prompt, and all gradients of a weighted sum of them."""
    generator = torch.Generator().manual_seed(3)
    prompts = family_prompts(model)
    groups = [[torch.randint(0, 300, (n,), generator=generator) for n in (1 + i, 7, 4)] for i in range(len(prompts))]
    model.hf.zero_grad()
    logp = completion_logp(model, pack(model, prompts, groups), backend=backend)
    if logp.requires_grad:
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return {"logp": logp.detach()} | {n: p.grad for n, p in model.hf.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", EVERY, ids=str)
def test_equals_the_layers_of_transformers(family: tuple[str, str], calls: list[int]) -> None:
    plain, model = make_family_lm(*family), with_cpu_layers(family)
    exact_model = make_family_lm(*family)
    exact_model.hf.double()
    exact_model.compute_dtype = torch.float64
    exact, torchs = run(exact_model, backend="reference"), run(plain)
    assert not calls
    with poisoned_memory():
        ours = run(model)
    assert len(calls) == len(model.hf.model.language_model.layers)
    assert last_backend("prefix_attention") == "native"
    assert ours.keys() == exact.keys()
    assert (ours["logp"] - exact["logp"]).abs().max() <= 2 * (torchs["logp"] - exact["logp"]).abs().max()
    size = torch.stack([x.norm() for x in exact.values()]).norm()
    for name, right in exact.items():
        assert (ours[name] - right).norm() <= 1e-5 * (right.norm() + 1e-3 * size), name
        assert (ours[name] - right).norm() <= 3 * (torchs[name] - right).norm() + 1e-6 * size, name


def test_the_same_bits_without_gradients_and_with_checkpointing(calls: list[int]) -> None:
    model = with_cpu_layers()
    whole = run(model)
    with model.inference():
        assert torch.equal(run(model)["logp"], whole["logp"])
    model.hf.train()
    set_checkpointing(model.hf, True)
    before = len(calls)
    again = run(model)
    assert len(calls) - before == 2 * len(model.hf.model.language_model.layers)
    for name, x in whole.items():
        assert torch.equal(again[name], x), name


def test_only_what_is_trained_gets_a_gradient(calls: list[int]) -> None:
    model = with_cpu_layers()
    whole = run(model)
    for names in (["input_layernorm", "v_proj.bias"], ["up_proj", "q_proj.weight"], ["lm_head"]):
        for name, parameter in model.hf.named_parameters():
            parameter.requires_grad = any(n in name for n in names)
        some = run(model)
        assert some.keys() - {"logp"} == {n for n, p in model.hf.named_parameters() if p.requires_grad}
        for name, x in some.items():
            assert torch.equal(x, whole[name]), name
    assert calls


@pytest.mark.parametrize("what", ["hooks", "adapters", "the reference's attention", "autocast", "a card's pass"])
def test_what_it_is_not_for_goes_the_way_of_transformers(what: str, calls: list[int]) -> None:
    model, seen = with_cpu_layers(), []
    backend = "auto"
    if what == "hooks":
        for layer in model.hf.model.language_model.layers:
            layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    elif what == "adapters":
        model.add_lora(LoraConfig(rank=2), 0)
    elif what == "the reference's attention":
        backend = "reference"
    model.bf16 = what == "autocast"
    if what == "a card's pass":
        with as_on_a_card():
            run(model)
    else:
        run(model, backend)
    assert not calls
    assert what != "hooks" or seen
    assert what != "adapters" or use_cpu_layers(model.hf, model.family) == 0


def test_a_copy_computes_with_its_own_weights(calls: list[int]) -> None:
    model = with_cpu_layers()
    other = model.frozen_copy()
    before = run(other)["logp"]
    with torch.no_grad():
        for parameter in model.hf.model.language_model.layers.parameters():
            parameter.zero_()
    assert torch.equal(run(other)["logp"], before)
    assert not torch.equal(run(model)["logp"], before)
    assert calls


def test_a_layer_of_another_form_is_left_alone() -> None:
    for change in (
        lambda layer: layer.double(),
        lambda layer: setattr(layer.mlp, "up_proj", nn.Sequential(layer.mlp.up_proj)),
        lambda layer: setattr(layer.self_attn, "o_proj", nn.Linear(64, 64)),
        lambda layer: setattr(layer.self_attn, "q_proj", nn.Linear(64, 128)),
    ):
        model = make_family_lm(*EVERY[1])
        layers = model.hf.model.language_model.layers
        change(layers[0])
        assert use_cpu_layers(model.hf, model.family) == len(layers) - 1


# The parts, at sizes that are no whole blocks.

ROWS = [1, 63, 64, 65, 200]


def gradients(function: Any, grads: list[Tensor], *inputs: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a formula, in fp32 and in fp64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        cast = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
        outputs = function(*cast)
        needed = [x for x in cast if x is not None]
        found.append([*outputs, *torch.autograd.grad(outputs, needed, [g.to(dtype) for g in grads])])
    return found[0], found[1]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


@pytest.fixture(params=[128, 256, 512])
def bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cpu_layers, "vector_bits", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", ROWS)
def test_the_norm(rows: int, bits: int) -> None:
    x, weight, grad, before = (torch.randn(rows, 48) for _ in range(4))
    weight = weight[0]
    torchs, exact = gradients(lambda x, w: [norm(x, w)], [grad], x, weight)
    dx = before.clone()
    with poisoned_memory():
        ours = cpu_layers._norm_backward(grad, x, weight, dx, 1e-5)
    assert_no_worse(dx, torchs[1] + before, exact[1] + before, terms=48)
    assert_no_worse(ours, torchs[2], exact[2], terms=rows)


@pytest.mark.parametrize("rows", ROWS)
def test_the_activation(rows: int, bits: int) -> None:
    gate_up, grad = 8 * torch.randn(rows, 96), torch.randn(rows, 48)
    gate_up[0, :4] = torch.tensor([-1e4, 1e4, -88.0, 0.0])
    torchs, exact = gradients(lambda x: [nn.functional.silu(x[:, :48]) * x[:, 48:]], [grad], gate_up)
    with poisoned_memory():
        out, gate_up_grad = cpu_layers._silu_mul(gate_up, grad)
        again, _ = cpu_layers._silu_mul(gate_up)
    assert torch.equal(out, again)
    assert_no_worse(out, torchs[0], exact[0], terms=4)
    assert_no_worse(gate_up_grad, torchs[1], exact[1], terms=8)


@pytest.mark.parametrize("dim", [8, 24, 32, 128])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", ROWS[1::2])
def test_rotary_positions(rows: int, normed: bool, dim: int, bits: int) -> None:
    heads, kv_heads = 3, 2
    qkv, cos, sin = torch.randn(rows, (heads + 2 * kv_heads) * dim), torch.randn(rows, dim), torch.randn(rows, dim)
    norms = [torch.randn(dim) if normed else None for _ in range(2)]
    grads = [torch.randn(rows, n, dim) for n in (heads, kv_heads, kv_heads)]

    def formula(qkv: Tensor, *norms: Tensor | None) -> list[Tensor]:
        parts = list(qkv.view(rows, -1, dim).split([heads, kv_heads, kv_heads], 1))
        c, s = cos.to(qkv.dtype)[:, None], sin.to(qkv.dtype)[:, None]
        for i, weight in enumerate(norms):
            x = parts[i] if weight is None else norm(parts[i], weight)
            parts[i] = x * c + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * s
        return parts

    torchs, exact = gradients(formula, grads, qkv, *norms)
    weights = cpu_layers._Weights(*[None] * 14)._replace(q_norm=norms[0], k_norm=norms[1])  # type: ignore[arg-type]
    shape = cpu_layers._Shape(0, heads, kv_heads, dim, 0.0, 1e-5, 1.0, None, None)
    with poisoned_memory():
        rotated = cpu_layers._rotary(qkv, cos, sin, weights, shape)
        qkv_grad, *norm_grads = cpu_layers._rotary_backward(tuple(grads), qkv, cos, sin, weights, shape)
    ours = [*cpu_layers._heads(rotated, qkv, shape), qkv_grad, *(g for g in norm_grads if g is not None)]
    assert len(ours) == len(exact)
    for mine, theirs, right in zip(ours, torchs, exact, strict=True):
        assert_no_worse(mine, theirs, right, terms=max(dim, rows * heads))


def test_the_same_bits_for_any_threads() -> None:
    x, weight, grad = torch.randn(300, 48), torch.randn(48), torch.randn(300, 48)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            dx = grad.clone()
            results.append((cpu_layers._norm_backward(grad, x, weight, dx, 1e-5), dx))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_without_a_compiler_all_is_as_before(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("VIDEOR1_NATIVE", "0")
    cpu_layers._functions.cache_clear()
    try:
        model = make_family_lm(*EVERY[1])
        assert use_cpu_layers(model.hf, model.family) == 0
    finally:
        cpu_layers._functions.cache_clear()
    assert "a decoder layer on the CPU runs in plain torch" in caplog.text
