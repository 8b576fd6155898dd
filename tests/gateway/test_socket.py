"""The wire with bytes in and out: a real uvicorn, real sockets, the memory broker."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from gateway.apps import App, Apps
from gateway.auth import sign_channel
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


# The node's part


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
