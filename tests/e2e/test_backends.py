"""Customers' backends: the unmodified `pusher` libraries for Node and Python, and Pysher."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pusher
import pysher
import pytest
from pusher.errors import PusherBadAuth

from tests.e2e.gateway_process import APP_ID, APP_KEY, APP_SECRET
from tests.e2e.inbox import PATIENCE_S
from tests.e2e.node_process import NodeProcess, OrderFailedError

if TYPE_CHECKING:
    from tests.e2e.gateway_process import Gateway
    from tests.e2e.stage import Stage

TEXT = {"text": "Grüße 🎭", "nested": {"list": [1, 2.5, None, True]}}


class Backend(NodeProcess):
    script = "backend.mjs"


def python_backend(gateway: Gateway, **changes: Any) -> pusher.Pusher:
    return pusher.Pusher(
        **{
            "app_id": APP_ID,
            "key": APP_KEY,
            "secret": APP_SECRET,
            "host": "127.0.0.1",
            "port": gateway.port,
            "ssl": False,
            **changes,
        }
    )


@pytest.mark.pusher("clients", "pusher for Node triggers, and leaves a socket out")
async def test_an_event_from_node_reaches_everyone_but_the_excluded_socket(stage: Stage) -> None:
    sender = await stage.party("sender", "viewer")
    listener = await stage.party("listener", "viewer")
    channel = stage.user("news")
    await sender.subscribe(channel)
    await listener.subscribe(channel)
    async with Backend("backend") as backend:
        await backend.order("connect", options=stage.gateway.backend_options())

        answer = await backend.order(
            "trigger",
            channels=channel,
            event="headline",
            data=TEXT,
            params={"socket_id": sender.socket_id},
        )
        await backend.order("trigger", channels=[channel], event="last", data={}, params={})

    assert answer == {"status": 200, "body": "{}"}
    received = await listener.expect("headline", channel)
    assert received.data == TEXT
    for party in (sender, listener):
        await party.expect("last", channel)
    assert listener.pushes() == {("headline", channel): 1, ("last", channel): 1}
    assert sender.pushes() == {("last", channel): 1}


@pytest.mark.pusher("clients", "pusher for Node triggers on many channels at once")
async def test_one_trigger_from_node_reaches_many_channels_once_each(stage: Stage) -> None:
    listener = await stage.party("listener", "viewer")
    channels = [stage.user(f"news{number}") for number in range(3)]
    for channel in channels:
        await listener.subscribe(channel)
    async with Backend("backend") as backend:
        await backend.order("connect", options=stage.gateway.backend_options())
        await backend.order("trigger", channels=channels, event="headline", data=1, params={})

    for channel in channels:
        assert (await listener.expect("headline", channel)).data == 1
    assert listener.pushes() == {("headline", channel): 1 for channel in channels}


@pytest.mark.pusher("1.8", "#server-to-user-ID reaches the signed-in sockets of that user alone")
async def test_an_event_to_a_user_reaches_each_of_his_signed_in_sockets_alone(
    stage: Stage,
) -> None:
    anna = [await stage.party("anna", "viewer", by="signin") for _ in range(2)]
    other = await stage.party("other", "viewer", by="signin")
    for party in (*anna, other):
        channel = f"#server-to-user-{party.user_id}"
        await party.expect("pusher_internal:subscription_succeeded", channel, kind="frame")
    async with Backend("backend") as backend:
        await backend.order("connect", options=stage.gateway.backend_options())
        for user_id in (anna[0].user_id, other.user_id):
            await backend.order("send_to_user", user=user_id, event="news", data={"for": user_id})

    for party in (*anna, other):
        assert (await party.expect("news", kind="user")).data == {"for": party.user_id}


@pytest.mark.pusher("2.1", "a wrong secret is a 401, as the libraries expect it")
async def test_a_backend_with_a_wrong_secret_is_refused(stage: Stage) -> None:
    async with Backend("backend") as backend:
        options = {**stage.gateway.backend_options(), "secret": "another"}
        await backend.order("connect", options=options)

        with pytest.raises(OrderFailedError) as refused:
            await backend.order("trigger", channels="news", event="e", data={}, params={})

    assert refused.value.status == 401


@pytest.mark.pusher("clients", "pusher for Python triggers, and leaves a socket out")
async def test_an_event_from_python_reaches_everyone_but_the_excluded_socket(stage: Stage) -> None:
    sender = await stage.party("sender", "viewer")
    listener = await stage.party("listener", "viewer")
    channel = stage.user("news")
    await sender.subscribe(channel)
    await listener.subscribe(channel)
    backend = python_backend(stage.gateway)

    answer = await asyncio.to_thread(backend.trigger, channel, "headline", TEXT, sender.socket_id)
    await asyncio.to_thread(backend.trigger, [channel], "last", {})

    assert answer == {}
    assert (await listener.expect("headline", channel)).data == TEXT
    for party in (sender, listener):
        await party.expect("last", channel)
    assert sender.pushes() == {("last", channel): 1}


@pytest.mark.pusher("2.1", "a wrong secret is a 401, as the libraries expect it")
async def test_a_python_backend_with_a_wrong_secret_is_refused(stage: Stage) -> None:
    backend = python_backend(stage.gateway, secret="another")

    with pytest.raises(PusherBadAuth):
        await asyncio.to_thread(backend.trigger, "news", "headline", {})


async def test_an_event_over_the_limit_is_refused_and_nobody_gets_it(stage: Stage) -> None:
    listener = await stage.party("listener", "viewer")
    channel = stage.user("news")
    await listener.subscribe(channel)

    refused = await stage.gateway.publish([channel], "headline", "x" * 10_240)
    allowed = await stage.gateway.publish([channel], "headline", "x" * 10_000)

    assert refused.status_code == 413, refused.text
    assert allowed.status_code == 200, allowed.text
    assert len((await listener.expect("headline", channel)).data) == 10_000
    assert listener.pushes() == {("headline", channel): 1}


@pytest.mark.pusher("clients", "Pysher (protocol 6) subscribes and receives")
async def test_pysher_receives_events_of_a_private_channel(stage: Stage) -> None:
    """Pysher speaks protocol 6 and parses connection_established as a string."""
    loop = asyncio.get_running_loop()
    told: dict[str, asyncio.Future[str]] = {
        name: loop.create_future() for name in ("connected", "subscribed", "headline")
    }
    channel_name = f"private-{stage.user('room')}"
    client = pysher.Pusher(
        key=APP_KEY,
        secret=APP_SECRET,
        custom_host="127.0.0.1",
        port=stage.gateway.port,
        secure=False,
    )

    def tell(data: str, name: str) -> None:
        loop.call_soon_threadsafe(told[name].set_result, data)

    def connected(data: str) -> None:
        # In Pysher's own thread: it reads no answer before both are bound.
        channel = client.subscribe(channel_name)
        channel.bind("pusher_internal:subscription_succeeded", tell, "subscribed")
        channel.bind("headline", tell, "headline")
        tell(data, "connected")

    client.connection.bind("pusher:connection_established", connected)
    client.connect()
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert json.loads(await told["connected"])["socket_id"]
            await told["subscribed"]
            await stage.gateway.publish([channel_name], "headline", TEXT)
            assert json.loads(await told["headline"]) == TEXT
    finally:
        # Its thread is a daemon: closing races with its own reading, and may leave it waiting.
        await asyncio.to_thread(client.disconnect, 1)
    # What the gateway knows of its end does not depend on that thread.
    backend = python_backend(stage.gateway)
    async with asyncio.timeout(PATIENCE_S):
        while (await asyncio.to_thread(backend.channel_info, channel_name))["occupied"]:
            pass
