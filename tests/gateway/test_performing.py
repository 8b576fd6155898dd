"""Client events and commands over real sockets: what comes of them, and for whom."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.apps import App, Apps
from gateway.auth import sign_channel
from tests.gateway.harness import APP, running_gateway, settings_for_tests
from tests.gateway.subscribers import member, on_own_channel, withdrawal

# Client events


@pytest.mark.pusher("1.7", "a client event reaches everyone on the channel but its sender")
async def test_a_client_event_reaches_everyone_on_the_channel_but_its_sender() -> None:
    async with running_gateway() as gateway:
        sender, other = await member(gateway, "a"), await member(gateway, "b")
        assert (await sender.event())["event"] == "pusher_internal:member_added"
        sender.send('{"event":"client-e","channel":"presence-a","data":{"x" : 1.0}}')

        opcode, payload = await other.frame()
        assert opcode == 1
        assert b'"data":{"x" : 1.0}' in payload
        assert json.loads(payload)["user_id"] == "a"
        await sender.ping()


@pytest.mark.pusher(
    "1.7", "client events need a private or presence channel that the sender is subscribed to"
)
@pytest.mark.parametrize(
    "message",
    [
        {"event": "client-e", "channel": "public", "data": {}},
        {"event": "client-e", "channel": "private-not-subscribed", "data": {}},
        {"event": "client-" + "e" * 200, "channel": "presence-a", "data": {}},
        {"event": "client-e", "channel": "presence-a", "data": "x" * 10_240},
    ],
)
async def test_a_client_event_against_the_rules_is_an_error_and_goes_nowhere(
    message: dict[str, Any],
) -> None:
    async with running_gateway() as gateway:
        sender, other = await member(gateway, "a"), await member(gateway, "b")
        await sender.event()
        await sender.subscribed("public")
        sender.send(message)

        assert (await sender.event())["event"] == "pusher:error"
        await other.ping()


@pytest.mark.pusher("1.7", "client events can be switched off for an app")
async def test_client_events_of_an_app_without_them_are_refused() -> None:
    apps = Apps([App(id="1", key="app-key", secret="app-secret", client_events=False)])
    async with running_gateway(apps=apps) as gateway:
        client = await member(gateway, "a")
        client.send({"event": "client-e", "channel": "presence-a", "data": {}})

        assert "not enabled" in (await client.event())["data"]["message"]


@pytest.mark.pusher("1.7", "client events over the rate get 4301 and the socket stays open")
async def test_client_events_over_the_rate_get_4301_and_the_socket_stays_open() -> None:
    settings = settings_for_tests(client_event_rate_per_s=2)
    async with running_gateway(settings) as gateway:
        client = await member(gateway, "a")
        for _ in range(3):
            client.send({"event": "client-e", "channel": "presence-a", "data": {}})

        assert (await client.event())["data"]["code"] == 4301
        await client.ping()


# Commands


async def test_a_command_is_answered_on_its_socket_and_nobody_else_sees_it() -> None:
    apps = Apps([App(id="1", key="app-key", secret="app-secret", client_events=False)])
    async with running_gateway(apps=apps) as gateway:
        client = await on_own_channel(gateway)
        second = await on_own_channel(gateway)
        client.send(withdrawal("r1"))

        reply = await client.event()
        assert (reply["event"], reply["channel"]) == ("goal.reply", "private-user@v")
        assert json.loads(reply["data"]) == {"request_id": "r1", "ok": True, "goal": {"id": "g"}}
        [(command, identity)] = gateway.commands.executed
        assert command.request_id == "r1"
        assert identity.user_id == "v"
        await second.ping()


async def test_a_command_sent_with_the_subscription_in_one_breath_is_executed() -> None:
    async with running_gateway() as gateway:
        client = await gateway.connect(path="/app/app-key?token=viewer:v")
        client.subscribe("private-user@v")
        client.send(withdrawal("r1"))

        events = {(await client.event())["event"] for _ in range(3)}
        assert "goal.reply" in events


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"event": "client-goal.dance", "data": {"request_id": "r"}}, "unknown_command"),
        ({"event": "client-exclusive.x", "data": {"request_id": "r"}}, "unknown_command"),
        ({"event": "client-goal.agree", "data": {"request_id": "r"}}, "malformed"),
        ({"event": "client-goal.agree", "data": {"goal_id": "g"}}, "bad_request_id"),
        ({"event": "client-goal.agree", "data": [1]}, "malformed"),
        ({"event": "client-goal.agree"}, "malformed"),
    ],
)
async def test_a_command_that_cannot_be_read_gets_a_reply_that_says_so(
    message: dict[str, Any], code: str
) -> None:
    async with running_gateway() as gateway:
        client = await on_own_channel(gateway)
        client.send(message | {"channel": "private-user@v"})

        reply = json.loads((await client.event())["data"])
        assert reply["ok"] is False
        assert reply["error"]["code"] == code
        assert reply["request_id"] == ("r" if "request_id" in str(message.get("data")) else None)
        assert gateway.commands.executed == []


async def test_commands_over_the_number_in_flight_are_refused_and_retryable() -> None:
    async with running_gateway(settings_for_tests(commands_in_flight=2)) as gateway:
        client = await on_own_channel(gateway)
        gateway.commands.released = asyncio.Event()
        for number in range(3):
            client.send(withdrawal(f"r{number}"))

        refused = json.loads((await client.event())["data"])
        assert refused["request_id"] == "r2"
        assert refused["error"]["code"] == "overloaded"
        assert refused["error"]["retryable"] is True
        gateway.commands.released.set()
        done = {json.loads((await client.event())["data"])["request_id"] for _ in range(2)}
        assert done == {"r0", "r1"}


async def test_commands_over_the_rate_are_refused() -> None:
    async with running_gateway(settings_for_tests(command_rate_per_s=1)) as gateway:
        client = await on_own_channel(gateway)
        client.send(withdrawal("r0"))
        client.send(withdrawal("r1"))

        replies = [json.loads((await client.event())["data"]) for _ in range(2)]
        assert {reply["request_id"]: reply["ok"] for reply in replies} == {"r0": True, "r1": False}
        assert {r["error"]["code"] for r in replies if not r["ok"]} == {"rate_limited"}


async def test_a_signature_over_ones_own_user_channel_proves_the_user_without_a_role() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        auth = sign_channel(APP, client.socket_id, "private-user@v")
        await client.subscribed("private-user@v", auth)
        assert (await client.event())["event"] == "goal.snapshot"
        client.send(withdrawal("r"))

        assert (await client.event())["event"] == "goal.reply"
        [(_, identity)] = gateway.commands.executed
        assert (identity.user_id, identity.role, identity.client_id) == ("v", None, "app-key")
