"""A customer's backend that is told by webhook, on a real port, and misbehaves as a test says."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from tests.gateway.harness import Recorder

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator

    from starlette.requests import Request


@dataclass(frozen=True)
class Told:
    """One call of the gateway, and how it was answered."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int

    @property
    def events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = json.loads(self.body)["events"]
        return events


@dataclass
class Receiver(Recorder):
    """What was told, in order, and how the next calls are answered.

    Attributes:
        answers: Statuses of the next calls, one each; then `status`.
        gate: While it is there, calls wait for it before they are answered.
    """

    port: int
    told: list[Told] = field(default_factory=list)
    answers: deque[int] = field(default_factory=deque)
    status: int = 200
    gate: asyncio.Event | None = None
    waiting: int = 0

    def url(self, path: str = "/hooks") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def events(self, path: str | None = None) -> list[dict[str, Any]]:
        """The events of calls that were answered well, in order."""
        return [
            event
            for told in self.told
            if told.status < 300 and path in {None, told.path}
            for event in told.events
        ]

    def names(self, path: str | None = None) -> list[str]:
        return [event["name"] for event in self.events(path)]

    async def until_events(self, count: int) -> None:
        """Waits until as many events have been taken."""
        await self.until(lambda: len(self.events()) >= count)

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        if self.gate is not None:
            self.waiting += 1
            self.changed.set()
            await self.gate.wait()
            self.waiting -= 1
        status = self.answers.popleft() if self.answers else self.status
        self.told.append(Told(request.url.path, dict(request.headers), body, status))
        self.changed.set()
        return Response(status_code=status)


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """A receiver in this event loop."""
    listener = socket.create_server(("127.0.0.1", 0))
    receiver = Receiver(listener.getsockname()[1])
    app = Starlette(routes=[Route("/{path:path}", receiver.answer, methods=["POST"])])
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listener])
    try:
        yield receiver
    finally:
        if receiver.gate is not None:
            receiver.gate.set()
        await server.shutdown([listener])
        listener.close()
