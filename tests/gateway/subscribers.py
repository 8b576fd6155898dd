"""Clients that have subscribed, and what they say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gateway.auth import sign_channel
from tests.gateway.harness import APP

if TYPE_CHECKING:
    from tests.gateway.harness import Gateway, RawClient


def withdrawal(request_id: str, channel: str = "private-user@v") -> dict[str, Any]:
    """A command, as a message."""
    data = {"request_id": request_id, "goal_id": "0" * 24}
    return {"event": "client-goal.withdraw", "channel": channel, "data": data}


async def on_own_channel(gateway: Gateway) -> RawClient:
    """A client of the viewer `v` on his own channel, who has read his snapshot."""
    client = await gateway.connect(path="/app/app-key?token=viewer:v")
    await client.subscribed("private-user@v")
    assert (await client.event())["event"] == "goal.snapshot"
    return client


async def member(gateway: Gateway, user_id: str) -> RawClient:
    """A client that is a member of `presence-a`."""
    client = await gateway.connect()
    shown = json.dumps({"user_id": user_id})
    auth = sign_channel(APP, client.socket_id, "presence-a", shown)
    await client.subscribed("presence-a", auth, channel_data=shown)
    return client
