"""The server engine against a real HTTP server on this machine that answers as vLLM does, and fails as told."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import gzip
import math
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_server import SPECIAL, TOKENIZER, Body, FakeServer, Reply, answer_text, completion, prompt_ids, received_media
from patience import PATIENCE
from tiny import make_media, make_prompt

from videor1.errors import ConfigError
from videor1.model.positions import prompt_positions
from videor1.rollout import SamplingOptions
from videor1.rollout.protocol import Branch, Request, RolloutError
from videor1.rollout.server.engine import ServerEngine
from videor1.rollout.server.media import media_fields, media_frames, media_part
from videor1.seeding import derive_seed
from videor1.types import Clip, Completion, Media, Prompt
from videor1.video.patches import media_from_clip
from videor1.video.shuffle import shuffled_patches


def make_image(size: tuple[int, int] = (56, 84)) -> Media:
    pixels = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return media_from_clip(Clip(pixels, size, 0.0, (0.0,), 1, 0.0, "image.png", "test"), "image")


VIDEO = make_prompt(make_media("video", (3, 4, 6), seconds=1.5, seed=1), draw=1)
IMAGE = make_prompt(make_image(), "What is this?", draw=2)
TEXT = make_prompt(None, "Two and two?", draw=3)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, args=(0.01,))
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


def make_engine(server: FakeServer, tmp_path: Path | None = None, **changes: Any) -> ServerEngine:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    settings: dict[str, Any] = {
        "url": server.url,
        "tokenizer": TOKENIZER,
        "special": SPECIAL,
        "options": SamplingOptions(64),
        "timeout": PATIENCE,
        "retries": 2,
        "save_weights": save,
        "sync_dir": tmp_path or Path("unused"),
        "sync": "vllm" if tmp_path else "none",
    }
    return ServerEngine(**{**settings, **changes})


def request(prompt: Prompt, ordered: int = 3, shuffled: int = 0, judge: Any = None, seed: int = 7) -> Request:
    permutation = (5, 0, 3, 1, 4, 2)
    branch = Branch(shuffled, ("shuffled", prompt.draw), permutation=permutation) if shuffled else None
    return Request(prompt, seed, Branch(ordered, ("ordered", prompt.draw)), branch, judge)


def is_shuffled(body: Body) -> bool:
    """Whether the frames of VIDEO came in another order."""
    media = received_media(body)
    return media is not None and not torch.equal(media[1], media_frames(VIDEO.media))


class Judge:
    """``verdicts[n]`` once n ordered answers are done; the last holds on."""

    def __init__(self, *verdicts: bool | None) -> None:
        self.verdicts = verdicts
        self.ordered: list[Completion] = []
        self.shuffled: list[Completion] = []

    def ordered_done(self, answer: Completion) -> None:
        self.ordered.append(answer)

    def shuffled_done(self, answer: Completion) -> None:
        self.shuffled.append(answer)

    @property
    def needed(self) -> bool | None:
        return self.verdicts[min(len(self.ordered), len(self.verdicts) - 1)]


# Answers


def test_groups_hold_the_answers_in_order(server: FakeServer) -> None:
    rollout = make_engine(server).generate([request(VIDEO, 3, 2), request(IMAGE, 2), request(TEXT, 1)])
    assert [(len(g.ordered), len(g.shuffled)) for g in rollout.groups] == [(3, 2), (2, 0), (1, 0)]
    video, image, _ = rollout.groups
    assert (video.prompt, image.prompt) == (VIDEO, IMAGE)
    assert (video.permutation, video.shuffled_asked) == ((5, 0, 3, 1, 4, 2), 2)
    assert (image.permutation, image.shuffled_asked) == (None, 0)
    assert rollout.failed == {}
    by_seed = {body["seed"]: body for body in server.asked}
    for group, branch, answers in ((video, "ordered", video.ordered), (video, "shuffled", video.shuffled)):
        for row, answer in enumerate(answers):
            body = by_seed[derive_seed(7, branch, group.prompt.draw, row) % 2**31]
            assert answer.text == answer_text(body)
            assert answer.token_ids.tolist() == completion(body)["choices"][0]["token_ids"]
            assert answer.logp.tolist() == [-0.5 - i for i in range(len(answer.token_ids))]
            assert (answer.token_ids.dtype, answer.logp.dtype, answer.finished) == (torch.int64, torch.float32, True)
    every = [c for g in rollout.groups for c in (*g.ordered, *g.shuffled)]
    assert len({c.text for c in every}) == len(every)
    assert rollout.stats.tokens == sum(len(c.token_ids) for c in every)
    assert (rollout.stats.shuffled_asked, rollout.stats.shuffled_skipped, rollout.stats.shuffled_stopped) == (2, 0, 0)
    assert rollout.stats.retries == 0


def test_a_request_says_all_that_the_sampling_hangs_on(server: FakeServer) -> None:
    options = SamplingOptions(33, temperature=0.7, top_p=0.9, top_k=40)
    make_engine(server, model="policy", options=options).generate([request(TEXT, 1)])
    (body,) = server.asked
    assert body["model"] == "policy"
    assert {k: body[k] for k in ("max_completion_tokens", "temperature", "top_p", "top_k")} == {
        "max_completion_tokens": 33,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
    }
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"], body["min_p"]) == (
        1,
        0,
        0,
        0,
    )
    assert body["logit_bias"] == {str(token): -100 for token in SPECIAL.vision}
    assert body["stop_token_ids"] == [SPECIAL.eos, SPECIAL.pad]
    assert body["return_token_ids"] is True
    make_engine(server).generate([request(TEXT, 1)])
    assert (server.asked[1]["top_k"], server.asked[1]["model"]) == (-1, "tiny")


def test_a_row_does_not_hang_on_its_batch_mates(server: FakeServer) -> None:
    alone = make_engine(server, concurrency=1).generate([request(VIDEO, 2, 2)]).groups[0]
    beside = make_engine(server).generate([request(TEXT, 5), request(VIDEO, 4, 3), request(IMAGE, 3)]).groups[1]
    assert [c.text for c in beside.ordered[:2]] == [c.text for c in alone.ordered]
    assert [c.text for c in beside.shuffled[:2]] == [c.text for c in alone.shuffled]
    other = make_engine(server).generate([request(VIDEO, 2, 2, seed=8)]).groups[0]
    assert not {c.text for c in other.ordered} & {c.text for c in alone.ordered}
    assert all(0 <= body["seed"] < 2**31 for body in server.asked)


def test_log_probs_at_another_temperature_are_not_taken(server: FakeServer) -> None:
    server.respond = lambda body, _: completion({**body, "logprobs": True})
    for temperature, known in ((1.0, True), (0.0, True), (0.7, False)):
        engine = make_engine(server, options=SamplingOptions(64, temperature=temperature))
        answer = engine.generate([request(TEXT, 1)]).groups[0].ordered[0]
        assert bool(answer.logp.isfinite().all()) is known
        assert bool(answer.logp.isnan().all()) is not known
        assert server.asked[-1]["logprobs"] is known


def test_an_answer_cut_at_its_limit_is_not_finished(server: FakeServer) -> None:
    ids = TOKENIZER("<think>on and on", add_special_tokens=False)["input_ids"]
    server.respond = lambda body, _: completion(body, finish_reason="length", token_ids=ids, logprobs=None)
    (answer,) = make_engine(server).generate([request(TEXT, 1)]).groups[0].ordered
    assert (answer.finished, answer.token_ids.tolist(), answer.text) == (False, ids, "<think>on and on")
    assert answer.logp.isnan().all()


def test_a_stop_token_that_the_server_left_out_is_appended(server: FakeServer) -> None:
    ids = TOKENIZER("red", add_special_tokens=False)["input_ids"]
    content = [{"logprob": -1.0}] * len(ids)
    server.respond = lambda body, _: completion(body, token_ids=ids, logprobs={"content": content})
    (answer,) = make_engine(server).generate([request(TEXT, 1)]).groups[0].ordered
    assert answer.token_ids.tolist() == [*ids, SPECIAL.eos]
    assert answer.logp[:-1].tolist() == [-1.0] * len(ids)
    assert math.isnan(answer.logp[-1])
    server.respond = lambda body, _: completion(body, token_ids=[*ids, SPECIAL.pad])
    (answer,) = make_engine(server).generate([request(TEXT, 1)]).groups[0].ordered
    assert answer.token_ids.tolist() == [*ids, SPECIAL.pad]


def test_sglang_names_the_token_ids_otherwise(server: FakeServer) -> None:
    def respond(body: Body, _: int) -> Body:
        reply = completion(body)
        choice = reply["choices"][0]
        choice["response_token_ids"], choice["prompt_token_ids"] = (
            choice.pop("token_ids"),
            reply.pop("prompt_token_ids"),
        )
        pads = (SPECIAL.image_pad, SPECIAL.video_pad)
        choice["prompt_token_ids"] = [10**6 if i in pads else i for i in choice["prompt_token_ids"]]
        return reply

    server.respond = respond
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = make_engine(server).generate([request(IMAGE, 1)]).groups[0].ordered[0]
    assert answer.text == answer_text(server.asked[0])
    assert answer.token_ids[-1] == SPECIAL.eos


def test_without_token_ids_the_text_is_encoded_again_and_said_once(server: FakeServer) -> None:
    server.respond = lambda body, _: {
        "choices": [{**completion(body)["choices"][0], "token_ids": None, "logprobs": None}]
    }
    engine = make_engine(server)
    with pytest.warns(UserWarning, match="does not return token ids"):
        (answer,) = engine.generate([request(TEXT, 1)]).groups[0].ordered
    expected = completion(server.asked[0])["choices"][0]["token_ids"]
    assert (answer.token_ids.tolist(), answer.finished, answer.text) == (expected, True, answer_text(server.asked[0]))
    assert answer.logp.isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate([request(TEXT, 2)])


# Media


@pytest.mark.parametrize(
    ("prompt", "unit", "permutation"),
    [
        (VIDEO, "frame", None),
        (VIDEO, "frame", (5, 0, 3, 1, 4, 2)),
        (VIDEO, "frame", (4, 0, 3, 1, 2)),  # an odd number of frames: the last of the new order is repeated
        (VIDEO, "temporal_patch", (2, 0, 1)),
        (IMAGE, "frame", None),
    ],
    ids=["ordered", "frames", "odd", "temporal patches", "image"],
)
def test_the_server_receives_the_very_pixels(
    server: FakeServer, prompt: Prompt, unit: str, permutation: tuple[int, ...] | None
) -> None:
    shuffled = permutation and Branch(1, ("shuffled", 1), permutation=permutation)
    make_engine(server, shuffle_unit=unit).generate([Request(prompt, 0, Branch(1, ("ordered", 1)), shuffled or None)])
    media = prompt.media
    assert media is not None
    kind, frames, fps = received_media(server.asked[-1])
    assert len(media_frames(media)) == len(frames) == (1 if kind == "image" else 6)
    again = media_from_clip(Clip(frames, tuple(frames.shape[1:3]), fps, (), len(frames), fps, "", ""), kind)
    expected = media.patches if permutation is None else shuffled_patches(media, permutation, unit)
    assert torch.equal(again.patches, expected)
    assert (again.kind, again.grid_thw, again.second_per_grid) == (media.kind, media.grid_thw, media.second_per_grid)


def test_the_user_turn_is_the_media_and_then_the_text(server: FakeServer) -> None:
    make_engine(server, concurrency=1).generate([request(VIDEO, 1), request(IMAGE, 1), request(TEXT, 1)])
    for prompt, body in zip((VIDEO, IMAGE, TEXT), server.asked, strict=True):
        assert prompt_ids(body) == prompt.input_ids.tolist()
    assert "mm_processor_kwargs" not in server.asked[2]


@pytest.mark.parametrize("T", [1, 2, 8])
def test_a_video_has_our_positions_in_time_though_vllm_rounds_to_bfloat16(T: int) -> None:
    generator = torch.Generator().manual_seed(T)
    some = [7 / 12, 4 / 3, 1.0, 2 / 1.7, 10 / 7, *(4 * torch.rand(60, generator=generator) + 1e-3).tolist()]
    for seconds in some:
        prompt = make_prompt(make_media("video", (T, 2, 2), seconds=seconds))
        ours, _ = prompt_positions(prompt, SPECIAL.video_pad, tokens_per_second=2.0)
        fps = media_fields(prompt.media)["media_io_kwargs"]["video"]["fps"]
        theirs = (np.arange(T) * (torch.tensor(2 / fps).bfloat16().item() * 2)).astype(np.int64)  # as in vLLM
        start = prompt.input_ids.tolist().index(SPECIAL.video_pad)
        assert (ours[0, start : start + T] - start).tolist() == theirs.tolist(), seconds
        assert abs(2 / fps / seconds - 1) < 0.01


@pytest.mark.parametrize("change", ["longer", "shorter", "tail", "other", "sglang"])
def test_a_server_that_reads_another_prompt_is_refused(server: FakeServer, change: str) -> None:
    def respond(body: Body, _: int) -> Body:
        reply = completion(body)
        ids = reply["prompt_token_ids"]
        at = ids.index(SPECIAL.video_pad)
        if change == "longer":
            ids.insert(at, SPECIAL.video_pad)  # a resized frame
        elif change == "shorter":
            del ids[at]
        elif change == "tail":
            ids.append(5)  # another generation prompt
        else:
            ids[3] += 1  # another system message
        if change == "sglang":
            reply["choices"][0]["prompt_token_ids"] = reply.pop("prompt_token_ids")
        return reply

    server.respond = respond
    with pytest.raises(RolloutError, match="the server's prompt has") as error:
        make_engine(server).generate([request(VIDEO, 4)])
    count = len(VIDEO.input_ids) + {"longer": 1, "shorter": -1, "tail": 1}.get(change, 0)
    assert f"has {count} tokens, ours {len(VIDEO.input_ids)} (18 of them media)" in str(error.value)
    assert ("differ from token 3 on" in str(error.value)) is (change in ("other", "sglang"))


def test_a_refused_server_is_left_at_once(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    under_way = threading.Barrier(3)

    def respond(body: Body, _: int) -> Reply:
        under_way.wait(PATIENCE)
        if doomed(body):
            return Reply(body={**completion(body), "prompt_token_ids": [1]})
        return Reply(body=completion(body), delay=60.0)

    server.respond = respond
    with pytest.raises(RolloutError, match="the server's prompt has 1 tokens"):
        make_engine(server, retries=0).generate([request(TEXT, 2), request(VIDEO, 1)])
    wait_until(lambda: server.cut_off == 2)
    gc.collect()
    assert caplog.records == []  # asyncio logs what a task left behind


def test_media_are_encoded_once_for_each_branch(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[object] = []
    monkeypatch.setattr(
        "videor1.rollout.server.engine.media_part", lambda *args: encoded.append(args[1]) or media_part(*args)
    )
    make_engine(server).generate([request(VIDEO, 3, 2)])
    assert encoded == [None, (5, 0, 3, 1, 4, 2)]
    assert sum(map(is_shuffled, server.asked)) == 2


# Order


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_than_concurrency_requests_are_in_flight(server: FakeServer, concurrency: int) -> None:
    server.respond = lambda body, _: Reply(body=completion(body), delay=0.03)
    rollout = make_engine(server, concurrency=concurrency).generate([request(VIDEO, 4, 2), request(TEXT, 4)])
    assert server.most_in_flight == concurrency
    assert (len(server.asked), rollout.failed) == (10, {})


def test_ordered_answers_are_asked_for_first_then_the_shuffled_ones_that_matter(server: FakeServer) -> None:
    maybe, surely = Judge(None), Judge(None, True)
    other = dataclasses.replace(VIDEO, draw=9)
    make_engine(server, concurrency=1).generate([request(VIDEO, 1, 1, maybe), request(other, 1, 1, surely)])
    seeds = [derive_seed(7, *names) % 2**31 for names in (("ordered", 1, 0), ("ordered", 9, 0), ("shuffled", 9, 0))]
    assert [body["seed"] for body in server.asked[:3]] == seeds
    assert len(server.asked) == 4


def test_shuffled_answers_that_cannot_matter_are_never_asked_for(server: FakeServer) -> None:
    judge = Judge(None, None, False)
    rollout = make_engine(server, concurrency=1).generate([request(VIDEO, 2, 3, judge)])
    assert not any(map(is_shuffled, server.asked))
    assert len(judge.ordered) == len(server.asked) == 2
    assert (rollout.groups[0].shuffled, rollout.groups[0].shuffled_asked) == ((), 3)
    stats = rollout.stats
    assert (stats.shuffled_asked, stats.shuffled_skipped, stats.shuffled_stopped) == (3, 3, 0)


def test_shuffled_answers_in_flight_are_stopped_once_they_cannot_matter(server: FakeServer) -> None:
    under_way = threading.Barrier(3)  # both shuffled rows and the ordered one

    def respond(body: Body, _: int) -> Reply:
        under_way.wait(PATIENCE)
        return Reply(body=completion(body), delay=2 * PATIENCE if is_shuffled(body) else 0.0)

    server.respond = respond
    judge = Judge(None, False)
    started = time.monotonic()
    rollout = make_engine(server, concurrency=3).generate([request(VIDEO, 1, 4, judge)])
    assert time.monotonic() - started < PATIENCE
    stats = rollout.stats
    assert (stats.shuffled_asked, stats.shuffled_skipped, stats.shuffled_stopped) == (4, 2, 2)
    assert (len(rollout.groups[0].ordered), rollout.groups[0].shuffled, rollout.failed) == (1, (), {})
    assert judge.shuffled == []
    wait_until(lambda: server.cut_off == 2)  # so that the server stops too
    assert len(server.asked) == 3


def test_shuffled_answers_that_ended_before_are_kept(server: FakeServer) -> None:
    ended = threading.Event()

    def respond(body: Body, _: int) -> Body:
        if is_shuffled(body):
            ended.set()
        else:
            ended.wait(PATIENCE)
            time.sleep(0.2)
        return completion(body)

    server.respond = respond
    judge = Judge(None, False)
    rollout = make_engine(server, concurrency=2).generate([request(VIDEO, 1, 1, judge)])
    assert len(rollout.groups[0].shuffled) == len(judge.shuffled) == 1
    assert (rollout.stats.shuffled_skipped, rollout.stats.shuffled_stopped) == (0, 0)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


# Failures


def log_probs(value: float) -> Body:
    return {"content": [{"logprob": value}]}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


def doomed(body: Body) -> bool:
    """Whether a request is one of VIDEO's."""
    return received_media(body) is not None


FAILURES: dict[str, tuple[Callable[[Body], Reply | Body], int, str]] = {
    "400": (lambda b: Reply(400, {"error": {"message": "context length is 8"}}), 1, "HTTP 400: .*context length is 8"),
    "404": (lambda b: Reply(404, "no such model"), 1, "HTTP 404: no such model"),
    "429": (lambda b: Reply(429, "slow down"), 3, "HTTP 429: slow down"),
    "500": (lambda b: Reply(500, "engine dead"), 3, "HTTP 500: engine dead"),
    "reset": (lambda b: Reply(body=None), 3, "the connection failed"),
    "timeout": (lambda b: Reply(body=completion(b), delay=30.0), 3, "no answer within 1 s"),
    "not JSON": (lambda b: Reply(body='{"choices": [{"mess'), 1, "not JSON"),
    "not an object": (lambda b: Reply(body=[1, 2]), 1, r"one choice, got \[1, 2\]"),
    "no choices": (lambda b: {"choices": []}, 1, "one choice"),
    "choices null": (lambda b: {"choices": None}, 1, "one choice"),
    "two choices": (lambda b: {"choices": completion(b)["choices"] * 2}, 1, "one choice"),
    "a choice that is none": (lambda b: {"choices": ["red"]}, 1, "one choice"),
    "aborted": (lambda b: completion(b, finish_reason="abort"), 1, "finish_reason 'abort'"),
    "no end": (lambda b: completion(b, finish_reason=None), 1, "finish_reason None"),
    "empty": (lambda b: completion(b, finish_reason="length", token_ids=[]), 1, "no tokens"),
    "words for ids": (lambda b: completion(b, token_ids=["red"]), 1, "expected token ids"),
    "negative ids": (lambda b: completion(b, token_ids=[-1]), 1, "expected token ids"),
    "no text": (lambda b: completion(b, token_ids=None, message={"content": None}), 1, "text or token_ids"),
    "an id beyond the vocabulary": (lambda b: completion(b, token_ids=[5, len(TOKENIZER)]), 1, "expected token ids"),
    "a huge id": (lambda b: completion(b, token_ids=[10**18]), 1, "expected token ids"),
    "a boolean id": (lambda b: completion(b, token_ids=[True, SPECIAL.eos]), 1, "expected token ids"),
    "too many tokens": (lambda b: completion(b, token_ids=[5] * 65, finish_reason="length"), 1, "65 tokens, of 64"),
    "too many with the end": (lambda b: completion(b, token_ids=[5] * 64), 1, "65 tokens, of 64"),
    "half an emoji": (lambda b: completion(b, token_ids=None, message={"content": "\ud83d"}), 1, "cannot encode"),
    "words for the prompt": (lambda b: completion(b) | {"prompt_token_ids": ["a"]}, 1, "the prompt's token ids"),
    "a positive log-prob": (lambda b: completion(b, logprobs=log_probs(0.5)), 1, "expected log-probs"),
    "a log-prob of NaN": (lambda b: completion(b, logprobs=log_probs(math.nan)), 1, "expected log-probs"),
    "a log-prob of -Inf": (lambda b: completion(b, logprobs=log_probs(-math.inf)), 1, "expected log-probs"),
    "a boolean log-prob": (lambda b: completion(b, logprobs=log_probs(False)), 1, "expected log-probs"),
    "a log-prob without bound": (lambda b: completion(b, logprobs=log_probs(-(10**400))), 1, "expected log-probs"),
    "deep nesting": (lambda b: Reply(body="[" * 100_000), 1, "nested too deeply"),
    "deep nesting that parses": (lambda b: completion(b, finish_reason=nested(500)), 1, "finish_reason"),
    "a huge integer": (lambda b: Reply(body='{"choices": ' + "9" * 5000 + "}"), 1, "not JSON"),
    "bad UTF-8": (lambda b: Reply(body=b'{"choices": "\xff\xfe"}'), 1, "not JSON"),
    "an encoding that is none": (
        lambda b: Reply(500, "dead", headers={"Content-Type": "text/plain; charset=hex"}),
        3,
        "HTTP 500: dead",
    ),
    "a large body": (lambda b: Reply(body="[" + "0," * 2_500_000 + "0]"), 1, "more than [0-9]+ bytes"),
    "a large error": (lambda b: Reply(400, "x" * 5_000_000), 1, "more than [0-9]+ bytes"),
    "a bomb": (
        lambda b: Reply(body=gzip.compress(bytes(50_000_000)), headers={"Content-Encoding": "gzip"}),
        1,
        "is compressed",
    ),
    "a redirect": (
        lambda b: Reply(307, "", headers={"Location": "http://127.0.0.2:9/v1/chat/completions"}),
        1,
        "redirects to another host, http://127.0.0.2:9/",
    ),
    "log-probs": (lambda b: completion(b, logprobs={"content": [None]}), 1, "expected log-probs"),
    "vision": (lambda b: completion(b, token_ids=[5, SPECIAL.video_pad, SPECIAL.eos]), 1, r"holds <\|video_pad\|>"),
    "after the end": (lambda b: completion(b, token_ids=[5, SPECIAL.pad, 5, SPECIAL.eos]), 1, "goes on after"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_row_that_fails_fails_its_group_alone(server: FakeServer, kind: str) -> None:
    fail, attempts, reason = FAILURES[kind]
    server.respond = lambda body, _: fail(body) if doomed(body) else completion(body)
    timeout = 1.0 if kind == "timeout" else PATIENCE
    rollout = make_engine(server, concurrency=2, timeout=timeout).generate([request(VIDEO, 1), request(TEXT, 3)])
    assert rollout.groups[0] is None
    assert len(rollout.groups[1].ordered) == 3
    assert list(rollout.failed) == [0]
    assert re.search("ordered answer 1 of 1: .*" + reason, rollout.failed[0]), rollout.failed
    assert sum(map(doomed, server.asked)) == attempts
    assert rollout.stats.retries == attempts - 1


@pytest.mark.parametrize("kind", ["429", "500", "reset", "timeout"])
def test_what_passes_is_tried_again(server: FakeServer, kind: str) -> None:
    fail, _, _ = FAILURES[kind]
    server.respond = lambda body, attempt: fail(body) if doomed(body) and not attempt else completion(body)
    timeout = 1.0 if kind == "timeout" else PATIENCE
    rollout = make_engine(server, timeout=timeout).generate([request(VIDEO, 2), request(TEXT, 1)])
    assert rollout.failed == {}
    assert rollout.stats.retries == 2
    assert len(server.asked) == 5


def test_a_shuffled_row_that_fails_fails_its_group(server: FakeServer) -> None:
    server.respond = lambda body, _: Reply(400, "no") if is_shuffled(body) else completion(body)
    rollout = make_engine(server, concurrency=1).generate([request(VIDEO, 2, 3), request(TEXT, 2)])
    assert [g is None for g in rollout.groups] == [True, False]
    assert rollout.failed == {0: "shuffled answer 1 of 3: HTTP 400: no"}
    assert sum(map(is_shuffled, server.asked)) == 1  # the rest of a failed group is not asked for
    assert (rollout.stats.shuffled_skipped, rollout.stats.shuffled_stopped) == (2, 0)


def test_rows_of_a_failed_group_are_not_asked_for(server: FakeServer) -> None:
    server.respond = lambda body, _: Reply(400, "no") if doomed(body) else completion(body)
    rollout = make_engine(server, concurrency=2).generate([request(VIDEO, 40), request(TEXT, 3)])
    assert rollout.groups[0] is None
    assert sum(map(doomed, server.asked)) <= 2
    assert len(rollout.groups[1].ordered) == 3


def test_a_call_of_which_nothing_is_left_raises(server: FakeServer) -> None:
    server.respond = lambda body, _: Reply(503, "loading")
    with pytest.raises(RolloutError) as error:
        make_engine(server).generate([request(VIDEO, 2), request(TEXT, 2)])
    message = str(error.value)
    assert message.startswith(f"{server.url}: none of 2 prompts was answered. The first: ordered answer ")
    assert "of 2: HTTP 503: loading" in message
    assert f"tried 3 times at most, {PATIENCE:g} s each" in message
    assert f"curl {server.url}/models" in message


@pytest.mark.parametrize("model", [None, "tiny"])
def test_a_server_that_is_not_there_raises(model: str | None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with FakeServer() as unused, pytest.raises(RolloutError, match=url):
        make_engine(unused, url=url, model=model, retries=0).generate([request(TEXT, 2)])


def test_a_server_that_dies_in_the_middle_leaves_what_it_answered(server: FakeServer) -> None:
    def respond(body: Body, _: int) -> Reply | Body:
        if doomed(body):
            threading.Thread(target=server.shutdown).start()
            server.socket.close()
            return Reply(body=None)
        return completion(body)

    server.respond = respond
    engine = make_engine(server, concurrency=1, retries=1, model="tiny")
    rollout = engine.generate([request(TEXT, 2), request(VIDEO, 2), request(IMAGE, 2)])
    assert [g is None for g in rollout.groups] == [False, True, True]
    assert sorted(rollout.failed) == [1, 2]
    assert all("the connection failed" in reason for reason in rollout.failed.values())
    with pytest.raises(RolloutError, match="the connection failed"):
        engine.generate([request(TEXT, 1)])


def test_the_one_model_is_taken_and_several_are_refused(server: FakeServer) -> None:
    engine = make_engine(server)
    engine.generate([request(TEXT, 1)])
    assert server.asked[0]["model"] == "tiny"
    server.models = ["a", "b"]
    engine.generate([request(TEXT, 1)])  # asked once
    with pytest.raises(RolloutError, match=r"2 models \(a, b\): name one"):
        make_engine(server).generate([request(TEXT, 1)])


def test_no_requests_ask_nothing(server: FakeServer) -> None:
    rollout = make_engine(server).generate([])
    assert (rollout.groups, rollout.failed, server.asked) == ([], {}, [])


# Weights


def test_weights_are_handed_over_whole_and_the_caches_dropped(server: FakeServer, tmp_path: Path) -> None:
    events: list[str] = []

    def save(folder: Path) -> None:
        assert folder == tmp_path / "next"
        folder.mkdir()
        (folder / "model.safetensors").write_text(f"version {len(events)}")
        events.append("save")

    def control(path: str, body: Body) -> Reply | Body:
        events.append(path)
        if path != "/collective_rpc":
            return Reply(body={"success": True} if "prefix" in path else "")
        folder = Path(body["kwargs"]["weights_path"])
        events.append((folder / "model.safetensors").read_text())
        assert folder.parent == tmp_path
        assert [p.name for p in tmp_path.iterdir()] == [folder.name]  # the whole of it, and nothing else
        assert body["method"] == "reload_weights"
        return {"results": [None]}

    server.control = control
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "half").touch()  # a run was killed
    engine = make_engine(server, tmp_path, save_weights=save)
    handed = []
    for _ in range(2):
        engine.weights_changed()
        handed.append(server.controlled[-3][1]["kwargs"]["weights_path"])
    after = ["/reset_prefix_cache?reset_running_requests=true", "/reset_encoder_cache"]
    assert events == ["save", "/collective_rpc", "version 0", *after, "save", "/collective_rpc", "version 5", *after]
    assert handed[0] != handed[1]  # a server could take the same path for the same weights
    assert [str(p) for p in tmp_path.iterdir()] == handed[1:]


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache"])
@pytest.mark.parametrize("status", [404, 500])
def test_a_hand_over_that_fails_is_an_error(server: FakeServer, tmp_path: Path, path: str, status: int) -> None:
    server.control = lambda asked, body: Reply(status, "what?") if asked.startswith(path) else {}
    with pytest.raises(RolloutError, match=f"POST {path}.*: HTTP {status}: what.*VLLM_SERVER_DEV_MODE=1"):
        make_engine(server, tmp_path, retries=0).weights_changed()
    assert server.controlled[-1][0].startswith(path)  # nothing follows


def test_a_cache_that_stays_is_an_error(server: FakeServer, tmp_path: Path) -> None:
    server.control = lambda path, body: {"success": False} if "prefix" in path else {}
    with pytest.raises(RolloutError, match=r"reset_prefix_cache.*refused: \{\"success\": false\}"):
        make_engine(server, tmp_path).weights_changed()


def test_weights_that_cannot_be_written_are_an_error_and_never_loaded(server: FakeServer, tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        folder.mkdir()
        raise OSError("no space left")

    with pytest.raises(RolloutError, match="no space left"):
        make_engine(server, tmp_path, save_weights=save).weights_changed()
    assert server.controlled == []


def test_a_policy_that_does_not_change_is_not_handed_over(server: FakeServer, tmp_path: Path) -> None:
    make_engine(server, tmp_path / "sync", sync="none").weights_changed()
    assert server.controlled == []
    assert not (tmp_path / "sync").exists()


# The engine itself


def test_nothing_is_left_behind(server: FakeServer, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    engine = make_engine(server, tmp_path)
    engine.generate([request(VIDEO, 3, 2), request(TEXT, 2)])
    engine.weights_changed()
    engine.close()
    engine.close()
    wait_until(lambda: set(threading.enumerate()) <= before)  # the server's threads end with their connections


def test_it_works_where_an_event_loop_runs(server: FakeServer) -> None:
    async def notebook() -> int:
        return len(make_engine(server).generate([request(TEXT, 2)]).groups[0].ordered)

    assert asyncio.run(notebook()) == 2


def test_an_interrupt_stops_the_requests(server: FakeServer) -> None:
    class Interrupting(Judge):
        @property
        def needed(self) -> bool | None:
            if self.ordered:
                raise KeyboardInterrupt
            return None

    server.respond = lambda body, _: Reply(body=completion(body), delay=2 * PATIENCE if is_shuffled(body) else 0.2)
    with pytest.raises(KeyboardInterrupt):
        make_engine(server).generate([request(VIDEO, 1, 2, Interrupting())])
    wait_until(lambda: server.cut_off == 2)


def test_the_key_comes_from_the_caller_or_the_environment(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    make_engine(server).generate([request(TEXT, 1)])
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    make_engine(server).generate([request(TEXT, 1)])
    make_engine(server, api_key="given").generate([request(TEXT, 1)])
    assert server.keys == ["Bearer EMPTY", "Bearer from-environment", "Bearer given"]


def test_a_missing_client_names_the_extra(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[server\]"'):
        make_engine(server)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000"}, "http://host:8000/v1, got 'localhost:8000'"),
        ({"sync": "vlm"}, "did you mean 'vllm'"),
        ({"shuffle_unit": "patch"}, "shuffle_unit: expected one of 'frame', 'temporal_patch'"),
        ({"timeout": 0}, "timeout: expected a finite number above 0"),
        ({"retries": -1}, "retries: expected a finite number of 0 or more"),
        ({"concurrency": 0}, "concurrency: expected a finite number of 1 or more"),
    ],
)
def test_options_that_cannot_work_are_refused(server: FakeServer, changes: Body, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(server, **changes)
