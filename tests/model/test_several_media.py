"""Prompts of several videos and images: ids, positions and log-probs against transformers' own, the shuffled branch
inside each clip, and what no clip may see of another."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_families import family_media, make_family_lm
from torch import Tensor

from videor1.model import VideoLM
from videor1.model.families import FAMILIES
from videor1.model.features import prompt_features, shuffled_features
from videor1.model.prompts import build_input_ids, question_text
from videor1.training.passes import completion_logp, pack
from videor1.types import Media, MediaItem, Message, Prompt, Sample
from videor1.video.patches import normalize_patches
from videor1.video.shuffle import draw_permutation

Grid = tuple[int, int, int]
TYPES = list(FAMILIES)
VIDEO_1, IMAGE, VIDEO_2 = ("video", (3, 4, 8), 2.0), ("image", (1, 8, 4), 0.0), ("video", (2, 4, 4), 0.5)
MIXED = [VIDEO_1, IMAGE, VIDEO_2]
TEXT = "First <video> is shown, then a still <image>\nand last <video>. Which comes first?"


@pytest.fixture(scope="module", params=TYPES)
def model(request: pytest.FixtureRequest) -> VideoLM:
    return make_family_lm(request.param)


def items_of(media: list[Media]) -> tuple[MediaItem, ...]:
    return tuple(MediaItem(one.kind, Path(f"{place}.mp4")) for place, one in enumerate(media))


def made(model: VideoLM, kinds: list[tuple[str, Grid, float]]) -> list[Media]:
    name = model.family.model_type
    return [
        family_media(name, kind, grid, fps=fps or 2.0, seed=seed) for seed, (kind, grid, fps) in enumerate(kinds, 1)
    ]


def prompt_of(model: VideoLM, media: list[Media], text: str = TEXT, draw: int = 0, **fields: Any) -> Prompt:
    kind = "video" if any(one.kind == "video" for one in media) else "image"
    sample = Sample(
        draw, str(draw), text, kind, "free-form", "<answer>red</answer>", Path("0.mp4"), media=items_of(media), **fields
    )
    whole: Any = tuple(media) if len(media) > 1 else media[0]
    ids = build_input_ids(model.tokenizer, sample, whole, max_prompt_length=9999, family=model.family)
    return Prompt(sample, ids, whole, draw)


def transformers_inputs(model: VideoLM, prompt: Prompt, answer: Tensor | None = None) -> dict[str, Any]:
    """What transformers' own forward takes for a prompt: pixels and grids by kind, in the order of their kind."""
    ids = prompt.input_ids if answer is None else torch.cat([prompt.input_ids, answer])
    special = model.special
    kinds = (ids == special.image_pad).long() + 2 * (ids == special.video_pad)
    inputs: dict[str, Any] = {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "mm_token_type_ids": kinds[None],
    }
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        own = [media for media in prompt.all_media if media.kind == kind]
        if own:
            pixels = [normalize_patches(media.patches, torch.float32, model.family.frames) for media in own]
            inputs[name] = torch.cat(pixels).to(model.compute_dtype)
            inputs[f"{kind}_grid_thw"] = torch.tensor([media.grid_thw for media in own])
    videos = [media for media in prompt.all_media if media.kind == "video"]
    if videos and model.family.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([media.second_per_grid for media in videos])
    return inputs


def transformers_positions(model: VideoLM, prompt: Prompt) -> tuple[Tensor, int]:
    inputs = transformers_inputs(model, prompt)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    names += ("second_per_grid_ts",) * (model.family.model_type == "qwen2_5_vl")
    theirs, deltas = model.hf.model.get_rope_index(**{name: inputs.get(name) for name in names})
    return theirs[:, 0], len(prompt.input_ids) + int(deltas)


def expected_text(model: VideoLM, media: list[Media], text: str) -> str:
    """The text of a prompt as transformers' processor writes it: each placeholder's pads repeated by its grid."""
    pieces = text.replace("<image>", "<video>").split("<video>")
    written = pieces[0]
    for one, after in zip(media, pieces[1:], strict=True):
        T, h, w = one.grid_thw
        if one.kind == "video" and model.family.video_text is not None:
            for time in one.times:  # a temporal patch is a run of its own, behind its time
                written += f"<{time:.1f} seconds><|vision_start|>{'<|video_pad|>' * (h * w // 4)}<|vision_end|>"
        else:
            written += f"<|vision_start|>{f'<|{one.kind}_pad|>' * (T * h * w // 4)}<|vision_end|>"
        written += after
    return written


def test_ids_and_positions_equal_transformers(model: VideoLM) -> None:
    media = made(model, MIXED)
    prompt = prompt_of(model, media)
    text = expected_text(model, media, question_text(prompt.sample))
    whole = model.tokenizer.decode(prompt.input_ids)
    assert text in whole
    assert prompt.input_ids.tolist() == model.tokenizer(whole, add_special_tokens=False)["input_ids"]
    positions, first = model.positions(prompt)
    theirs, following = transformers_positions(model, prompt)
    assert torch.equal(positions, theirs)
    assert first == following


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(TYPES),
    kinds=st.lists(st.tuples(st.sampled_from(["video", "image"]), GRIDS, st.floats(0.2, 8.0)), min_size=1, max_size=5),
    gap=st.sampled_from(["", " ", "\nthen "]),
)
@example(name="qwen2_5_vl", kinds=[("video", (4, 1, 1), 0.2)] * 3, gap="")
@example(name="qwen3_vl", kinds=[("image", (1, 1, 1), 1.0), ("video", (1, 1, 1), 1.0)], gap="")
def test_any_media_in_any_order(name: str, kinds: list[tuple[str, Grid, float]], gap: str) -> None:
    """Beside each other and apart, positions are those of transformers' get_rope_index."""
    model = MODELS[name]
    grids = [(kind, (T if kind == "video" else 1, 2 * h, 2 * w), fps) for kind, (T, h, w), fps in kinds]
    media = made(model, grids)
    prompt = prompt_of(model, media, gap.join(f"<{kind}>" for kind, _, _ in grids) + " Which?")
    positions, first = model.positions(prompt)
    theirs, following = transformers_positions(model, prompt)
    assert torch.equal(positions, theirs)
    assert first == following
    pads = torch.tensor([model.special.video_pad, model.special.image_pad])
    count = sum(one.grid_thw[0] * one.grid_thw[1] * one.grid_thw[2] // 4 for one in media)
    assert int(torch.isin(prompt.input_ids, pads).sum()) == count


MODELS = {name: make_family_lm(name) for name in TYPES}


def plain_copy(model: VideoLM) -> Any:
    """Its weights in an unmodified model of transformers, in fp64."""
    config = type(model.hf.config).from_dict(model.hf.config.to_dict())
    hf = type(model.hf)._from_config(config, attn_implementation="sdpa")
    hf.load_state_dict(model.hf.state_dict())
    return hf.eval().double()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_log_probs_and_gradients_equal_transformers(name: str, double: bool) -> None:
    """Of a packed row of two prompts of several media, and one with one video: to transformers in fp64."""
    model = make_family_lm(name)
    plain = plain_copy(model)
    if double:
        model = VideoLM(model.hf.double(), model.tokenizer, source="tiny", position_rule="transformers")
    prompts = [
        prompt_of(model, made(model, MIXED)),
        prompt_of(model, made(model, [IMAGE, VIDEO_2, IMAGE, VIDEO_1]), "Without any place for them.", 1),
        prompt_of(model, made(model, [VIDEO_2]), "One.", 2),
    ]
    answers = [torch.arange(5, 5 + length) for length in (7, 3, 5)]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = transformers_inputs(model, prompt, answer)
        inputs |= {key: value.double() for key, value in inputs.items() if key.startswith("pixel_values")}
        logits = plain(**inputs, use_cache=False).logits[0, len(prompt.input_ids) - 1 : -1]
        expected.append(logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0])
    theirs = torch.cat(expected)
    theirs.sum().backward()
    ours = completion_logp(model, pack(model, prompts, [[answer] for answer in answers]))
    ours.sum().backward()
    assert ((ours - theirs).abs() - theirs.abs() * torch.finfo(torch.float32).eps).max() <= 2e-6
    gradients = {key: p.grad for key, p in plain.named_parameters()}
    size = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
    error = 2e-6 if double else 1e-5  # log-probs leave linear_logprob in fp32 either way
    for key, parameter in model.hf.named_parameters():
        assert parameter.grad is not None, key
        assert (parameter.grad - gradients[key]).norm() <= error * (gradients[key].norm() + 1e-3 * size), key


def test_without_placeholders_all_media_stand_first(model: VideoLM) -> None:
    media = made(model, MIXED)
    bare = prompt_of(model, media, "Which comes first?")
    placed = prompt_of(model, media, "<video><image><video>Which comes first?")
    assert torch.equal(bare.input_ids, placed.input_ids)


def test_one_medium_in_a_list_is_the_same_prompt(model: VideoLM) -> None:
    """Ids, positions, features and permutations are those of an entry that names its file by path."""
    for kind in ("video", "image"):
        (media,) = made(model, [(kind, (2 if kind == "video" else 1, 4, 8), 2.0)])
        plain = Sample(0, "0", "Which?", kind, "free-form", "<answer>red</answer>", Path("0.mp4"))  # type: ignore[arg-type]
        listed = dataclasses.replace(plain, media=items_of([media]))
        assert listed.items == plain.items
        prompts = []
        for sample in (plain, listed, dataclasses.replace(listed, problem=f"<{kind}>Which?")):
            ids = build_input_ids(model.tokenizer, sample, media, max_prompt_length=999, family=model.family)
            prompts.append(Prompt(sample, ids, media, 7))
        orders = [draw_permutation(prompt, "frame", 3) for prompt in prompts]
        assert len(set(orders)) == 1
        assert (orders[0] is None) == (kind == "image")
        with model.inference():
            features = prompt_features(model, prompts[:1]) + prompt_features(model, prompts[1:2])
        assert torch.equal(features[0], features[1])
        for prompt in prompts[1:]:
            assert torch.equal(prompt.input_ids, prompts[0].input_ids)
            assert torch.equal(model.positions(prompt)[0], model.positions(prompts[0])[0])


def test_a_literal_placeholder_of_an_entry_with_a_path_stays_text(model: VideoLM) -> None:
    """Such entries are read as they always were."""
    (media,) = made(model, [VIDEO_2])
    sample = Sample(0, "0", "What is <image> and <video>?", "video", "free-form", "<answer>x</answer>", Path("0.mp4"))
    ids = build_input_ids(model.tokenizer, sample, media, max_prompt_length=999, family=model.family)
    assert "What is <image> and <video>?" in model.tokenizer.decode(ids)


@pytest.mark.parametrize("unit", ["frame", "temporal_patch"])
def test_frames_move_inside_their_clip(model: VideoLM, unit: str) -> None:
    """One order for each clip, none for an image; the features are those of each medium shuffled by itself."""
    media = made(model, [VIDEO_1, IMAGE, VIDEO_2, ("video", (5, 4, 4), 1.0)])
    prompt = prompt_of(model, media, "Which?", draw=4)
    orders: Any = draw_permutation(prompt, unit, 11)
    factor = 2 if unit == "frame" else 1
    assert orders[1] is None
    for one, order in zip(media, orders, strict=True):
        assert order is None or sorted(order) == list(range(factor * one.grid_thw[0]))
    assert orders == draw_permutation(dataclasses.replace(prompt, media=tuple(media)), unit, 11)
    drawn = [draw_permutation(dataclasses.replace(prompt, draw=draw), unit, 11) for draw in range(40)]
    assert len({whole[3] for whole in drawn}) > 30  # type: ignore[index]
    assert any(a[0] != b[0] for a, b in itertools.pairwise(drawn))  # type: ignore[index]
    with model.inference():
        (ordered,) = prompt_features(model, [prompt])
        alone = []
        for one, order in zip(media, orders, strict=True):
            single = dataclasses.replace(prompt, media=one)
            alone.append(prompt_features(model, [single], [order], unit=unit)[0])
        for known in (None, [ordered]):
            (shuffled,) = shuffled_features(model, [prompt], [orders], unit=unit, ordered=known)
            torch.testing.assert_close(shuffled, torch.cat(alone), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    lengths = [one.grid_thw[0] * one.grid_thw[1] * one.grid_thw[2] // 4 for one in media]
    assert shuffled is not None
    assert ordered is not None
    # What the tower has computed is used again, to the bit: of images, and of temporal patches in another order.
    image = slice(lengths[0], lengths[0] + lengths[1])
    assert torch.equal(shuffled[image], ordered[image])


def test_which_prompts_have_a_shuffled_branch(model: VideoLM) -> None:
    still, short = ("image", (1, 4, 4), 0.0), ("video", (1, 4, 4), 1.0)
    for kinds, unit, eligible in (
        ([still, still], "frame", False),
        ([still, short], "frame", True),
        ([still, short], "temporal_patch", False),  # a single pair of frames has no other order
        ([short, VIDEO_2], "temporal_patch", True),
    ):
        prompt = prompt_of(model, made(model, kinds), "Which?")
        assert (draw_permutation(prompt, unit, 0) is not None) == eligible


def test_no_clip_is_seen_from_before_it(model: VideoLM) -> None:
    """Another second clip changes nothing of the first one's hidden states, and a packed neighbour nothing at all."""
    media = made(model, [VIDEO_1, VIDEO_2])
    other = [media[0], dataclasses.replace(media[1], patches=255 - media[1].patches)]
    text = "<video> then <video>"
    answer = torch.arange(5, 9)
    with model.inference():
        logps = []
        for neighbour in (media, other):
            packed = pack(model, [prompt_of(model, neighbour, text), prompt_of(model, media, text, 1)], [[answer]] * 2)
            logps.append(completion_logp(model, packed).split(4))
        assert torch.equal(logps[0][1], logps[1][1])
        assert not torch.equal(logps[0][0], logps[1][0])
        (first,), (second,) = (prompt_features(model, [prompt_of(model, one, text)]) for one in (media, other))
    tokens = 3 * 4 * 8 // 4
    assert first is not None
    assert second is not None
    assert torch.equal(first[:tokens], second[:tokens])
    assert not torch.equal(first[tokens:], second[tokens:])


def test_a_conversation(model: VideoLM) -> None:
    """System, user and assistant turns, media in several of them; without placeholders in the first of the user."""
    media = made(model, MIXED)
    turns = (
        Message("user", "See <video>."),
        Message("assistant", "Seen, and <image>?"),
        Message("user", "No, <video>"),
    )
    prompt = prompt_of(model, media, turns[-1].content, messages=turns, system="Be brief.")
    whole = model.tokenizer.decode(prompt.input_ids)
    tail = question_text(prompt.sample).removeprefix("No, <video>")
    texts = [
        expected_text(model, [one], text)
        for one, text in zip(media, ("See <video>.", "Seen, and <image>?", "No, <video>"), strict=True)
    ]
    assert whole == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{texts[0]}<|im_end|>\n<|im_start|>assistant\n{texts[1]}<|im_end|>\n"
        f"<|im_start|>user\n{texts[2]}{tail}<|im_end|>\n<|im_start|>assistant\n"
    )
    positions, _ = model.positions(prompt)
    assert torch.equal(positions, transformers_positions(model, prompt)[0])
    turns = (Message("user", "See."), Message("assistant", "Seen."), Message("user", "And?"))
    whole = model.tokenizer.decode(prompt_of(model, media, "And?", messages=turns).input_ids)
    assert expected_text(model, media, "<video><image><video>See.") in whole
