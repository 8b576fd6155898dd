"""A client of the HTTP transports that speaks bytes, as pusher-js would or as it never would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import deque
from typing import TYPE_CHECKING, Any, Self

import httpx

from tests.gateway.harness import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

QUERY = "protocol=7&client=js&version=8.6.0"


class LinesEnded(Exception):
    """The answer that carried the lines is complete, or was cut."""


class FallbackClient:
    """One session.

    Attributes:
        streams: Whether it holds a stream open; otherwise it polls.
        name: What the session is called in the path.
    """

    def __init__(
        self,
        port: int,
        *,
        streams: bool,
        name: str | None = None,
        key: str = "app-key",
        query: str = QUERY,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.streams = streams
        self.name = name or f"{secrets.randbelow(1000)}/{secrets.token_hex(4)}"
        self.socket_id = ""
        self._query = query
        self._headers = headers or {}
        self._http = httpx.AsyncClient(
            verify=False, base_url=f"http://127.0.0.1:{port}/pusher/app/{key}/", timeout=PATIENCE_S
        )
        self._stack = contextlib.AsyncExitStack()
        self._lines: AsyncIterator[str] | None = None
        self._messages: deque[dict[str, Any]] = deque()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.leave()
        await self._http.aclose()

    async def leave(self) -> None:
        """Drops the stream."""
        await self._stack.aclose()
        self._lines = None

    async def reopen(self) -> httpx.Response:
        """Asks for lines, in place of the answer that may be open."""
        await self.leave()
        route = "xhr_streaming" if self.streams else "xhr"
        response = await self._stack.enter_async_context(
            self._http.stream("POST", f"{self.name}/{route}?{self._query}", headers=self._headers)
        )
        self._lines = response.aiter_lines()
        return response

    async def connect(self) -> Self:
        """Opens the session and reads `connection_established`."""
        await self.reopen()
        assert await self.line() == "o{}"
        established = await self.event()
        assert established["event"] == "pusher:connection_established", established
        self.socket_id = json.loads(established["data"])["socket_id"]
        return self

    async def line(self) -> str:
        """The next line; a poller asks again when an answer has ended."""
        while True:
            if self._lines is None:
                await self.reopen()
            assert self._lines is not None
            async with asyncio.timeout(PATIENCE_S):
                try:
                    return await anext(self._lines)
                except (StopAsyncIteration, httpx.TransportError):
                    self._lines = None
                    if self.streams:
                        raise LinesEnded from None

    async def event(self) -> dict[str, Any]:
        """The next message, decoded."""
        while not self._messages:
            line = await self.line()
            if line == "h":
                continue
            assert line[0] == "a", line
            self._messages.extend(json.loads(text) for text in json.loads(line[1:]))
        return self._messages.popleft()

    async def closed(self) -> tuple[dict[str, Any], list[Any]]:
        """The data of the `pusher:error`, and code and reason of the close, that come next."""
        error = await self.event()
        assert error["event"] == "pusher:error", error
        line = await self.line()
        assert line[0] == "c", line
        return error["data"], json.loads(line[1:])

    async def post(self, content: bytes) -> int:
        """Sends a body to `xhr_send` and returns the status."""
        response = await self._http.post(f"{self.name}/xhr_send?t=1&n=1", content=content)
        return response.status_code

    async def send(self, *messages: object) -> None:
        """Sends messages in one call."""
        texts = [one if isinstance(one, str) else json.dumps(one) for one in messages]
        assert await self.post(json.dumps(texts).encode()) == 204

    async def subscribed(self, channel: str, auth: str = "", **data: Any) -> Any:
        """Subscribes and returns the data of `subscription_succeeded`."""
        data |= {"channel": channel, "auth": auth}
        await self.send({"event": "pusher:subscribe", "data": data})
        answer = await self.event()
        assert answer["event"] == "pusher_internal:subscription_succeeded", answer
        return json.loads(answer["data"])

    async def ping(self) -> None:
        """Goes round once."""
        await self.send({"event": "pusher:ping", "data": {}})
        assert (await self.event())["event"] == "pusher:pong"
