"""A gateway that may open no more files: it says so, lives on, and takes newcomers in again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import pytest
import redis.asyncio
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from gateway.open_files import files_for_sockets
from tests.e2e.gateway_process import APP_KEY, DUET_SERVE, START_DEADLINE_S, Gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from persistence.embedded_redis import RedisServer
    from tests.e2e.gateway_process import Stores

ALLOWED = 256


@pytest.fixture
def gateway(
    server_guard: ServerGuard, stores: Stores, victim_redis: RedisServer, apps_file: Path
) -> Iterator[Gateway]:
    argv = ("/bin/sh", "-c", f"ulimit -n {ALLOWED}; exec {' '.join(DUET_SERVE)}")
    settings = {"DUET_REDIS_URL": victim_redis.url}
    gateway = Gateway(server_guard, stores, apps_file, settings, argv)
    gateway.start()
    yield gateway
    gateway.kill()


@pytest.fixture
async def sockets() -> AsyncIterator[list[ClientConnection]]:
    """Those that are open, closed with the test."""
    open_ones: list[ClientConnection] = []
    yield open_ones
    for socket in open_ones:
        socket.transport.abort()


async def newcomer(gateway: Gateway) -> ClientConnection | None:
    """A socket that was let in, or none."""
    try:
        socket = await connect(
            f"{gateway.ws_url}/app/{APP_KEY}?protocol=7", compression=None, ping_interval=None
        )
        await socket.recv()
    except (OSError, EOFError, InvalidHandshake, ConnectionClosed):
        return None
    return socket


async def fill(gateway: Gateway, sockets: list[ClientConnection]) -> None:
    """Connects until nobody is let in any more."""
    while (socket := await newcomer(gateway)) is not None:
        sockets.append(socket)
        assert len(sockets) < files_for_sockets(ALLOWED)


async def subscribe(socket: ClientConnection, channel: str) -> None:
    """Subscribes, which takes a Redis that answers."""
    await socket.send(json.dumps({"event": "pusher:subscribe", "data": {"channel": channel}}))
    async with asyncio.timeout(START_DEADLINE_S):
        async for text in socket:
            if json.loads(text)["event"] == "pusher_internal:subscription_succeeded":
                return


def told(gateway: Gateway) -> list[dict[str, object]]:
    lines = [line for line in gateway.log_text().splitlines() if "no_file_for_newcomers" in line]
    return [json.loads(line) for line in lines]


async def test_newcomers_are_sent_away_with_one_line_until_there_is_room_again(
    gateway: Gateway, sockets: list[ClientConnection]
) -> None:
    await fill(gateway, sockets)
    for _ in range(20):
        assert await newcomer(gateway) is None

    [line] = told(gateway)
    assert line["allowed"] == ALLOWED
    assert "ulimit -n" in str(line["remedy"])

    for _ in range(10):
        await sockets.pop().close()
    async with asyncio.timeout(START_DEADLINE_S):
        while (socket := await newcomer(gateway)) is None:
            pass
    sockets.append(socket)
    await subscribe(socket, "later")


async def test_links_that_break_while_no_file_is_left_for_newcomers_are_made_again(
    gateway: Gateway, sockets: list[ClientConnection], victim_redis: RedisServer
) -> None:
    await fill(gateway, sockets)
    # All at once, as a crowd comes.
    await asyncio.gather(*(newcomer(gateway) for _ in range(200)))
    async with redis.asyncio.Redis.from_url(victim_redis.url) as admin:
        for kind in ("normal", "pubsub"):
            with contextlib.suppress(redis.asyncio.ConnectionError):
                await admin.client_kill_filter(_type=kind, skipme=True)

    await subscribe(sockets[0], "after-the-cut")

    assert "Too many open files" not in gateway.log_text()
