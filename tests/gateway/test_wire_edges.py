"""Each limit at its edge, frames that no client library sends, and a crowd on one channel."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from gateway.auth import sign_channel
from gateway.broker import Publication
from gateway.frames import push_body
from tests.gateway.harness import (
    APP,
    RawClient,
    masked_frame,
    running_gateway,
    settings_for_tests,
    until,
    until_yes,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.gateway.harness import Gateway

# One gateway for the file: nothing here changes it.
pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGE_BYTES = 65_536
EVENT_BYTES = 10_240
MEMBERS = 1_000
CHANNELS = 1_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    settings = settings_for_tests(presence_max_members=MEMBERS)
    async with running_gateway(settings) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def client(gateway: Gateway) -> AsyncIterator[RawClient]:
    async with await gateway.connect() as client:
        yield client


def upgrade(query: str = "") -> bytes:
    """The request that begins a connection."""
    lines = (
        f"GET /app/app-key?protocol=7{query} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==",
        "Sec-WebSocket-Version: 13",
    )
    return "\r\n".join((*lines, "", "")).encode()


async def until_members(gateway: Gateway, channel: str, count: int) -> None:
    """Waits until the channel has so many members."""

    async def are_as_many() -> bool:
        return len(await gateway.presence.members(APP.id, channel)) == count

    await until_yes(are_as_many)


async def signed(client: RawClient, channel: str, **shown: Any) -> Any:
    """Subscribes with the backend's signature."""
    if not shown:
        return await client.subscribed(channel, sign_channel(APP, client.socket_id, channel))
    data = json.dumps(shown)
    auth = sign_channel(APP, client.socket_id, channel, data)
    return await client.subscribed(channel, auth, channel_data=data)


# Limits


@pytest.mark.pusher("1.9", "1009: a message over DUET_MAX_MESSAGE_BYTES, whole or in fragments")
@pytest.mark.parametrize("fragments", [1, 4])
async def test_a_message_may_be_as_long_as_the_limit_and_not_longer(
    client: RawClient, fragments: int
) -> None:
    def send(length: int) -> None:
        text = b'{"event":"pusher:ping","data":"%b"}'
        text %= b"x" * (length - len(text) + 2)
        assert len(text) == length
        size = length // fragments
        for number in range(fragments):
            last = number == fragments - 1
            part = text[number * size :] if last else text[number * size : (number + 1) * size]
            client.send_frame(0 if number else 1, part, fin=last)

    send(MESSAGE_BYTES)
    assert (await client.event())["event"] == "pusher:pong"

    send(MESSAGE_BYTES + 1)
    assert (await client.refused())[1].code == 1009


@pytest.mark.pusher("1.6", "a channel's name has 200 characters at most, of the documented ones")
async def test_a_channels_name_may_have_200_characters(client: RawClient) -> None:
    await client.subscribed("n" * 200)
    await client.subscribed("aZ09_-=@,.;")

    for name in ("n" * 201, "", "with space", "grüße", "a/b", "#server"):
        client.subscribe(name)
        error = await client.event()
        assert error["event"] in {"pusher:error", "pusher:subscription_error"}, name


@pytest.mark.pusher("1.7", "a client event's name has 200 characters and its data 10 KiB at most")
async def test_a_client_event_has_bounds_for_its_name_and_its_data(
    gateway: Gateway, client: RawClient
) -> None:
    channel = "private-bounds"
    await signed(client, channel)
    async with await gateway.connect() as other:
        await signed(other, channel)

        def send(name: str, data: str) -> None:
            client.send({"event": name, "channel": channel, "data": data})

        send("client-" + "e" * 194, "too long a name")
        assert (await client.event())["event"] == "pusher:error"
        send("client-e", "x" * (EVENT_BYTES - 1))
        assert (await client.event())["event"] == "pusher:error"
        send("client-" + "e" * 193, "x" * (EVENT_BYTES - 2))

        assert len((await other.event())["event"]) == 200


@pytest.mark.pusher("1.7", "client events over the rate get 4301 and the socket stays open")
async def test_ten_client_events_a_second_pass_and_the_eleventh_does_not(
    gateway: Gateway, client: RawClient
) -> None:
    channel = "private-rate"
    await signed(client, channel)
    async with await gateway.connect() as other:
        await signed(other, channel)

        for number in range(11):
            client.send({"event": "client-e", "channel": channel, "data": number})

        assert [(await other.event())["data"] for _ in range(10)] == list(range(10))
        assert (await client.event())["data"]["code"] == 4301
        await client.ping()


@pytest.mark.pusher(
    "1.6", "user_id and user_info of a member have bounds; a numeric id becomes a string"
)
async def test_a_member_has_bounds_for_his_id_and_his_info(client: RawClient) -> None:
    channel = "presence-bounds"
    most = "i" * (2048 - len('{"n":""}'))

    for shown in (
        {"user_id": "u" * 129},
        {"user_id": ""},
        {"user_id": "u", "user_info": {"n": f"{most}i"}},
    ):
        data = json.dumps(shown, separators=(",", ":"))
        auth = sign_channel(APP, client.socket_id, channel, data)
        client.subscribe(channel, auth, channel_data=data)
        assert (await client.event())["event"] == "pusher:subscription_error"

    data = json.dumps({"user_id": 7, "user_info": {"n": most}}, separators=(",", ":"))
    auth = sign_channel(APP, client.socket_id, channel, data)
    answer = await client.subscribed(channel, auth, channel_data=data)
    assert answer["presence"] == {"ids": ["7"], "hash": {"7": {"n": most}}, "count": 1}


# Frames


@pytest.mark.pusher("1.9", "1002: interleaved messages, reserved opcodes and bits, long pings")
@pytest.mark.parametrize(
    "sent",
    [
        masked_frame(1, b'{"event":', fin=False) + masked_frame(1, b'{"event":"pusher:ping"}'),
        masked_frame(0, b"nothing to continue"),
        masked_frame(3, b""),
        masked_frame(11, b""),
        masked_frame(9, b"p", fin=False),
        masked_frame(9, b"p" * 126),
        b"\xc1" + masked_frame(1, b"{}")[1:],
        b"\x81\x02{}",
    ],
    ids=[
        "interleaved",
        "continuation of nothing",
        "reserved data opcode",
        "reserved control opcode",
        "fragmented ping",
        "long ping",
        "reserved bit",
        "not masked",
    ],
)
async def test_frames_against_the_rfc_end_the_connection_with_a_reason(
    client: RawClient, sent: bytes
) -> None:
    client.writer.write(sent)

    error, closed = await client.refused()

    assert error["code"] is None
    assert closed.code == 1002


async def test_a_fragmented_binary_message_is_answered_once_and_dropped(client: RawClient) -> None:
    client.send_frame(2, b"one", fin=False)
    client.send_frame(0, b"two", fin=False)
    client.send_frame(9, b"ping")
    client.send_frame(0, b"three")

    assert (await client.event())["event"] == "pusher:error"
    assert await client.frame() == (10, b"ping")
    await client.ping()


@pytest.mark.pusher("1.9", "a peer that leaves or closes during the handshake leaves nothing")
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        upgrade()[:60],
        upgrade("&token=viewer:ana"),
    ],
    ids=["nothing sent", "half a request", "token being checked"],
)
async def test_a_peer_that_leaves_during_the_handshake_leaves_nothing(
    gateway: Gateway, sent: bytes
) -> None:
    gateway.tokens.held = asyncio.Event()
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(sent)
        await until(lambda: bool(gateway.server.server_state.connections))
        writer.close()
        await writer.wait_closed()
    finally:
        gateway.tokens.held.set()
        gateway.tokens.held = None

    await until(lambda: not gateway.node.hub.connections)
    await until(lambda: not gateway.server.server_state.connections)


@pytest.mark.pusher("1.9", "a peer that leaves or closes during the handshake leaves nothing")
async def test_a_close_frame_right_behind_the_upgrade_is_answered(gateway: Gateway) -> None:
    gateway.tokens.held = asyncio.Event()
    try:
        client = await gateway.open("/app/app-key?protocol=7&token=viewer:ana")
        client.send_frame(8, (1000).to_bytes(2))
    finally:
        gateway.tokens.held.set()
        gateway.tokens.held = None

    # What comes while the token is checked waits; then the close is the first thing acted upon.
    assert (await client.event())["event"] == "pusher:connection_established"
    assert (await client.closed()).code == 1000
    await until(lambda: not gateway.node.hub.connections)


# Many


@pytest.mark.pusher("1.1", "1,000 channels on one socket")
async def test_a_socket_may_have_a_thousand_channels(gateway: Gateway, client: RawClient) -> None:
    names = [f"channel-{number}" for number in range(CHANNELS)]
    for name in names:
        client.subscribe(name)
    assert [(await client.event())["channel"] for _ in names] == names

    await gateway.node.publish(
        [Publication(APP.id, name, push_body("e", name, {})) for name in names]
    )
    assert {(await client.event())["channel"] for _ in names} == set(names)

    for name in names:
        client.send({"event": "pusher:unsubscribe", "data": {"channel": name}})
    await client.ping()
    ids = {one.pusher.socket_id: one.pusher for one in gateway.node.connections()}
    assert ids[client.socket_id].subscriptions == {}


@pytest.mark.pusher("1.6", "a presence channel with 1,000 members")
async def test_a_presence_channel_may_have_a_thousand_members(gateway: Gateway) -> None:
    channel = "presence-crowd"
    crowd: list[RawClient] = []
    try:
        for start in range(0, MEMBERS, 50):
            batch = await asyncio.gather(*(gateway.connect() for _ in range(50)))
            for number, client in enumerate(batch, start):
                data = json.dumps({"user_id": str(number)})
                auth = sign_channel(APP, client.socket_id, channel, data)
                client.subscribe(channel, auth, channel_data=data)
            crowd += batch
        await until_members(gateway, channel, MEMBERS)
        first = crowd[0]
        answer = await first.event()
        assert answer["event"] == "pusher_internal:subscription_succeeded"
        seen = set(json.loads(answer["data"])["presence"]["ids"])
        while len(seen) < MEMBERS:
            event = await first.event()
            assert event["event"] == "pusher_internal:member_added"
            user_id = json.loads(event["data"])["user_id"]
            assert user_id not in seen
            seen.add(user_id)

        late = await gateway.connect()
        data = json.dumps({"user_id": "one too many"})
        auth = sign_channel(APP, late.socket_id, channel, data)
        late.subscribe(channel, auth, channel_data=data)
        assert (await late.event())["data"]["type"] == "LimitReached"
        await late.close()

        await crowd[-1].close()
        removed = await first.event()
        assert removed["event"] == "pusher_internal:member_removed"
        assert json.loads(removed["data"]) == {"user_id": str(MEMBERS - 1)}
    finally:
        for client in crowd:
            client.writer.transport.abort()
    await until_members(gateway, channel, 0)
