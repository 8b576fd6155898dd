"""The wire with bytes in and out: a real uvicorn, real sockets, the memory broker."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from gateway.apps import App, Apps
from gateway.auth import sign_channel, sign_user
from gateway.frames import PONG_FRAME
from persistence.errors import StoreUnavailable
from tests.gateway.harness import (
    APP,
    RawClient,
    masked_frame,
    running_gateway,
    settings_for_tests,
    until,
)

# Opening


@pytest.mark.pusher(
    "1.1", "the first frame is connection_established with a socket_id of two numbers"
)
async def test_the_first_frame_is_connection_established_with_a_socket_id() -> None:
    async with running_gateway() as gateway, await gateway.open() as client:
        event = await client.event()

        assert event["event"] == "pusher:connection_established"
        data = json.loads(event["data"])
        assert re.fullmatch(r"\d+\.\d+", data["socket_id"])
        assert data["activity_timeout"] == 120


@pytest.mark.pusher("1.1", "an offered Sec-WebSocket-Protocol is echoed (Swift)")
async def test_the_offered_subprotocol_is_echoed() -> None:
    offered = "pusher-channels-protocol-7"
    async with (
        running_gateway() as gateway,
        await gateway.open(Sec_WebSocket_Protocol=offered) as client,
    ):
        assert f"Sec-WebSocket-Protocol: {offered}\r\n" in client.response


@pytest.mark.pusher("1.1", "permessage-deflate is not negotiated")
async def test_compression_is_refused_because_ready_frames_are_plain() -> None:
    async with (
        running_gateway() as gateway,
        await gateway.open(
            Sec_WebSocket_Extensions="permessage-deflate; client_max_window_bits"
        ) as client,
    ):
        assert " 101 " in client.response
        assert "permessage-deflate" not in client.response


@pytest.mark.pusher("1.1", "protocol 5, 6 and 7 are served")
@pytest.mark.parametrize("version", ["5", "6", "7"])
async def test_the_protocol_versions_of_pushers_own_clients_are_served(version: str) -> None:
    async with running_gateway() as gateway:
        client = await gateway.connect(path=f"/app/app-key?protocol={version}")
        await client.ping()


@pytest.mark.pusher(
    "1.9", "4001, 4003, 4005, 4006, 4007: a pusher:error and a close with that code"
)
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/app/app-key?protocol=4", 4007),
        ("/app/app-key?protocol=8", 4007),
        ("/app/app-key?protocol=" + "9" * 5000, 4007),
        ("/app/app-key?protocol=seven", 4006),
        ("/app/app-key?protocol=-7", 4006),
        ("/app/nobody?protocol=7", 4001),
        ("/app/?protocol=7", 4001),
        ("/elsewhere", 4005),
        ("/app/off?protocol=7", 4003),
        ("/app/app-key?protocol=7&token=broken", 4009),
    ],
)
async def test_a_refused_connection_gets_an_error_and_a_close_with_the_same_code(
    path: str, code: int
) -> None:
    apps = Apps([APP, App(id="2", key="off", secret="s", enabled=False)])
    async with (
        running_gateway(apps=apps) as gateway,
        await gateway.open(path) as client,
    ):
        error, closed = await client.refused()

        assert error["code"] == closed.code == code
        assert error["message"]


@pytest.mark.pusher("1.9", "4008: a missing protocol, in strict mode only")
@pytest.mark.pusher("1.9", "4000: an app that is for TLS only sends the client to TLS")
async def test_an_app_for_tls_only_refuses_plain_connections() -> None:
    apps = Apps([App(id="1", key="app-key", secret="s", tls_only=True)])
    async with running_gateway(apps=apps) as gateway:
        for headers in ({}, {"X_Forwarded_Proto": "http"}):
            async with await gateway.open(**headers) as client:
                error, closed = await client.refused()
                assert error["code"] == closed.code == 4000
        await (await gateway.connect(X_Forwarded_Proto="https, http")).close()


async def test_a_missing_protocol_is_refused_in_strict_mode_only() -> None:
    async with running_gateway() as gateway:
        await (await gateway.connect(path="/app/app-key")).close()
    async with (
        running_gateway(settings_for_tests(strict_protocol=True)) as gateway,
        await gateway.open("/app/app-key") as client,
    ):
        _, closed = await client.refused()

        assert closed.code == 4008


@pytest.mark.pusher("1.1", "a path prefix (wsPath) is routed")
async def test_a_path_prefix_is_part_of_the_path() -> None:
    async with running_gateway(settings_for_tests(path_prefix="/duet")) as gateway:
        await (await gateway.connect(path="/duet/app/app-key?protocol=7")).close()
        async with await gateway.open("/app/app-key?protocol=7") as client:
            assert (await client.refused())[1].code == 4005


@pytest.mark.pusher("1.9", "4004: over the app's connection quota")
async def test_a_connection_over_the_apps_quota_is_refused_until_one_leaves() -> None:
    apps = Apps([App(id="1", key="app-key", secret="s", max_connections=1)])
    async with running_gateway(apps=apps) as gateway:
        first = await gateway.connect()
        async with await gateway.open() as second:
            assert (await second.refused())[1].code == 4004

        first.send_frame(8, b"\x03\xe8")
        await first.ended()
        await (await gateway.connect()).close()


@pytest.mark.pusher("1.9", "4009: an Origin that the app does not allow")
@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://good.example", True),
        ("https://GOOD.example:8443", True),
        ("https://a.sub.example", True),
        ("https://sub.example", False),
        ("https://evilgood.example", False),
        ("https://good.example.evil.example", False),
        ("null", False),
        (None, True),
    ],
)
async def test_only_allowed_origins_connect(origin: str | None, allowed: bool) -> None:
    origins = ("good.example", "*.sub.example")
    apps = Apps([App(id="1", key="app-key", secret="s", origins=origins)])
    headers = {} if origin is None else {"Origin": origin}
    async with (
        running_gateway(apps=apps) as gateway,
        await gateway.open(**headers) as client,
    ):
        if allowed:
            assert (await client.event())["event"] == "pusher:connection_established"
        else:
            assert (await client.refused())[1].code == 4009


async def test_a_bearer_token_proves_the_user_before_anything_is_answered() -> None:
    async with running_gateway() as gateway:
        gateway.tokens.held = asyncio.Event()
        client = await gateway.open(Authorization="Bearer streamer:s")
        client.subscribe("private-stream@s")
        gateway.tokens.held.set()

        assert (await client.event())["event"] == "pusher:connection_established"
        answer = await client.event()
        assert answer["event"] == "pusher_internal:subscription_succeeded"


async def test_a_socket_that_is_gone_before_its_token_is_checked_leaves_nothing() -> None:
    async with running_gateway() as gateway:
        gateway.tokens.held = asyncio.Event()
        client = await gateway.open("/app/app-key?token=streamer:s")
        client.writer.transport.abort()
        gateway.tokens.held.set()

        await until(lambda: not gateway.server.server_state.connections)
        assert gateway.count("duet_connections") == 0


# Messages


@pytest.mark.pusher(
    "1.3", "a message that makes no sense is answered by pusher:error and the socket stays open"
)
@pytest.mark.parametrize(
    "message",
    [
        "not json",
        "[]",
        "{}",
        '{"event":1}',
        '{"event":"pusher:subscribe"}',
        '{"event":"pusher:subscribe","data":{}}',
        '{"event":"pusher:subscribe","data":{"channel":5}}',
        '{"event":"pusher:subscribe","data":"{"}',
        '{"event":"pusher:subscribe","data":{"channel":"a b"}}',
        '{"event":"pusher:subscribe","data":{"channel":"#other"}}',
        '{"event":"pusher:subscribe","data":{"channel":""}}',
        '{"event":"pusher:signin","data":{"auth":"x"}}',
        '{"event":"pusher:unknown","data":{}}',
        '{"event":"unknown","data":{}}',
        '{"event":"client-x","data":{}}',
        '{"event":"x","channel":5}',
        '{"event":"x","data":' + "[" * 5000 + "]" * 5000 + "}",
        '{"event":"client-x","channel":"private-a","data":"\\ud800"}',
        '{"event":"pusher:subscribe","data":{"channel":"' + "c" * 201 + '"}}',
    ],
)
async def test_a_message_that_makes_no_sense_is_answered_and_the_socket_stays_open(
    message: str,
) -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        client.send(message)

        error = await client.event()
        assert error["event"] == "pusher:error"
        assert error["data"]["code"] is None
        assert error["data"]["message"]
        await client.ping()


@pytest.mark.pusher("1.1", "a binary frame is answered by pusher:error and the socket stays open")
async def test_a_binary_frame_is_answered_and_the_socket_stays_open() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        client.send_frame(2, b"\x00\xff")
        assert "Binary" in (await client.event())["data"]["message"]
        client.send_frame(2, b"\x00", fin=False)
        assert "Binary" in (await client.event())["data"]["message"]
        client.send_frame(0, b"\x01", fin=True)

        await client.ping()


@pytest.mark.pusher("1.1", "fragmented messages, control frames in between")
async def test_a_fragmented_message_with_a_ping_in_between_is_one_message() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        client.send_frame(1, b'{"event":"pusher:', fin=False)
        client.send_frame(9, b"are you there")
        client.send_frame(0, b"pi", fin=False)
        client.send_frame(0, b'ng"}')

        assert await client.frame() == (10, b"are you there")
        assert (await client.event())["event"] == "pusher:pong"


@pytest.mark.pusher("1.1", "a frame may arrive byte by byte")
async def test_a_message_split_into_single_bytes_is_one_message() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        for byte in masked_frame(1, b'{"event":"pusher:ping","data":"{}"}'):
            client.writer.write(bytes((byte,)))
            await client.writer.drain()

        assert (await client.event())["event"] == "pusher:pong"


@pytest.mark.pusher(
    "1.9", "1002, 1007, 1009: a broken frame gets the RFC's code and a pusher:error"
)
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (masked_frame(1, b'{"event":"\xff"}'), 1007),
        (masked_frame(1, b"x" * 1025), 1009),
        (masked_frame(1, b"x" * 1000, fin=False) + masked_frame(0, b"x" * 1000), 1009),
        (b"\x81\x02hi", 1002),
        (masked_frame(3, b""), 1002),
        (masked_frame(0, b"no beginning"), 1002),
        (masked_frame(9, b"x" * 126), 1002),
    ],
    ids=["utf-8", "too big", "too big in pieces", "unmasked", "opcode", "continuation", "control"],
)
async def test_a_broken_frame_gets_an_error_and_the_rfcs_close_code(sent: bytes, code: int) -> None:
    settings = settings_for_tests(max_message_bytes=1024)
    async with running_gateway(settings) as gateway, await gateway.connect() as client:
        client.writer.write(sent)

        error, closed = await client.refused()
        assert closed.code == code
        assert error["code"] is None
        await client.ended()


@pytest.mark.pusher("1.9", "a client's close is echoed")
async def test_a_clients_close_is_echoed_and_the_connection_ended() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        client.send_frame(8, b"\x0f\xa0bye")

        assert await client.frame() == (8, b"\x0f\xa0bye")
        await client.ended()
        await until(lambda: not gateway.server.server_state.connections)


async def test_frames_behind_a_close_are_ignored() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        client.writer.write(masked_frame(8, b"\x03\xe8") + masked_frame(1, b'{"event":"x"}'))

        assert await client.frame() == (8, b"\x03\xe8")
        await client.ended()


async def test_a_request_that_is_no_upgrade_is_refused_by_http() -> None:
    async with running_gateway() as gateway:
        client = await gateway.open(Sec_WebSocket_Version="12")
        assert " 426 " in client.response


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
        watcher = await _member(gateway, "w")
        first = await _member(gateway, "u")
        assert json.loads((await watcher.event())["data"])["user_id"] == "u"
        second = await _member(gateway, "u")
        await first.close()
        await second.close()

        removed = await watcher.event()
        assert removed["event"] == "pusher_internal:member_removed"
        assert json.loads(removed["data"]) == {"user_id": "u"}
        await watcher.ping()


@pytest.mark.pusher("1.6", "a full presence channel refuses new members only")
async def test_a_full_presence_channel_refuses_new_members_only() -> None:
    async with running_gateway(settings_for_tests(presence_max_members=1)) as gateway:
        await _member(gateway, "u")
        await _member(gateway, "u")
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
        client.send(_command("r", channel="private-user@w"))

        assert (await client.event())["event"] == "pusher:error"
        assert gateway.commands.executed == []


# Client events


@pytest.mark.pusher("1.7", "a client event reaches everyone on the channel but its sender")
async def test_a_client_event_reaches_everyone_on_the_channel_but_its_sender() -> None:
    async with running_gateway() as gateway:
        sender, other = await _member(gateway, "a"), await _member(gateway, "b")
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
        sender, other = await _member(gateway, "a"), await _member(gateway, "b")
        await sender.event()
        await sender.subscribed("public")
        sender.send(message)

        assert (await sender.event())["event"] == "pusher:error"
        await other.ping()


@pytest.mark.pusher("1.7", "client events can be switched off for an app")
async def test_client_events_of_an_app_without_them_are_refused() -> None:
    apps = Apps([App(id="1", key="app-key", secret="app-secret", client_events=False)])
    async with running_gateway(apps=apps) as gateway:
        client = await _member(gateway, "a")
        client.send({"event": "client-e", "channel": "presence-a", "data": {}})

        assert "not enabled" in (await client.event())["data"]["message"]


@pytest.mark.pusher("1.7", "client events over the rate get 4301 and the socket stays open")
async def test_client_events_over_the_rate_get_4301_and_the_socket_stays_open() -> None:
    settings = settings_for_tests(client_event_rate_per_s=2)
    async with running_gateway(settings) as gateway:
        client = await _member(gateway, "a")
        for _ in range(3):
            client.send({"event": "client-e", "channel": "presence-a", "data": {}})

        assert (await client.event())["data"]["code"] == 4301
        await client.ping()


# Commands


async def test_a_command_is_answered_on_its_socket_and_nobody_else_sees_it() -> None:
    apps = Apps([App(id="1", key="app-key", secret="app-secret", client_events=False)])
    async with running_gateway(apps=apps) as gateway:
        client = await _own_channel(gateway)
        second = await _own_channel(gateway)
        client.send(_command("r1"))

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
        client.send(_command("r1"))

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
        client = await _own_channel(gateway)
        client.send(message | {"channel": "private-user@v"})

        reply = json.loads((await client.event())["data"])
        assert reply["ok"] is False
        assert reply["error"]["code"] == code
        assert reply["request_id"] == ("r" if "request_id" in str(message.get("data")) else None)
        assert gateway.commands.executed == []


async def test_commands_over_the_number_in_flight_are_refused_and_retryable() -> None:
    async with running_gateway(settings_for_tests(commands_in_flight=2)) as gateway:
        client = await _own_channel(gateway)
        gateway.commands.released = asyncio.Event()
        for number in range(3):
            client.send(_command(f"r{number}"))

        refused = json.loads((await client.event())["data"])
        assert refused["request_id"] == "r2"
        assert refused["error"]["code"] == "overloaded"
        assert refused["error"]["retryable"] is True
        gateway.commands.released.set()
        done = {json.loads((await client.event())["data"])["request_id"] for _ in range(2)}
        assert done == {"r0", "r1"}


async def test_commands_over_the_rate_are_refused() -> None:
    async with running_gateway(settings_for_tests(command_rate_per_s=1)) as gateway:
        client = await _own_channel(gateway)
        client.send(_command("r0"))
        client.send(_command("r1"))

        replies = [json.loads((await client.event())["data"]) for _ in range(2)]
        assert {reply["request_id"]: reply["ok"] for reply in replies} == {"r0": True, "r1": False}
        assert {r["error"]["code"] for r in replies if not r["ok"]} == {"rate_limited"}


async def test_a_signature_over_ones_own_user_channel_proves_the_user_without_a_role() -> None:
    async with running_gateway() as gateway, await gateway.connect() as client:
        auth = sign_channel(APP, client.socket_id, "private-user@v")
        await client.subscribed("private-user@v", auth)
        assert (await client.event())["event"] == "goal.snapshot"
        client.send(_command("r"))

        assert (await client.event())["event"] == "goal.reply"
        [(_, identity)] = gateway.commands.executed
        assert (identity.user_id, identity.role, identity.client_id) == ("v", None, "app-key")


# Liveness


@pytest.mark.pusher("1.9", "4201: a client that does not answer a ping")
async def test_a_silent_client_is_pinged_and_closed_when_it_does_not_answer() -> None:
    settings = settings_for_tests(activity_timeout_s=0.1, pong_timeout_s=0.1)
    async with running_gateway(settings) as gateway, await gateway.connect() as client:
        assert (await client.event())["event"] == "pusher:ping"

        error, closed = await client.refused()
        assert error["code"] == closed.code == 4201


@pytest.mark.pusher("1.4", "a silent client is pinged; whoever answers stays")
async def test_a_client_that_answers_pings_stays() -> None:
    settings = settings_for_tests(activity_timeout_s=0.05, pong_timeout_s=1)
    async with running_gateway(settings) as gateway, await gateway.connect() as client:
        for _ in range(3):
            assert (await client.event())["event"] == "pusher:ping"
            client.send({"event": "pusher:pong", "data": {}})


async def test_a_peer_that_ignores_the_close_is_aborted() -> None:
    settings = settings_for_tests(activity_timeout_s=0.05, pong_timeout_s=0.05)
    async with running_gateway(settings) as gateway, await gateway.connect() as client:
        await client.event()
        await client.refused()

        await client.ended()
        await until(lambda: not gateway.server.server_state.connections)


@pytest.mark.pusher("1.8", "4009: authorized connections only")
async def test_an_authorized_only_app_closes_those_who_stay_anonymous() -> None:
    app = App(
        id="1",
        key="app-key",
        secret="app-secret",
        authorized_only=True,
        authorization_timeout_s=0.2,
    )
    async with running_gateway(settings_for_tests(activity_timeout_s=0.5), Apps([app])) as gateway:
        anonymous, known = await gateway.connect(), await gateway.connect()
        auth = sign_channel(app, known.socket_id, "private-a")
        await known.subscribed("private-a", auth)

        error, closed = await anonymous.refused()
        assert error["code"] == closed.code == 4009
        assert (await known.event())["event"] == "pusher:ping"


# Slow readers and the drain


async def test_a_stalled_reader_is_aborted_while_the_others_get_everything() -> None:
    settings = settings_for_tests(send_buffer_bytes=262_144)
    async with running_gateway(settings) as gateway:
        stalled, reading = await gateway.connect(), await gateway.connect()
        await stalled.subscribed("c")
        await reading.subscribed("c")
        stalled.reader._transport.pause_reading()  # type: ignore[attr-defined]

        for number in range(400):
            await gateway.push("c", n=number, pad="x" * 20_000)
            assert json.loads((await reading.event())["data"])["n"] == number

        await until(lambda: gateway.count("duet_slow_aborts_total") == 1)
        await reading.ping()


async def test_a_reader_that_stalls_and_catches_up_has_missed_nothing_and_keeps_the_order() -> None:
    settings = settings_for_tests(send_buffer_bytes=8_000_000)
    async with running_gateway(settings) as gateway:
        lagging, reading = await gateway.connect(), await gateway.connect()
        await lagging.subscribed("c")
        await reading.subscribed("c")
        [one, other] = gateway.node.connections()
        assert min(one.fd, other.fd) >= 0

        async def publish(numbers: range) -> None:
            for number in numbers:
                await gateway.push("c", n=number, pad="x" * 20_000)
                # What is said to one socket alone goes through the transport, in between.
                one.write(PONG_FRAME)
                assert json.loads((await reading.event())["data"])["n"] == number

        await publish(range(5))
        lagging.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await publish(range(5, 305))
        # Something waits in the transport now: nothing may be written past it.
        assert one.fd == -1 < other.fd
        lagging.reader._transport.resume_reading()  # type: ignore[attr-defined]

        received = [await lagging.event() for _ in range(2 * 305)]
        published = [event for event in received if event["event"] != "pusher:pong"]
        assert [json.loads(event["data"])["n"] for event in published] == list(range(305))
        await until(lambda: one.fd >= 0)


async def test_the_descriptor_of_a_connection_that_ends_is_taken_back_at_once() -> None:
    async with running_gateway() as gateway:
        for _ in range(2):
            await (await gateway.connect()).subscribed("c")
        aborted, closed = gateway.node.connections()
        channel = gateway.node.hub.channel(("1", "c"))
        assert channel is not None

        aborted.abort()
        closed.disconnect(4009)

        assert (aborted.fd, closed.fd) == (-1, -1)
        assert set(channel.live.values()) <= {-1}


@pytest.mark.pusher("1.9", "4200: a stopping node sends its sockets away in slices")
async def test_a_stopping_node_asks_everyone_to_reconnect_over_the_drain() -> None:
    async with running_gateway(settings_for_tests(drain_s=0.3)) as gateway:
        clients = [await gateway.connect() for _ in range(6)]
        gateway.node.begin_drain()
        assert gateway.node.ready is False
        loop = asyncio.get_running_loop()

        async def closed_at(client: RawClient) -> float:
            error, closed = await client.refused()
            assert error["code"] == closed.code == 4200
            return loop.time()

        times = await asyncio.gather(*map(closed_at, clients))

        assert max(times) - min(times) > 0.1
        late = await gateway.open()
        assert (await late.refused())[1].code == 4100


@pytest.mark.pusher("1.8", "terminating a user closes his signed-in sockets (4009)")
async def test_terminating_a_user_closes_the_sockets_that_signed_in_as_it() -> None:
    async with running_gateway() as gateway:
        one = await gateway.connect(path="/app/app-key?token=viewer:v")
        other = await gateway.connect(path="/app/app-key?token=viewer:w")
        await gateway.node.terminate_user("1", "v")

        assert (await one.refused())[1].code == 4009
        await other.ping()


# Helpers


def _command(request_id: str, channel: str = "private-user@v") -> dict[str, Any]:
    data = {"request_id": request_id, "goal_id": "0" * 24}
    return {"event": "client-goal.withdraw", "channel": channel, "data": data}


async def _own_channel(gateway: Any) -> RawClient:
    client: RawClient = await gateway.connect(path="/app/app-key?token=viewer:v")
    await client.subscribed("private-user@v")
    assert (await client.event())["event"] == "goal.snapshot"
    return client


async def _member(gateway: Any, user_id: str) -> RawClient:
    client: RawClient = await gateway.connect()
    shown = json.dumps({"user_id": user_id})
    auth = sign_channel(APP, client.socket_id, "presence-a", shown)
    await client.subscribed("presence-a", auth, channel_data=shown)
    return client
