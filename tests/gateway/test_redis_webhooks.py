"""What is told by webhook is recorded in the step in which it happens, whichever node dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from gateway.apps import App, Apps, Webhook
from gateway.broker import Publication
from gateway.frames import published_body
from gateway.messages import Member
from gateway.occupancy import counted_channels
from gateway.redis_broker import RedisBroker
from gateway.redis_cache import RedisCache
from gateway.redis_lease import RedisLease
from gateway.redis_occupancy import RedisOccupancy
from gateway.redis_presence import RedisPresence
from gateway.redis_webhooks import HookTiming, RedisWebhooks
from gateway.webhooks import client_event
from tests.gateway.harness import PATIENCE_S, until_accepted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from persistence.embedded_redis import RedisServer

EVERY = ("client_event", "cache_miss", "subscription_count")
TIMING = HookTiming(delay_s=0.05, give_up_s=60, claim_s=5)
CHANNEL = "private-cache-c"


class Bench:
    """One node's parts, and the queue that webhooks are sent from."""

    def __init__(self, url: str, prefix: str, *events: str) -> None:
        hook = Webhook(url="http://127.0.0.1:9/", events=events)
        self.app = App(
            id="1", key="k", secret="s", subscription_count=True, webhooks=(hook,) if events else ()
        )
        self.apps = Apps([self.app])
        self.prefix = prefix
        self.broker = RedisBroker(url, prefix, "n", 1.0)
        self.hooks = RedisWebhooks(self.broker.commands, prefix, self.apps.by_id, TIMING)
        self.cache = RedisCache(self.broker, prefix, self.hooks)
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()
        self.admin: Any = redis.asyncio.Redis.from_url(url)

    async def start(self) -> None:
        await self.broker.start(
            lambda _app, _channel, body, _except: self.heard.put_nowait(body),
            lambda _: None,
            lambda: None,
        )

    async def stop(self) -> None:
        await self.broker.stop()
        await self.admin.aclose()

    async def recorded(self) -> list[dict[str, Any]]:
        """The events that wait to be told, as another node sees them."""
        return [
            json.loads(fields[b"e"])
            async for queue in self.admin.scan_iter(f"{self.prefix}:*", _type="stream")
            for _, fields in await self.admin.xrange(queue)
        ]


@pytest.fixture
async def bench(redis_url: str, redis_prefix: str) -> AsyncIterator[Bench]:
    made = Bench(redis_url, redis_prefix, *EVERY)
    await made.start()
    yield made
    await made.stop()


async def die_after(step: Coroutine[Any, Any, object]) -> None:
    """Sends what a step sends, and takes no part in what happens then."""
    task = asyncio.create_task(step)
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_client_event_that_was_heard_is_recorded_though_its_node_died(bench: Bench) -> None:
    await bench.broker.subscribe("1", "private-c")
    body = published_body("client-e", "private-c", "x")
    publication = Publication("1", "private-c", body, "1.2", by_client=True)
    hook = bench.hooks.hook("1", "client_event")

    await die_after(bench.broker.publish_told(publication, hook, client_event(body, "1.2")))
    async with asyncio.timeout(PATIENCE_S):
        assert await bench.heard.get() == body

    assert await bench.recorded() == [
        {
            "name": "client_event",
            "channel": "private-c",
            "event": "client-e",
            "data": "x",
            "socket_id": "1.2",
        }
    ]


async def test_a_miss_is_recorded_though_the_node_that_asked_died(bench: Bench) -> None:
    await die_after(bench.cache.last("1", CHANNEL))
    async with asyncio.timeout(PATIENCE_S):
        # Answers come in order: this one says that the other question was answered, too.
        assert await bench.cache.cached("1", CHANNEL) is None

    assert await bench.recorded() == [{"name": "cache_miss", "channel": CHANNEL}]


@pytest.mark.pusher("1.6", "many misses of a cache channel are told once")
async def test_of_many_misses_one_is_told_until_something_is_published(bench: Bench) -> None:
    miss = {"name": "cache_miss", "channel": CHANNEL}
    for _ in range(3):
        assert await bench.cache.last("1", CHANNEL) is None
    assert await bench.recorded() == [miss]

    await bench.broker.publish([Publication("1", CHANNEL, published_body("e", CHANNEL, "x"))])
    assert await bench.cache.last("1", CHANNEL) is not None
    await bench.admin.delete(f"{bench.prefix}:1:last:{CHANNEL}")
    assert await bench.cache.last("1", CHANNEL) is None

    assert await bench.recorded() == [miss, miss]


async def test_a_count_that_is_published_is_recorded_and_no_other(bench: Bench) -> None:
    lease = RedisLease(bench.broker.commands, bench.prefix, "n", 10.0)
    announce = counted_channels(bench.apps.by_id)
    occupancy = RedisOccupancy(
        bench.broker.commands, bench.prefix, lease, "occupancy", announce, hooks=bench.hooks
    )
    await occupancy.start()
    for count in (1, 3, 3, 0):
        occupancy.report("1", "c", count)
        occupancy.report("1", "presence-c", count)
        await occupancy.counts("1", ["c"])

    assert await bench.recorded() == [
        {"name": "subscription_count", "channel": "c", "subscription_count": count}
        for count in (1, 3)
    ]
    await occupancy.stop()


async def test_what_nobody_wants_to_hear_of_is_not_recorded(
    redis_url: str, redis_prefix: str
) -> None:
    bench = Bench(redis_url, redis_prefix, "channel_vacated")
    await bench.start()

    assert bench.hooks.hook("1", "client_event") == b""
    assert await bench.cache.last("1", CHANNEL) is None

    assert await bench.admin.keys(f"{bench.prefix}:*") == []
    await bench.stop()


async def test_a_client_event_is_told_once_after_the_scripts_were_flushed(bench: Bench) -> None:
    body = published_body("client-e", "private-c", "x")
    publication = Publication("1", "private-c", body, "1.2", by_client=True)
    call = (publication, bench.hooks.hook("1", "client_event"), client_event(body, "1.2"))
    await bench.admin.script_flush()

    await bench.broker.publish_told(*call)

    assert len(await bench.recorded()) == 1


async def test_a_redis_that_is_full_gives_away_what_fills_it(own_redis: RedisServer) -> None:
    bench = Bench(own_redis.url, "p", *EVERY)
    await bench.start()
    await bench.cache.last("1", CHANNEL)
    await bench.admin.config_set("maxmemory", 1)

    [claim] = await bench.hooks.claim(1)
    batch = await bench.hooks.read(claim)
    assert batch is not None
    settled = await bench.hooks.sent(claim, batch)

    assert settled is not None
    assert settled.removed == 1
    assert await bench.recorded() == []
    await bench.stop()


async def test_what_redis_has_forgotten_of_the_last_moments_is_told_all_the_same(
    own_redis: RedisServer,
) -> None:
    """Who had just come back was told of as gone, and who had just come never was told of."""
    bench = Bench(own_redis.url, "p", "channel_occupied", "member_added", "member_removed")
    await bench.start()
    lease = RedisLease(bench.broker.commands, "p", "n", 600.0)
    presence = RedisPresence(bench.broker.commands, "p", lease, 9, bench.hooks)
    occupancy = RedisOccupancy(bench.broker.commands, "p", lease, "occupancy", hooks=bench.hooks)
    await presence.start()
    await occupancy.start()
    await presence.join("1", "presence-c", Member("back", b"{}"), "1.1")
    await presence.leave("1", "presence-c", "back", "1.1")
    await bench.admin.save()
    await presence.join("1", "presence-c", Member("back", b"{}"), "1.2")
    await presence.join("1", "presence-c", Member("new", b"{}"), "1.3")
    occupancy.report("1", "presence-c", 2)
    await occupancy.counts("1", ["presence-c"])
    own_redis.process.kill()
    own_redis.start()

    await until_accepted(lease.renew)
    # Counts every end that has waited for long enough.
    await bench.hooks.claim(1)

    assert [(event["name"], event.get("user_id")) for event in await bench.recorded()] == [
        ("member_added", "back"),
        ("member_added", "new"),
        ("channel_occupied", None),
    ]
    await presence.stop()
    await occupancy.stop()
    await bench.stop()
