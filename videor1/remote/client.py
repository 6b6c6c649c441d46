"""A client of one server with OpenAI's API: requests over HTTP, retries, and error messages."""

from __future__ import annotations

import importlib
import json
import os
from types import TracebackType
from typing import Any

from videor1.errors import ConfigError, install
from videor1.remote.bounds import bounded_http_client

MAX_BYTES = 4 * 2**20  # of a reply that is no completion
_QUOTED = 400  # characters of an error's body that a message shows
_MAY_PASS = (408, 409, 429)  # statuses below 500 of requests that may be answered when they are sent again
_LONGEST_WAIT = 60.0  # seconds that a server may ask for before the next attempt


class RequestFailed(Exception):
    """A request failed, as did its retries. The message says what was received.

    Attributes:
        final: whether the server has refused the request itself, so that it would refuse it again.
        wait: seconds after which the server asks to be tried again; None: it does not say.
    """

    def __init__(self, message: str, *, final: bool = False, wait: float | None = None) -> None:
        super().__init__(message)
        self.final, self.wait = final, wait


class ServerClient:
    """A connection pool that is open within an ``async with`` block, in one event loop.

    The ``openai`` client retries connection errors, timeouts, 408, 409, 429 and 5xx, waiting 0.5 s, 1 s, 2 s, ... or as
    long as the server asks (a minute at most); any other 4xx is final, and so is a reply that breaks a bound
    (:mod:`videor1.remote.bounds`): nothing that a server sends is trusted.

    Args:
        url: base of the API, such as ``http://host:8000/v1``.
        timeout: seconds one attempt may take, to the end of the reply.
        retries: attempts after the first.
        api_key: None: environment OPENAI_API_KEY, or "EMPTY".
        max_bytes: most bytes of a reply.
        option: the option that the URL is from, which messages name.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        retries: int,
        api_key: str | None,
        max_bytes: int = MAX_BYTES,
        option: str = "rollout.url",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{option}: expected a URL such as http://host:8000/v1, got {url!r}")
        self.url, self._option = url.rstrip("/"), option
        self.retried = 0  # attempts after the first, of all requests
        self._timeout, self._retries, self._max_bytes = timeout, retries, max_bytes
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        self._openai = _import_openai(option)
        self._client: Any = None

    async def __aenter__(self) -> ServerClient:
        openai = self._openai
        # The hook is called for every attempt, also for those of requests that fail in the end or are cancelled.
        hooks = {"request": [self._count]}
        http = bounded_http_client(
            openai, self.url, timeout=self._timeout, max_bytes=self._max_bytes, event_hooks=hooks, option=self._option
        )
        timeout = openai.Timeout(self._timeout, connect=min(self._timeout, 10.0))
        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._api_key,
            timeout=timeout,
            max_retries=self._retries,
            http_client=http,
            default_headers={"Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def models(self) -> list[str]:
        """Return the names of the models that the server serves."""
        reply = await self._send(self._client.get("/models", cast_to=object))
        try:
            return [str(model["id"]) for model in reply["data"]]
        except (TypeError, KeyError):
            raise RequestFailed(f"/models gave no list of models: {quoted(reply)}") from None

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request and return the decoded reply.

        Raises:
            RequestFailed: the request and its retries failed.
        """
        return await self._send(self._client.post(path, cast_to=object, body=body))

    async def control(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request as :meth:`post` does, to a path that is not below the API's ``/v1``."""
        return await self.post(self.url.removesuffix("/v1") + path, body)

    def advice(self) -> str:
        """Return what to tell, after the reason, where a server does not answer."""
        return (
            f"Each request was tried {self._retries + 1} times at most, {self._timeout:g} s each. Check that it "
            f"runs and is reached from here (curl {self.url}/models), and its log"
        )

    async def _send(self, request: Any) -> Any:
        openai = self._openai
        try:
            return await request
        except openai.APITimeoutError:
            raise RequestFailed(f"no answer within {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise RequestFailed(f"the connection failed: {type(cause).__name__}: {quoted(str(cause))}") from None
        except openai.APIStatusError as error:
            final = error.status_code < 500 and error.status_code not in _MAY_PASS
            wait = _seconds(error.response.headers.get("retry-after"))
            raise RequestFailed(
                f"HTTP {error.status_code}: {quoted(error.response.text)}", final=final, wait=wait
            ) from None
        except RecursionError:
            raise RequestFailed("the reply is not JSON that can be read: it is nested too deeply") from None
        except (openai.APIError, ValueError) as error:  # of JSON, its numbers or UTF-8
            raise RequestFailed(f"the reply is not JSON: {quoted(str(error))}") from None
        except openai.OpenAIError as error:
            raise RequestFailed(quoted(str(error))) from None

    async def _count(self, request: Any) -> None:
        self.retried += request.headers.get("x-stainless-retry-count", "0") != "0"


def quoted(reply: object) -> str:
    """Return the beginning of what a server sent, for an error message."""
    try:
        text = reply if isinstance(reply, str) else json.dumps(reply, default=str)
    except RecursionError:
        text = f"a {type(reply).__name__} that is nested too deeply"
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _seconds(text: str | None) -> float | None:
    """Return the seconds of a retry-after header; None for anything else than a number of at most a minute."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds <= _LONGEST_WAIT else None


def _import_openai(option: str) -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ConfigError(f"{option}: {error}; {install('server')}") from None
