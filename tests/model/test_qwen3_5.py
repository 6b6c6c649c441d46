"""What Qwen3.5 has and other families have not: states that cross tokens in its layers of linear attention."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model
from tiny_families import HYBRIDS, family_media, family_prompt, make_family_lm
from torch import Tensor, nn

from videor1.model import VideoLM
from videor1.training.passes import completion_logp, pack
from videor1_kernels import PrefixLayout, prefix_causal_conv, prefix_gated_delta
from videor1_kernels.integrations.transformers import PackedRow, share_prefixes


@pytest.fixture(scope="module", params=HYBRIDS)
def model(request: pytest.FixtureRequest) -> VideoLM:
    return make_family_lm("qwen3_5", request.param)


class Unforked(PackedRow):
    """What plain packing does: attention keeps to each answer, linear attention runs over the row from end to end."""

    @property
    def whole(self) -> PrefixLayout:
        return PrefixLayout([self.layout.total_tokens], [[]])

    def convolve(self, layer: int, x: Tensor, weight: Tensor, activation: str) -> Tensor:
        return prefix_causal_conv(x, weight, self.whole, activation=activation)

    def recur(self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return prefix_gated_delta(q, k, v, g, beta, self.whole)


def states_of(model: VideoLM, answers: list[Tensor], context: type[PackedRow] = PackedRow) -> list[Tensor]:
    """The hidden states of each answer to one prompt."""
    media = family_media("qwen3_5")
    row = pack(model, [family_prompt(model, media)], [answers])
    with model.inference():
        features = model.vision_features([media])
        hidden = model.hidden_states(row.ids, row.positions, context(row.layout), features)
    return list(hidden[row.layout.completion_index].split([len(answer) for answer in answers]))


def test_nothing_leaks_from_one_answer_into_the_next(model: VideoLM) -> None:
    """A neighbour's tokens change nothing, where plain packing lets them change an answer by more than a tenth."""
    generator = torch.Generator().manual_seed(0)
    first, other, answer = (torch.randint(0, 300, (n,), generator=generator) for n in (9, 9, 6))
    leaks = {}
    for context in (PackedRow, Unforked):
        one, two = (states_of(model, [neighbour, answer], context)[1] for neighbour in (first, other))
        leaks[context] = float((one - two).abs().max())
    assert leaks[Unforked] > 0.1
    assert leaks[PackedRow] < 1e-6


def test_the_order_of_answers_changes_nothing(model: VideoLM) -> None:
    generator = torch.Generator().manual_seed(1)
    answers = [torch.randint(0, 300, (n,), generator=generator) for n in (1, 7, 2, 5)]
    order = [2, 0, 3, 1]
    plain, moved = states_of(model, answers), states_of(model, [answers[i] for i in order])
    for place, i in enumerate(order):
        torch.testing.assert_close(moved[place], plain[i], rtol=0, atol=1e-5)


def test_a_forward_without_a_context_is_the_models_own(model: VideoLM) -> None:
    """A padded batch, with a cache, as ``generate`` calls it: the layers were given a subclass of their own class."""
    text = model.hf.model.language_model
    layer = next(layer.linear_attn for layer in text.layers if hasattr(layer, "linear_attn"))
    plain = type(layer).__mro__[1](text.config, layer.layer_idx).eval()
    plain.load_state_dict(layer.state_dict())
    x, mask = torch.randn(2, 5, 64), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert torch.equal(layer(x, attention_mask=mask), plain(x, attention_mask=mask))
    with pytest.raises(ValueError, match=r"one packed row without a mask, got batch 2"):
        layer(x, videor1_context=PackedRow(PrefixLayout([5], [[]])))


def test_linear_attention_of_another_kind_is_refused() -> None:
    """Never a row that leaks without an error."""
    text = make_model().model.language_model
    text.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"Qwen2_5_VLDecoderLayer has linear attention of a kind .* would leak"):
        share_prefixes(text)
    layer = make_family_lm("qwen3_5", next(iter(HYBRIDS))).hf.model.language_model.layers[0]
    layer.linear_attn.activation = "gelu"
    config = SimpleNamespace(layer_types=["linear_attention"])
    fake = SimpleNamespace(config=config, layers=nn.ModuleList([layer]), set_attn_implementation=lambda name: None)
    with pytest.raises(ValueError, match=r"activation of .*silu.*, got 'gelu'"):
        share_prefixes(fake)


def test_a_packed_row_through_layers_that_share_nothing_is_refused() -> None:
    """By the attention, as it is registered for any model."""
    model = make_family_lm("qwen3_5", "flfl, GQA 4")
    text = copy.deepcopy(model.hf.model.language_model)
    for layer in text.layers:
        if hasattr(layer, "self_attn"):
            del layer.self_attn.videor1_shares
    model.hf.model.language_model = text
    with pytest.raises(ValueError, match=r"linear attention, .* call .*share_prefixes\(language_model\)"):
        states_of(model, [torch.arange(4)])
    share_prefixes(text)
    states_of(model, [torch.arange(4)])


def test_gradients_reach_a_shared_prompt_from_every_answer(model: VideoLM) -> None:
    """The sum over two answers is the sum of what each gives by itself, in every parameter."""
    prompt = family_prompt(model, family_media("qwen3_5"))
    answers = [torch.arange(5) + 40, torch.arange(3) + 90]
    gradients = []
    for groups in ([answers], [answers[:1]], [answers[1:]]):
        model.hf.zero_grad()
        completion_logp(model, pack(model, [prompt], groups)).sum().backward()
        gradients.append({name: p.grad for name, p in model.hf.named_parameters()})
    both, *single = gradients
    for name, together in both.items():
        alone = sum(of[name] for of in single)
        assert (together - alone).norm() <= 1e-5 * together.norm() + 1e-7, name
