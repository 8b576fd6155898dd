"""What every occupancy promises, over memory and over Redis; then losses of Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from gateway import occupancy
from gateway.broker import BrokerUnavailable, MemoryBroker, MemoryBus
from gateway.frames import push_body
from gateway.occupancy import Count, MemoryOccupancy, MemoryTotals, Turns
from gateway.redis_broker import RedisBroker
from gateway.redis_lease import RedisLease
from gateway.redis_occupancy import RedisOccupancy
from tests.gateway.harness import Recorder, until_accepted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.occupancy import Occupancy
    from persistence.embedded_redis import RedisServer

LONG_LEASE_S = 600.0
SHORT_THROTTLE_S = 0.3


@dataclass
class Told(Recorder):
    """What handlers were told and what was published, in order."""

    turns: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)

    def listen(self, one: Occupancy) -> None:
        """Notes what one node is told."""
        one.handlers.on_occupied(lambda app, name: self._turn(f"+{app} {name}"))
        one.handlers.on_vacated(lambda app, name: self._turn(f"-{app} {name}"))

    def _turn(self, text: str) -> None:
        self.turns.append(text)
        self.changed.set()

    def on_publication(self, _app: str, channel: str, body: bytes, _excluded: str | None) -> None:
        """Notes a publication."""
        event = json.loads(body)
        data = json.loads(event["data"])
        self.published.append(f"{channel} {data.get('subscription_count', data.get('turn'))}")
        self.changed.set()

    async def heard(self, *turns: str) -> None:
        """Waits for as many turns and compares them."""
        await self.until(lambda: len(self.turns) >= len(turns))
        assert self.turns == list(turns)


def announce(_app_id: str, name: str) -> Count | Turns | None:
    """By its first letter: a count, turns, or nothing."""
    if name.startswith("c"):
        return Count()
    if name.startswith("t"):
        bodies = [push_body("turn", "turns", {"turn": turn + name}) for turn in "+-"]
        return Turns("turns", *bodies)
    return None


@dataclass
class Cluster:
    """Makes nodes that share numbers, and notes what they tell."""

    told: Told
    make: Callable[[str], Occupancy]
    kill: Callable[[Occupancy, str], Any]
    nodes: list[Occupancy] = field(default_factory=list)

    async def node(self, name: str) -> Occupancy:
        """A node that has started."""
        one = self.make(name)
        self.told.listen(one)
        await one.start()
        self.nodes.append(one)
        return one


@pytest.fixture(params=["memory", "redis"])
async def cluster(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Cluster]:
    """A cluster over memory or Redis."""
    told = Told()
    monkeypatch.setattr(occupancy, "THROTTLE_S", SHORT_THROTTLE_S)
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "memory":
            broker = MemoryBroker(MemoryBus())
            await broker.start(told.on_publication, lambda _: None, lambda: None)
            stack.push_async_callback(broker.stop)
            totals = MemoryTotals()

            async def expire(survivor: Occupancy, name: str) -> None:
                assert isinstance(survivor, MemoryOccupancy)
                survivor.expire(name)

            made = Cluster(
                told, lambda name: MemoryOccupancy(broker, name, totals, announce), expire
            )
        else:
            url = request.getfixturevalue("redis_url")
            made, broker = await stack.enter_async_context(_redis_cluster(url, told))
        for channel in ("turns", "c", "c-busy"):
            await broker.subscribe("1", channel)
        yield made
        for one in made.nodes:
            await one.stop()


@contextlib.asynccontextmanager
async def _redis_cluster(url: str, told: Told) -> Any:
    prefix = f"test-{secrets.token_hex(6)}"
    broker = RedisBroker(url, prefix, "watcher", 1.0)
    await broker.start(told.on_publication, lambda _: None, lambda: None)

    def make(name: str) -> RedisOccupancy:
        lease = RedisLease(broker.commands, prefix, name, LONG_LEASE_S)
        return RedisOccupancy(
            broker.commands, prefix, lease, "occ", announce, throttle_s=SHORT_THROTTLE_S
        )

    async def kill(survivor: Occupancy, name: str) -> None:
        """The lease of `name` has run out, and the survivor renews its own."""
        assert isinstance(survivor, RedisOccupancy)
        async with redis.asyncio.Redis.from_url(url) as admin:
            await admin.zadd(f"{prefix}:nodes", {name: 1})
        await survivor._lease.renew()

    try:
        yield Cluster(told, make, kill), broker
    finally:
        await broker.stop()


async def test_sums_go_over_all_nodes_and_turns_are_told_once(cluster: Cluster) -> None:
    one, two = await cluster.node("n1"), await cluster.node("n2")

    one.report("1", "a", 2)
    assert await one.counts("1", ["a"]) == {"a": 2}
    two.report("1", "a", 3)
    assert await two.counts("1", ["a", "b"]) == {"a": 5, "b": 0}
    one.report("1", "a", 0)
    assert await one.counts("1", ["a"]) == {"a": 3}
    two.report("1", "a", 0)
    assert await two.counts("1", ["a"]) == {"a": 0}

    await cluster.told.heard("+1 a", "-1 a")
    assert await one.occupied("1") == {}


async def test_what_comes_and_goes_at_once_was_never_there(cluster: Cluster) -> None:
    node = await cluster.node("n1")
    node.report("1", "a", 1)
    node.report("1", "a", 0)
    node.report("1", "b", 1)

    await cluster.told.heard("+1 b")
    assert await node.occupied("1") == {"b": 1}


async def test_reports_are_written_without_anyone_asking(cluster: Cluster) -> None:
    node = await cluster.node("n1")
    node.report("1", "a", 1)

    await cluster.told.heard("+1 a")


async def test_occupied_names_are_listed_by_prefix_and_app(cluster: Cluster) -> None:
    node = await cluster.node("n1")
    for name in ("presence-a", "presence-b", "private-a", "[a]*"):
        node.report("1", name, 1)
    node.report("2", "presence-c", 7)

    assert await node.occupied("1", "presence-") == {"presence-a": 1, "presence-b": 1}
    assert await node.occupied("2") == {"presence-c": 7}
    assert await node.occupied("1", "[a]*") == {"[a]*": 1}
    assert await node.occupied("1", "*") == {}
    assert len(await node.occupied("1")) == 4


async def test_a_dead_nodes_numbers_vanish_once_and_those_of_the_living_stay(
    cluster: Cluster,
) -> None:
    dead, survivor = await cluster.node("dead"), await cluster.node("alive")
    for name in ("gone", "both"):
        dead.report("1", name, 2)
        await dead.counts("1", [name])
    survivor.report("1", "both", 1)
    await survivor.occupied("1")

    await cluster.kill(survivor, "dead")
    await cluster.kill(survivor, "dead")

    assert await survivor.occupied("1") == {"both": 1}
    assert sorted(cluster.told.turns) == ["+1 both", "+1 gone", "-1 gone"]


async def test_turns_are_published_where_they_are_wanted(cluster: Cluster) -> None:
    one, two = await cluster.node("n1"), await cluster.node("n2")
    one.report("1", "t", 1)
    await one.counts("1", ["t"])
    two.report("1", "t", 1)
    await two.counts("1", ["t"])
    one.report("1", "t", 0)
    await one.counts("1", ["t"])
    two.report("1", "t", 0)
    await two.counts("1", ["t"])

    told = cluster.told
    await told.until(lambda: len(told.published) == 2)
    assert told.published == ["turns +t", "turns -t"]


@pytest.mark.pusher("1.3", "subscription_count follows every change, up to 100 subscribers at once")
async def test_a_count_of_up_to_a_hundred_is_published_on_every_change(cluster: Cluster) -> None:
    one, two = await cluster.node("n1"), await cluster.node("n2")
    for node, number in ((one, 1), (two, 98), (one, 2), (one, 2), (two, 0), (one, 0)):
        node.report("1", "c", number)
        await node.counts("1", ["c"])

    told = cluster.told
    await told.until(lambda: len(told.published) == 4)
    assert told.published == ["c 1", "c 99", "c 100", "c 2"]


@pytest.mark.pusher("1.3", "above 100 subscribers the count is sent at most every 5 seconds")
async def test_above_a_hundred_counts_are_throttled_and_the_last_one_is_sent(
    cluster: Cluster,
) -> None:
    one, two = await cluster.node("n1"), await cluster.node("n2")
    loop = asyncio.get_running_loop()
    one.report("1", "c-busy", 101)
    await one.counts("1", ["c-busy"])
    told = cluster.told
    await told.until(lambda: len(told.published) == 1)
    shown_at = loop.time()
    for number in range(1, 20):
        node = (one, two)[number % 2]
        node.report("1", "c-busy", 101 + number)
        await node.counts("1", ["c-busy"])
    total = sum([120, 119])

    await told.until(lambda: len(told.published) == 2)

    assert loop.time() - shown_at > SHORT_THROTTLE_S * 0.8
    assert told.published == ["c-busy 101", f"c-busy {total}"]


# Redis alone


@dataclass
class Pair:
    """Two nodes on a Redis of their own, each with its own link."""

    server: RedisServer
    nodes: list[RedisOccupancy]
    told: Told


@pytest.fixture
async def pair(own_redis: RedisServer) -> AsyncIterator[Pair]:
    """Two nodes that have started."""
    told = Told()
    prefix = f"test-{secrets.token_hex(6)}"
    brokers = [RedisBroker(own_redis.url, prefix, f"b{n}", 0.3) for n in range(2)]
    nodes = []
    for number, broker in enumerate(brokers):
        await broker.start(lambda *_: None, lambda _: None, lambda: None)
        lease = RedisLease(broker.commands, prefix, f"n{number}", LONG_LEASE_S)
        nodes.append(RedisOccupancy(broker.commands, prefix, lease, "occ"))
        told.listen(nodes[-1])
        await nodes[-1].start()
    # Both know that the other one stands.
    await nodes[0]._lease.renew()
    yield Pair(own_redis, nodes, told)
    for node in nodes:
        await node.stop()
    for broker in brokers:
        await broker.stop()


async def test_redis_restarted_empty_gets_every_number_again_and_nothing_is_told(
    pair: Pair,
) -> None:
    one, two = pair.nodes
    one.report("1", "a", 1)
    one.report("1", "mine", 1)
    await one.occupied("1")
    await one.counts("1", ["a"])
    two.report("1", "a", 2)
    await two.counts("1", ["a"])
    pair.server.process.kill()
    pair.server.start()
    # While it was away somebody left and somebody came.
    one.report("1", "mine", 0)
    one.report("1", "new", 1)

    await until_accepted(lambda: one.counts("1", ["a"]))

    assert await two.occupied("1") == {"a": 3, "new": 1}
    assert sorted(pair.told.turns) == ["+1 a", "+1 mine", "+1 new", "-1 mine"]


async def test_redis_restarted_with_what_it_had_kept_a_while_ago_is_put_right(pair: Pair) -> None:
    one, two = pair.nodes
    one.report("1", "left", 1)
    one.report("1", "stays", 1)
    await one.counts("1", ["left"])
    async with redis.asyncio.Redis.from_url(pair.server.url) as admin:
        await admin.save()
    one.report("1", "left", 0)
    one.report("1", "new", 1)
    await one.counts("1", ["new"])
    pair.server.process.kill()
    pair.server.start()

    await until_accepted(one._lease.renew)
    for node in pair.nodes:
        await until_accepted(lambda node=node: node.counts("1", ["left"]))  # type: ignore[misc]

    assert await two.occupied("1") == {"stays": 1, "new": 1}


async def test_what_a_frozen_redis_did_not_take_is_written_when_it_answers(pair: Pair) -> None:
    one, two = pair.nodes
    one.report("1", "a", 1)
    await one.counts("1", ["a"])
    pair.server.process.pause()
    one.report("1", "a", 0)
    one.report("1", "b", 4)
    with pytest.raises(BrokerUnavailable):
        await one.counts("1", ["a"])
    pair.server.process.resume()

    await until_accepted(lambda: one.counts("1", ["a"]))

    assert await two.occupied("1") == {"b": 4}


async def test_survivors_reap_many_names_at_the_same_time_each_once(pair: Pair) -> None:
    one, two = pair.nodes
    dead_lease = RedisLease(one._commands, one._prefix, "dead", LONG_LEASE_S)
    dead = RedisOccupancy(one._commands, one._prefix, dead_lease, "occ")
    await dead.start()
    names = [f"c{number:03}" for number in range(450)]
    for name in names:
        dead.report("1", name, 1)
    await dead.counts("1", names)
    await dead_lease._tasks.stop()
    await dead._tasks.stop()
    async with redis.asyncio.Redis.from_url(pair.server.url) as admin:
        await admin.zadd(f"{one._prefix}:nodes", {"dead": 1})

    await asyncio.gather(one._lease.renew(), two._lease.renew())

    assert sorted(pair.told.turns) == [f"-1 {name}" for name in names]
    assert await one.occupied("1") == {}
    async with redis.asyncio.Redis.from_url(pair.server.url) as admin:
        assert await admin.zscore(f"{one._prefix}:nodes", "dead") is None
