"""What a hostile or broken server sends, byte by byte: each request fails in bounded time, with a reason."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from videor1.rollout.server.client import RequestFailed, ServerClient

Send = Callable[[socket.socket], None]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def raw_server(send: Send) -> Iterator[str]:
    """The address of a server that reads a request's beginning and then calls ``send`` until the client hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            send(connection)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while not stopped.is_set():
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        stopped.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def drip(parts: Iterator[bytes], pause: float = 0.0) -> Send:
    def send(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)

    return send


def forever(first: bytes, part: bytes, pause: float = 0.0) -> Send:
    def send(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(part)
            time.sleep(pause)

    return send


def failure(send: Send, timeout: float, max_bytes: int = 2**20) -> tuple[str, float]:
    """The reason for which a request fails, and after how many seconds."""

    async def ask(url: str) -> None:
        async with ServerClient(url, timeout=timeout, retries=0, api_key="k", max_bytes=max_bytes) as client:
            await client.post("/chat/completions", {"model": "x"})

    with raw_server(send) as url:
        started = time.monotonic()
        with pytest.raises(RequestFailed) as error:
            asyncio.run(ask(url))
    return str(error.value), time.monotonic() - started


@pytest.mark.parametrize(
    ("send", "reason"),
    [
        (forever(OK + b"Content-Length: 100000\r\n\r\n[", b" ", 0.05), "no answer within 1 s"),
        (forever(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n[\r\n", 0.05), "no answer within 1 s"),
        (forever(b"HTTP/1.1 200 OK\r\n", b"a", 0.05), "no answer within 1 s"),
        (forever(b"", b"H", 0.3), "no answer within 1 s|the connection failed"),
        (forever(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.05), "no answer within 1 s"),
    ],
    ids=["body", "chunks", "header", "status line", "informational replies"],
)
def test_a_reply_that_drips_is_a_timeout_of_the_whole(send: Send, reason: str) -> None:
    message, seconds = failure(send, timeout=1.0)
    assert re.search(reason, message), message
    assert seconds < 20.0  # on a busy machine; read by read it would take minutes or no end


@pytest.mark.parametrize(
    ("send", "reason"),
    [
        (forever(OK + b"\r\n", b"[" * 65536), "more than 1048576 bytes"),
        (
            forever(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"8000\r\n" + b"[" * 0x8000 + b"\r\n"),
            "more than 1048576",
        ),
        (forever(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"b" * 1000 + b"\r\n"), "the connection failed"),
        (forever(b"HTTP/1.1 200 OK\r\nX-A: ", b"b" * 1000), "the connection failed"),
        (forever(b"", b"\x00\xff" * 1000), "the connection failed"),
        (drip(iter([OK + b"Content-Length: 99\r\n\r\n[]"])), "the connection failed"),
        (drip(iter([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n[]"])), "the connection failed"),
        (drip(iter([OK + b"Content-Length: -1\r\n\r\n[]"])), "the connection failed"),
        (drip(iter([OK + b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\n[]"])), r"is compressed \(br\)"),
        (drip(iter([])), "the connection failed"),
    ],
    ids=[
        "a body without end",
        "chunks without end",
        "headers without end",
        "a header without end",
        "noise",
        "half a body",
        "two lengths",
        "a negative length",
        "an encoding",
        "nothing",
    ],
)
def test_a_reply_that_breaks_a_bound_is_refused(send: Send, reason: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message, _ = failure(send, timeout=600.0)
    assert re.search(reason, message), message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
