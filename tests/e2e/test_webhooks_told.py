"""Webhooks of real gateway processes: checked by the libraries, through kills of every kind."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pusher
import pytest
import redis.asyncio

from gateway.apps import App
from tests.e2e.gateway_process import APP_ID, APP_KEY, APP_SECRET, APPS_TOML
from tests.e2e.node_process import NodeProcess
from tests.gateway.harness import until_yes
from tests.gateway.member import Member
from tests.gateway.receiver import Receiver, receiving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.e2e.gateway_process import GatewayBuilder, Stores

# Gateways of their own take seconds to start on a busy machine.
pytestmark = pytest.mark.timeout(120)

APP = App(id=APP_ID, key=APP_KEY, secret=APP_SECRET)
LEASE_S = 2.0
DELAY_S = 0.5


class Backend(NodeProcess):
    script = "backend.mjs"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


@pytest.fixture
def settings(receiver: Receiver, tmp_path: Path) -> dict[str, Any]:
    """Of gateways whose app tells the receiver of everything."""
    apps_file = tmp_path / "apps.toml"
    apps_file.write_text(
        f"""{APPS_TOML}
[[apps.webhooks]]
url = "{receiver.url()}"
events = ["channel_occupied", "channel_vacated", "member_added", "member_removed", "client_event"]
"""
    )
    return {
        "DUET_APPS_FILE": str(apps_file),
        "DUET_NODE_LEASE_S": str(LEASE_S),
        "DUET_WEBHOOK_DELAY_S": str(DELAY_S),
        "DUET_WEBHOOK_TIMEOUT_S": "1",
        "DUET_REDIS_TIMEOUT_S": "0.3",
    }


def about(receiver: Receiver, channel: str) -> list[dict[str, Any]]:
    return [event for event in receiver.events() if event["channel"] == channel]


async def until_gone(stores: Stores, name: str, most: int = 0) -> None:
    """Waits until the sorted set has no more than `most` members."""
    async with redis.asyncio.Redis.from_url(stores.redis_url) as admin:

        async def are_gone() -> bool:
            return bool(await admin.zcard(f"{stores.prefix}:{name}") <= most)

        await until_yes(are_gone)


async def until_noted(stores: Stores) -> None:
    """Waits until no call is under way: one whose answer is not noted would be made again."""
    await until_gone(stores, "hooks:due")


async def until_buried(stores: Stores) -> None:
    """Waits until one node is left, and every end of what the others held has counted."""
    await until_gone(stores, "nodes", 1)
    await until_gone(stores, "hooks:leaving")


@pytest.mark.pusher("2.3", "pusher for Node and for Python accept the signed calls")
async def test_the_libraries_accept_what_a_gateway_sends_and_nothing_else(
    gateway_with: GatewayBuilder, settings: dict[str, Any], receiver: Receiver
) -> None:
    gateway = await gateway_with(**settings)
    async with Member.connected(gateway, APP) as member:
        await member.subscribe("presence-room", "ada")
        await member.trigger("client-hello", "presence-room", {"text": "Grüße 🎭"})
        await receiver.until_events(3)
    library = pusher.Pusher(app_id=APP_ID, key=APP_KEY, secret=APP_SECRET)

    async with Backend("backend") as backend:
        await backend.order("connect", options=gateway.backend_options())
        for told in receiver.told:
            text = told.body.decode()
            checked = await backend.order("webhook", headers=told.headers, body=text)
            assert checked["valid"] is True
            assert checked["events"] == told.events
            forged = await backend.order("webhook", headers=told.headers, body=text + " ")
            assert forged == {"valid": False}
            key, signature = told.headers["x-pusher-key"], told.headers["x-pusher-signature"]
            assert library.validate_webhook(key, signature, text) == json.loads(text)
            assert library.validate_webhook(key, signature, text + " ") is None


@pytest.mark.pusher("2.3", "a crashed node's leavings are told once, by the survivors")
async def test_what_a_killed_node_leaves_is_told_once_by_the_survivors(
    gateway_with: GatewayBuilder, settings: dict[str, Any], receiver: Receiver, stores: Stores
) -> None:
    doomed = await gateway_with(**settings)
    survivors = [await gateway_with(**settings) for _ in range(2)]
    async with (
        Member.connected(doomed, APP) as gone,
        Member.connected(doomed, APP) as twice,
        Member.connected(survivors[0], APP) as stays,
    ):
        await gone.subscribe("presence-room", "ada")
        await twice.subscribe("presence-room", "bob")
        await stays.subscribe("presence-room", "bob")
        await gone.subscribe("lonely")
        # channel_occupied twice, member_added twice.
        await receiver.until_events(4)
        await until_noted(stores)

        await asyncio.to_thread(doomed.kill)
        await receiver.until(lambda: len(receiver.events()) >= 6)
        # Whatever else the survivors had to tell would be in front of this.
        async with Member.connected(survivors[1], APP) as last:
            await last.subscribe("mark")
            await receiver.until(lambda: about(receiver, "mark"))

        assert about(receiver, "lonely") == [
            {"name": "channel_occupied", "channel": "lonely"},
            {"name": "channel_vacated", "channel": "lonely"},
        ]
        room = [one for one in about(receiver, "presence-room") if one["name"] != "member_added"]
        assert room == [
            {"name": "channel_occupied", "channel": "presence-room"},
            {"name": "member_removed", "channel": "presence-room", "user_id": "ada"},
        ]


@pytest.mark.pusher("2.3", "a client that comes back to another node in time has not left")
async def test_who_moves_from_a_killed_node_to_another_one_has_not_left(
    gateway_with: GatewayBuilder, settings: dict[str, Any], receiver: Receiver, stores: Stores
) -> None:
    doomed = await gateway_with(**settings)
    survivor = await gateway_with(**settings)
    async with Member.connected(doomed, APP) as before:
        await before.subscribe("presence-room", "ada")
        await receiver.until_events(2)
        await until_noted(stores)
        await asyncio.to_thread(doomed.kill)
    async with Member.connected(survivor, APP) as after:
        await after.subscribe("presence-room", "ada")
        await until_buried(stores)
        await after.subscribe("mark")
        await receiver.until(lambda: about(receiver, "mark"))

        assert [event["name"] for event in about(receiver, "presence-room")] in (
            ["channel_occupied", "member_added"],
            ["member_added", "channel_occupied"],
        )


@pytest.mark.pusher("2.3", "what a killed node was sending is sent by another one")
async def test_a_node_that_is_killed_while_it_sends_loses_nothing(
    gateway_with: GatewayBuilder, settings: dict[str, Any], receiver: Receiver
) -> None:
    doomed = await gateway_with(**settings)
    receiver.gate = asyncio.Event()
    backend = pusher.Pusher(
        app_id=APP_ID, key=APP_KEY, secret=APP_SECRET, host="127.0.0.1", port=doomed.port, ssl=False
    )
    async with (
        Member.connected(doomed, APP) as member,
        Member.connected(doomed, APP) as listener,
    ):
        await listener.subscribe("presence-room", "bob")
        await receiver.until(lambda: receiver.waiting)
        await member.subscribe("presence-room", "ada")
        assert (await listener.next())["event"] == "pusher_internal:member_added"
        for number in range(5):
            await member.trigger("client-n", "presence-room", number)
            assert (await listener.next())["data"] == number
        await member.subscribe("behind-it")
        # Who asks is told what is written; what was not is not known to have happened.
        assert (await asyncio.to_thread(backend.channel_info, "behind-it"))["occupied"]
        await asyncio.to_thread(doomed.kill)
    gate, receiver.gate = receiver.gate, None
    receiver.told.clear()

    await gateway_with(**settings)
    gate.set()
    await receiver.until(
        lambda: {"name": "channel_vacated", "channel": "behind-it"} in receiver.events()
    )

    told = receiver.events()
    sent = [event["data"] for event in told if event["name"] == "client_event"]
    assert sorted(set(sent)) == [str(number) for number in range(5)]
    assert [event["name"] for event in about(receiver, "behind-it")] == [
        "channel_occupied",
        "channel_vacated",
    ]


async def test_an_endpoint_that_comes_back_hears_of_what_it_missed(
    gateway_with: GatewayBuilder, settings: dict[str, Any], receiver: Receiver
) -> None:
    receiver.status = 503
    gateway = await gateway_with(**settings)
    async with Member.connected(gateway, APP) as member:
        for number in range(3):
            await member.subscribe(f"c{number}")
        await receiver.until(lambda: len(receiver.told) >= 2)
        assert receiver.events() == []

        receiver.status = 200
        await receiver.until_events(3)

    assert sorted(event["channel"] for event in receiver.events()) == ["c0", "c1", "c2"]
