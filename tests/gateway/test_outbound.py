"""How bytes leave: peers that keep up, that lag, and that have gone."""

from __future__ import annotations

import json

from gateway.auth import sign_channel
from gateway.frames import PONG_FRAME
from gateway.messages import Member
from tests.gateway.harness import (
    APP,
    Gateway,
    RawClient,
    running_gateway,
    settings_for_tests,
    until,
)


async def pair(gateway: Gateway) -> tuple[RawClient, RawClient]:
    """Two clients on one channel."""
    one, other = await gateway.connect(), await gateway.connect()
    await one.subscribed("c")
    await other.subscribed("c")
    return one, other


async def pushed(
    gateway: Gateway, reading: RawClient, number: int, *, pad_bytes: int = 20_000
) -> None:
    """Publishes to their channel, and waits until the one that reads has it."""
    await gateway.push("c", n=number, pad="x" * pad_bytes)
    assert json.loads((await reading.event())["data"])["n"] == number


async def test_a_stalled_reader_is_aborted_while_the_others_get_everything() -> None:
    settings = settings_for_tests(send_buffer_bytes=262_144)
    async with running_gateway(settings) as gateway:
        stalled, reading = await pair(gateway)
        stalled.stall()

        for number in range(400):
            await pushed(gateway, reading, number)

        await until(lambda: gateway.count("duet_slow_aborts_total") == 1)
        await reading.ping()


async def test_a_reader_that_stalls_and_catches_up_has_missed_nothing_and_keeps_the_order() -> None:
    settings = settings_for_tests(send_buffer_bytes=8_000_000)
    async with running_gateway(settings) as gateway:
        lagging, reading = await pair(gateway)
        [one, other] = gateway.node.connections()
        assert min(one.fd, other.fd) >= 0

        async def publish(numbers: range) -> None:
            for number in numbers:
                await pushed(gateway, reading, number)
                # What is said to one socket alone goes through the transport, in between.
                one.write(PONG_FRAME)

        await publish(range(5))
        lagging.stall()
        await publish(range(5, 305))
        # Something waits in the transport now: nothing may be written past it.
        assert one.fd == -1 < other.fd
        lagging.read_on()

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


async def joined_by_two_who_show_much(gateway: Gateway) -> str:
    """A channel whose members alone are more than a socket's bound and what the system holds."""
    channel = "presence-crowd"
    for number in range(2):
        member = Member(f"user-{number}", b'"%b"' % (b"x" * 8_000_000))
        await gateway.presence.join(APP.id, channel, member, f"1.{number}")
    return channel


def ticket(client: RawClient, channel: str) -> dict[str, str]:
    data = '{"user_id":"eve"}'
    return {"auth": sign_channel(APP, client.socket_id, channel, data), "channel_data": data}


async def test_who_joins_a_channel_of_very_many_members_is_not_slow_for_it() -> None:
    async with running_gateway() as gateway:
        channel = await joined_by_two_who_show_much(gateway)
        client = await gateway.connect()

        state = await client.subscribed(channel, **ticket(client, channel))

        assert state["presence"]["count"] == 3
        await client.ping()
        assert gateway.count("duet_slow_aborts_total") == 0


async def test_who_reads_nothing_of_a_long_answer_is_slow_as_soon_as_more_waits_behind_it() -> None:
    async with running_gateway() as gateway:
        channel = await joined_by_two_who_show_much(gateway)
        client, reading = await pair(gateway)
        client.stall()
        client.subscribe(channel, **ticket(client, channel))

        for number in range(100):
            await pushed(gateway, reading, number, pad_bytes=200_000)

        await until(lambda: gateway.count("duet_slow_aborts_total") == 1)
