"""What a request says and brings, and what becomes of a server's answer."""

import math
import re
import warnings
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from asking import IMAGE, ORDER, TEXT, VIDEO, ask_once, make_engine, request
from fake_server import SPECIAL, TOKENIZER, Body, FakeServer, answer_text, completion, received_media
from tiny import make_lm, make_media, make_prompt

from videor1.rollout import SamplingOptions
from videor1.rollout.protocol import Branch, Request, RolloutError
from videor1.rollout.server.answer import logp_warning
from videor1.rollout.server.media import media_fields, media_frames, media_part
from videor1.seeding import derive_seed
from videor1.types import Clip, Prompt
from videor1.video.patches import media_from_clip
from videor1.video.shuffle import shuffled_patches


def test_groups_hold_the_answers_in_order(server: FakeServer) -> None:
    with patch("videor1.rollout.server.engine.media_part", side_effect=media_part) as encoded:
        rollout = make_engine(server).generate([request(VIDEO, 3, 2), request(IMAGE, 2), request(TEXT, 1)])
    orders = [call.args[1] for call in encoded.call_args_list if call.args[0] is VIDEO.media]
    assert (orders, encoded.call_count) == ([None, ORDER], 3), "media are encoded once for each branch"
    assert [(len(g.ordered), len(g.shuffled)) for g in rollout.groups] == [(3, 2), (2, 0), (1, 0)]
    video, image, _ = rollout.groups
    assert (video.prompt, image.prompt) == (VIDEO, IMAGE)
    assert (video.permutation, video.shuffled_asked) == (ORDER, 2)
    assert (image.permutation, image.shuffled_asked) == (None, 0)
    assert rollout.failed == {}
    by_seed = {body["seed"]: body for body in server.asked}
    for branch, answers in (("ordered", video.ordered), ("shuffled", video.shuffled)):
        for row, answer in enumerate(answers):
            body = by_seed[derive_seed(7, branch, VIDEO.draw, row) % 2**31]
            assert answer.text == answer_text(body)
            assert answer.token_ids.tolist() == completion(body)["choices"][0]["token_ids"]
            assert answer.logp.tolist() == [-0.5 - i for i in range(len(answer.token_ids))]
            assert (answer.token_ids.dtype, answer.logp.dtype, answer.finished) == (torch.int64, torch.float32, True)
    every = [c for g in rollout.groups for c in (*g.ordered, *g.shuffled)]
    assert len({c.text for c in every}) == len(every)
    stats = rollout.stats
    assert (stats.tokens, stats.retries) == (sum(len(c.token_ids) for c in every), 0)
    assert (stats.shuffled_asked, stats.shuffled_skipped, stats.shuffled_stopped) == (2, 0, 0)


def test_a_request_says_all_that_the_sampling_hangs_on(server: FakeServer) -> None:
    ask_once(server, model="policy", options=SamplingOptions(33, temperature=0.7, top_p=0.9, top_k=40))
    (body,) = server.asked
    expected = {
        "model": "policy", "max_completion_tokens": 33, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0,
        "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "return_token_ids": True,
        "logit_bias": {str(token): -100 for token in SPECIAL.vision}, "stop_token_ids": [SPECIAL.eos, SPECIAL.pad],
    }  # fmt: skip
    assert {name: body[name] for name in expected} == expected
    assert "mm_processor_kwargs" not in body
    engine = make_engine(server)
    engine.generate([request(TEXT, 1)])
    assert (server.asked[1]["top_k"], server.asked[1]["model"]) == (-1, "tiny")  # the one model that is served
    server.models = ["a", "b"]
    engine.generate([request(TEXT, 1)])  # asked once
    with pytest.raises(RolloutError, match=r"2 models \(a, b\): name one"):
        ask_once(server)


def test_where_an_answer_ends(server: FakeServer) -> None:
    """Cut at its limit it is not finished; a stop token that the server left out is appended."""
    ids = TOKENIZER("<think>on and on", add_special_tokens=False)["input_ids"]
    server.respond = lambda body, _: completion(body, finish_reason="length", token_ids=ids, logprobs=None)
    answer = ask_once(server)
    assert (answer.finished, answer.token_ids.tolist(), answer.text) == (False, ids, "<think>on and on")
    assert answer.logp.isnan().all()
    content = [{"logprob": -1.0}] * len(ids)
    server.respond = lambda body, _: completion(body, token_ids=ids, logprobs={"content": content})
    answer = ask_once(server)
    assert answer.token_ids.tolist() == [*ids, SPECIAL.eos]
    assert answer.logp[:-1].tolist() == [-1.0] * len(ids)
    assert math.isnan(answer.logp[-1])
    server.respond = lambda body, _: completion(body, token_ids=[*ids, SPECIAL.pad])
    assert ask_once(server).token_ids.tolist() == [*ids, SPECIAL.pad]
    # Log-probs at another temperature are not taken.
    server.respond = lambda body, _: completion({**body, "logprobs": True})
    for temperature, known in ((1.0, True), (0.0, True), (0.7, False)):
        answer = ask_once(server, options=SamplingOptions(64, temperature=temperature))
        assert bool(answer.logp.isfinite().all()) is known
        assert bool(answer.logp.isnan().all()) is not known
        assert server.asked[-1]["logprobs"] is known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"temperature": 0.0, "top_p": 0.5}, None),  # greedy: nothing is sampled
        ({"temperature": 0.7}, "temperature 0.7: .*not used"),
        ({"temperature": 1.2, "top_p": 0.9}, "temperature 1.2: "),
        ({"top_p": 0.95}, "top_p 0.95: .*a part of it"),
        ({"top_k": 20, "top_p": 0.9}, "top_p 0.9, top_k 20: "),
    ],
)
def test_log_probs_that_are_not_of_what_was_sampled_are_told(options: dict[str, float], message: str | None) -> None:
    said = logp_warning(SamplingOptions(64, **options))
    assert said is None if message is None else re.match(message, said or "")


def test_sglang_names_the_token_ids_otherwise(server: FakeServer) -> None:
    def respond(body: Body, _: int) -> Body:
        reply = completion(body)
        choice, pads = reply["choices"][0], (SPECIAL.image_pad, SPECIAL.video_pad)
        choice["response_token_ids"] = choice.pop("token_ids")
        choice["prompt_token_ids"] = [10**6 if i in pads else i for i in reply.pop("prompt_token_ids")]
        return reply

    server.respond = respond
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = ask_once(server, IMAGE)
    assert answer.text == answer_text(server.asked[0])
    assert answer.token_ids[-1] == SPECIAL.eos


def test_without_token_ids_the_text_is_encoded_again_and_said_once(server: FakeServer) -> None:
    server.respond = lambda body, _: completion(body, token_ids=None, logprobs=None)
    engine = make_engine(server)
    with pytest.warns(UserWarning, match="does not return token ids"):
        (answer,) = engine.generate([request(TEXT, 1)]).groups[0].ordered
    expected = completion(server.asked[0])["choices"][0]["token_ids"]
    assert (answer.token_ids.tolist(), answer.finished, answer.text) == (expected, True, answer_text(server.asked[0]))
    assert answer.logp.isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate([request(TEXT, 2)])


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_that_a_server_took_out_of_the_text(server: FakeServer, name: str) -> None:
    """The tokens hold it all the same; without them nobody knows what was sampled."""
    message = {"content": "<answer>red</answer>", name: "red"}
    server.respond = lambda body, _: completion(body, message=message)
    assert ask_once(server, TEXT).text == answer_text(server.asked[0])
    server.respond = lambda body, _: completion(body, message=message, token_ids=None, logprobs=None)
    with pytest.raises(RolloutError, match="took the reasoning out of the answer's text"):
        ask_once(server, TEXT)


@pytest.mark.parametrize("sglang", [False, True])
def test_a_server_that_reads_another_prompt_is_refused(server: FakeServer, sglang: bool) -> None:
    ours = VIDEO.input_ids.tolist()
    at = ours.index(SPECIAL.video_pad)
    for seen in (
        [*ours[:at], SPECIAL.video_pad, *ours[at:]],  # a resized frame
        [*ours[:at], *ours[at + 1 :]],
        [*ours, 5],  # another generation prompt
        [*ours[:3], ours[3] + 1, *ours[4:]],  # another system message
    ):
        place = {"prompt_token_ids": seen}
        server.respond = lambda body, _, place=place: (
            completion(body, **place) | {"prompt_token_ids": None} if sglang else completion(body) | place
        )
        with pytest.raises(RolloutError, match="the server's prompt has") as error:
            make_engine(server).generate([request(VIDEO, 4)])
        assert f"has {len(seen)} tokens, ours {len(ours)} (18 of them media)" in str(error.value)
        assert ("differ from token 3 on" in str(error.value)) is (len(seen) == len(ours))


ODD = (4, 0, 3, 1, 2)  # of frames: the last of the new order is repeated
FRAMES: list[tuple[Prompt, Any, tuple[int, ...] | None]] = [(VIDEO, "frame", order) for order in (None, ORDER, ODD)]
FRAMES += [(VIDEO, "temporal_patch", (2, 0, 1)), (IMAGE, "frame", None)]


@pytest.mark.parametrize(("prompt", "unit", "permutation"), FRAMES, ids=range(len(FRAMES)))
def test_the_server_receives_the_very_pixels(server: FakeServer, prompt: Prompt, unit: Any, permutation: Any) -> None:
    shuffled = permutation and Branch(1, ("shuffled", 1), permutation=permutation)
    make_engine(server, shuffle_unit=unit).generate([Request(prompt, 0, Branch(1, ("ordered", 1)), shuffled or None)])
    media = prompt.media
    kind, frames, fps = received_media(server.asked[-1])
    assert len(media_frames(media)) == len(frames) == (1 if kind == "image" else 6)
    again = media_from_clip(Clip(frames, tuple(frames.shape[1:3]), fps, (), len(frames), fps, "", ""), kind)
    expected = media.patches if permutation is None else shuffled_patches(media, permutation, unit)
    assert torch.equal(again.patches, expected)
    assert (again.kind, again.grid_thw, again.second_per_grid) == (media.kind, media.grid_thw, media.second_per_grid)


@pytest.mark.parametrize("T", [1, 2, 8])
def test_a_video_has_our_positions_in_time_though_vllm_rounds_to_bfloat16(T: int) -> None:
    generator, model = torch.Generator().manual_seed(T), make_lm()
    for seconds in [7 / 12, 4 / 3, 1.0, 2 / 1.7, 10 / 7, *(4 * torch.rand(60, generator=generator) + 1e-3).tolist()]:
        prompt = make_prompt(make_media("video", (T, 2, 2), seconds=seconds))
        ours, _ = model.positions(prompt)
        fps = media_fields(prompt.media)["media_io_kwargs"]["video"]["fps"]
        theirs = (np.arange(T) * (torch.tensor(2 / fps).bfloat16().item() * 2)).astype(np.int64)  # as in vLLM
        start = prompt.input_ids.tolist().index(SPECIAL.video_pad)
        assert (ours[0, start : start + T] - start).tolist() == theirs.tolist(), seconds
        assert abs(2 / fps / seconds - 1) < 0.01
