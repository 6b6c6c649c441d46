"""What a hostile or broken server sends, byte by byte: each request fails in bounded time, with a reason."""

import asyncio
import re
import resource
import threading

from raw_server import CHUNKS, OK, Cases, RawServer, forever, once

from videor1.remote.client import RequestFailed, ServerClient


async def failure(url: str, timeout: float) -> str:
    """The reason for which a request fails."""
    async with ServerClient(url, timeout=timeout, retries=0, api_key="k", max_bytes=2**20) as client:
        try:
            return f"none: {await client.post('/chat/completions', {'model': 'x'})}"
        except RequestFailed as error:
            return str(error)


def assert_fail(cases: Cases, timeout: float) -> None:
    async def ask(port: int) -> list[str]:
        urls = [f"http://127.0.0.1:{port}/{number}/v1" for number in range(len(cases))]
        return await asyncio.gather(*(failure(url, timeout) for url in urls))

    with RawServer(cases) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        told = dict(zip(cases, asyncio.run(ask(server.server_address[1])), strict=True))
        server.shutdown()
    assert {name: reason for name, reason in told.items() if not re.search(cases[name][1], reason)} == {}


def test_a_reply_that_drips_is_a_timeout_of_the_whole() -> None:
    """Read by read it would take minutes or have no end."""
    assert_fail(
        {
            "body": (forever(OK + b"Content-Length: 100000\r\n\r\n[", b" ", 0.05), r"no answer within 0\.5 s"),
            "chunks": (forever(CHUNKS, b"1\r\n[\r\n", 0.05), r"no answer within 0\.5 s"),
            "header": (forever(b"HTTP/1.1 200 OK\r\n", b"a", 0.05), r"no answer within 0\.5 s"),
            "status line": (forever(b"", b"H", 0.3), r"no answer within 0\.5 s|the connection failed"),
            "informational": (forever(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.05), r"no answer within 0\.5 s"),
        },
        timeout=0.5,
    )


def test_a_reply_that_breaks_a_bound_is_refused() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    two_lengths = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n[]"
    endless = b"8000\r\n" + b"[" * 0x8000 + b"\r\n"
    assert_fail(
        {
            "a body without end": (forever(OK + b"\r\n", b"[" * 65536), "more than 1048576 bytes"),
            "chunks without end": (forever(CHUNKS, endless), "more than 1048576 bytes"),
            "headers": (forever(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"b" * 1000 + b"\r\n"), "the connection failed"),
            "a header without end": (forever(b"HTTP/1.1 200 OK\r\nX-A: ", b"b" * 1000), "the connection failed"),
            "noise": (forever(b"", b"\x00\xff" * 1000), "the connection failed"),
            "half a body": (once(OK + b"Content-Length: 99\r\n\r\n[]"), "the connection failed"),
            "two lengths": (once(two_lengths), "the connection failed"),
            "a negative length": (once(OK + b"Content-Length: -1\r\n\r\n[]"), "the connection failed"),
            "an encoding": (once(OK + b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\n[]"), r"compressed \(br\)"),
            "nothing": (once(b""), "the connection failed"),
        },
        timeout=600.0,
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB, of ten replies
