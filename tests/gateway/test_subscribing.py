"""Subscriptions over real sockets: who may, in which order, and what is shown first."""

from __future__ import annotations

import asyncio
import json

import pytest

from gateway.auth import sign_channel, sign_user
from persistence.errors import StoreUnavailable
from tests.gateway.harness import APP, running_gateway, settings_for_tests
from tests.gateway.subscribers import member, withdrawal

# Subscribing


@pytest.mark.pusher("1.6", "public, private and presence channels")
async def test_public_private_and_presence_channels_are_subscribed_by_signature() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        assert await client.subscribed("public") == {}
        auth = sign_channel(APP, client.socket_id, "private-a")
        assert await client.subscribed("private-a", auth) == {}
        shown = '{"user_id":7,"user_info":{"name":"A"}}'
        auth = sign_channel(APP, client.socket_id, "presence-a", shown)
        state = await client.subscribed("presence-a", auth, channel_data=shown)

        assert state == {"presence": {"ids": ["7"], "hash": {"7": {"name": "A"}}, "count": 1}}


@pytest.mark.pusher(
    "1.5", "a wrong signature is a subscription_error that never tells the right one"
)
async def test_a_wrong_signature_is_a_subscription_error_that_tells_no_digest() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        right = sign_channel(APP, client.socket_id, "private-b")
        client.subscribe("private-a", right)

        error = await client.event()
        assert error["event"] == "pusher:subscription_error"
        assert error["channel"] == "private-a"
        assert (error["data"]["type"], error["data"]["status"]) == ("AuthError", 401)
        expected = sign_channel(APP, client.socket_id, "private-a").partition(":")[2]
        assert expected not in json.dumps(error)
        await client.ping()


@pytest.mark.pusher("1.3", "a second subscription to a channel is a pusher:error with code null")
async def test_a_second_subscription_to_a_channel_is_an_error() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        await client.subscribed("c")
        client.subscribe("c")

        error = await client.event()
        assert error["data"] == {"code": None, "message": "Existing subscription to channel c"}


@pytest.mark.pusher("1.3", "unsubscribe is silent and repeatable")
async def test_unsubscribe_is_silent_and_repeatable_and_one_may_come_back() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        await client.subscribed("c")
        for _ in range(2):
            client.send({"event": "pusher:unsubscribe", "data": {"channel": "c"}})
        await client.ping()
        await gateway.push("c")
        await client.ping()

        await client.subscribed("c")
        await gateway.push("c", n=1)
        assert json.loads((await client.event())["data"]) == {"n": 1}


@pytest.mark.pusher("1.3", "messages act in the order in which they were sent")
async def test_messages_sent_in_one_breath_act_in_their_order() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        auth = sign_channel(APP, client.socket_id, "private-a")
        client.subscribe("private-a", auth)
        client.subscribe("private-a", auth)
        client.send({"event": "client-e", "channel": "private-a", "data": {}})
        client.send({"event": "pusher:unsubscribe", "data": {"channel": "private-a"}})
        client.subscribe("private-a", auth)
        client.send({"event": "unknown"})

        events = [await client.event() for _ in range(4)]
        assert [event["event"] for event in events] == [
            "pusher_internal:subscription_succeeded",
            "pusher:error",
            "pusher_internal:subscription_succeeded",
            "pusher:error",
        ]
        assert "Existing" in events[1]["data"]["message"]
        assert "Unknown" in events[3]["data"]["message"]


async def test_the_four_families_follow_from_the_token() -> None:
    async with running_gateway() as gateway:
        gateway.commands.live.add("s")
        streamer = await gateway.connect(path="/app/app-key?token=streamer:s")
        viewer = await gateway.connect(path="/app/app-key?token=viewer:v")

        await streamer.subscribed("private-stream@s")
        state = await streamer.subscribed("presence-stream-viewer@s.preview.v")
        assert state["presence"]["ids"] == ["s"]
        state = await viewer.subscribed("presence-stream@s")
        assert state["presence"]["ids"] == ["v"]

        for channel, status in [
            ("private-stream@s", 401),
            ("private-user@s", 401),
            ("presence-stream-viewer@s.preview.w", 401),
            ("presence-stream@other", 403),
            ("private-anything", 401),
        ]:
            viewer.subscribe(channel)
            error = await viewer.event()
            assert (error["event"], error["channel"]) == ("pusher:subscription_error", channel)
            assert error["data"]["status"] == status


async def test_being_live_is_remembered_until_it_is_dropped_on_every_node() -> None:
    async with running_gateway() as gateway:
        gateway.commands.live.add("s")
        viewer = await gateway.connect(path="/app/app-key?token=viewer:v")
        await viewer.subscribed("presence-stream@s")
        viewer.send({"event": "pusher:unsubscribe", "data": {"channel": "presence-stream@s"}})
        await viewer.subscribed("presence-stream@s")
        assert gateway.commands.asked_live == ["s"]

        gateway.commands.live.clear()
        viewer.send({"event": "pusher:unsubscribe", "data": {"channel": "presence-stream@s"}})
        await gateway.node.drop_channel_data("s")
        viewer.subscribe("presence-stream@s")
        assert (await viewer.event())["data"]["status"] == 403


@pytest.mark.pusher("1.5", "presence without channel_data takes the signed-in user's")
async def test_a_signed_in_user_has_presence_and_user_events_without_channel_data() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        client.subscribe("#server-to-user-7")
        assert (await client.event())["event"] == "pusher:subscription_error"

        user_data = '{"id":"7","user_info":{"name":"A"}}'
        auth = sign_user(APP, client.socket_id, user_data)
        client.send({"event": "pusher:signin", "data": {"auth": auth, "user_data": user_data}})
        success = await client.event()
        assert success["event"] == "pusher:signin_success"
        assert json.loads(success["data"]) == {"user_data": user_data}

        await client.subscribed("#server-to-user-7")
        auth = sign_channel(APP, client.socket_id, "presence-a")
        state = await client.subscribed("presence-a", auth)
        assert state["presence"]["hash"] == {"7": {"name": "A"}}
        client.subscribe("#server-to-user-8")
        assert (await client.event())["event"] == "pusher:subscription_error"


@pytest.mark.pusher(
    "1.3", "member_added and member_removed on a user's first and last socket, not to the joiner"
)
async def test_members_come_and_go_once_per_user_and_not_for_themselves() -> None:
    async with running_gateway() as gateway:
        watcher = await member(gateway, "w")
        first = await member(gateway, "u")
        assert json.loads((await watcher.event())["data"])["user_id"] == "u"
        second = await member(gateway, "u")
        await first.close()
        await second.close()

        removed = await watcher.event()
        assert removed["event"] == "pusher_internal:member_removed"
        assert json.loads(removed["data"]) == {"user_id": "u"}
        await watcher.ping()


@pytest.mark.pusher("1.6", "a full presence channel refuses new members only")
async def test_a_full_presence_channel_refuses_new_members_only() -> None:
    async with running_gateway(settings_for_tests(presence_max_members=1)) as gateway:
        await member(gateway, "u")
        await member(gateway, "u")
        async with await gateway.connect() as late:
            shown = '{"user_id":"x"}'
            auth = sign_channel(APP, late.socket_id, "presence-a", shown)
            late.subscribe("presence-a", auth, channel_data=shown)

            error = await late.event()
            assert (error["event"], error["data"]["type"]) == (
                "pusher:subscription_error",
                "LimitReached",
            )


# Snapshot and gate


async def test_pushes_wait_behind_subscription_succeeded_and_the_snapshot() -> None:
    async with running_gateway() as gateway:
        gateway.commands.snapshot_released = asyncio.Event()
        client = await gateway.connect(path="/app/app-key?token=viewer:v")
        await client.subscribed("private-user@v")
        await gateway.commands.snapshot_asked.wait()
        await gateway.push("private-user@v", "early", n=1)
        await gateway.push("private-user@v", "early", n=2)
        await client.ping()
        gateway.commands.snapshot_released.set()

        events = [await client.event() for _ in range(3)]
        assert [event["event"] for event in events] == ["goal.snapshot", "early", "early"]
        assert json.loads(events[0]["data"]) == {"goals": [], "of": "v"}
        assert [json.loads(event["data"])["n"] for event in events[1:]] == [1, 2]
        await gateway.push("private-user@v", "late")
        assert (await client.event())["event"] == "late"


async def test_who_leaves_while_his_snapshot_is_read_is_sent_none() -> None:
    async with running_gateway() as gateway:
        gateway.commands.snapshot_released = asyncio.Event()
        client = await gateway.connect(path="/app/app-key?token=viewer:v")
        await client.subscribed("private-user@v")
        await gateway.commands.snapshot_asked.wait()
        client.send({"event": "pusher:unsubscribe", "data": {"channel": "private-user@v"}})
        await client.ping()
        gateway.commands.snapshot_released.set()

        # Twice: the snapshot's reader goes on behind the first.
        await client.ping()
        await client.ping()


async def test_a_snapshot_that_cannot_be_read_holds_nothing_back_and_follows() -> None:
    async with running_gateway() as gateway:
        gateway.commands.snapshot_faults = [StoreUnavailable("down")]
        client = await gateway.connect(path="/app/app-key?token=viewer:v")
        await client.subscribed("private-user@v")
        await gateway.push("private-user@v", "early")

        assert (await client.event())["event"] == "early"
        assert (await client.event())["event"] == "goal.snapshot"


async def test_someone_elses_signed_user_channel_has_no_snapshot_and_binds_nobody() -> None:
    async with running_gateway() as gateway:
        client = await gateway.connect(path="/app/app-key?token=viewer:v")
        auth = sign_channel(APP, client.socket_id, "private-user@w")
        await client.subscribed("private-user@w", auth)
        client.send(withdrawal("r", channel="private-user@w"))

        assert (await client.event())["event"] == "pusher:error"
        assert gateway.commands.executed == []
