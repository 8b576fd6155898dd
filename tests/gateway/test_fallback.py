"""The HTTP transports of pusher-js with bytes in and out: a real server, the memory broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway import fallback_connection
from gateway.apps import App, Apps
from gateway.auth import sign_channel, sign_user
from gateway.broker import MemoryBroker, MemoryBus
from gateway.fallback_connection import FallbackConnection
from gateway.messages import Member
from gateway.presence import MemoryPresence
from tests.gateway.fallback_client import QUERY, FallbackClient, LinesEnded
from tests.gateway.harness import APP, running_gateway, settings_for_tests, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.broker import Broker
    from gateway.settings import Settings
    from tests.gateway.harness import Gateway

BOTH = pytest.mark.parametrize("streams", [True, False], ids=["streaming", "polling"])


@contextlib.asynccontextmanager
async def connected(
    settings: Settings | None = None, apps: Apps | None = None, *, streams: bool = True
) -> AsyncIterator[tuple[Gateway, FallbackClient]]:
    """A gateway, and a client that has read `connection_established`."""
    async with (
        running_gateway(settings, apps) as gateway,
        FallbackClient(gateway.port, streams=streams) as client,
    ):
        await client.connect()
        yield gateway, client


@pytest.mark.pusher("1.10", "a session opens, subscribes, hears and sends")
@BOTH
async def test_a_connection_does_what_a_socket_does(streams: bool) -> None:
    async with connected(streams=streams) as (gateway, client):
        channel = "private-room"
        await client.subscribed(channel, sign_channel(APP, client.socket_id, channel))
        other = await gateway.connect()
        await other.subscribed(channel, sign_channel(APP, other.socket_id, channel))

        await gateway.push(channel, "published", text="grüße")
        await client.send({"event": "client-typing", "channel": channel, "data": {"on": True}})

        published = await client.event()
        assert published["event"] == "published"
        assert json.loads(published["data"]) == {"text": "grüße"}
        assert (await other.event())["event"] == "published"
        assert await other.event() == {
            "event": "client-typing",
            "channel": channel,
            "data": {"on": True},
        }
        await client.ping()


@BOTH
async def test_a_token_in_the_query_proves_the_user_and_commands_are_answered(
    streams: bool,
) -> None:
    async with (
        running_gateway() as gateway,
        FallbackClient(
            gateway.port, streams=streams, query=f"{QUERY}&token=streamer:ben"
        ) as client,
    ):
        await client.connect()
        channel = "private-user@ben"
        await client.subscribed(channel)
        assert (await client.event())["event"] == "goal.snapshot"

        await client.send(
            {
                "event": "client-goal.agree",
                "channel": channel,
                "data": {"request_id": "r-1", "goal_id": "0" * 24},
            }
        )

        reply = await client.event()
        assert reply["event"] == "goal.reply"
        assert json.loads(reply["data"])["ok"] is True


async def test_a_connection_is_present_and_its_end_is_a_leave() -> None:
    async with running_gateway() as gateway:
        watcher = await gateway.connect()
        channel = "presence-room"
        shown = json.dumps({"user_id": "w"})
        await watcher.subscribed(
            channel, sign_channel(APP, watcher.socket_id, channel, shown), channel_data=shown
        )
        async with FallbackClient(gateway.port, streams=True) as client:
            await client.connect()
            user_data = json.dumps({"id": "f"})
            auth = sign_user(APP, client.socket_id, user_data)
            await client.send(
                {"event": "pusher:signin", "data": {"auth": auth, "user_data": user_data}}
            )
            assert (await client.event())["event"] == "pusher:signin_success"
            shown = json.dumps({"user_id": "f"})
            await client.subscribed(
                channel, sign_channel(APP, client.socket_id, channel, shown), channel_data=shown
            )
            assert (await watcher.event())["event"] == "pusher_internal:member_added"

            await gateway.node.terminate_user(APP.id, "f")

            error, close = await client.closed()
            assert (error["code"], close[0]) == (4009, 4009)
            assert (await watcher.event())["event"] == "pusher_internal:member_removed"
            with pytest.raises(LinesEnded):
                await client.line()
        assert len(gateway.fallback) == 0


# Opening


@pytest.mark.pusher("1.10", "a refused session is told the close code of a socket")
@pytest.mark.parametrize(
    ("key", "query", "headers", "code"),
    [
        ("nobody", QUERY, {}, 4001),
        ("off-key", QUERY, {}, 4003),
        ("full-key", QUERY, {}, 4004),
        ("app-key", "protocol=x", {}, 4006),
        ("app-key", "protocol=4", {}, 4007),
        ("app-key", f"{QUERY}&token=nonsense", {}, 4009),
        ("own-key", QUERY, {"Origin": "https://elsewhere.example"}, 4009),
    ],
)
@BOTH
async def test_a_refused_connection_reads_why(
    streams: bool, key: str, query: str, headers: dict[str, str], code: int
) -> None:
    apps = Apps(
        [
            APP,
            App(id="2", key="off-key", secret="s", enabled=False),
            App(id="3", key="full-key", secret="s", max_connections=1),
            App(id="4", key="own-key", secret="s", origins=("own.example",)),
        ]
    )
    async with running_gateway(apps=apps) as gateway:
        await gateway.connect("/app/full-key?protocol=7")
        async with FallbackClient(
            gateway.port, streams=streams, key=key, query=query, headers=headers
        ) as client:
            response = await client.reopen()

            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == "*"
            assert await client.line() == "o{}"
            error, close = await client.closed()
            assert (error["code"], close[0]) == (code, code)
        assert len(gateway.fallback) == 0


async def test_a_connection_whose_token_can_not_be_checked_in_time_is_told_to_come_back() -> None:
    settings = settings_for_tests(handshake_timeout_s=0.05)
    async with running_gateway(settings) as gateway:
        gateway.tokens.held = asyncio.Event()
        async with FallbackClient(
            gateway.port, streams=True, query=f"{QUERY}&token=viewer:ana"
        ) as client:
            assert await client.line() == "o{}"
            error, _ = await client.closed()
            assert error["code"] == 4100


@pytest.mark.pusher("1.10", "pages of other origins may call (CORS, preflight)")
async def test_the_preflight_of_a_page_of_another_origin_is_answered() -> None:
    async with (
        running_gateway() as gateway,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}") as http,
    ):
        answer = await http.options(
            "/pusher/app/app-key/1/abcdefgh/xhr_send",
            headers={
                "Origin": "https://page.example",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "content-type",
            },
        )

        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "content-type" in answer.headers["access-control-allow-headers"]
        assert "POST" in answer.headers["access-control-allow-methods"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "app-key/1/abcdefgh/xhr", 405),
        ("POST", "app-key/1/abcdefgh/websocket", 404),
        ("POST", "app-key/1000/abcdefgh/xhr", 404),
        ("POST", "app-key/1/abc-efgh/xhr", 404),
        ("POST", "app-key", 404),
        ("POST", "nobody/1/abcdefgh/xhr_send", 404),
    ],
)
async def test_other_addresses_and_methods_are_told_apart(
    method: str, path: str, status: int
) -> None:
    async with (
        running_gateway() as gateway,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}") as http,
    ):
        answer = await http.request(method, f"/pusher/app/{path}", content=b"[]")

        assert answer.status_code == status
        assert len(gateway.fallback) == 0


# Sending


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{}", 400),
        (b"[1]", 400),
        (b'["\xff"]', 400),
        (b'["\\ud800"]', 400),
        (b"[" * 100_000, 400),
        (b"[" + b" " * 300_000 + b"]", 413),
    ],
)
async def test_a_body_that_holds_no_messages_is_refused_and_the_connection_stays(
    body: bytes, status: int
) -> None:
    async with connected() as (_, client):
        assert await client.post(body) == status

        await client.ping()


async def test_a_message_that_makes_no_sense_is_answered_and_the_connection_stays() -> None:
    async with connected() as (_, client):
        await client.send("nonsense")

        error = await client.event()
        assert error["event"] == "pusher:error"
        assert error["data"]["code"] is None
        await client.ping()


async def test_a_message_over_the_limit_ends_the_connection() -> None:
    settings = settings_for_tests(max_message_bytes=1024)
    async with connected(settings) as (_, client):
        await client.send("x" * 1024)
        assert (await client.event())["event"] == "pusher:error"

        await client.send("x" * 1025)

        _, close = await client.closed()
        assert close[0] == 1009


async def test_many_messages_in_one_call_act_in_their_order() -> None:
    async with connected() as (_, client):
        names = [f"channel-{number}" for number in range(200)]

        await client.send(
            *({"event": "pusher:subscribe", "data": {"channel": name}} for name in names)
        )

        assert [(await client.event())["channel"] for _ in names] == names


async def test_the_members_of_a_large_channel_are_not_too_much_for_a_connection() -> None:
    channel = "presence-crowd"
    async with (
        running_gateway() as gateway,
        FallbackClient(gateway.port, streams=False) as client,
    ):
        await gateway.presence.join(
            "1", channel, Member("ana", b'"%b"' % (b"x" * 2_000_000)), "1.1"
        )
        await client.connect()

        data = '{"user_id":"eve"}'
        auth = sign_channel(APP, client.socket_id, channel, data)
        state = await client.subscribed(channel, auth, channel_data=data)

        assert state["presence"]["count"] == 2
        await client.ping()


async def test_others_are_heard_while_a_call_with_many_messages_is_taken() -> None:
    async with connected() as (gateway, _client):
        [connection] = gateway.node.connections()
        assert isinstance(connection, FallbackConnection)

        taking = asyncio.create_task(connection.receive(['{"event":"pusher:pong"}'] * 1_000))
        await asyncio.sleep(0)

        assert not taking.done()
        await taking


# A connection's life


@pytest.mark.pusher("1.10", "heartbeats; a client that answers none is closed (4201)")
async def test_a_stream_has_heartbeats_and_who_answers_none_is_closed() -> None:
    settings = settings_for_tests(activity_timeout_s=0.2, pong_timeout_s=0.3)
    async with connected(settings) as (_, client):
        for _ in range(5):
            assert await client.line() == "h"
            assert await client.post(b"[]") == 204

        error, close = await client.closed()

        assert (error["code"], close[0]) == (4201, 4201)


async def test_a_silent_poll_ends_with_a_heartbeat_and_the_next_one_hears_what_came() -> None:
    settings = settings_for_tests(activity_timeout_s=0.2)
    async with connected(settings, streams=False) as (gateway, client):
        await client.subscribed("news")

        assert await client.line() == "h"
        await gateway.push("news", "while-away")

        assert (await client.event())["event"] == "while-away"


@pytest.mark.pusher("1.10", "a session ends when nobody holds a stream or polls")
@BOTH
async def test_a_connection_ends_when_nobody_comes_back(
    streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback_connection, "REOPEN_GRACE_S", 0.2)
    settings = settings_for_tests(handshake_timeout_s=0.2)
    async with connected(settings, streams=streams) as (gateway, client):
        await client.leave()

        await until(lambda: len(gateway.fallback) == 0)

        assert not gateway.node.hub.connections
        # What the client would do next tells it that its connection is lost.
        assert await client.line() == "o{}"


@pytest.mark.pusher("1.10", "a stream is opened anew after 256 KiB and nothing is lost")
async def test_a_stream_that_has_carried_its_share_waits_for_the_next_one() -> None:
    async with connected() as (gateway, client):
        await client.subscribed("news")
        count = 120
        for number in range(count):
            await gateway.push("news", "part", number=number, text="ä" * 3000)
        numbers: list[int] = []
        opened = 1
        carried = 0

        while len(numbers) < count:
            line = await client.line()
            carried += len(line) + 1
            numbers += [json.loads(json.loads(text)["data"])["number"] for text in _texts(line)]
            if carried > fallback_connection.STREAM_UNITS:
                # As pusher-js does: at this line, whatever may come behind it.
                await client.reopen()
                opened += 1
                carried = 0

        assert numbers == list(range(count))
        assert opened > 1


def _texts(line: str) -> list[str]:
    assert line[0] == "a"
    texts: list[str] = json.loads(line[1:])
    return texts


async def test_a_second_stream_takes_over_and_the_first_one_ends() -> None:
    async with (
        running_gateway() as gateway,
        FallbackClient(gateway.port, streams=True) as first,
        FallbackClient(gateway.port, streams=True, name=first.name) as second,
    ):
        await first.connect()
        await first.subscribed("news")

        await second.reopen()
        with pytest.raises(LinesEnded):
            await first.line()
        await gateway.push("news", "e")

        assert (await second.event())["event"] == "e"
        assert len(gateway.fallback) == 1


@pytest.mark.pusher("1.10", "a session that is not read is ended, the others go on")
async def test_a_stalled_reader_is_aborted_while_the_others_get_everything() -> None:
    settings = settings_for_tests(send_buffer_bytes=200_000)
    async with (
        running_gateway(settings) as gateway,
        FallbackClient(gateway.port, streams=True) as stalled,
    ):
        await stalled.connect()
        await stalled.subscribed("news")
        reader = await gateway.connect()
        await reader.subscribed("news")

        sent = 0
        while not gateway.count("duet_slow_aborts_total"):
            await gateway.push("news", "part", number=sent, text="x" * 20_000)
            assert json.loads((await reader.event())["data"])["number"] == sent
            sent += 1

        assert len(gateway.fallback) == 0
        await reader.ping()


async def test_a_stopping_node_asks_connections_to_come_again() -> None:
    async with (
        running_gateway() as gateway,
        FallbackClient(gateway.port, streams=True) as streaming,
        FallbackClient(gateway.port, streams=False) as polling,
        FallbackClient(gateway.port, streams=True) as late,
    ):
        await streaming.connect()
        await polling.connect()

        gateway.node.begin_drain(0)

        assert [(await one.closed())[1][0] for one in (streaming, polling)] == [4200, 4200]
        assert await late.line() == "o{}"
        assert (await late.closed())[1][0] == 4100


async def test_an_authorized_only_app_closes_those_who_stay_anonymous() -> None:
    app = App(id="1", key="app-key", secret="s", authorized_only=True, authorization_timeout_s=0.1)
    settings = settings_for_tests(handshake_timeout_s=0.2)
    async with connected(settings, Apps([app])) as (_, client):
        assert (await client.closed())[1][0] == 4009


# Several processes


async def test_messages_that_come_to_another_process_reach_the_connection() -> None:
    bus = MemoryBus()

    def presence(broker: Broker) -> Any:
        assert isinstance(broker, MemoryBroker)
        return MemoryPresence(broker, "n", 100)

    async with (
        running_gateway(broker=MemoryBroker(bus), presence=presence) as here,
        running_gateway(broker=MemoryBroker(bus), presence=presence) as there,
        FallbackClient(here.port, streams=True) as client,
        FallbackClient(there.port, streams=True, name=client.name) as astray,
    ):
        await client.connect()

        await astray.send({"event": "pusher:subscribe", "data": {"channel": "news"}})

        assert (await client.event())["event"] == "pusher_internal:subscription_succeeded"
        assert len(there.fallback) == 0
