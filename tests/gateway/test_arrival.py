"""Whoever connects: straight to the gateway, or by way of uvicorn's HTTP side."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.gateway.harness import (
    PATIENCE_S,
    Gateway,
    RawClient,
    masked_frame,
    running_gateway,
    settings_for_tests,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PING = b'{"event":"pusher:ping","data":{}}'


def request(path: str = "/app/app-key?protocol=7", *lines: str) -> bytes:
    return "\r\n".join(
        [
            f"GET {path} HTTP/1.1",
            "Host: localhost",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
            *lines,
            "",
            "",
        ]
    ).encode()


@contextlib.asynccontextmanager
async def client_of(gateway: Gateway) -> AsyncIterator[RawClient]:
    """A client that has sent nothing."""
    async with RawClient(*await asyncio.open_connection("127.0.0.1", gateway.port)) as client:
        yield client


async def head(client: RawClient) -> str:
    async with asyncio.timeout(PATIENCE_S):
        return (await client.reader.readuntil(b"\r\n\r\n")).decode()


async def test_an_upgrade_that_comes_in_two_parts_is_served_all_the_same() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(request()[:40])
        # uvicorn's HTTP side has the connection once it is not an arrival any more.
        await until(lambda: "HttpProtocol" in kinds(gateway))
        client.writer.write(request()[40:])

        assert "101 Switching Protocols" in await head(client)
        assert (await client.event())["event"] == "pusher:connection_established"
        await client.ping()


def kinds(gateway: Gateway) -> set[str]:
    return {type(one).__name__ for one in gateway.server.server_state.connections}


async def test_an_upgrade_with_a_repeated_header_goes_the_long_way_to_the_same_end() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(request("/app/app-key", "X-Twice: a", "X-Twice: b"))

        # The date is websockets', so this was not answered by the short way.
        assert "Date: " in await head(client)
        assert (await client.event())["event"] == "pusher:connection_established"
        await client.ping()


async def test_the_short_way_answers_in_one_segment_and_takes_what_follows_the_upgrade() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(request() + masked_frame(1, PING) + masked_frame(9, b"p"))

        assert "Date: " not in await head(client)
        assert (await client.event())["event"] == "pusher:connection_established"
        assert (await client.event())["event"] == "pusher:pong"
        assert await client.frame() == (10, b"p")


async def test_what_follows_the_upgrade_waits_until_the_token_is_checked() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        gateway.tokens.held = asyncio.Event()
        client.writer.write(request("/app/app-key?token=viewer:ana") + masked_frame(1, PING))
        await head(client)
        gateway.tokens.held.set()

        assert (await client.event())["event"] == "pusher:connection_established"
        assert (await client.event())["event"] == "pusher:pong"


async def test_what_follows_the_upgrade_of_a_refused_token_is_dropped() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(
            request("/app/app-key?token=nobody") + masked_frame(8, (1000).to_bytes(2))
        )
        await head(client)

        _, closed = await client.refused()

        assert closed.code == 4009


async def test_http_is_served_on_the_same_port() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n")

        assert (await head(client)).startswith("HTTP/1.1 404")


async def test_a_connection_without_a_word_is_closed_when_the_server_stops() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        await until(lambda: kinds(gateway) == {"Arrival"})

        for connection in list(gateway.server.server_state.connections):
            connection.shutdown()

        await client.ended()
        await until(lambda: not gateway.server.server_state.connections)


POST = b"POST /nowhere/events HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"


@pytest.mark.parametrize(
    "beginning",
    [b"", b"\r\n", b"GET /nowhere HTTP/1.1\r\nHost:", POST, POST + b"four"],
    ids=["nothing", "an empty line", "half a head", "no body", "half a body"],
)
async def test_who_never_says_all_of_the_first_call_is_sent_away(beginning: bytes) -> None:
    async with (
        running_gateway(settings_for_tests(handshake_timeout_s=0.1)) as gateway,
        client_of(gateway) as client,
    ):
        client.writer.write(beginning)

        await client.ended()
        await until(lambda: not gateway.server.server_state.connections)


async def test_half_a_call_behind_others_is_sent_away_too() -> None:
    async with (
        running_gateway(settings_for_tests(handshake_timeout_s=0.1)) as gateway,
        client_of(gateway) as client,
    ):
        client.writer.write(b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await head(client)).startswith("HTTP/1.1 404")
        client.writer.write(b"GET /nowhere HTTP/1.1\r\n")

        await client.ended()


async def test_a_head_without_end_is_refused_before_it_fills_the_memory() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(b"GET /nowhere HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(1_000):
                client.writer.write(b"X: " + b"a" * 1_000 + b"\r\n")
                await client.writer.drain()

        await client.ended()


async def test_a_frame_right_behind_an_unusual_upgrade_is_not_lost() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(
            request("/app/app-key", "X-Twice: a", "X-Twice: b") + masked_frame(1, PING)
        )

        await head(client)
        assert (await client.event())["event"] == "pusher:connection_established"
        assert (await client.event())["event"] == "pusher:pong"


async def test_an_upgrade_of_an_old_http_is_refused() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(request().replace(b"HTTP/1.1", b"HTTP/1.0"))

        assert (await head(client)).startswith("HTTP/1.1 400")
        await client.ended()


async def test_an_upgrade_behind_a_call_that_waits_for_its_answer_is_refused_behind_it() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n" + request())

        assert (await head(client)).startswith("HTTP/1.1 404")
        assert (await head(client)).startswith("HTTP/1.1 400")
        await client.ended()


async def test_who_speaks_another_websocket_version_is_told_ours() -> None:
    async with running_gateway() as gateway, client_of(gateway) as client:
        client.writer.write(request().replace(b"Version: 13", b"Version: 8"))

        answer = await head(client)

    assert answer.startswith("HTTP/1.1 426")
    assert "\r\nSec-WebSocket-Version: 13\r\n" in answer
