"""Parties of an invitation, each an unmodified pusher-js in its own Node process."""

from __future__ import annotations

import itertools
import time
import uuid
from typing import TYPE_CHECKING, Any

from tests.e2e.inbox import PATIENCE_S, Sent
from tests.e2e.node_process import NodeProcess

if TYPE_CHECKING:
    from tests.e2e.gateway_process import Gateway
    from tests.e2e.inbox import Received

# pusher-js wants some cluster even where the host is given; with the transports named it never
# tries a host that was not.
_OPTIONS = {
    "cluster": "none",
    "wsHost": "127.0.0.1",
    "forceTLS": False,
    "enabledTransports": ["ws"],
    "disableStats": True,
}


class Party(NodeProcess):
    """A user's app: connects, subscribes, sends goal commands as client events."""

    script = "client.mjs"

    def __init__(self, user_id: str, role: str) -> None:
        super().__init__(user_id)
        self.user_id = user_id
        self.role = role
        self.socket_id = ""
        self.channels: list[str] = []
        self._request_numbers = itertools.count(1)

    @property
    def own_channel(self) -> str:
        return f"private-user@{self.user_id}"

    @property
    def stream_channel(self) -> str:
        """The streamer's private one."""
        return f"private-stream@{self.user_id}"

    @property
    def audience_channel(self) -> str:
        """The one that a streamer shares with everybody who watches."""
        return f"presence-stream@{self.user_id}"

    def preview_channel(self, viewer: Party) -> str:
        return f"presence-stream-viewer@{self.user_id}.preview.{viewer.user_id}"

    async def connect(
        self,
        gateway: Gateway,
        *,
        by: str = "endpoint",
        info: dict[str, Any] | None = None,
        app: dict[str, Any] | None = None,
    ) -> None:
        """Connects and waits for the socket id.

        Args:
            by: `endpoint` (the gateway signs for a JWT), `signin` (signed in by the gateway, no
                signatures on channels), `backend` (the customer's backend signs), `none`.
            info: What others see of the user.
            app: Other options for the library of the customer's backend.
        """
        self.channels = []
        await self.order(
            "connect",
            key=gateway.app_key,
            options={**_OPTIONS, "wsPort": gateway.port},
            authorize={
                "by": by,
                "url": gateway.url,
                "token": gateway.token(self.user_id, self.role),
                "app": app or gateway.backend_options(),
                "user": {"id": self.user_id, "info": info or {"name": self.user_id}},
            },
        )
        await self.connected()
        if by == "signin":
            await self.order("signin")
            await self.expect("pusher:signin_success", kind="frame")

    async def connected(self, timeout_s: float = PATIENCE_S) -> None:
        """Waits until the connection is open, the first time or again."""
        state = await self.expect(
            kind="state",
            where=lambda record: record.fields["current"] == "connected",
            timeout_s=timeout_s,
        )
        self.socket_id = state.fields["socket_id"]

    async def disconnect(self) -> None:
        await self.order("disconnect")
        await self.expect(
            kind="state", where=lambda record: record.fields["current"] == "disconnected"
        )

    async def reconnect(self) -> None:
        """Connects again; pusher-js subscribes to the same channels by itself."""
        await self.order("reconnect")
        await self.connected()

    async def subscribe(self, channel: str) -> Received:
        """Subscribes and returns `pusher:subscription_succeeded` as the app sees it."""
        await self.order("subscribe", channel=channel)
        self.channels.append(channel)
        return await self.expect("pusher:subscription_succeeded", channel)

    async def refused(self, channel: str) -> Received:
        """Subscribes and returns the `pusher:subscription_error`."""
        await self.order("subscribe", channel=channel)
        return await self.expect("pusher:subscription_error", channel)

    async def unsubscribe(self, channel: str) -> None:
        await self.order("unsubscribe", channel=channel)
        self.channels.remove(channel)

    async def trigger(self, channel: str, event: str, data: Any) -> None:
        assert await self.order("trigger", channel=channel, event=event, data=data) is True

    def new_request_id(self) -> str:
        return f"{self.user_id}-{next(self._request_numbers)}-{uuid.uuid4().hex[:8]}"

    async def command(
        self,
        name: str,
        *,
        request_id: str | None = None,
        timeout_s: float = PATIENCE_S,
        **data: Any,
    ) -> dict[str, Any]:
        """Sends a goal command on one's own channel and returns its `goal.reply`."""
        request_id = request_id or self.new_request_id()
        asked = {"request_id": request_id, **data}
        self.sent.append(Sent(time.monotonic(), name, asked))
        await self.trigger(self.own_channel, name, asked)
        reply = await self.expect(
            "goal.reply",
            self.own_channel,
            where=lambda record: record.data["request_id"] == request_id,
            timeout_s=timeout_s,
        )
        answer: dict[str, Any] = reply.data
        return answer

    async def succeed(self, name: str, **data: Any) -> dict[str, Any]:
        """Sends a goal command that has to succeed and returns the goal."""
        reply = await self.command(name, **data)
        assert reply["ok"] is True, reply
        goal: dict[str, Any] = reply["goal"]
        return goal

    async def fail(self, name: str, **data: Any) -> dict[str, Any]:
        """Sends a goal command that has to be refused and returns the error."""
        reply = await self.command(name, **data)
        assert reply["ok"] is False, reply
        error: dict[str, Any] = reply["error"]
        return error
