"""What a judge is asked, and which replies are a score."""

import asyncio
import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_server import Body, FakeServer, Reply
from hypothesis import given
from hypothesis import strategies as st
from judging import asked, judge_config, judge_server, reply
from raw_server import CHUNKS, OK, Cases, RawServer, forever, once

from videor1.config import JudgeConfig
from videor1.errors import ConfigError
from videor1.rewards.background import AttemptFailed
from videor1.rewards.llm_judge import LLMJudge, read_score, request_key
from videor1.types import Message, Sample

SAMPLE = Sample(0, "0", "What happens?", "text", "free-form", "<answer> a {answer} dog </answer>")

SCORES = {
    "<score>0.5</score>": 0.5,
    "It is right: <score> 1 </score> .": 1.0,
    "<score>1</score> was said, but no: <score>0</score>": 0.0,
    "<think><score>x</score></think>\n<score>.25</score>": 0.25,
    "0.75": 0.75,
    " 1.0\n": 1.0,
    '{"score": 0.5}': 0.5,
    '{"why": "<b>", "score": 1}': 1.0,
    '```json\n{"score": 1e-1}\n```': 0.1,
    "```\n0.5\n```": None,
    '<score>0.5</score> {"score": 1}': 0.5,
    "<score>2</score>": None,
    "<score>-0.1</score>": None,
    "<score>-0</score>": None,
    "<score>1.0000001</score>": None,
    "<score>NaN</score>": None,
    "<score>nan</score>": None,
    "<score>inf</score>": None,
    "<score>0,5</score>": None,
    "<score>1/2</score>": None,
    "<score>٠</score>": None,
    "<score></score>": None,
    "<score>0.5": None,
    "<score>1</score> and then <score>high</score>": None,
    "I give 0.5": None,
    "": None,
    "1e999": None,
    "00.5": 0.5,
    '{"score": NaN}': None,
    '{"score": Infinity}': None,
    '{"score": true}': None,
    '{"score": "1"}': None,
    '{"score": null}': None,
    '{"score": 1.5}': None,
    '{"score": [1]}': None,
    "[1]": None,
    "[" * 100000: None,
    "9" * 5000: None,
    '{"score": ' + "9" * 5000 + "}": None,
}


@pytest.mark.parametrize(("text", "score"), SCORES.items(), ids=lambda value: str(value)[:30])
def test_the_rule_for_scores(text: str, score: float | None) -> None:
    if score is None:
        with pytest.raises(AttemptFailed, match="expected a score from 0 to 1") as failed:
            read_score(text)
        assert len(str(failed.value)) < 1000
    else:
        assert read_score(text) == score


@given(st.text() | st.text('<>/score0.1e-9 \n{}":', max_size=40) | st.floats().map(lambda x: f"<score>{x}</score>"))
def test_any_text_is_a_score_or_a_failure(text: str) -> None:
    with contextlib.suppress(AttemptFailed):
        assert 0 <= read_score(text) <= 1


def make(**options: Any) -> LLMJudge:
    return LLMJudge(JudgeConfig(**{"url": "http://127.0.0.1:9/v1", "model": "m"} | options))


def test_the_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text('{question}|{answer}|{solution}|{"score": 0.5} \\frac{a}{b} {other}|{answer}é')
    judge = make(prompt_file=str(file), max_tokens=7)
    body = judge.request(SAMPLE, "{solution} \ud800 {question}")
    assert asked(body) == (
        'What happens?|{solution} ? {question}|a {answer} dog|{"score": 0.5} \\frac{a}{b} {other}|'
        "{solution} ? {question}é"
    )
    assert {name: body[name] for name in body if name != "messages"} == {
        "model": "m",
        "temperature": 0,
        "max_completion_tokens": 7,
    }
    choice = Sample(0, "0", "Which?", "text", "multiple choice", "<answer>A</answer>", options=("A. x", "B. y"))
    assert asked(judge.request(choice, "B")).startswith("Which?\nA. x\nB. y|B|A|")
    built_in = asked(make().request(SAMPLE, "a cat"))
    assert all(text in built_in for text in ("What happens?", "a {answer} dog", "a cat", "<score>0.5</score>"))


def test_the_key_is_of_all_that_the_score_depends_on(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("{answer}")
    judges = [make(), make(model="other"), make(max_tokens=5), make(prompt_file=str(tmp_path / "p"))]
    keys = [request_key(judge.request(SAMPLE, "a cat")) for judge in judges]
    keys += [request_key(judges[0].request(SAMPLE, "a cap"))]
    keys += [request_key(judges[0].request(Sample(**{**vars(SAMPLE), "problem": "Why?"}), "a cat"))]
    keys += [request_key(judges[0].request(Sample(**{**vars(SAMPLE), "solution": "<answer>x</answer>"}), "a cat"))]
    for earlier in ("Milk.", "Oil."):
        turns = ("user", "What is poured?"), ("assistant", earlier), ("user", SAMPLE.problem)
        sample = Sample(**{**vars(SAMPLE), "messages": tuple(Message(*turn) for turn in turns)})
        assert f"assistant: {earlier}\nuser: {SAMPLE.problem}" in asked(judges[0].request(sample, "a cat"))
        keys += [request_key(judges[0].request(sample, "a cat"))]
    assert len(set(keys)) == len(keys)
    free = [make(url="http://127.0.0.1:10/v1"), make(timeout=5.0), make(retries=1), make(concurrency=1)]
    assert {request_key(judge.request(SAMPLE, "a cat")) for judge in free} == {keys[0]}


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"model": None}, "", r"reward\.judge\.model: expected the model's name"),
        ({"url": "host:8000"}, "", r"reward\.judge\.url: expected a URL such as"),
        ({"problem_types": ["open ended"]}, "", "got 'open ended'; did you mean 'open-ended'"),
        ({"api_key_env": "NO_SUCH_KEY"}, "", "the environment variable 'NO_SUCH_KEY' is not set"),
        ({"prompt_file": "nowhere.txt"}, "", r"reward\.judge\.prompt_file: nowhere\.txt cannot be read"),
        ({"prompt_file": "p"}, "Grade it.", "expected a text with {answer}"),
        ({"prompt_file": "p"}, "{answer} {solutoin}", r"unknown placeholder {solutoin}; did you mean {solution}"),
        ({"prompt_file": "p"}, b"{answer}\xff", "cannot be read as text"),
        ({"prompt_file": "p"}, "{answer}" + "x" * 2**20, "at most 1,048,576 bytes"),
    ],
)
def test_wrong_options(
    options: dict[str, Any], text: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=message):
        make(**options)


async def failures(judges: list[LLMJudge]) -> list[str]:
    async def one(judge: LLMJudge) -> str:
        try:
            return f"none: {await judge.ask(judge.request(SAMPLE, 'x'))}"
        except AttemptFailed as error:
            return str(error)
        finally:
            await judge.close()

    return await asyncio.gather(*map(one, judges))


def ask(server: FakeServer, **options: Any) -> str:
    return asyncio.run(failures([LLMJudge(judge_config(server, **options))]))[0]


def test_the_key_of_the_server_is_of_the_variable_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-general")
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with judge_server() as server:
        server.respond = lambda body, attempt: Reply(401, f"wrong key {server.keys[-1]}")
        told = ask(server, api_key_env="JUDGE_KEY")
        assert told == "HTTP 401: wrong key Bearer ***"
        ask(server)
        monkeypatch.delenv("OPENAI_API_KEY")
        ask(server)
    assert server.keys == ["Bearer sk-secret", "Bearer sk-general", "Bearer EMPTY"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (reply("none"), "expected a score from 0 to 1"),
        (reply("<score>1</score>", finish_reason="length"), "was cut off"),
        (reply("x", message=None), "expected a chat completion"),
        ({"choices": []}, "expected a chat completion"),
        ({"choices": [{"message": {"content": [1]}}]}, "expected a chat completion"),
        ([], "expected a chat completion"),
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100000, "nested too deeply"),
        ("x" * (2**20 + 1), "more than 1048576 bytes"),
    ],
)
def test_replies_that_are_no_score(body: Body, reason: str) -> None:
    with judge_server() as server:
        server.respond = lambda _, attempt: Reply(body=body)
        assert reason in ask(server)


@pytest.mark.parametrize(("status", "final"), [(400, True), (404, True), (429, False), (500, False), (408, False)])
def test_what_is_refused_is_not_asked_again(status: int, final: bool) -> None:
    async def failure(judge: LLMJudge) -> AttemptFailed:
        try:
            await judge.ask(judge.request(SAMPLE, "x"))
        except AttemptFailed as error:
            return error
        finally:
            await judge.close()
        raise AssertionError

    with judge_server() as server:
        server.respond = lambda _, attempt: Reply(status, "no", headers={"retry-after": "7" if final else "1e9"})
        error = asyncio.run(failure(LLMJudge(judge_config(server))))
    assert (error.final, error.wait) == (final, 7.0 if final else None)
    assert len(server.asked) == 1


def test_hostile_servers_cost_bounded_time() -> None:
    moved = b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.2:9/v1\r\nContent-Length: 0\r\n\r\n"
    cases: Cases = {
        "slow headers": (forever(b"HTTP/1.1 200 OK\r\n", b"a", 0.05), "no answer within 0.5 s"),
        "an endless body": (forever(CHUNKS, b"1000\r\n" + b"x" * 4096 + b"\r\n"), "bytes|no answer within"),
        "a dripping body": (forever(OK + b"Content-Length: 9999\r\n\r\n[", b" ", 0.05), "no answer within 0.5 s"),
        "a redirect": (once(moved), "name that in reward.judge.url"),
        "nothing": (lambda connection: time.sleep(2), "no answer within 0.5 s|connection failed"),
        "no HTTP": (once(b"hello\r\n\r\n"), "the connection failed"),
    }
    with RawServer(cases) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_address[1]}/{number}/v1" for number in range(len(cases))]
        started = time.perf_counter()
        told = asyncio.run(failures([make(url=url, timeout=0.5) for url in urls]))
        assert time.perf_counter() - started < 3
        server.shutdown()
    for (name, (_, reason)), message in zip(cases.items(), told, strict=True):
        assert any(words in message for words in reason.split("|")), (name, message)
