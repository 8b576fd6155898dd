"""What every presence promises, over memory and over Redis; then leases and losses of Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from gateway.broker import BrokerUnavailable, MemoryBroker, MemoryBus
from gateway.messages import Member
from gateway.presence import ChannelFull, MemoryPresence, MemoryStore, Presence
from gateway.redis_broker import RedisBroker
from gateway.redis_lease import Entering, RedisLease
from gateway.redis_presence import RedisPresence
from tests.gateway.harness import Recorder, until, until_accepted, until_yes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from persistence.embedded_redis import RedisServer

CHANNEL = "presence-c"
LONG_LEASE_S = 600.0


@dataclass
class Watcher(Recorder):
    """Hears the member events of the channel, in order: `+user` and `-user`."""

    events: list[str] = field(default_factory=list)
    excluded: list[str | None] = field(default_factory=list)

    def on_publication(self, _app: str, _channel: str, body: bytes, excluded: str | None) -> None:
        """Notes a member event, or the marker that ends a test."""
        event = json.loads(body)
        sign = {"member_added": "+", "member_removed": "-"}.get(event["event"].rpartition(":")[2])
        self.events.append((sign or "=") + json.loads(event["data"])["user_id"])
        self.excluded.append(excluded)
        self.changed.set()

    async def count(self, expected: int) -> None:
        """Waits for as many events."""
        await self.until(lambda: len(self.events) >= expected)

    async def heard(self, *expected: str) -> None:
        """Waits for as many events and compares them."""
        await self.count(len(expected))
        assert self.events == list(expected)


@dataclass
class Cluster:
    """Makes nodes that share members, and watches their events."""

    watcher: Watcher
    node: Callable[[str], Presence]
    kill: Callable[[Presence, str], Any]


@pytest.fixture(params=["memory", "redis"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """A cluster over memory or Redis whose channel has room for three."""
    watcher = Watcher()
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "memory":
            broker = MemoryBroker(MemoryBus())
            await broker.start(watcher.on_publication, lambda _: None, lambda: None)
            stack.push_async_callback(broker.stop)
            await broker.subscribe("1", CHANNEL)
            store = MemoryStore()

            async def expire(presence: Presence, name: str) -> None:
                assert isinstance(presence, MemoryPresence)
                presence.expire(name)

            yield Cluster(watcher, lambda name: MemoryPresence(broker, name, 3, store), expire)
            return
        yield await stack.enter_async_context(
            _redis_cluster(request.getfixturevalue("redis_url"), watcher)
        )


@contextlib.asynccontextmanager
async def _redis_cluster(url: str, watcher: Watcher, timeout_s: float = 1.0) -> Any:
    prefix = f"test-{secrets.token_hex(6)}"
    broker = RedisBroker(url, prefix, "watcher", timeout_s)
    await broker.start(watcher.on_publication, lambda _: None, lambda: None)
    await broker.subscribe("1", CHANNEL)

    def node(name: str) -> RedisPresence:
        lease = RedisLease(broker.commands, prefix, name, LONG_LEASE_S)
        return RedisPresence(broker.commands, prefix, lease, 3)

    async def kill(survivor: Presence, name: str) -> None:
        """The lease of `name` has run out, and the survivor renews its own."""
        assert isinstance(survivor, RedisPresence)
        async with redis.asyncio.Redis.from_url(url) as admin:
            await admin.zadd(f"{prefix}:nodes", {name: 1})
        await survivor._lease.renew()

    try:
        yield Cluster(watcher, node, kill)
    finally:
        await broker.stop()


def member(user_id: str, info: bytes = b"{}") -> Member:
    return Member(user_id, info)


async def test_a_user_is_added_with_the_first_and_removed_with_the_last_connection(
    cluster: Cluster,
) -> None:
    one, two = cluster.node("n1"), cluster.node("n2")

    joins = [
        (await one.join("1", CHANNEL, member("u"), "1.1")).first,
        (await one.join("1", CHANNEL, member("u"), "1.2")).first,
        (await two.join("1", CHANNEL, member("u"), "2.1")).first,
    ]
    leaves = [
        await one.leave("1", CHANNEL, "u", "1.1"),
        await two.leave("1", CHANNEL, "u", "2.1"),
        await one.leave("1", CHANNEL, "u", "1.2"),
    ]

    assert joins == [True, False, False]
    assert leaves == [False, False, True]
    await cluster.watcher.heard("+u", "-u")
    assert cluster.watcher.excluded == ["1.1", None]
    assert await two.members("1", CHANNEL) == {}


async def test_a_join_returns_the_members_right_after_it(cluster: Cluster) -> None:
    one, two = cluster.node("n1"), cluster.node("n2")
    await one.join("1", CHANNEL, member("a", b'{"n":1}'), "1.1")

    joined = await two.join("1", CHANNEL, member("b", b'{"n":2}'), "2.1")

    assert joined.members == {"a": b'{"n":1}', "b": b'{"n":2}'}
    assert await one.members("1", CHANNEL) == joined.members


async def test_repeated_joins_and_leaves_change_nothing(cluster: Cluster) -> None:
    node = cluster.node("n1")
    await node.leave("1", CHANNEL, "u", "1.1")
    await node.join("1", CHANNEL, member("u"), "1.1")
    await node.join("1", CHANNEL, member("u"), "1.1")
    assert await node.leave("1", CHANNEL, "u", "1.1")
    assert not await node.leave("1", CHANNEL, "u", "1.1")
    await node.join("1", CHANNEL, member("u"), "1.1")

    await cluster.watcher.heard("+u", "-u", "+u")
    assert list(await node.members("1", CHANNEL)) == ["u"]


async def test_ids_with_spaces_and_any_letters_are_users_like_others(cluster: Cluster) -> None:
    node = cluster.node("n1")
    await node.join("1", CHANNEL, member("a b é$."), "1.1")

    assert await node.leave("1", CHANNEL, "a b é$.", "1.1")
    await cluster.watcher.heard("+a b é$.", "-a b é$.")


async def test_a_full_channel_refuses_newcomers_and_lets_members_connect_again(
    cluster: Cluster,
) -> None:
    node = cluster.node("n1")
    for number in range(3):
        await node.join("1", CHANNEL, member(f"u{number}"), f"1.{number}")

    with pytest.raises(ChannelFull):
        await node.join("1", CHANNEL, member("late"), "1.9")
    again = await node.join("1", CHANNEL, member("u0"), "1.8")

    assert not again.first
    assert set(again.members) == {"u0", "u1", "u2"}


async def test_users_are_counted_once_each_in_many_channels_at_once(cluster: Cluster) -> None:
    one, two = cluster.node("n1"), cluster.node("n2")
    for node, user, socket_id in ((one, "a", "1.1"), (two, "a", "2.1"), (two, "b", "2.2")):
        await node.join("1", CHANNEL, member(user), socket_id)
    await one.join("1", "presence-d", member("c"), "1.3")

    counts = await one.user_counts("1", [CHANNEL, "presence-d", "presence-nobody"])

    assert counts == {CHANNEL: 2, "presence-d": 1, "presence-nobody": 0}
    assert await two.user_counts("2", [CHANNEL]) == {CHANNEL: 0}


async def test_channels_and_apps_are_apart(cluster: Cluster) -> None:
    node = cluster.node("n1")
    await node.join("1", CHANNEL, member("u"), "1.1")

    assert (await node.join("2", CHANNEL, member("u"), "1.1")).first
    assert (await node.join("1", "presence-d", member("u"), "1.1")).first
    assert await node.leave("2", CHANNEL, "u", "1.1")
    assert list(await node.members("1", CHANNEL)) == ["u"]


async def test_a_dead_nodes_members_leave_once_and_the_living_stay(cluster: Cluster) -> None:
    dead, survivor = cluster.node("dead"), cluster.node("alive")
    await survivor.start()
    await dead.join("1", CHANNEL, member("gone"), "1.1")
    await dead.join("1", CHANNEL, member("both"), "1.2")
    await survivor.join("1", CHANNEL, member("both"), "2.1")

    await cluster.kill(survivor, "dead")
    await cluster.kill(survivor, "dead")

    await cluster.watcher.heard("+gone", "+both", "-gone")
    assert list(await survivor.members("1", CHANNEL)) == ["both"]
    await survivor.stop()


async def test_a_hundred_joins_and_leaves_at_once_are_one_coming_and_one_going(
    cluster: Cluster,
) -> None:
    nodes = [cluster.node(f"n{number}") for number in range(4)]

    joined = await asyncio.gather(
        *(nodes[n % 4].join("1", CHANNEL, member("u"), f"1.{n}") for n in range(100))
    )
    left = await asyncio.gather(
        *(nodes[n % 4].leave("1", CHANNEL, "u", f"1.{n}") for n in range(100))
    )

    assert sum(one.first for one in joined) == 1
    assert sum(left) == 1
    await cluster.watcher.heard("+u", "-u")


# Redis alone


@dataclass
class Parts:
    """Two nodes on a Redis of their own, each with its own link."""

    server: RedisServer
    watcher: Watcher
    brokers: list[RedisBroker]
    prefix: str

    def node(
        self, number: int, lease_s: float = LONG_LEASE_S, max_members: int = 3
    ) -> RedisPresence:
        """The presence of one of the nodes."""
        commands = self.brokers[number].commands
        lease = RedisLease(commands, self.prefix, f"n{number}", lease_s)
        return RedisPresence(commands, self.prefix, lease, max_members)

    async def run_out(self, name: str) -> None:
        """Ends a node's lease behind its back."""
        async with redis.asyncio.Redis.from_url(self.server.url) as admin:
            await admin.zadd(f"{self.prefix}:nodes", {name: 1})


@pytest.fixture
async def parts(own_redis: RedisServer) -> AsyncIterator[Parts]:
    """Two nodes and a watcher."""
    watcher = Watcher()
    prefix = f"test-{secrets.token_hex(6)}"
    brokers = [RedisBroker(own_redis.url, prefix, f"b{n}", 0.3) for n in range(2)]
    await brokers[0].start(watcher.on_publication, lambda _: None, lambda: None)
    await brokers[1].start(lambda *_: None, lambda _: None, lambda: None)
    await brokers[0].subscribe("1", CHANNEL)
    yield Parts(own_redis, watcher, brokers, prefix)
    for broker in brokers:
        await broker.stop()


async def test_survivors_reap_at_the_same_time_and_announce_each_member_once(
    parts: Parts,
) -> None:
    commands = parts.brokers[0].commands
    lease = RedisLease(commands, parts.prefix, "dead", LONG_LEASE_S)
    dead = RedisPresence(commands, parts.prefix, lease, 1000)
    users = [f"u{number:03}" for number in range(450)]
    await dead.start()
    for number, user in enumerate(users):
        await dead.join("1", CHANNEL, member(user), f"1.{number}")
    await lease._tasks.stop()
    one, two = parts.node(0), parts.node(1)
    await one.start()
    await two.start()
    await parts.run_out("dead")

    await asyncio.gather(one._lease.renew(), two._lease.renew())

    await parts.watcher.count(900)
    assert parts.watcher.events[:450] == [f"+{user}" for user in users]
    assert sorted(parts.watcher.events[450:]) == [f"-{user}" for user in users]
    assert await one.members("1", CHANNEL) == {}
    async with redis.asyncio.Redis.from_url(parts.server.url) as admin:
        assert await admin.zscore(f"{parts.prefix}:nodes", "dead") is None
        assert await admin.exists(f"{parts.prefix}:presence:node:dead") == 0
    await one.stop()
    await two.stop()


async def test_a_node_that_was_only_away_enters_its_members_again_and_says_so(
    parts: Parts,
) -> None:
    away, survivor = parts.node(0), parts.node(1)
    await away.start()
    await survivor.start()
    await away.join("1", CHANNEL, member("u", b'{"n":1}'), "1.1")
    await parts.run_out("n0")
    await survivor._lease.renew()
    await parts.watcher.heard("+u", "-u")

    await away._lease.renew()

    await parts.watcher.heard("+u", "-u", "+u")
    assert await survivor.members("1", CHANNEL) == {"u": b'{"n":1}'}
    assert await away.leave("1", CHANNEL, "u", "1.1")
    await away.stop()
    await survivor.stop()


async def test_after_redis_was_away_others_get_time_to_come_back_before_they_are_dead(
    parts: Parts,
) -> None:
    back, survivor = parts.node(0), parts.node(1)
    await back.start()
    await survivor.start()
    await back.join("1", CHANNEL, member("u"), "1.1")
    await parts.run_out("n0")
    survivor._lease._renewed_at -= LONG_LEASE_S

    await survivor._lease.renew()
    await back._lease.renew()
    await parts.run_out("n0")
    survivor._lease._reap_from -= LONG_LEASE_S
    await survivor._lease.renew()

    await parts.watcher.heard("+u", "-u")
    await back.stop()
    await survivor.stop()


async def test_redis_restarted_empty_gets_every_nodes_members_again_in_silence(
    parts: Parts,
) -> None:
    one, two = parts.node(0), parts.node(1)
    await one.start()
    await two.start()
    await one.join("1", CHANNEL, member("a"), "1.1")
    await two.join("1", CHANNEL, member("b"), "2.1")
    parts.server.process.kill()
    parts.server.start()

    await until_accepted(one._lease.renew)
    await until_accepted(two._lease.renew)

    assert set(await one.members("1", CHANNEL)) == {"a", "b"}
    await until_accepted(lambda: parts.brokers[0].subscribe("1", CHANNEL))
    assert await one.leave("1", CHANNEL, "a", "1.1")
    await parts.watcher.heard("+a", "+b", "-a")
    await one.stop()
    await two.stop()


async def test_a_crowded_channel_is_entered_again_without_being_told_of_the_crowd_each_time(
    parts: Parts,
) -> None:
    """Told 2,000 times of 2,000 members a node never came to an end, and tried for ever."""
    members, info_bytes = 150, 1_000
    info = b'"' + b"x" * info_bytes + b'"'
    node = parts.node(1, max_members=members)
    await node.start()
    for number in range(members):
        await node.join("1", CHANNEL, member(f"u{number}", info), f"1.{number}")
    async with redis.asyncio.Redis.from_url(parts.server.url) as admin:
        await admin.flushall()
        before = (await admin.info("stats"))["total_net_output_bytes"]

        await until_accepted(node._lease.renew)

        after = (await admin.info("stats"))["total_net_output_bytes"]
    assert after - before < 10 * members * info_bytes
    assert len(await node.members("1", CHANNEL)) == members
    await node.stop()


async def test_who_leaves_while_a_node_enters_its_members_again_is_announced(
    parts: Parts,
) -> None:
    """It left out who had gone when their portion came, and there was nothing left to announce."""
    members = 250
    node = parts.node(1, max_members=members)
    await node.start()
    for number in range(members):
        await node.join("1", CHANNEL, member(f"u{number}"), f"1.{number}")
    async with redis.asyncio.Redis.from_url(parts.server.url) as admin:
        await admin.flushall()
    lease = node._lease

    renewing = asyncio.create_task(lease.renew())
    await until(lambda: not lease.settled, every_s=0)
    assert await node.leave("1", CHANNEL, "u249", "1.249") is False
    await renewing

    await parts.watcher.count(members + 1)
    assert parts.watcher.events[members:] == ["-u249"]
    await node.stop()


async def test_redis_restarted_with_what_it_had_kept_a_while_ago_is_put_right(
    parts: Parts,
) -> None:
    """Its epoch is the one that everybody knows, and who has left since is there again."""
    one, two = parts.node(0), parts.node(1)
    await one.start()
    await two.start()
    for presence, user, socket_id in ((one, "a", "1.1"), (one, "b", "1.2"), (two, "c", "2.1")):
        await presence.join("1", CHANNEL, member(user), socket_id)
    async with redis.asyncio.Redis.from_url(parts.server.url) as admin:
        await admin.save()
    await one.leave("1", CHANNEL, "a", "1.1")
    await one.join("1", CHANNEL, member("new"), "1.3")
    parts.server.process.kill()
    parts.server.start()

    await until_accepted(one._lease.renew)
    await until_accepted(two._lease.renew)

    assert set(await one.members("1", CHANNEL)) == {"b", "c", "new"}
    await one.stop()
    await two.stop()


async def test_who_joins_a_redis_that_lost_its_data_is_told_of_everyone(parts: Parts) -> None:
    one, two = parts.node(0, max_members=9), parts.node(1, max_members=9)
    await one.start()
    await two.start()
    await one.join("1", CHANNEL, member("a"), "1.1")
    await two.join("1", CHANNEL, member("b"), "2.1")
    await two.join("1", CHANNEL, member("left"), "2.2")
    # Both know that the other one stands.
    await one._lease.renew()
    parts.server.process.kill()
    assert await two.leave("1", CHANNEL, "left", "2.2") is False
    parts.server.start()
    shown: dict[str, bytes] = {}

    async def join() -> None:
        shown.update((await one.join("1", CHANNEL, member("new"), "1.9")).members)

    await until_accepted(join)

    assert {"a", "b", "new"} <= shown.keys()
    await until_accepted(lambda: parts.brokers[0].subscribe("1", CHANNEL))
    await until_accepted(two._lease.renew)
    assert await two.members("1", CHANNEL) == {"a": b"{}", "b": b"{}", "new": b"{}"}
    await one.stop()
    await two.stop()


async def test_a_node_that_did_not_survive_the_loss_is_not_waited_for_for_ever(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.redis_lease.PEERS_WAIT_S", 0.3)
    one, two = parts.node(0), parts.node(1)
    await one.start()
    await two.start()
    await one.join("1", CHANNEL, member("a"), "1.1")
    await two.join("1", CHANNEL, member("b"), "2.1")
    await one._lease.renew()
    await two._lease._tasks.stop()
    parts.server.process.kill()
    parts.server.start()

    await until_accepted(lambda: one.join("1", CHANNEL, member("new"), "1.9"))

    assert set(await one.members("1", CHANNEL)) == {"a", "new"}
    await one.stop()


async def test_a_leave_that_redis_did_not_hear_of_is_made_at_the_next_renewal(
    parts: Parts,
) -> None:
    node = parts.node(1)
    await node.start()
    await node.join("1", CHANNEL, member("u"), "1.1")
    parts.server.process.pause()
    assert await node.leave("1", CHANNEL, "u", "1.1") is False
    with pytest.raises(BrokerUnavailable):
        await node.join("1", CHANNEL, member("w"), "1.2")
    with pytest.raises(BrokerUnavailable):
        await node.members("1", CHANNEL)
    parts.server.process.resume()

    await until_accepted(node._lease.renew)

    # The join that was given up came through before its leave.
    await parts.watcher.heard("+u", "-u", "+w", "-w")
    assert await node.members("1", CHANNEL) == {}
    await node.stop()


async def test_a_join_that_was_given_up_does_not_silence_its_next_attempt(parts: Parts) -> None:
    """It was entered again as one about to leave, so whoever tried again had never come."""
    node = parts.node(1)
    await node.start()
    broker = parts.brokers[1]
    parts.server.process.kill()
    with pytest.raises(BrokerUnavailable):
        await node.join("1", CHANNEL, member("u"), "1.1")
    parts.server.start()
    await until(lambda: broker.commands.connected and parts.brokers[0].alive)
    await node.enter_again(Entering.QUIETLY)

    await until_accepted(lambda: node.join("1", CHANNEL, member("u"), "1.1"))

    await parts.watcher.heard("+u")
    await node.stop()


async def test_a_node_that_stops_leaves_no_lease_behind(parts: Parts) -> None:
    node = parts.node(0)
    await node.start()
    await node.stop()

    async with redis.asyncio.Redis.from_url(parts.server.url) as admin:
        assert await admin.zrange(f"{parts.prefix}:nodes", 0, -1) == []


async def test_the_lease_is_renewed_without_anyone_asking(parts: Parts) -> None:
    node = parts.node(0, lease_s=0.15)
    await node.start()
    key = f"{parts.prefix}:nodes"
    async with redis.asyncio.Redis.from_url(parts.server.url) as admin:
        first = await admin.zscore(key, "n0")

        async def is_renewed() -> bool:
            return bool(await admin.zscore(key, "n0") != first)

        await until_yes(is_renewed)
    await node.stop()
