"""Qwen3-VL's prompts, positions, frames and patches against transformers' processor and get_rope_index."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from media import numbered_frames, write_video
from PIL import Image
from rollouts import ask
from spies import Calls
from tiny import CHAT_TEMPLATE, make_tokenizer
from tiny_families import (
    family_inputs,
    family_media,
    family_prompt,
    family_prompts,
    make_family_lm,
    make_qwen3,
    make_qwen3_tokenizer,
    opening,
    qwen3_config,
    tokenizer_of,
)
from tokenizers import AddedToken
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLVisionModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as hf_smart_resize
from transformers.video_utils import VideoMetadata

from videor1.config import VideoConfig
from videor1.errors import ConfigError
from videor1.model import VideoLM, vision
from videor1.model.families import FAMILIES
from videor1.model.positions import PositionRule
from videor1.model.prompts import VIDEO, build_input_ids, special_ids
from videor1.model.template import check_template
from videor1.rollout import Branch, LocalEngine, SamplingOptions
from videor1.rollout.local.kv_cache import Sizes
from videor1.types import Clip, Media, SampleError
from videor1.video import PixelLimits, read_frames, read_image
from videor1.video.media import load_media
from videor1.video.patches import media_from_clip, normalize_patches
from videor1.video.rules import OverBudgetError
from videor1.video.shuffle import draw_permutation

FAMILY = FAMILIES["qwen3_vl"]
RULES = FAMILY.frames
MODEL = make_family_lm("qwen3_vl")
TOKENIZER = make_qwen3_tokenizer()
Grid = tuple[int, int, int]


def processor() -> Qwen3VLProcessor:
    """transformers' own, of which no part needs torchvision that is called here."""
    made = object.__new__(Qwen3VLProcessor)
    sizes = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    made.image_processor = made.video_processor = sizes
    made.video_token, made.vision_start_token, made.vision_end_token = (
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    return made


def clip_of(frames: int, total: int, fps: float, size: tuple[int, int] = (64, 96)) -> Clip:
    """Frames sampled from a file of so many."""
    numbers = RULES.sample(total, fps, max_frames=frames, fps=1e6)
    assert len(numbers) == frames
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (frames, *size, 3), dtype=np.uint8))
    return Clip(pixels, size, frames / total * fps, (), total, fps, "made", "made", numbers=tuple(numbers))


@pytest.mark.parametrize(("frames", "total", "fps"), [(4, 40, 10.0), (5, 77, 29.97), (7, 300, 23.976), (16, 31, 0.7)])
def test_ids_equal_the_processors(frames: int, total: int, fps: float) -> None:
    """Of an even and an odd number of frames; the video's text stands for the template's own start, pad and end."""
    clip = clip_of(frames, total, fps)
    media = media_from_clip(clip, "video", rules=RULES)
    prompt = family_prompt(MODEL, media)
    grid = {"video_grid_thw": torch.tensor([media.grid_thw])}
    metadata = VideoMetadata(total_num_frames=total, fps=fps, frames_indices=list(clip.numbers))
    text = processor().replace_video_token(grid | {"video_metadata": [metadata]}, 0)
    rendered = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    before, _, after = rendered.partition(VIDEO)
    expected = TOKENIZER(before + text, add_special_tokens=False)["input_ids"]
    assert prompt.input_ids[: len(expected)].tolist() == expected
    whole = TOKENIZER.decode(prompt.input_ids)
    assert whole.startswith(before + text)
    assert whole.count("<|vision_start|>") == whole.count(" seconds>") == media.grid_thw[0] == -(-frames // 2)
    assert whole.endswith(after.partition("?")[2])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["video", "image"]),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    fps=st.floats(0.05, 60),
)
@example(kind="video", grid=(9, 1, 1), fps=2.0)
def test_positions_equal_get_rope_index(kind: str, grid: Grid, fps: float) -> None:
    """Under both rules, which differ for no Qwen3-VL, and from the formula, token by token."""
    T, h, w = grid if kind == "video" else (1, *grid[1:])
    prompt = family_prompt(MODEL, family_media("qwen3_vl", kind, (T, 2 * h, 2 * w), fps=fps))
    inputs = family_inputs(MODEL, prompt)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    theirs, deltas = MODEL.hf.model.get_rope_index(**{name: inputs.get(name) for name in names})
    rules: tuple[PositionRule, ...] = ("paper", "transformers")
    for rule in rules:
        model = VideoLM(MODEL.hf, TOKENIZER, source="tiny", position_rule=rule)
        positions, first = model.positions(prompt)
        assert torch.equal(positions, theirs[:, 0])
        assert first == len(prompt.input_ids) + int(deltas)
    expected: list[tuple[int, int, int]] = []
    place = 0
    for token in prompt.input_ids.tolist():
        after = 1 + max((max(position) for position in expected), default=-1)
        if token in (MODEL.special.video_pad, MODEL.special.image_pad):
            start = expected[-1][0] + 1 if place == 0 else start  # noqa: F821
            expected.append((start, start + place // w, start + place % w))
            place += 1
        else:
            place = 0
            expected.append((after,) * 3)
    assert torch.equal(MODEL.positions(prompt)[0], torch.tensor(expected).T)


def test_what_does_not_fit_is_refused() -> None:
    prompt = family_prompt(MODEL, family_media("qwen3_vl", grid=(3, 4, 4)))
    assert prompt.media is not None
    pads = (prompt.input_ids == MODEL.special.video_pad).nonzero().flatten()
    joined = torch.cat([prompt.input_ids[: pads[3] + 1], prompt.input_ids[pads[4] :]])  # two runs become one
    moved = prompt.input_ids.clone()
    moved[pads[3]], moved[0] = 5, MODEL.special.video_pad
    for ids in (joined, moved, prompt.input_ids[pads[0] :]):
        if len(ids) == len(prompt.input_ids) - int(pads[0]):
            continue  # text before the first run may be missing
        with pytest.raises(
            ValueError, match=r"expected 3 runs of 4 \+ 4 \+ 4 media tokens for grid \(3, 4, 4\), got 12"
        ):
            MODEL.positions(dataclasses.replace(prompt, input_ids=ids))
    untimed = dataclasses.replace(prompt.media, times=())
    with pytest.raises(ValueError, match="expected the times of 3 temporal patches, got 0"):
        build_input_ids(TOKENIZER, prompt.sample, untimed, max_prompt_length=999, family=FAMILY)
    with pytest.raises(ValueError, match="expected 1536 columns a patch of Qwen3-VL, got 1176"):
        MODEL.vision_features([family_media("qwen2_5_vl")])


@pytest.mark.parametrize("unit", ["frame", "temporal_patch"])
def test_the_shuffled_prompt_does_not_give_the_order_away(unit: str) -> None:
    """Ids and positions of the shuffled branch are those of the ordered one, whatever the permutation: frames move, the
    times before them do not."""
    prompt = family_prompt(MODEL, family_media("qwen3_vl", grid=(4, 4, 4)))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hidden = VideoLM.hidden_states

    def noted(self: VideoLM, ids: Tensor, positions: Tensor, context: Any, features: Any = ()) -> Tensor:
        seen.append((ids, positions, torch.cat(list(features))))
        return hidden(self, ids, positions, context, features)

    order = draw_permutation(prompt, unit, 7)
    assert order is not None
    assert order != tuple(sorted(order))
    request = ask(MODEL, prompt, 2)
    from videor1.model.features import shuffled_features

    with MODEL.inference():
        (moved,) = shuffled_features(MODEL, [prompt], [order], unit=unit, ordered=[request.ordered.features])
    request = dataclasses.replace(request, shuffled=Branch(2, ("shuffled", 0), moved, order))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoLM, "hidden_states", noted)
        LocalEngine(MODEL, SamplingOptions(2), max_rows=2).generate([request])
    (ids, positions, features), (other_ids, other_positions, other_features) = seen
    assert torch.equal(ids, other_ids)
    assert torch.equal(positions, other_positions)
    assert not torch.equal(features, other_features)


def test_sampled_frames_equal_the_processors() -> None:
    given_to: Any = SimpleNamespace(min_frames=4, max_frames=768, fps=2)
    rng = random.Random(0)
    for _ in range(2000):
        total, rate, fps = (
            rng.randint(2, 3000),
            rng.choice([24.0, 29.97, 0.5, rng.uniform(1, 60)]),
            rng.choice([2.0, 0.3, 5.0]),
        )
        given_to.max_frames = rng.choice([4, 8, 16, 768])
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        expected = Qwen3VLVideoProcessor.sample_frames(given_to, metadata, fps=fps).tolist()
        assert RULES.sample(total, rate, max_frames=given_to.max_frames, fps=fps) == expected
    assert RULES.sample(1, 30.0, max_frames=16, fps=2.0) == []


def test_sizes_equal_the_processors() -> None:
    """With its cap on a frame, whose tokens are our max_pixels."""
    rng = random.Random(0)
    skipped = 0
    for _ in range(3000):
        frames, size = rng.randint(2, 40), (rng.randint(10, 2200), rng.randint(10, 2200))
        most = 1024 * rng.randint(4, 800)
        least, total = rng.randint(1, most), 1024 * rng.randint(1, 30000)
        if max(size) > 150 * min(size):
            continue
        frame = max(min(most, total // frames), int(1.05 * least))  # as in the processor's resize
        expected = hf_smart_resize(
            frames, *size, temporal_factor=2, factor=32, min_pixels=least, max_pixels=frame * frames
        )
        pixels = min(frames, round(frames / 2) * 2) * math.prod(expected)
        try:
            assert RULES.video_size(frames, *size, PixelLimits(least, most, total), 32) == expected
            assert pixels <= total, "let through above its budget"
        except OverBudgetError:
            assert pixels > total, "skipped, though it fits"
            skipped += 1
    assert 0 < skipped < 2000


def test_defaults_are_the_published_processors() -> None:
    assert RULES.video_size(16, 1080, 1920, PixelLimits(None, 768 * 1024), 32) == (640, 1152)
    assert RULES.video_size(16, 1080, 1920, PixelLimits(None, 128 * 28 * 28), 32) == (224, 416)
    assert RULES.video_size(768, 1080, 1920, PixelLimits(None, 768 * 1024), 32) == (128, 224)  # of 24576 tokens in all


@pytest.mark.parametrize("frames", [2, 5])
def test_patches_equal_the_processors_chain(frames: int, tmp_path: Path) -> None:
    """Resized in float, cut as transformers cuts them, normalised by 0.5; an image by its own processor for images."""
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (frames, 90, 131, 3), dtype=np.uint8))
    clip = Clip(pixels, (96, 128), 2.0, (), frames, 2.0, "made", "made", numbers=tuple(range(frames)))
    media = media_from_clip(clip, "video", rules=RULES)
    levels = torch.nn.functional.interpolate(
        pixels.permute(0, 3, 1, 2).double(), size=(96, 128), mode="bicubic", antialias=True
    )
    levels = (levels.clamp(0, 255).round() / 255 - 0.5) / 0.5
    expected, T, h, w = Qwen3VLVideoProcessor.patchify(None, levels[None], 16, 2, 2)  # type: ignore[arg-type]
    assert media.grid_thw == (T, h, w)
    error = (normalize_patches(media.patches, torch.float32, RULES) - expected[0]).abs()
    assert error.max() <= 1.01 / 127.5  # a level
    assert error.mean() <= 1e-3 / 127.5
    # Pillow rounds and clips between its two passes: levels that do not overshoot keep it within one.
    Image.fromarray((96 + pixels[0] // 4).numpy()).save(tmp_path / "a.png")
    image = media_from_clip(
        read_image(tmp_path / "a.png", rules=RULES, min_pixels=4096, max_pixels=10**5), "image", rules=RULES
    )
    theirs = Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 4096, "longest_edge": 10**5}
    )(images=[Image.open(tmp_path / "a.png")], return_tensors="pt")
    assert image.grid_thw == tuple(theirs["image_grid_thw"][0].tolist())
    error = (normalize_patches(image.patches, torch.float32, RULES) - theirs["pixel_values"]).abs()
    assert error.max() <= 1.01 / 127.5


def sample_at(path: Path) -> Any:
    prompt = family_prompt(MODEL, family_media("qwen3_vl"))
    return dataclasses.replace(prompt.sample, path=path)


def test_a_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(25, 64, 96), rate=10)  # 2.5 s: 5 frames, an odd number
    video = VideoConfig(max_pixels=64 * 96)
    media = load_media(sample_at(path), video, rules=RULES)
    assert media is not None
    assert media.grid_thw == (3, 4, 6)
    assert media.times == pytest.approx((0.3, 1.5, 2.4))  # of frames 0, 6; 12, 18; 24, 24
    with pytest.raises(SampleError, match=r"5 frames of 64x32, the smallest that video.min_pixels") as raised:
        load_media(sample_at(path), dataclasses.replace(video, total_pixels=3 * 32 * 32), rules=RULES)
    assert raised.value.kind == "over_budget"
    assert str(path) in str(raised.value)
    smaller = load_media(sample_at(path), dataclasses.replace(video, total_pixels=5 * 32 * 64), rules=RULES)
    assert smaller is not None
    assert smaller.grid_thw == (3, 2, 4)
    with pytest.raises(
        ValueError, match="total_pixels: got 5, but this model's family bounds the pixels of each frame"
    ):
        read_frames(path, total_pixels=5)


def test_a_tokenizer_or_template_of_another_family() -> None:
    with pytest.raises(ConfigError, match=r"no token <think>, </think>; expected the tokenizer of a Qwen3-VL model"):
        VideoLM(make_qwen3(), make_tokenizer(), source="tiny")
    special_ids(make_tokenizer(), FAMILIES["qwen2_5_vl"])
    template = TOKENIZER.chat_template.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    bare = make_qwen3_tokenizer().__class__(tokenizer_object=TOKENIZER.backend_tokenizer)
    bare.chat_template = template
    check_template(bare, "MODEL", FAMILIES["qwen2_5_vl"])  # which leaves the template's pads where they are
    with pytest.raises(
        ConfigError, match=r"MODEL does not put a video as <\|vision_start\|><\|video_pad\|><\|vision_end"
    ):
        check_template(bare, "MODEL", FAMILY)
    prompt = family_prompt(MODEL, family_media("qwen3_vl"))
    with pytest.raises(ConfigError, match="0 times for one video, expected once, where the times of its frames"):
        build_input_ids(bare, prompt.sample, prompt.media, max_prompt_length=999, family=FAMILY)
    other = copy.deepcopy(TOKENIZER)
    other.chat_template = CHAT_TEMPLATE
    with pytest.raises(ConfigError, match=r"template of MODEL is that of Qwen2.5-VL: it adds '<\|im_start\|>system"):
        check_template(other, "MODEL", FAMILY)
    config = qwen3_config(TOKENIZER)
    config.vision_config.patch_size = 14
    hf = type(make_qwen3())(config)
    with pytest.raises(ConfigError, match=r"tiny: its vision_config's patch_size is 14, expected 16 \(Qwen3-VL\)"):
        VideoLM(hf, TOKENIZER, source="tiny")


# As Qwen3-VL's template has it: what a tool answers, between tags in a user's turn.
TOOLS = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "<|im_start|>user{{ '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}<|im_end|>{{ '\\n' }}"
    "{% else %}"
)
PLAIN_TEMPLATE = "{% for message in messages %}" + CHAT_TEMPLATE.partition("{% endif %}")[2]
QWEN3_TEMPLATE = TOOLS + PLAIN_TEMPLATE.removeprefix("{% for message in messages %}").replace(
    "{% endfor %}{% if add_generation_prompt %}", "{% endif %}{% endfor %}{% if add_generation_prompt %}"
)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_a_tokenizer_or_template_of_qwen3_vl(model_type: str) -> None:
    """Refused, while models that were trained on with tags, tools or templates of their own are let through."""
    family = FAMILIES[model_type]

    def tokenizer(*tokens: str, template: str = CHAT_TEMPLATE) -> Any:
        made = copy.deepcopy(make_tokenizer())
        made.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
        made.chat_template = template
        return made

    tags, tools = ("<think>", "</think>"), ("<tool_response>", "</tool_response>")
    with pytest.raises(ConfigError, match=f"<tool_response>, </tool_response>, .* {family.name} has never seen them"):
        special_ids(tokenizer(*tools, *tags), family)
    for tokens in (tags, (*tags, "<answer>", "</answer>"), tools, (*tags, *tools), (*tools, "<answer>", *tags)):
        special_ids(tokenizer(*tokens), family)
    assert TOKENIZER.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False) == tokenizer(
        template=QWEN3_TEMPLATE
    ).apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    with pytest.raises(
        ConfigError, match=f"is that of Qwen3-VL: it adds no system turn, .* use the template of a {family.name}"
    ):
        check_template(tokenizer(template=QWEN3_TEMPLATE), "MODEL", family)
    own = "<|im_start|>system\nThink first.<|im_end|>\n"
    for template in (CHAT_TEMPLATE, PLAIN_TEMPLATE, own + QWEN3_TEMPLATE):
        check_template(tokenizer(template=template), "MODEL", family)
    check_template(tokenizer(*tags, template=QWEN3_TEMPLATE), "MODEL", FAMILY)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_template_that_opens_the_reasoning(model_type: str) -> None:
    """As those of Qwen3-VL's Thinking models and of Qwen3.5, which no other family has."""
    family, thinking = FAMILIES[model_type], opening(tokenizer_of(model_type), "<think>\n")
    if family is FAMILY:
        check_template(thinking, "MODEL", family)
        model = VideoLM(make_qwen3(), thinking, source="tiny")
        assert (model.opened_text, model.frozen_copy().opened_text) == ("<think>\n", "<think>\n")
        assert MODEL.opened_text == ""
    elif "<think>\n" in family.opened:
        check_template(thinking, "MODEL", family)
    else:
        with pytest.raises(ConfigError, match=r"template of MODEL opens an answer with '<think>\\n', .* Take another"):
            check_template(thinking, "MODEL", family)


# Language model's width, layers, heads of q and k; the tower's width, layers, heads, deepstack layers.
PUBLISHED = {
    "2B": (2048, 28, 16, 8, 1024, 24, 16, [5, 11, 17]),
    "4B": (2560, 36, 32, 8, 1024, 24, 16, [5, 11, 17]),
    "8B": (4096, 36, 32, 8, 1152, 27, 16, [8, 16, 24]),
    "32B": (5120, 64, 64, 8, 1152, 27, 16, [8, 16, 24]),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_shapes(size: str) -> None:
    """Without weights: the tower computes all frames of a pass in one attention a layer and reads nothing back, media
    have the features of every deepstack layer, and the cache has the heads' own width."""
    width, layers, heads, key_heads, tower_width, depth, tower_heads, deepstack = PUBLISHED[size]
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 64,
            "num_key_value_heads": key_heads, "head_dim": 128, "vocab_size": 512,
        },
        vision_config={
            "hidden_size": tower_width, "depth": depth, "num_heads": tower_heads, "out_hidden_size": width,
            "deepstack_visual_indexes": deepstack,
        },
    )  # fmt: skip
    assert Sizes.of(config.text_config, torch.bfloat16).token == 2 * layers * key_heads * 128 * 2
    with torch.device("meta"):
        tower = Qwen3VLVisionModel._from_config(config.vision_config, attn_implementation="sdpa").bfloat16()
    vision.prepare(tower)
    media = [family_media("qwen3_vl", grid=(3, 8, 12)), family_media("qwen3_vl", "image", (1, 4, 20))]
    grid, meta = torch.tensor([m.grid_thw for m in media]), torch.device("meta")
    inputs = FAMILY.tower_inputs(grid, tower.config, meta, torch.bfloat16)
    pixels = normalize_patches(torch.cat([m.patches for m in media]).to(meta), torch.bfloat16, RULES)
    with Calls() as calls:
        features = FAMILY.features(tower(pixels, grid_thw=grid, **inputs))
    assert features.shape == ((3 * 8 * 12 + 4 * 20) // 4, width * (1 + len(deepstack)))
    assert len(calls.varlen) == depth
    assert {len(args[3]) - 1 for args in calls.varlen} == {4}, "a segment a temporal patch"
    assert not any("convolution" in name for name in calls.names)


def test_text_of_several_lengths() -> None:
    """The pads of every run are expanded, and nothing else."""
    for prompt in family_prompts(MODEL):
        media: Media | None = prompt.media
        if media is None:
            continue
        T, h, w = media.grid_thw
        pads = (prompt.input_ids == MODEL.special.media_pad(media)).tolist()
        runs = "".join("x" if pad else " " for pad in pads).split()
        assert [len(run) for run in runs] == ([h * w // 4] * T if media.kind == "video" else [T * h * w // 4])
