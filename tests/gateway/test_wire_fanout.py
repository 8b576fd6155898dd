"""Slices written to descriptors while sockets come, lag and vanish: nobody gets another's bytes."""

from __future__ import annotations

import asyncio
import json
import random
from socket import SO_SNDBUF, SOL_SOCKET
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from tests.gateway.harness import Gateway, RawClient, running_gateway, settings_for_tests, until

if TYPE_CHECKING:
    from collections.abc import Callable

STAYING, LAGGING, PUBLICATIONS = 24, 6, 150
# Enough for what lags to fill the system's buffers, so that the transport takes over.
PADDING = "x" * 8_000


@pytest.mark.parametrize("new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_everybody_gets_its_own_channel_whole_and_in_order(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(among_others_that_come_lag_and_vanish())


async def among_others_that_come_lag_and_vanish() -> None:
    settings = settings_for_tests(fanout_slice=2, join_wait_ms=1, send_buffer_bytes=16_777_216)
    async with running_gateway(settings) as gateway:
        staying = [await joined(gateway, "big") for _ in range(STAYING)]
        lagging = [await joined(gateway, "big", reads=False) for _ in range(LAGGING)]
        others: list[RawClient] = []
        reading = [asyncio.create_task(numbers(client, "big")) for client in staying]
        chance = random.Random(7)

        for number in range(PUBLICATIONS):
            await gateway.push("big", n=number, padding=PADDING)
            await gateway.push("small", n=number)
            # Its descriptor is free for the next one that comes, in the middle of the slices.
            others.append(await joined(gateway, chance.choice(["small", "big"])))
            if len(others) > 4:
                others.pop(chance.randrange(4)).writer.transport.abort()
            if chance.random() < 0.3:
                await asyncio.sleep(0.002)
        big = gateway.node.hub.channel(("1", "big"))
        assert big is not None
        await until(lambda: not big.slicing and not big.batch)
        # It was worth the trouble: these lag, the others have kept up.
        assert list(big.live.values()).count(-1) == LAGGING
        for client in lagging:
            client.read_on()
        reading += [asyncio.create_task(numbers(client, "big")) for client in lagging]
        async with asyncio.timeout(30):
            received = [await task for task in reading]

        assert received == [list(range(PUBLICATIONS))] * (STAYING + LAGGING)
        for client in others:
            await in_order(gateway, client)


async def joined(gateway: Gateway, channel: str, *, reads: bool = True) -> RawClient:
    client = await gateway.connect()
    client.subscribe(channel)
    client.channel = channel  # type: ignore[attr-defined]
    while True:
        event = await client.event()
        if event["event"] == "pusher_internal:subscription_succeeded":
            break
    if not reads:
        ours: Any = gateway.node._by_socket_id[client.socket_id]
        # So that the system holds less than what it is sent.
        ours._transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_SNDBUF, 65_536)
        client.stall()
    return client


async def numbers(client: RawClient, channel: str) -> list[int]:
    """What the client gets, until the last publication."""
    found: list[int] = []
    while not found or found[-1] != PUBLICATIONS - 1:
        found.append(number_of(await client.event(), channel))
    return found


def number_of(event: dict[str, Any], channel: str) -> int:
    assert event["channel"] == channel, event
    number: int = json.loads(event["data"])["n"]
    return number


async def in_order(gateway: Gateway, client: RawClient) -> None:
    """Everything that a latecomer got is of its channel, without a gap."""
    client.send({"event": "pusher:ping", "data": {}})
    found: list[int] = []
    while (event := await client.event())["event"] != "pusher:pong":
        found.append(number_of(event, client.channel))  # type: ignore[attr-defined]
    assert found == list(range(PUBLICATIONS))[PUBLICATIONS - len(found) :]
