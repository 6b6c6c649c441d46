"""Servers that fail: a row fails its group alone, what passes is tried again, and nothing that came is trusted."""

import gc
import gzip
import math
import re
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from asking import IMAGE, TEXT, VIDEO, ask_once, has_media, is_shuffled, make_engine, request, wait_until
from fake_server import SPECIAL, TOKENIZER, Body, FakeServer, Reply, completion
from patience import PATIENCE
from tiny import make_prompt

from videor1.rollout.protocol import Rollout, RolloutError

Fail = Callable[[Body], Reply | Body]


def log_probs(value: Any) -> Fail:
    return lambda body: completion(body, logprobs={"content": [value if value is None else {"logprob": value}]})


def ids(*values: Any, **changes: Any) -> Fail:
    return lambda body: completion(body, token_ids=list(values), **changes)


def text(content: str | None) -> Fail:
    return lambda body: completion(body, token_ids=None, message={"content": content})


def reply(status: int, body: Any, **headers: str) -> Fail:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: Reply(status, body, headers=named) if headers else Reply(status, body)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


PASSING: dict[str, tuple[Fail, str]] = {
    "429": (reply(429, "slow down"), "HTTP 429: slow down"),
    "500": (reply(500, "engine dead"), "HTTP 500: engine dead"),
    "reset": (reply(200, None), "the connection failed"),
    "no encoding": (reply(500, "dead", Content_Type="text/plain; charset=hex", retry_after_ms="1"), "HTTP 500: dead"),
}
FINAL: dict[str, tuple[Fail, str]] = {
    "400": (reply(400, {"error": {"message": "context length is 8"}}), "HTTP 400: .*context length is 8"),
    "404": (reply(404, "no such model"), "HTTP 404: no such model"),
    "not JSON": (reply(200, '{"choices": [{"mess'), "not JSON"),
    "not an object": (reply(200, [1, 2]), r"one choice, got \[1, 2\]"),
    "no choices": (lambda b: {"choices": []}, "one choice"),
    "choices null": (lambda b: {"choices": None}, "one choice"),
    "two choices": (lambda b: {"choices": completion(b)["choices"] * 2}, "one choice"),
    "a choice that is none": (lambda b: {"choices": ["red"]}, "one choice"),
    "aborted": (lambda b: completion(b, finish_reason="abort"), "finish_reason 'abort'"),
    "no end": (lambda b: completion(b, finish_reason=None), "finish_reason None"),
    "empty": (ids(finish_reason="length"), "no tokens"),
    "words for ids": (ids("red"), "expected token ids"),
    "negative ids": (ids(-1), "expected token ids"),
    "an id beyond the vocabulary": (ids(5, len(TOKENIZER)), "expected token ids"),
    "a huge id": (ids(10**18), "expected token ids"),
    "a boolean id": (ids(True, SPECIAL.eos), "expected token ids"),
    "too many tokens": (ids(*[5] * 65, finish_reason="length"), "65 tokens, of 64"),
    "too many with the end": (ids(*[5] * 64), "65 tokens, of 64"),
    "vision": (ids(5, SPECIAL.video_pad, SPECIAL.eos), r"holds <\|video_pad\|>"),
    "after the end": (ids(5, SPECIAL.pad, 5, SPECIAL.eos), "goes on after"),
    "no text": (text(None), "text or token_ids"),
    "half an emoji": (text("\ud83d"), "cannot encode"),
    "words for the prompt": (lambda b: completion(b) | {"prompt_token_ids": ["a"]}, "the prompt's token ids"),
    "a positive log-prob": (log_probs(0.5), "expected log-probs"),
    "a log-prob of NaN": (log_probs(math.nan), "expected log-probs"),
    "a log-prob of -Inf": (log_probs(-math.inf), "expected log-probs"),
    "a boolean log-prob": (log_probs(False), "expected log-probs"),
    "a log-prob without bound": (log_probs(-(10**400)), "expected log-probs"),
    "no log-prob": (log_probs(None), "expected log-probs"),
    "deep nesting": (reply(200, "[" * 100_000), "nested too deeply"),
    "deep nesting that parses": (lambda b: completion(b, finish_reason=nested(500)), "finish_reason"),
    "a huge integer": (reply(200, '{"choices": ' + "9" * 5000 + "}"), "not JSON"),
    "bad UTF-8": (reply(200, b'{"choices": "\xff\xfe"}'), "not JSON"),
    "a large body": (reply(200, "[" + "0," * 2_500_000 + "0]"), "more than [0-9]+ bytes"),
    "a large error": (reply(400, "x" * 5_000_000), "more than [0-9]+ bytes"),
    "a bomb": (reply(200, gzip.compress(bytes(50_000_000)), Content_Encoding="gzip"), "is compressed"),
    "a redirect": (reply(307, "", Location="http://127.0.0.2:9/v1"), "redirects to another host, http://127.0.0.2:9/"),
}


def ask_all(server: FakeServer, kinds: Iterable[str], times: int = 99) -> Rollout:
    """One row of each kind, which fails so often, and of three rows that do not fail."""
    prompts = [make_prompt(None, kind, draw=i) for i, kind in enumerate(kinds)]
    failures = PASSING | FINAL

    def respond(body: Body, attempt: int) -> Reply | Body:
        kind = body["messages"][0]["content"][0]["text"].partition("\n")[0]
        return failures[kind][0](body) if kind in failures and attempt < times else completion(body)

    server.respond = respond
    return make_engine(server, retries=1).generate([*(request(prompt, 1) for prompt in prompts), request(TEXT, 3)])


@pytest.mark.parametrize("failures", [PASSING, FINAL], ids=["passing", "final"])
def test_a_row_that_fails_fails_its_group_alone(server: FakeServer, failures: dict[str, tuple[Fail, str]]) -> None:
    rollout = ask_all(server, failures)
    assert len(rollout.groups[-1].ordered) == 3
    assert rollout.groups[:-1] == [None] * len(failures)
    told = dict(zip(failures, rollout.failed.values(), strict=True))
    unlike = {kind for kind in failures if not re.search(f"ordered answer 1 of 1: .*{failures[kind][1]}", told[kind])}
    assert {kind: told[kind] for kind in unlike} == {}
    attempts = 2 if failures is PASSING else 1
    assert set(server.attempts.values()) == {0, attempts - 1}
    assert rollout.stats.retries == len(failures) * (attempts - 1)
    if failures is PASSING:  # what passes is tried again
        server.attempts.clear()
        rollout = ask_all(server, PASSING, times=1)
        assert (rollout.failed, rollout.stats.retries) == ({}, len(PASSING))


def test_timeouts(server: FakeServer) -> None:
    server.respond = lambda body, attempt: Reply(body=completion(body), delay=0.0 if attempt else 30.0)
    with pytest.raises(RolloutError, match=r"ordered answer 1 of 1: no answer within 0\.5 s"):
        ask_once(server, timeout=0.5, retries=0, model="tiny")
    server.attempts.clear()
    rollout = make_engine(server, timeout=0.5, retries=99).generate([request(TEXT, 1)])
    assert rollout.failed == {}
    assert rollout.stats.retries >= 1


def test_a_row_that_fails_ends_its_group(server: FakeServer) -> None:
    server.respond = lambda body, _: Reply(400, "no") if is_shuffled(body) else completion(body)
    rollout = make_engine(server, concurrency=1).generate([request(VIDEO, 2, 3), request(TEXT, 2)])
    assert [g is None for g in rollout.groups] == [True, False]
    assert rollout.failed == {0: "shuffled answer 1 of 3: HTTP 400: no"}
    assert sum(map(is_shuffled, server.asked)) == 1  # the rest of a failed group is not asked for
    assert (rollout.stats.shuffled_skipped, rollout.stats.shuffled_stopped) == (2, 0)
    server.asked.clear()
    server.respond = lambda body, _: Reply(400, "no") if has_media(body) else completion(body)
    rollout = make_engine(server, concurrency=2).generate([request(VIDEO, 40), request(TEXT, 3)])
    assert rollout.groups[0] is None
    assert sum(map(has_media, server.asked)) <= 2
    assert len(rollout.groups[1].ordered) == 3


def test_a_refused_server_is_left_at_once(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    under_way = threading.Barrier(3)

    def respond(body: Body, _: int) -> Reply:
        under_way.wait(PATIENCE)
        if has_media(body):
            return Reply(body=completion(body) | {"prompt_token_ids": [1]})
        return Reply(body=completion(body), delay=60.0)

    server.respond = respond
    with pytest.raises(RolloutError, match="the server's prompt has 1 tokens"):
        make_engine(server, retries=0).generate([request(TEXT, 2), request(VIDEO, 1)])
    wait_until(lambda: server.cut_off == 2)
    gc.collect()
    assert caplog.records == []  # asyncio logs what a task left behind


def test_a_call_of_which_nothing_is_left_raises(server: FakeServer) -> None:
    server.respond = lambda body, _: Reply(503, "loading")
    with pytest.raises(RolloutError) as error:
        make_engine(server).generate([request(VIDEO, 2), request(TEXT, 2)])
    assert max(server.attempts.values()) == 2, "the third is the last"
    told = str(error.value)
    assert told.startswith(f"{server.url}: none of 2 prompts was answered. The first: ordered answer ")
    tried = f"tried 3 times at most, {PATIENCE:g} s each"
    assert all(words in told for words in ("of 2: HTTP 503: loading", tried, f"curl {server.url}/models"))

    # A server that dies in the middle leaves what it answered.
    def respond(body: Body, _: int) -> Reply | Body:
        if has_media(body):
            threading.Thread(target=server.shutdown).start()
            server.socket.close()
            return Reply(body=None)
        return completion(body)

    server.respond = respond
    engine = make_engine(server, concurrency=1, retries=0, model="tiny")
    rollout = engine.generate([request(TEXT, 2), request(VIDEO, 2), request(IMAGE, 2)])
    assert [g is None for g in rollout.groups] == [False, True, True]
    assert sorted(rollout.failed) == [1, 2]
    assert all("the connection failed" in reason for reason in rollout.failed.values())
    with pytest.raises(RolloutError, match="the connection failed"):
        engine.generate([request(TEXT, 1)])


def test_a_server_that_is_not_there_raises() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for model in (None, "tiny"):
        with FakeServer() as unused, pytest.raises(RolloutError, match=url):
            ask_once(unused, url=url, model=model, retries=0)
