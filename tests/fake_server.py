"""An HTTP server on this machine that answers chat completions as vLLM does, and fails as told."""

import base64
import dataclasses
import hashlib
import io
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import make_tokenizer

from videor1.model.prompts import special_ids

TOKENIZER = make_tokenizer()
SPECIAL = special_ids(TOKENIZER)
Body = dict[str, Any]


@dataclasses.dataclass
class Reply:
    """What goes back: a status and a body, after ``delay`` seconds; ``body`` None: the connection is reset."""

    status: int = 200
    body: Any = ""
    delay: float = 0.0
    headers: dict[str, str] = dataclasses.field(default_factory=lambda: {"retry-after-ms": "1"})


def received_media(body: Body) -> tuple[str, torch.Tensor, float] | None:
    """(kind, frames [F, height, width, 3], frames per second) as vLLM's loader takes them."""
    part = body["messages"][0]["content"][0]
    if part["type"] == "text":
        return None
    kind = part["type"].removesuffix("_url")
    head, _, data = part[part["type"]]["url"].partition(",")
    assert head == {"image": "data:image/png;base64", "video": "data:video/jpeg;base64"}[kind]
    frames = [np.asarray(Image.open(io.BytesIO(base64.b64decode(d, validate=True)))) for d in data.split(",")]
    fps = 0.0
    if kind == "video":
        assert body["media_io_kwargs"]["video"]["num_frames"] == -1
        assert body["mm_processor_kwargs"]["do_sample_frames"] is False
        fps = body["media_io_kwargs"]["video"]["fps"]
    assert body["mm_processor_kwargs"]["do_resize"] is False
    return kind, torch.from_numpy(np.stack(frames)), fps


def prompt_ids(body: Body) -> list[int]:
    """What the chat template makes of a request, media expanded."""
    turns, media = [], []
    for message in body["messages"]:
        content = message["content"]
        if isinstance(content, list):
            media += [part for part in content if part["type"] != "text"]
            content = [{**part, "type": part["type"].removesuffix("_url")} for part in content]
        turns.append({"role": message["role"], "content": content})
    text = TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids: list[int] = []
    given = iter(media)
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        count = 1
        if token in (SPECIAL.video_pad, SPECIAL.image_pad):
            one: Body = {"messages": [{"content": [next(given)]}]}
            _, frames, _ = received_media(body | one) or ("", torch.empty(0), 0.0)
            count = -(-len(frames) // 2) * (frames.shape[1] // 28) * (frames.shape[2] // 28)
        ids += [token] * count
    return ids


def answer_text(body: Body) -> str:
    """Of the prompt and the seed alone."""
    key = hashlib.sha256(json.dumps([body["messages"], body["seed"]]).encode()).hexdigest()[:6]
    return f"<think>{key}</think>\n<answer>red</answer>"


def completion(body: Body, **changes: Any) -> Body:
    """A chat completion as vLLM sends it; ``changes`` to its choice."""
    text = answer_text(body)
    ids = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], SPECIAL.eos]
    message = {"role": "assistant", "content": text}
    choice: Body = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": ids}
    if body["logprobs"]:
        choice["logprobs"] = {"content": [{"token": "?", "logprob": -0.5 - i} for i in range(len(ids))]}
    made = {"id": "x", "object": "chat.completion", "choices": [choice | changes]}
    return made | {"prompt_token_ids": prompt_ids(body)}


class FakeServer(ThreadingHTTPServer):
    """Keeps what it was asked. ``respond(body, attempt)`` answers a chat completion, attempt counting from 0 for each
    distinct request; ``control(path, body)`` a POST beside /v1."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.asked: list[Body] = []
        self.controlled: list[tuple[str, Body]] = []
        self.keys: list[str | None] = []
        self.models = ["tiny"]
        self.in_flight = self.most_in_flight = self.cut_off = 0
        self.attempts: dict[str, int] = {}
        self.respond: Callable[[Body, int], Reply | Body] = lambda body, attempt: completion(body)
        self.control: Callable[[str, Body], Reply | Body] = lambda path, body: {"results": [None]}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_GET(self) -> None:
        assert self.path == "/v1/models", self.path
        self._send({"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path != "/v1/chat/completions":
            server.controlled.append((self.path, body))
            self._send(server.control(self.path, body))
            return
        with server.lock:
            server.asked.append(body)
            server.keys.append(self.headers["Authorization"])
            key = json.dumps(body)
            attempt = server.attempts[key] = server.attempts.get(key, -1) + 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            reply = server.respond(body, attempt)
            if isinstance(reply, Reply):
                self._wait(reply.delay)
        finally:
            with server.lock:
                server.in_flight -= 1
        self._send(reply)

    def _wait(self, seconds: float) -> None:
        """Until then, or until the client hangs up."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            readable, _, _ = select.select([self.connection], [], [], 0.005)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                with self.server.lock:
                    self.server.cut_off += 1
                raise ConnectionError("the client hung up")

    def _send(self, reply: Reply | Body) -> None:
        if not isinstance(reply, Reply):
            reply = Reply(body=reply)
        if reply.body is None:  # a reset, after half an answer
            begun = "HTTP/1.1 200 OK", "Content-Type: application/json", "Content-Length: 1000", "", '{"id": '
            self.wfile.write("\r\n".join(begun).encode())
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        body = reply.body if isinstance(reply.body, str | bytes) else json.dumps(reply.body)
        data = body.encode() if isinstance(body, str) else body
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        if data and "Content-Type" not in reply.headers:  # vLLM's resets answer with an empty body of no type
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
