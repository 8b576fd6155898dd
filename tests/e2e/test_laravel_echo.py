"""A Laravel front end: the unmodified laravel-echo, which brings pusher-js and its own habits."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.e2e.node_process import NodeProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.e2e.stage import Stage


class Echo(NodeProcess):
    script = "echo.mjs"


@asynccontextmanager
async def echo(
    stage: Stage, name: str, role: str, broadcaster: str = "pusher"
) -> AsyncIterator[Echo]:
    """A connected Echo of that user."""
    gateway = stage.gateway
    async with Echo(name) as client:
        await client.order(
            "connect",
            options={
                "broadcaster": broadcaster,
                "key": gateway.app_key,
                "cluster": "none",
                "wsHost": "127.0.0.1",
                "wsPort": gateway.port,
                "forceTLS": False,
                "enabledTransports": ["ws"],
                "authEndpoint": f"{gateway.url}/pusher/auth",
                "bearerToken": gateway.token(stage.user(name), role),
            },
        )
        await client.expect(
            kind="state", where=lambda record: record.fields["current"] == "connected"
        )
        yield client


@pytest.mark.pusher("clients", "laravel-echo listens to public, private and presence channels")
@pytest.mark.parametrize("broadcaster", ["pusher", "reverb"])
async def test_echo_listens_to_public_private_and_presence_channels(
    stage: Stage, broadcaster: str
) -> None:
    await stage.open_session(stage.user("streamer"))
    news = stage.user("news")
    own, room = f"user@{stage.user('streamer')}", f"stream@{stage.user('streamer')}"
    async with echo(stage, "streamer", "streamer", broadcaster) as streamer:
        await streamer.order("listen", channel=news, type="public", event=".headline")
        await streamer.order("listen", channel=own, type="private", event=".goal.added")
        await streamer.order("listen", channel=room, type="presence", event=".goal.ended")
        for channel in (news, own, room):
            await streamer.expect(kind="subscribed", channel=channel)

        viewer = await stage.socket("viewer", "viewer")
        invited = await viewer.command("client-goal.invite", **stage.terms())
        added = await streamer.expect(".goal.added", own)
        await stage.gateway.publish([news], "headline", {"text": "hello"})
        headline = await streamer.expect(".headline", news)
        await viewer.command("client-goal.withdraw", goal_id=invited["goal"]["id"])
        ended = await streamer.expect(".goal.ended", room)

    assert added.data["id"] == invited["goal"]["id"]
    assert headline.data == {"text": "hello"}
    assert ended.data["goal_id"] == invited["goal"]["id"]


@pytest.mark.pusher("clients", "laravel-echo: here, joining, leaving, whispers")
async def test_echo_sees_who_is_here_and_hears_whispers(stage: Stage) -> None:
    await stage.open_session(stage.user("streamer"))
    room = f"stream@{stage.user('streamer')}"
    async with (
        echo(stage, "streamer", "streamer") as streamer,
        echo(stage, "viewer", "viewer") as viewer,
    ):
        await streamer.order("listen", channel=room, type="presence", event=".goal.ended")
        alone = await streamer.expect(kind="here")
        await viewer.order("listen", channel=room, type="presence", event=".goal.ended")
        both = await viewer.expect(kind="here")
        await streamer.expect(kind="joining")
        await viewer.order("whisper", channel=room, data={"typing": True})
        whisper = await streamer.expect(kind="whisper")
        await viewer.order("leave", channel=room)
        await streamer.expect(kind="leaving")

    assert len(alone.fields["users"]) == 1
    assert len(both.fields["users"]) == 2
    assert whisper.data == {"typing": True}


@pytest.mark.pusher("clients", "laravel-echo is told when a channel is refused")
async def test_echo_is_told_when_a_channel_is_refused(stage: Stage) -> None:
    async with echo(stage, "viewer", "viewer") as viewer:
        own = f"user@{stage.user('somebody-else')}"
        await viewer.order("listen", channel=own, type="private", event=".goal.added")

        refused = await viewer.expect(kind="refused")

    assert refused.fields["error"]["status"] == 403
