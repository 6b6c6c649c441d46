"""The layers in one call on a CPU, against the same passes operation by operation and against transformers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rollouts import IMAGE, TEXT, VIDEO, answer, ask, tokens
from tiny import LOG_PROB_TERMS, _drawn_model, make_lm, make_model, make_tokenizer
from torch import Tensor

from videor1.config import LoraConfig
from videor1.model import VideoLM
from videor1.rollout import SamplingOptions
from videor1.rollout.local import decode, text_layers
from videor1.rollout.local.decode import Decoder, Prefill
from videor1.rollout.local.kv_cache import Capacity, KVCache
from videor1.rollout.local.text_layers import TextLayers, _panels
from videor1.side_by_side import as_on_a_card
from videor1_kernels import DecodeLayout, PrefixLayout
from videor1_kernels.testing import rounding

HEADS: dict[str, dict[str, Any]] = {
    "two key heads": {},
    "one key head, three layers": {"num_key_value_heads": 1, "num_hidden_layers": 3},
    "seven query heads each": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112},
    "wide heads, narrow mlp": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 41},
    "as many key heads": {"num_key_value_heads": 4, "intermediate_size": 600},
}


def model_of(lora: int = 0, **text: Any) -> VideoLM:
    hidden = text.get("hidden_size", 64)
    dim = hidden // text.get("num_attention_heads", 4)
    section = [dim // 2 - 2 * (3 * dim // 16), 3 * dim // 16, 3 * dim // 16]
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0}
    hf = _drawn_model.__wrapped__(0, (("rope_parameters", rope), *text.items()))[0]
    model = VideoLM(hf, make_tokenizer(), source="tiny")
    with torch.no_grad():
        for name, parameter in model.hf.model.language_model.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        if lora:
            config = LoraConfig(rank=lora)
            model.add_lora(config, 0)
            for name, parameter in model.hf.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.2 * lora / config.alpha, generator=torch.Generator().manual_seed(1))
    return model


def passes(model: VideoLM, rows: int, positions: Tensor) -> tuple[Tensor, Tensor, KVCache]:
    """The states of a prefill of two prompts and of a decode step, and the cache; NaN where nothing is written."""
    lengths, starts = [19, 5], [31, 3]
    cache = KVCache(Capacity(rows + 2, 60, 4, 1), model.hf.config.text_config, torch.float32, model.device)
    for pools in (cache.prefix_k, cache.prefix_v, cache.suffix_k, cache.suffix_v):
        for pool in pools:
            pool.fill_(torch.nan)
    decoder = Decoder(model, cache, range(10, 60))
    layout = PrefixLayout(lengths, [[], []])
    ids = torch.arange(24) * 13 % 300
    first = decoder.prefill(ids, positions, [], Prefill(layout, cache, starts, [[] for _ in starts], "auto"))
    slots = torch.randperm(rows + 2, generator=torch.Generator().manual_seed(rows))[:rows]
    groups = torch.arange(rows) % 2
    batch = DecodeLayout(torch.tensor([0, 19, 24]), groups, torch.tensor(starts), slots)
    counts = torch.ones(rows, dtype=torch.int64)
    for step in range(2):
        states = decoder.states(torch.arange(rows) * 7 % 290 + step, 20 + groups + step, counts + step, batch)
    return first, states, cache


def in_both_ways(model: VideoLM, rows: int = 5) -> None:
    positions = torch.stack([torch.arange(24), torch.arange(24) // 2, torch.arange(24) % 5])[:, None]
    with model.inference():
        found = passes(model, rows, positions)
        with as_on_a_card():
            expected = passes(model, rows, positions)
    bound = rounding(LOG_PROB_TERMS)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * float(theirs.abs().max()))
    for name in ("prefix_k", "prefix_v", "suffix_k", "suffix_v"):
        for ours, theirs in zip(getattr(found[2], name), getattr(expected[2], name), strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())  # nothing is written beside them
            scale = float(theirs.nan_to_num().abs().max())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * scale, equal_nan=True)


@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("heads", HEADS)
def test_the_passes_of_each_model_on_vectors_of_each_width(heads: str, bits: int) -> None:
    model = model_of(**HEADS[heads])
    with patch.object(text_layers, "vector_bits", return_value=bits):
        in_both_ways(model)


@pytest.mark.parametrize("rows", [1, 11, 12, 13, 48, 49, 101])
def test_every_number_of_rows(rows: int) -> None:
    in_both_ways(model_of(), rows)


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_adapters(rank: int) -> None:
    in_both_ways(model_of(rank))


def test_no_row_knows_the_others_or_the_threads() -> None:
    model = make_lm()
    positions = torch.arange(24).expand(3, 1, -1)
    with model.inference():
        [_, few, _], [_, many, _] = (passes(model, rows, positions) for rows in (4, 100))
        assert torch.equal(few, many[:4])
        for threads, least in ((2, 1), (3, 7), (1, 48)):
            with patch.object(decode, "threads", return_value=threads), patch.object(decode, "LEAST_ROWS", least):
                assert torch.equal(passes(model, 100, positions)[1], many)


def test_a_rollout_takes_it_and_answers_the_same() -> None:
    model, options = make_lm(), SamplingOptions(6)
    requests = [ask(model, VIDEO, 4), ask(model, TEXT, 3), ask(model, IMAGE, 2)]
    with patch.object(TextLayers, "_run", autospec=True, side_effect=TextLayers._run) as run:
        found = answer(model, requests, options)
        assert len(run.call_args_list) >= 6
        run.reset_mock()
        with as_on_a_card():
            assert tokens(answer(model, requests, options)) == tokens(found)
        assert tokens(answer(model, requests, options, backend="reference")) == tokens(found)
        assert not run.called


def _hook(model: VideoLM) -> None:
    model.hf.model.language_model.layers[1].mlp.register_forward_hook(lambda *_: None)


OTHERS: dict[str, Callable[[], VideoLM]] = {
    "16 bits": lambda: VideoLM(make_model().bfloat16(), make_tokenizer(), source="tiny"),
    "autocast": lambda: VideoLM(make_model(), make_tokenizer(), source="tiny", bf16=True),
    "another activation": lambda: model_of(hidden_act="gelu"),
    "flash-attn": lambda: vars(model := make_lm()).update(flash=True) or model,
    "heads of 8": lambda: model_of(num_attention_heads=8),
}


@pytest.mark.parametrize("other", [*OTHERS, "a hook", "large", "no compiler"])
def test_what_it_does_not_compute_is_left_to_the_operations(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OTHERS[other]() if other in OTHERS else make_lm()
    if other == "a hook":
        _hook(model)
    if other == "large":
        monkeypatch.setattr(text_layers, "MOST_WEIGHTS", 1000)
    if other == "no compiler":
        monkeypatch.setattr(text_layers, "_functions", lambda: "there is none")
    assert Decoder(model, None, range(4)).native is None
    assert Decoder(make_lm(), None, range(4)).native is not None or other in ("large", "no compiler")


def test_panels() -> None:
    for rows, inputs in ((1, 3), (32, 5), (45, 7)):
        weight = torch.randn(rows, inputs)
        panels = _panels(weight)
        assert panels.shape == (-(-rows // 32), inputs, 32)
        back = panels.transpose(1, 2).flatten(0, 1)
        assert torch.equal(back[:rows], weight)
        assert not back[rows:].any()


@pytest.mark.parametrize("bad", ["position", "length", "slot"])
def test_a_place_out_of_range_is_an_error(bad: str) -> None:
    model = make_lm()
    cache = KVCache(Capacity(2, 8, 4, 1), model.hf.config.text_config, torch.float32, model.device)
    decoder = Decoder(model, cache, range(6))
    layout = DecodeLayout(
        torch.tensor([0, 8]), torch.tensor([0]), suffix_slots=torch.tensor([2 if bad == "slot" else 1])
    )
    positions, lengths = torch.tensor([6 if bad == "position" else 5]), torch.tensor([5 if bad == "length" else 4])
    with model.inference(), pytest.raises(RuntimeError, match="out of range"):
        decoder.states(torch.tensor([3]), positions, lengths, layout)


def test_a_pass_without_memory_is_an_error() -> None:
    layers = Decoder(make_lm(), None, range(4)).native
    assert layers is not None
    layers._call = lambda _: -1000
    cache = KVCache(Capacity(2, 8, 4, 1), make_lm().hf.config.text_config, torch.float32, torch.device("cpu"))
    table = torch.ones(8, 16)
    with pytest.raises(MemoryError, match="pass of 8 tokens"):
        layers.prefill(torch.zeros(8, 64), table, table, PrefixLayout([8], [[]]), cache, [0])


def test_the_numbers_of_a_pass_are_as_many_as_the_struct_has() -> None:
    """9 + 3 + 24 + 4 members of 8 bytes, see csrc/text_layers.cpp."""
    layers = Decoder(make_lm(), None, range(4)).native
    assert layers is not None
    given: list[bytes] = []
    layers._call = lambda numbers: given.append(numbers) or 0
    cache = KVCache(Capacity(2, 8, 4, 1), make_lm().hf.config.text_config, torch.float32, torch.device("cpu"))
    table = torch.ones(8, 16)
    layers.prefill(torch.zeros(8, 64), table, table, PrefixLayout([8], [[]]), cache, [0])
    assert len(given[0]) == 8 * 40 == struct.calcsize("40q")
