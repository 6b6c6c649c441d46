"""A judge on this machine, and options that ask it."""

from __future__ import annotations

import contextlib
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from fake_server import Body, FakeServer, Reply

from videor1.config import JudgeConfig
from videor1.training.tgrpo import Trainer


def reply(text: str, **changes: Any) -> Body:
    """A chat completion that says this."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | changes]}


def asked(body: Body) -> str:
    """What a request asks."""
    return body["messages"][0]["content"]


def by_lot(text: str) -> float:
    """0, 0.25, ... 1 by every letter of a text."""
    return zlib.crc32(text.encode()) % 5 / 4


def answer_of(body: Body) -> str:
    """The answer that the built-in prompt quotes."""
    match = re.search(r"Answer to grade[^\n]*\n(.*)\n\n1 means", asked(body), re.DOTALL)
    assert match, body
    return match[1]


@contextlib.contextmanager
def judge_server(score: Callable[[Body], float] | None = None, delay: float = 0.0) -> Iterator[FakeServer]:
    """A server whose model gives each answer a score: ``by_lot`` of the answer, if not told otherwise."""
    with FakeServer() as server:
        of = score or (lambda body: by_lot(answer_of(body)))
        server.respond = lambda body, attempt: Reply(body=reply(f"It says so. <score>{of(body)}</score>"), delay=delay)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def judge_config(server: FakeServer, **changes: Any) -> JudgeConfig:
    """A judge of every problem type."""
    types = ["multiple choice", "OCR", "numerical", "regression", "free-form"]
    return JudgeConfig(**{"url": server.url, "model": "judge", "problem_types": types, "retries": 0} | changes)


def judge_flags(server: FakeServer, **changes: Any) -> dict[str, Any]:
    """The same as options of a run in a test."""
    given = {"url": server.url, "model": "judge", "problem_types": "multiple choice,OCR,numerical", "retries": 0}
    return {f"reward__judge__{name}": value for name, value in (given | changes).items()}


def tagged(run: Trainer) -> Trainer:
    """A run whose model writes its answers in tags."""
    decode = run.model.tokenizer.decode
    run.model.tokenizer.decode = lambda ids, **options: (
        f"<answer>{decode(ids, **options)}</answer>" if options.get("skip_special_tokens") else decode(ids, **options)
    )
    return run
