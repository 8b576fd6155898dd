"""A bare WebSocket that sends what no client library would, and many of which fit one process."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.e2e.inbox import PATIENCE_S, Inbox, Sent

if TYPE_CHECKING:
    from tests.e2e.inbox import Received


class Door(Protocol):
    """What a socket needs to know of a gateway, however that is run."""

    app_key: str

    @property
    def ws_url(self) -> str: ...

    def token(self, user_id: str, role: str | None) -> str: ...


class WireSocket(Inbox):
    """One socket whose user is proved by the JWT in its URL; every frame is an `event` record."""

    def __init__(self, gateway: Door, user_id: str, role: str, *, path: str | None = None) -> None:
        super().__init__(user_id)
        self.user_id = user_id
        self.own_channel = f"private-user@{user_id}"
        self.socket_id = ""
        query = {
            "protocol": 7,
            "client": "wire",
            "version": "1.0",
            "token": gateway.token(user_id, role),
        }
        self._url = f"{gateway.ws_url}{path or '/app/' + gateway.app_key}?{urlencode(query)}"
        self._connection: ClientConnection | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._connection = await connect(
            self._url, compression=None, open_timeout=PATIENCE_S, ping_interval=None
        )
        self._reader = asyncio.create_task(self._read(self._connection))
        try:
            hello = await self.expect("pusher:connection_established")
        except BaseException:
            await self.__aexit__()
            raise
        self.socket_id = hello.data["socket_id"]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._connection is not None
        assert self._reader is not None
        await self._connection.close()
        await self._reader

    async def refused_with(self) -> int | None:
        """Connects where that has to be refused; returns the HTTP status or the close code."""
        try:
            connection = await connect(self._url, compression=None, open_timeout=PATIENCE_S)
        except InvalidStatus as refusal:
            return refusal.response.status_code
        async with connection, asyncio.timeout(PATIENCE_S):
            await connection.wait_closed()
        return connection.close_code

    async def _read(self, connection: ClientConnection) -> None:
        try:
            async for text in connection:
                message = json.loads(text)
                data = message.get("data")
                if isinstance(data, str):
                    message["data"] = json.loads(data)
                self.put("event", message)
        except ConnectionClosed:
            pass
        self.close(f"closed with {connection.close_code} {connection.close_reason}")

    @property
    def close_code(self) -> int | None:
        assert self._connection is not None
        return self._connection.close_code

    async def wait_closed(self) -> int | None:
        """Waits until the server has closed the socket and returns the code."""
        assert self._connection is not None
        async with asyncio.timeout(PATIENCE_S):
            await self._connection.wait_closed()
        return self._connection.close_code

    async def send_text(self, text: str) -> None:
        assert self._connection is not None
        await self._connection.send(text)

    async def send_bytes(self, data: bytes) -> None:
        assert self._connection is not None
        await self._connection.send(data)

    async def send(self, event: str, data: Any, channel: str | None = None) -> None:
        message = {"event": event, "data": data}
        if channel is not None:
            message["channel"] = channel
        await self.send_text(json.dumps(message))

    async def subscribe(self, channel: str) -> Received:
        await self.send("pusher:subscribe", {"channel": channel})
        return await self.expect("pusher_internal:subscription_succeeded", channel)

    async def subscribe_own(self) -> Received:
        """Subscribes to one's own channel, which takes commands, and returns the snapshot."""
        await self.subscribe(self.own_channel)
        return await self.expect("goal.snapshot", self.own_channel)

    async def command(
        self,
        name: str,
        *,
        request_id: str | None = None,
        timeout_s: float = PATIENCE_S,
        **data: Any,
    ) -> dict[str, Any]:
        """Sends a goal command on one's own channel and returns its `goal.reply`."""
        request_id = request_id or f"{self.user_id}-{uuid.uuid4().hex}"[:64]
        asked = {"request_id": request_id, **data}
        self.sent.append(Sent(time.monotonic(), name, asked))
        await self.send(name, asked, self.own_channel)
        return await self.reply(request_id, timeout_s=timeout_s)

    async def reply(
        self, request_id: str | None, *, timeout_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        reply = await self.expect(
            "goal.reply",
            self.own_channel,
            where=lambda record: record.data["request_id"] == request_id,
            timeout_s=timeout_s,
        )
        answer: dict[str, Any] = reply.data
        return answer
