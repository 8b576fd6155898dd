"""A socket of an app that signs for itself, as its backend would."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Protocol, Self

from websockets.asyncio.client import connect

from gateway.auth import sign_channel, sign_user

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.apps import App

PATIENCE_S = 10.0


class Door(Protocol):
    """A gateway, however it is run."""

    @property
    def ws_url(self) -> str: ...


class Member:
    """A socket of an app."""

    def __init__(self, socket: Any, app: App, socket_id: str) -> None:
        self._socket = socket
        self.app = app
        self.socket_id = socket_id

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, gateway: Door, app: App) -> AsyncIterator[Self]:
        async with connect(f"{gateway.ws_url}/app/{app.key}?protocol=7") as socket:
            established = json.loads(await socket.recv())
            yield cls(socket, app, json.loads(established["data"])["socket_id"])

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            event: dict[str, Any] = json.loads(await self._socket.recv())
        return event

    async def send(self, event: str, **data: Any) -> None:
        await self._socket.send(json.dumps({"event": event, "data": data}))

    async def subscribe(self, channel: str, user_id: str | None = None) -> None:
        """Subscribes; as `user_id` on a presence channel."""
        data = None if user_id is None else json.dumps({"user_id": user_id})
        asked = {"channel": channel, "auth": sign_channel(self.app, self.socket_id, channel, data)}
        if data is not None:
            asked["channel_data"] = data
        await self.send("pusher:subscribe", **asked)
        while True:
            event = await self.next()
            if event["event"] == "pusher_internal:subscription_succeeded":
                return
            assert event["event"].startswith("pusher_internal:"), event

    async def sign_in(self, user_id: str) -> None:
        user_data = json.dumps({"id": user_id})
        auth = sign_user(self.app, self.socket_id, user_data)
        await self.send("pusher:signin", auth=auth, user_data=user_data)
        assert (await self.next())["event"] == "pusher:signin_success"

    async def leave(self, channel: str) -> None:
        await self.send("pusher:unsubscribe", channel=channel)

    async def trigger(self, name: str, channel: str, data: object) -> None:
        """Sends a client event."""
        await self._socket.send(json.dumps({"event": name, "channel": channel, "data": data}))

    async def close(self) -> None:
        await self._socket.close()

    async def closed(self) -> int:
        """Waits for the close and returns its code."""
        async with asyncio.timeout(PATIENCE_S):
            await self._socket.wait_closed()
        code: int = self._socket.close_code
        return code
