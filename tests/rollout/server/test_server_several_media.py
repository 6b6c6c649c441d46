"""Prompts of several videos and images, and conversations, as a server is sent them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from asking import PICTURE, make_engine
from fake_server import TOKENIZER, FakeServer
from PIL import Image
from tiny import make_media
from torch import Tensor

from videor1.model.families import FAMILIES
from videor1.model.prompts import build_input_ids, question_text
from videor1.rollout.protocol import Branch, Request
from videor1.rollout.server.media import media_frames
from videor1.seeding import derive_seed
from videor1.types import Media, MediaItem, Message, Prompt, Sample

ONE, TWO = (make_media("video", (2, 4, 6), seconds=1.5, seed=seed) for seed in (1, 2))
ORDERS = ((3, 0, 2, 1), None, (1, 0, 3, 2))


def prompt_of(*media: Media, text: str = "<video>, <image>, <video>?", **fields: Any) -> Prompt:
    items = tuple(MediaItem(one.kind, Path("x")) for one in media)
    sample = Sample(0, "0", text, "video", "free-form", "<answer>red</answer>", Path("x"), media=items, **fields)
    return Prompt(sample, build_input_ids(TOKENIZER, sample, media, max_prompt_length=999), media, 1)


def pixels(part: dict[str, Any]) -> Tensor:
    """The frames of a part of a message."""
    url = part[part["type"]]["url"].partition(",")[2]
    return torch.stack(
        [torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(one))))) for one in url.split(",")]
    )


def sent(server: FakeServer, prompt: Prompt) -> list[dict[str, Any]]:
    """The bodies of an ordered and a shuffled answer."""
    engine = make_engine(server)
    branches = Branch(1, ("ordered", 1)), Branch(1, ("shuffled", 1), permutation=ORDERS)
    rollout = engine.generate([Request(prompt, 7, *branches)])
    assert rollout.failed == {}
    (group,) = rollout.groups
    assert group is not None
    assert group.permutation == ORDERS
    by_seed = {body["seed"]: body for body in server.asked}  # they arrive in any order
    return [by_seed[derive_seed(7, branch, 1, 0) % 2**31] for branch in ("ordered", "shuffled")]


def test_media_stand_in_their_places(server: FakeServer) -> None:
    prompt = prompt_of(ONE, PICTURE, TWO)
    for body, orders in zip(sent(server, prompt), ((None, None, None), ORDERS), strict=True):
        (turn,) = body["messages"]
        kinds = [part["type"] for part in turn["content"]]
        assert kinds == ["video_url", "text", "image_url", "text", "video_url", "text"]
        texts = [part["text"] for part in turn["content"] if part["type"] == "text"]
        assert texts == [", ", ", ", question_text(prompt.sample).removeprefix("<video>, <image>, <video>")]
        media = [part for part in turn["content"] if part["type"] != "text"]
        for part, one, order in zip(media, (ONE, PICTURE, TWO), orders, strict=True):
            assert torch.equal(pixels(part), media_frames(one, order))
        assert body["media_io_kwargs"]["video"]["num_frames"] == -1
        assert "chat_template_kwargs" not in body


def test_a_conversation_and_its_arguments(server: FakeServer) -> None:
    turns = (Message("user", "<video> <image>"), Message("assistant", "I see."), Message("user", "<video>?"))
    prompt = prompt_of(ONE, PICTURE, TWO, text="<video>?", messages=turns, system="Be brief.")
    prompt.sample.chat_template_kwargs["x"] = 1  # type: ignore[index]
    body = sent(server, prompt)[0]
    roles = [turn["role"] for turn in body["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert [body["messages"][i]["content"] for i in (0, 2)] == ["Be brief.", "I see."]
    assert [part["type"] for part in body["messages"][1]["content"]] == ["video_url", "text", "image_url"]
    assert torch.equal(pixels(body["messages"][3]["content"][0]), media_frames(TWO))
    assert body["chat_template_kwargs"] == {"x": 1}


def test_videos_at_different_times_fail_their_prompt_alone(server: FakeServer) -> None:
    """A request tells the times of one video for all: another's would be wrong."""
    other = make_media("video", (2, 4, 6), seconds=0.5, seed=3)
    good, bad = prompt_of(ONE, TWO, text="?"), prompt_of(ONE, other, text="?")
    requests = [Request(prompt, 7, Branch(2, ("ordered", i))) for i, prompt in enumerate((bad, good))]
    rollout = make_engine(server).generate(requests)
    assert rollout.groups[0] is None
    assert rollout.groups[1] is not None
    assert "2 videos of this prompt have frames at different times" in rollout.failed[0]
    assert FAMILIES["qwen2_5_vl"].server_video is not None
