"""The attention that is registered with transformers: inside a language model, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from videor1_kernels import PrefixLayout
from videor1_kernels.integrations.transformers import NAME, PackedRow, register
from videor1_kernels.testing import rounding

HEADS, KV_HEADS, LAYERS = 4, 2, 3


def make_model(attention: str) -> Qwen2ForCausalLM:
    """A text model of another family than the trainer's: the attention is for any decoder."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.3,
        attn_implementation=attention,
        use_sliding_window=False,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    return make_model(register())


def test_the_name_is_registered_and_again_is_harmless() -> None:
    assert register() == register() == NAME == "videor1_prefix"
    assert NAME in AttentionInterface().valid_keys()


def test_a_packed_row_equals_one_row_per_completion(model: Qwen2ForCausalLM) -> None:
    plain = make_model("sdpa")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(64, (n,), generator=generator) for n in (6, 3)]
    completions = [[torch.randint(64, (n,), generator=generator) for n in lengths] for lengths in ((4, 2), (1, 5, 3))]
    layout = PrefixLayout([6, 3], [[4, 2], [1, 5, 3]])
    ids, positions = [], []
    for prompt, group in zip(prompts, completions, strict=True):
        ids += [prompt, *group]
        positions += [torch.arange(len(prompt)), *(len(prompt) + torch.arange(len(c)) for c in group)]
    row = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions)[None], "use_cache": False}
    logits = model(**row, videor1_context=PackedRow(layout)).logits[0]
    got = logits[layout.predict_index]
    want = []
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in group:
            alone = plain(torch.cat([prompt, completion])[None]).logits[0]
            want.append(alone[len(prompt) - 1 : -1])
    # In each layer four products of 32 or 48 terms, a softmax and two norms; then the head.
    terms = LAYERS * (4 * 48 + 14 + 2 * 32) + 32
    want = torch.cat(want)
    torch.testing.assert_close(got, want, rtol=0, atol=rounding(terms, want.abs().max().item()))

    weights = torch.randn(got.shape, generator=generator)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        # Forwards and backwards, by norms: an entry whose terms cancel errs by as much as the others.
        assert (ours.grad - theirs.grad).norm() <= rounding(3 * terms, theirs.grad.norm().item()), name


@dataclass
class Recorder:
    """A context that notes what it is given and lets each token see itself alone."""

    calls: list[tuple[int, tuple[int, ...], tuple[int, ...], float | None]] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        assert k.shape == v.shape
        self.calls.append((layer, tuple(q.shape), tuple(k.shape), scale))
        return v.repeat_interleave(HEADS // KV_HEADS, 1)


def test_a_context_is_called_once_per_layer_in_order(model: Qwen2ForCausalLM) -> None:
    context = Recorder()
    model(input_ids=torch.arange(5)[None], use_cache=False, videor1_context=context)
    assert context.calls == [(layer, (5, HEADS, 8), (5, KV_HEADS, 8), 8**-0.5) for layer in range(LAYERS)]


def test_an_explicit_backend_is_handed_on(model: Qwen2ForCausalLM) -> None:
    layout = PrefixLayout([3], [[2]])
    ids = torch.arange(5)[None]
    with pytest.raises(ValueError, match="no-such-backend"):
        model(input_ids=ids, use_cache=False, videor1_context=PackedRow(layout, backend="no-such-backend"))
    model(input_ids=ids, use_cache=False, videor1_context=PackedRow(layout, backend="reference"))


def test_what_a_forward_needs(model: Qwen2ForCausalLM) -> None:
    ids = torch.arange(6)[None]
    for row, context, message in (
        (ids, {}, r"videor1_prefix.*needs the keyword argument videor1_context.*'sdpa'"),
        (ids.expand(2, 6), {"videor1_context": Recorder()}, "one packed row without a mask, got batch 2, mask None"),
        (ids, {"videor1_context": PackedRow(PrefixLayout([3], [[2]]))}, "prefix_attention"),  # a layout of 5 tokens
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=row, use_cache=False, **context)


def test_a_mask_is_refused() -> None:
    register()
    attention = AttentionInterface()[NAME]
    q, kv = torch.zeros(1, HEADS, 5, 8), torch.zeros(1, KV_HEADS, 5, 8)
    module, mask = SimpleNamespace(layer_idx=0), torch.ones(1, 1, 5, 5)
    with pytest.raises(ValueError, match=r"got batch 1, mask \(1, 1, 5, 5\)"):
        attention(module, q, kv, kv, mask, scaling=1.0, videor1_context=Recorder())
    out, weights = attention(module, q, kv, kv, None, scaling=1.0, videor1_context=Recorder())
    assert out.shape == (1, 5, HEADS, 8)
    assert weights is None
