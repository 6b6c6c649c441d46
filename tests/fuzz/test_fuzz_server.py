"""Replies of any content: a completion that training can use, or a failure with a reason."""

import asyncio
import json
import math
import threading
import warnings
from typing import Any

import pytest
import torch
from fake_server import SPECIAL, TOKENIZER, FakeServer, Reply, completion
from fuzzing import TEXTS, changed, check_message, damaged, fuzz
from hypothesis import strategies as st
from tiny import make_prompt

from videor1.remote.client import RequestFailed, ServerClient
from videor1.rollout import SamplingOptions
from videor1.rollout.protocol import RolloutError
from videor1.rollout.server.answer import AnswerReader
from videor1.types import Completion

PROMPT = make_prompt(None, "Two and two?")
LIMIT = 64
BODY = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Two and two?"}]}],
    "seed": 1,
    "logprobs": True,
}


def good(**changes: Any) -> dict[str, Any]:
    return completion(BODY, **changes) | {"prompt_token_ids": PROMPT.input_ids.tolist()}


GOOD = st.sampled_from(
    [good(), good(token_ids=None), good(logprobs=None), good(token_ids=None, logprobs=None, finish_reason="length")]
)


def check_completion(made: Completion) -> None:
    ids, logp = made.token_ids.tolist(), made.logp
    assert 1 <= len(ids) <= LIMIT
    assert all(0 <= i < len(TOKENIZER) for i in ids)
    assert not set(ids) & set(SPECIAL.vision)
    assert (made.token_ids.dtype, logp.dtype, len(logp)) == (torch.int64, torch.float32, len(ids))
    assert all(math.isnan(value) or -math.inf <= value <= 0 for value in logp.tolist())
    assert made.finished == (ids[-1] in (SPECIAL.eos, SPECIAL.pad)) or not made.finished
    made.text.encode()


def read(reader: AnswerReader, reply: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_completion(reader.read(reply, PROMPT))
    except (RequestFailed, RolloutError) as error:
        check_message(error)


def test_replies(fuzz_times: int) -> None:
    reader = AnswerReader(TOKENIZER, SPECIAL, SamplingOptions(LIMIT))
    assert reader.read(good(), PROMPT).finished
    with pytest.raises(RequestFailed):
        reader.read([], PROMPT)
    fuzz(250 * fuzz_times, GOOD.flatmap(changed), lambda reply: read(reader, reply))


HEADERS = st.dictionaries(
    st.sampled_from(["Content-Type", "Content-Encoding", "Location", "Retry-After", "X-Should-Retry"]),
    st.sampled_from(["application/json", "text/plain; charset=utf-16", "gzip", "http://127.0.0.2:9/v1", "/v1/models"])
    | TEXTS.map(lambda text: "".join(c for c in text if c.isascii() and c.isprintable())),
    max_size=2,
)
STATUSES = st.sampled_from([200, 200, 200, 200, 201, 204, 301, 307, 308, 400, 404, 418, 500, 503])


def test_bytes_over_http(fuzz_times: int) -> None:
    reader = AnswerReader(TOKENIZER, SPECIAL, SamplingOptions(LIMIT))
    whole = GOOD.map(lambda reply: json.dumps(reply).encode())
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    async def ask() -> Any:
        async with ServerClient(server.url, timeout=60.0, retries=0, api_key=None) as client:
            return await client.post("/chat/completions", BODY)

    def check(example: tuple[bytes, int, dict[str, str]]) -> None:
        data, status, headers = example
        server.respond = lambda body, attempt: Reply(status, data, headers=headers)
        try:
            reply = asyncio.run(ask())
        except RequestFailed as error:
            check_message(error)
            return
        read(reader, reply)

    try:
        check((json.dumps(good()).encode(), 200, {}))
        fuzz(50 * fuzz_times, st.tuples(damaged(whole), STATUSES, HEADERS), check)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
