"""Qwen3-VL through a server that writes times into the text as vLLM's processor does."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from asking import make_engine
from fake_server import Body, FakeServer, completion, received_media
from tiny_families import family_media, family_prompt, make_family_lm

from videor1.model.families import FAMILIES
from videor1.model.prompts import VIDEO
from videor1.rollout import Branch
from videor1.rollout.protocol import Request, RolloutError
from videor1.rollout.server.media import media_fields
from videor1.types import Clip, Prompt
from videor1.video.patches import media_from_clip
from videor1.video.shuffle import shuffled_patches

MODEL = make_family_lm("qwen3_vl")
FAMILY, TOKENIZER, SPECIAL = MODEL.family, MODEL.tokenizer, MODEL.special


def vllm_times(video: dict[str, Any], count: int) -> list[float]:
    """vLLM's metadata of a list of frames, of which its processor makes the mean of each two."""
    indices = video.get("frames_indices", list(range(count)))
    assert len(indices) == count <= video.get("total_num_frames", count)
    assert all(type(i) is int for i in indices)
    seconds = [i / float(video["fps"]) for i in indices]
    return [(a + b) / 2 for a, b in zip(seconds[::2], seconds[1::2], strict=True)]


def vllm_ids(body: Body) -> list[int]:
    """Each time is encoded alone, before the start token, the pads and the end token of its patch."""
    content = [{**part, "type": part["type"].removesuffix("_url")} for part in body["messages"][0]["content"]]
    turn = [{"role": "user", "content": content}]
    text = TOKENIZER.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    before, found, after = text.partition(VIDEO)
    ids = list(TOKENIZER(before, add_special_tokens=False)["input_ids"])
    media = received_media(body)
    assert media is not None
    _, frames, _ = media
    tokens = (frames.shape[1] // 32) * (frames.shape[2] // 32)
    if not found:
        at = ids.index(SPECIAL.image_pad)
        return [*ids[:at], *[SPECIAL.image_pad] * tokens, *ids[at + 1 :]]
    for time in vllm_times(body["media_io_kwargs"]["video"], len(frames)):
        ids += TOKENIZER(f"<{time:.1f} seconds>", add_special_tokens=False)["input_ids"]
        ids += [SPECIAL.vision_start, *[SPECIAL.video_pad] * tokens, SPECIAL.vision_end]
    return ids + list(TOKENIZER(after, add_special_tokens=False)["input_ids"])


def answers(change: Callable[[Body], None] = lambda body: None) -> Callable[[Body, int], Body]:
    def respond(body: Body, _: int) -> Body:
        change(body)
        return completion(body) | {"prompt_token_ids": vllm_ids(body)}

    return respond


def video() -> Prompt:
    """Times that are not evenly spaced, as of frames that were rounded to their numbers, the last one repeated."""
    media = family_media("qwen3_vl", grid=(3, 4, 6), seed=1)
    return family_prompt(MODEL, dataclasses.replace(media, times=(0.25, 12.349, 20.05)))


@pytest.mark.parametrize("unit", ["frame", "temporal_patch"])
def test_the_server_reads_our_prompt_and_pixels(server: FakeServer, unit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffled frames stand behind the same times."""
    monkeypatch.setattr("fake_server.prompt_ids", lambda body: [])
    server.respond = answers()
    image = family_prompt(MODEL, family_media("qwen3_vl", "image", (1, 4, 6), seed=2), draw=2)
    order = (5, 0, 3, 1, 4, 2) if unit == "frame" else (2, 0, 1)
    prompt = video()
    engine = make_engine(server, tokenizer=TOKENIZER, special=SPECIAL, family=FAMILY, shuffle_unit=unit)
    branches = Branch(1, ("ordered", 0)), Branch(1, ("shuffled", 0), permutation=order)
    rollout = engine.generate([Request(prompt, 0, *branches), Request(image, 0, Branch(1, ("ordered", 2)))])
    assert rollout.failed == {}
    seen = []
    for body in server.asked:
        kind, frames, _ = received_media(body) or pytest.fail("no media")
        clip = Clip(
            frames, tuple(frames.shape[1:3]), 1.0, (), len(frames), 1.0, "", "", numbers=tuple(range(len(frames)))
        )
        seen.append((kind, media_from_clip(clip, kind, rules=FAMILY.frames).patches))
    assert prompt.media is not None
    assert image.media is not None
    for kind, expected in (
        ("video", prompt.media.patches),
        ("video", shuffled_patches(prompt.media, order, unit)),
        ("image", image.media.patches),
    ):
        if kind == "image":  # the second frame of an image repeats the first, which alone is sent
            pairs = expected.view(-1, 3, 2, 256)
            expected = torch.stack([pairs[:, :, 0]] * 2, 2).flatten(1)
        assert any(kind == k and torch.equal(patches, expected) for k, patches in seen), kind


def test_a_server_that_takes_no_times_is_found_out(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM before it took frames_indices numbers them from 0."""
    monkeypatch.setattr("fake_server.prompt_ids", lambda body: [])
    server.respond = answers(lambda body: body["media_io_kwargs"]["video"].pop("frames_indices"))
    engine = make_engine(server, tokenizer=TOKENIZER, special=SPECIAL, family=FAMILY)
    with pytest.raises(RolloutError, match=r"the server's prompt has .* they differ from token"):
        engine.generate([Request(video(), 0, Branch(1, ("ordered", 0)))])


def test_every_time_is_the_text_of_ours() -> None:
    rng = random.Random(0)
    for _ in range(500):
        T = rng.randint(1, 9)
        times = tuple(sorted(rng.choice([rng.uniform(0, 9000), rng.randint(0, 999) / 20]) for _ in range(T)))
        media = dataclasses.replace(family_media("qwen3_vl", grid=(T, 2, 2)), times=times)
        told = media_fields(media, FAMILY)["media_io_kwargs"]["video"]
        assert [f"{t:.1f}" for t in vllm_times(told, 2 * T)] == [f"{t:.1f}" for t in times]


def test_which_families_a_server_serves() -> None:
    assert [f.model_type for f in FAMILIES.values() if f.server_video] == ["qwen2_5_vl", "qwen3_vl", "qwen3_5"]
