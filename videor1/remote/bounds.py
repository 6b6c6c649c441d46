"""Bounds on what a server may send: the time and the bytes of a reply, and the host that it comes from."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from typing import Any


def bounded_http_client(
    openai: Any, url: str, *, timeout: float, max_bytes: int, event_hooks: dict[str, Any], option: str = "rollout.url"
) -> Any:
    """Return the HTTP client of the ``openai`` package, with bounds on each attempt at a request.

    An attempt that takes longer than ``timeout`` seconds from its beginning to the end of the reply is a timeout of the
    package's own, however slowly the reply drips. The others raise ``openai.OpenAIError``, after which the package does
    not try again.

    Args:
        openai: the package.
        url: the server's address. A request that is redirected to another scheme, host or port is refused, since that
            would get the questions and frames.
        timeout: seconds.
        max_bytes: most bytes of a reply. A compressed one is refused, since it may unpack to any size.
        event_hooks: further hooks, in the form of httpx.
        option: the option that the address is from, which messages name.
    """
    # httpx or httpx2, whichever the installed openai is built on.
    httpx = importlib.import_module(openai.DefaultAsyncHttpxClient.__base__.__module__.partition(".")[0])
    origin = _origin(httpx.URL(url))

    class BoundedStream(httpx.AsyncByteStream):  # type: ignore[name-defined]
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            received = 0
            async for part in self._stream:
                received += len(part)
                if received > max_bytes:
                    raise openai.OpenAIError(f"the reply has more than {max_bytes} bytes")
                yield part

        async def aclose(self) -> None:
            await self._stream.aclose()

    class BoundedClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, **options: Any) -> Any:
            try:
                async with asyncio.timeout(timeout):
                    return await super().send(request, **options)
            except TimeoutError:
                raise httpx.ReadTimeout("the whole reply took longer", request=request) from None

    async def stay(request: Any) -> None:
        if _origin(request.url) != origin:
            raise openai.OpenAIError(f"it redirects to another host, {str(request.url)[:200]}: name that in {option}")

    async def bound(response: Any) -> None:
        if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
            raise openai.OpenAIError(f"the reply is compressed ({encoding[:40]}), which was not asked for")
        response.stream = BoundedStream(response.stream)
        response.encoding = "utf-8"  # The server may name any codec of Python's.

    hooks = {"request": [*event_hooks.get("request", []), stay], "response": [*event_hooks.get("response", []), bound]}
    return BoundedClient(event_hooks=hooks)


def _origin(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
