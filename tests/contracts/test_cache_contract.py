"""What every cache of last events promises, over memory and over Redis."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from gateway.broker import MemoryBroker, MemoryBus, Publication
from gateway.cache import Cache, MemoryCache, is_on_its_way
from gateway.frames import frame, published_body
from gateway.hub import Channel, Gate
from gateway.redis_broker import RedisBroker
from gateway.redis_cache import RedisCache
from gateway.webhooks import NoWebhooks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.broker import Broker

CHANNEL = "private-cache-c"


class Bench:
    """A cache, the broker that fills it, and what arrives from it."""

    def __init__(self, broker: Broker, cache: Cache) -> None:
        self.broker = broker
        self.cache = cache
        self.arrived: list[bytes] = []

    async def start(self) -> None:
        await self.broker.start(
            lambda _app, _channel, body, _except: self.arrived.append(body),
            lambda _: None,
            lambda: None,
        )

    async def publish(self, data: str, channel: str = CHANNEL, **more: Any) -> bytes:
        body = published_body("e", channel, data)
        await self.broker.publish([Publication("1", channel, body, **more)])
        return body


@pytest.fixture(params=["memory", "redis"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """Empty caches of one node."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "memory":
            bus = MemoryBus()
            made = Bench(MemoryBroker(bus), MemoryCache(bus))
        else:
            prefix = f"test-{secrets.token_hex(6)}"
            url = request.getfixturevalue("redis_url")
            broker = RedisBroker(url, prefix, "n", 1.0)
            made = Bench(broker, RedisCache(broker, prefix, NoWebhooks()))
        await made.start()
        stack.push_async_callback(made.broker.stop)
        yield made


@pytest.mark.pusher("1.6", "a cache channel keeps the last event of the app's backend")
async def test_the_last_event_is_kept_as_it_was_published(bench: Bench) -> None:
    await bench.publish("first")
    last = await bench.publish('{"é":"☃"}', except_socket_id="1.2")

    assert await bench.cache.last("1", CHANNEL) == last
    cached = await bench.cache.cached("1", CHANNEL)
    assert cached is not None
    assert cached[0] == '{"é":"☃"}'
    assert 1795 <= cached[1] <= 1800


@pytest.mark.parametrize("channel", ["private-c", "foo-cache-c", "presence-c", "cached"])
async def test_other_channels_keep_nothing(bench: Bench, channel: str) -> None:
    await bench.publish("x", channel)

    assert await bench.cache.cached("1", channel) is None


@pytest.mark.pusher("1.6", "a cache channel keeps no client events")
async def test_a_clients_event_is_not_kept(bench: Bench) -> None:
    body = await bench.publish("server's")
    await bench.publish("client's", by_client=True)

    assert await bench.cache.last("1", CHANNEL) == body


async def test_apps_and_channels_are_apart(bench: Bench) -> None:
    await bench.publish("x")

    assert await bench.cache.last("2", CHANNEL) is None
    assert await bench.cache.last("1", "private-cache-d") is None


async def test_what_last_returns_has_come_before_if_it_is_heard(bench: Bench) -> None:
    await bench.broker.subscribe("1", CHANNEL)
    for number in range(50):
        body = await bench.publish(str(number))
        assert await bench.cache.last("1", CHANNEL) == body
        assert bench.arrived[-1] == body


def test_an_event_is_found_in_gate_and_batch() -> None:
    body, other = published_body("e", CHANNEL, "1"), published_body("e", CHANNEL, "2")
    channel, gate = Channel("1", CHANNEL), Gate()
    assert not is_on_its_way(body, channel, gate)

    gate.hold(frame(other) + frame(body))
    assert is_on_its_way(body, channel, gate)

    gate, channel.batch = Gate(), [frame(other)]
    assert not is_on_its_way(body, channel, gate)
    channel.batch.append(frame(body))
    assert is_on_its_way(body, channel, gate)


async def test_an_event_is_kept_for_its_time(redis_url: str, redis_prefix: str) -> None:
    broker = RedisBroker(redis_url, redis_prefix, "n", 1.0, cache_ttl_s=60)
    bench = Bench(broker, RedisCache(broker, redis_prefix, NoWebhooks()))
    await bench.start()
    await bench.publish("x")
    async with redis.asyncio.Redis.from_url(redis_url) as admin:
        key = f"{redis_prefix}:1:last:{CHANNEL}"
        assert 0 < await admin.pttl(key) <= 60_000
        await admin.delete(key)

    assert await bench.cache.last("1", CHANNEL) is None
    assert await bench.cache.cached("1", CHANNEL) is None
    await broker.stop()


async def test_after_scripts_were_flushed_a_publication_is_kept_and_none_comes_twice(
    redis_url: str, redis_prefix: str
) -> None:
    broker = RedisBroker(redis_url, redis_prefix, "n", 1.0)
    bench = Bench(broker, RedisCache(broker, redis_prefix, NoWebhooks()))
    await bench.start()
    for channel in ("plain", CHANNEL):
        await broker.subscribe("1", channel)
    async with redis.asyncio.Redis.from_url(redis_url) as admin:
        await admin.script_flush()

    bodies = [published_body("e", channel, "x") for channel in ("plain", CHANNEL)]
    await broker.publish(
        [
            Publication("1", channel, body)
            for channel, body in zip(("plain", CHANNEL), bodies, strict=True)
        ]
    )

    assert await bench.cache.last("1", CHANNEL) == bodies[1]
    assert bench.arrived == bodies
    await broker.stop()
