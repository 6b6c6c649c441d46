"""The loss of SFT on conversations: of all turns of the assistant, against transformers' own with labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_several_media import items_of, made, plain_copy, transformers_inputs
from tiny_families import make_family_lm

from videor1.model import VideoLM
from videor1.model.families import FAMILIES
from videor1.model.prompts import build_sft_ids
from videor1.training.passes import pack, sft_loss
from videor1.training.sft import Example
from videor1.types import Message, Prompt, Sample

KINDS = [("video", (3, 4, 8), 2.0), ("image", (1, 8, 4), 0.0)]


def examples_of(model: VideoLM, seen: str) -> list[Example]:
    """Two conversations, the first with two media, and a question of one turn."""
    media = made(model, KINDS)
    turns = (
        Message("user", f"See <video>. {seen}"),
        Message("assistant", "A red square."),
        Message("user", "And <image>?"),
        Message("assistant", "A cup, and"),
        Message("assistant", "a spoon."),
    )
    path = Path("a.mp4")
    fields: dict[str, Any] = {"messages": turns, "media": items_of(media), "instructed": False}
    first = Sample(0, "0", turns[2].content, "video", "free-form", "", path, **fields)
    second = replace(
        first, problem="Why?", messages=(turns[1], Message("user", "Why?"), turns[3]), media=(), data_type="text"
    )
    third = Sample(2, "2", "Which?", "text", "free-form", "<answer>2</answer>", process="<think>Hm.</think>")
    found = []
    for sample, own in ((first, tuple(media)), (second, None), (third, None)):
        ids, mask = build_sft_ids(model.tokenizer, sample, own, 9999, family=model.family)
        length = int((~mask).nonzero()[-1]) + 1
        prompt = Prompt(sample, ids[:length], own, 0)
        found.append(Example(prompt, ids[length:], mask[:length].nonzero()[:, 0]))
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loss_is_transformers_own_with_labels(family: str) -> None:
    model = make_family_lm(family)
    examples = examples_of(model, "Well?")
    assert [len(one.earlier) > 0 for one in examples] == [True, True, False]
    count = sum(one.targets for one in examples)
    packed = pack(model, [e.prompt for e in examples], [[e.answer] for e in examples], [e.earlier for e in examples])
    got = sft_loss(model, packed, count)
    got.backward()
    ours = {name: p.grad.clone() for name, p in model.hf.named_parameters() if p.grad is not None}
    plain, want = plain_copy(model), torch.zeros((), dtype=torch.float64)
    for one in examples:
        inputs = transformers_inputs(model, one.prompt, one.answer)
        inputs |= {key: value.double() for key, value in inputs.items() if key.startswith("pixel_values")}
        labels = torch.full_like(inputs["input_ids"], -100)
        learned = [*one.earlier.tolist(), *range(len(one.prompt.input_ids), len(one))]
        labels[0, learned] = inputs["input_ids"][0, learned]
        want = want + plain(**inputs, labels=labels, use_cache=False).loss * len(learned) / count
    want.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    size = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    for name, p in plain.named_parameters():
        if p.grad is not None:
            assert (ours[name] - p.grad).norm() <= 1e-5 * (p.grad.norm() + 1e-3 * size), name


def test_what_others_say_is_no_label() -> None:
    """Another text of the user changes what is learned from, never what is learned."""
    model = make_family_lm("qwen2_5_vl")
    labels = []
    for seen in ("Well?", "A long text that the user says instead of it."):
        examples = examples_of(model, seen)
        prompts, answers = [e.prompt for e in examples], [[e.answer] for e in examples]
        labels.append(pack(model, prompts, answers, [e.earlier for e in examples]).labels.tolist())
    assert labels[0] == labels[1]
    text = model.tokenizer.decode(labels[0])
    assert "user" not in text
    assert text.count("<|im_end|>") == 3 + 2 + 1
    # Without earlier turns a row is what it was.
    packed = pack(model, prompts, answers)
    assert packed.earlier is None
    assert packed.labels is not None
    assert torch.equal(packed.predict_index, packed.layout.predict_index)
    nothing = [torch.empty(0, dtype=torch.int64)] * 3
    assert pack(model, prompts, answers, nothing).earlier is None
