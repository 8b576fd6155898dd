"""The wire across two nodes on one Redis: cache channels, users, watchlists, counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from gateway.apps import App, Apps
from gateway.auth import sign_channel, sign_user
from gateway.broker import Publication
from gateway.frames import published_body
from gateway.redis_broker import RedisBroker
from gateway.redis_lease import RedisLease
from gateway.redis_presence import RedisPresence
from tests.gateway.harness import redis_shared, running_gateway, settings_for_tests, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.broker import Broker
    from gateway.presence import Presence
    from persistence.embedded_redis import RedisServer
    from tests.gateway.harness import Gateway, RawClient

APP = App(id="1", key="app-key", secret="app-secret", subscription_count=True)
SILENT_APP = App(id="2", key="silent", secret="silent-secret")
QUOTA_APP = App(id="3", key="quota", secret="quota-secret", max_connections=3)
THROTTLE_S = 0.5
LONG_LEASE_S = 600.0


@dataclass
class Pair:
    """Two nodes of one cluster."""

    one: Gateway
    two: Gateway
    leases: list[RedisLease]
    url: str
    prefix: str

    async def publish(self, channel: str, data: str, event: str = "e") -> None:
        """Publishes as the app's backend does."""
        body = published_body(event, channel, data)
        await self.one.node.publish([Publication("1", channel, body)])

    async def lose_one(self) -> None:
        """The first node's lease runs out; the second one notices."""
        async with redis.asyncio.Redis.from_url(self.url) as admin:
            await admin.zadd(f"{self.prefix}:nodes", {"n1": 1})
        await self.leases[1].renew()


@contextlib.asynccontextmanager
async def running_pair(url: str, **settings: Any) -> AsyncIterator[Pair]:
    prefix, apps = f"test-{secrets.token_hex(6)}", Apps([APP, SILENT_APP, QUOTA_APP])
    leases: list[RedisLease] = []

    def node(name: str) -> Any:
        broker = RedisBroker(url, prefix, name, 0.5)
        lease = RedisLease(broker.commands, prefix, name, LONG_LEASE_S)
        leases.append(lease)

        def presence(_: Broker) -> Presence:
            return RedisPresence(broker.commands, prefix, lease, 100)

        shared = redis_shared(broker, apps, prefix, lease, THROTTLE_S)
        chosen = settings_for_tests(**settings)
        return running_gateway(chosen, apps, broker, presence, shared)

    async with node("n1") as one, node("n2") as two:
        await leases[0].renew()
        yield Pair(one, two, leases, url, prefix)


@pytest.fixture
async def pair(redis_url: str) -> AsyncIterator[Pair]:
    async with running_pair(redis_url) as made:
        yield made


async def signed_in(client: RawClient, app: App, user_id: str, **data: Any) -> Any:
    """Signs in; the answer's data."""
    user_data = json.dumps({"id": user_id, **data})
    auth = sign_user(app, client.socket_id, user_data)
    client.send({"event": "pusher:signin", "data": {"auth": auth, "user_data": user_data}})
    answer = await client.event()
    assert answer["event"] == "pusher:signin_success", answer
    return json.loads(answer["data"])


async def watched(client: RawClient) -> dict[str, list[str]]:
    """The next watchlist events: name -> user ids."""
    event = await client.event()
    assert event["event"] == "pusher_internal:watchlist_events", event
    assert "channel" not in event
    return {one["name"]: one["user_ids"] for one in json.loads(event["data"])["events"]}


async def counted(client: RawClient, channel: str) -> int:
    """The next subscription_count."""
    event = await client.event()
    assert event["event"] == "pusher_internal:subscription_count", event
    assert event["channel"] == channel
    data: dict[str, int] = json.loads(event["data"])
    return data["subscription_count"]


async def counted_until(client: RawClient, channel: str, count: int) -> None:
    """Reads counts until there is the one that is waited for."""
    while await counted(client, channel) != count:
        pass


# Cache channels


@pytest.mark.pusher("1.6", "a cache channel's last event follows subscription_succeeded")
@pytest.mark.parametrize(
    "channel",
    ["cache-c", "private-cache-c", "private-encrypted-cache-c", "presence-cache-c"],
)
async def test_a_subscriber_gets_the_last_event_of_each_cache_family(
    pair: Pair, channel: str
) -> None:
    await pair.publish(channel, "older")
    await pair.publish(channel, '{"n":1}')
    client = await pair.two.connect("/app/app-key?protocol=7&token=viewer:v")
    auth = "" if channel == "cache-c" else sign_channel(APP, client.socket_id, channel)

    await client.subscribed(channel, auth)

    assert await client.event() == {"event": "e", "channel": channel, "data": '{"n":1}'}


@pytest.mark.pusher("1.6", 'an empty cache channel answers pusher:cache_miss with the data "{}"')
async def test_a_subscriber_of_an_empty_cache_channel_is_told_of_the_miss(pair: Pair) -> None:
    client = await pair.two.connect("/app/silent?protocol=7")
    await client.subscribed("cache-c")

    assert await client.event() == {
        "event": "pusher:cache_miss",
        "channel": "cache-c",
        "data": "{}",
    }
    await client.ping()


@pytest.mark.pusher("1.6", "client events don't fill a cache channel")
async def test_a_client_event_is_relayed_and_not_replayed(pair: Pair) -> None:
    channel = "private-cache-c"
    await pair.publish(channel, "server's")
    sender, receiver = await pair.one.connect(), await pair.two.connect()
    for client in (sender, receiver):
        await client.subscribed(channel, sign_channel(APP, client.socket_id, channel))
        assert (await client.event())["data"] == "server's"

    sender.send({"event": "client-x", "channel": channel, "data": "client's"})
    event = await receiver.event()
    while event["event"] == "pusher_internal:subscription_count":
        event = await receiver.event()
    assert event["event"] == "client-x"

    late = await pair.one.connect()
    await late.subscribed(channel, sign_channel(APP, late.socket_id, channel))
    assert (await late.event())["data"] == "server's"


async def test_who_subscribes_amid_publications_gets_each_once_and_in_order(pair: Pair) -> None:
    channel, newcomers, ended = "cache-busy", 40, False
    await pair.publish(channel, "0")

    async def publish() -> int:
        number = 0
        while not ended:
            number += 1
            await pair.publish(channel, str(number))
        return number

    publishing = asyncio.create_task(publish())
    clients = []
    for number in range(newcomers):
        client = await (pair.one, pair.two)[number % 2].connect("/app/app-key?protocol=7")
        client.subscribe(channel)
        clients.append(client)
    for client in clients:
        assert (await client.event())["event"] == "pusher_internal:subscription_succeeded"
    ended = True
    last = await publishing

    for client in clients:
        seen: list[int] = []
        while not seen or seen[-1] < last:
            event = await client.event()
            if event["event"] == "e":
                seen.append(int(event["data"]))
        assert seen == list(range(seen[0], last + 1))


async def test_a_cache_channel_whose_store_is_away_is_refused_and_not_called_empty(
    own_redis: RedisServer,
) -> None:
    async with running_pair(own_redis.url) as pair:
        client = await pair.one.connect("/app/silent?protocol=7")
        await client.subscribed("cache-c")
        assert (await client.event())["event"] == "pusher:cache_miss"
        own_redis.process.pause()
        late = await pair.one.connect("/app/silent?protocol=7")
        late.subscribe("cache-c")

        answer = await late.event()

        assert answer["event"] == "pusher:subscription_error"
        assert answer["data"]["status"] == 503
        own_redis.process.resume()


# Users


@pytest.mark.pusher("1.6", "#server-to-user-ID belongs to the signed-in user")
async def test_events_to_a_user_reach_each_of_the_users_connections_alone(pair: Pair) -> None:
    here, there = await pair.one.connect(), await pair.two.connect()
    stranger = await pair.two.connect()
    channel = "#server-to-user-42"
    for client in (here, there):
        await signed_in(client, APP, "42")
        await client.subscribed(channel)
    await signed_in(stranger, APP, "43")
    stranger.subscribe(channel)
    assert (await stranger.event())["event"] == "pusher:subscription_error"

    await pair.publish(channel, "for you")

    for client in (here, there):
        event = await client.event()
        while event["event"] == "pusher_internal:subscription_count":
            event = await client.event()
        assert event == {"event": "e", "channel": channel, "data": "for you"}


@pytest.mark.pusher("1.8", "watchlist: who is online at signin, then changes, across nodes")
async def test_a_watcher_learns_who_is_online_and_who_comes_and_goes(pair: Pair) -> None:
    early = await pair.two.connect("/app/app-key?protocol=7&token=viewer:early")
    watcher = await pair.one.connect()
    await pair.two.node.online.counts("1", ["early"])
    await signed_in(watcher, APP, "w", watchlist=["early", "late", "late", 7])
    assert await watched(watcher) == {"online": ["early"]}

    late = await pair.two.connect()
    await signed_in(late, APP, "late")
    assert await watched(watcher) == {"online": ["late"]}
    again = await pair.one.connect()
    await signed_in(again, APP, "late")
    number = await pair.two.connect()
    await signed_in(number, APP, "7")
    # The second connection of one user is no news.
    assert await watched(watcher) == {"online": ["7"]}

    await early.close()
    assert await watched(watcher) == {"offline": ["early"]}
    await late.close()
    await number.close()
    assert await watched(watcher) == {"offline": ["7"]}
    await again.close()
    assert await watched(watcher) == {"offline": ["late"]}
    await watcher.ping()


@pytest.mark.pusher("1.8", "users of a crashed node go offline")
async def test_the_users_of_a_dead_node_go_offline_for_their_watchers(pair: Pair) -> None:
    lost = await pair.one.connect()
    await signed_in(lost, APP, "lost")
    await pair.one.node.online.counts("1", ["lost"])
    watcher = await pair.two.connect()
    await signed_in(watcher, APP, "w", watchlist=["lost"])
    assert await watched(watcher) == {"online": ["lost"]}

    await pair.lose_one()

    assert await watched(watcher) == {"offline": ["lost"]}


async def test_apps_do_not_see_each_others_users(pair: Pair) -> None:
    watcher = await pair.one.connect()
    await signed_in(watcher, APP, "w", watchlist=["u"])
    assert await watched(watcher) == {"online": []}
    other = await pair.two.connect("/app/silent?protocol=7")
    await signed_in(other, SILENT_APP, "u")
    await pair.two.node.online.counts("2", ["u"])

    own = await pair.two.connect()
    await signed_in(own, APP, "u")

    assert await watched(watcher) == {"online": ["u"]}


async def test_signing_in_again_replaces_the_watchlist(pair: Pair) -> None:
    watcher = await pair.one.connect()
    await signed_in(watcher, APP, "w", watchlist=["a", "b"])
    assert await watched(watcher) == {"online": []}
    await signed_in(watcher, APP, "w", watchlist=["b", "c"])
    assert await watched(watcher) == {"online": []}
    clients = {}
    for user_id in ("a", "c", "b"):
        clients[user_id] = await pair.two.connect()
        await signed_in(clients[user_id], APP, user_id)
        await pair.two.node.online.counts("1", [user_id])

    assert await watched(watcher) == {"online": ["c"]}
    assert await watched(watcher) == {"online": ["b"]}
    await signed_in(watcher, APP, "w")
    await clients["b"].close()
    await until(lambda: ("1", "b") not in pair.two.node.users._connections)
    await pair.two.node.online.counts("1", ["b"])
    await watcher.ping()


async def test_hidden_channels_are_nobodys_to_use(pair: Pair) -> None:
    watcher = await pair.one.connect()
    await signed_in(watcher, APP, "w", watchlist=["u"])
    await watched(watcher)
    for event, more in (
        ("pusher:subscribe", {"data": {"channel": "#watch-v"}}),
        ("client-x", {"channel": "#watch-u", "data": {}}),
    ):
        watcher.send({"event": event, **more})
        assert (await watcher.event())["event"] == "pusher:error"
    watcher.send({"event": "pusher:unsubscribe", "data": {"channel": "#watch-u"}})
    assert await pair.one.node.occupancy.occupied("1") == {}

    user = await pair.two.connect()
    await signed_in(user, APP, "u")

    assert await watched(watcher) == {"online": ["u"]}


@pytest.mark.pusher("1.8", "terminating a user closes (4009) signed-in connections on every node")
async def test_terminating_a_user_leaves_mere_presence_members_alone(pair: Pair) -> None:
    mine = [await pair.one.connect(), await pair.two.connect()]
    for client in mine:
        await signed_in(client, APP, "u")
    member = await pair.two.connect("/app/app-key?protocol=7")
    shown = '{"user_id":"u"}'
    channel = "presence-c"
    await member.subscribed(
        channel, sign_channel(APP, member.socket_id, channel, shown), channel_data=shown
    )

    await pair.one.node.terminate_user("1", "u")

    for client in mine:
        error, closed = await client.refused()
        assert error["code"] == closed.code == 4009
    await member.ping()


# subscription_count


@pytest.mark.pusher("1.3", "subscription_count tells all subscribers, across nodes")
async def test_every_subscriber_is_told_how_many_there_are(pair: Pair) -> None:
    one = await pair.one.connect()
    await one.subscribed("c")
    assert await counted(one, "c") == 1
    two, three = await pair.two.connect(), await pair.two.connect()
    await two.subscribed("c")
    await three.subscribed("c")
    for client in (one, two):
        await counted_until(client, "c", 3)

    two.send({"event": "pusher:unsubscribe", "data": {"channel": "c"}})
    await counted_until(one, "c", 2)
    await three.close()
    await counted_until(one, "c", 1)


@pytest.mark.pusher("1.3", "no subscription_count on presence channels, nor unless the app asks")
async def test_presence_channels_and_other_apps_have_no_count(pair: Pair) -> None:
    client = await pair.one.connect("/app/app-key?protocol=7&token=viewer:v")
    name = "presence-c"
    await client.subscribed(name, sign_channel(APP, client.socket_id, name))
    silent = await pair.one.connect("/app/silent?protocol=7")
    await silent.subscribed("c")

    assert await pair.one.node.occupancy.counts("1", [name]) == {name: 1}
    assert await pair.one.node.occupancy.counts("2", ["c"]) == {"c": 1}

    await client.ping()
    await silent.ping()


@pytest.mark.pusher("1.3", "above 100 subscribers subscription_count is throttled")
async def test_a_crowd_is_counted_now_and_then_and_rightly_in_the_end(pair: Pair) -> None:
    clients = []
    for number in range(130):
        client = await (pair.one, pair.two)[number % 2].connect()
        client.subscribe("crowd")
        clients.append(client)

    counts: list[int] = []
    assert (await clients[0].event())["event"] == "pusher_internal:subscription_succeeded"
    while not counts or counts[-1] != 130:
        counts.append(await counted(clients[0], "crowd"))

    assert counts == sorted(set(counts))
    above = [count for count in counts if count > 100]
    # Connecting them took less than two pauses.
    assert len(above) <= 3


# Occupancy


async def test_occupancy_follows_connections_wherever_they_are(pair: Pair) -> None:
    here, there = await pair.one.connect(), await pair.two.connect()
    for client in (here, there):
        await client.subscribed("a")
    await there.subscribed("b")
    await pair.two.node.occupancy.counts("1", ["a"])

    assert await pair.one.node.occupancy.occupied("1") == {"a": 2, "b": 1}
    await there.close()
    await until(lambda: len(pair.two.node.hub.connections) == 0)
    await pair.two.node.occupancy.counts("1", ["a"])
    assert await pair.one.node.occupancy.occupied("1") == {"a": 1}


@pytest.mark.pusher("1.9", "4004: max_connections holds across nodes")
async def test_a_quota_counts_the_connections_of_every_node(pair: Pair) -> None:
    path = "/app/quota?protocol=7"
    first = await pair.one.connect(path)
    for _ in range(2):
        await pair.one.connect(path)
    await pair.one.node._quotas.look()
    await pair.two.node._quotas.look()

    for gateway in (pair.one, pair.two):
        client = await gateway.open(path)
        assert (await client.refused())[1].code == 4004

    await first.close()
    await until(lambda: len(pair.one.node.hub.connections) == 2)
    await pair.one.node._quotas.look()
    await pair.two.node._quotas.look()
    await pair.two.connect(path)


# After a gap


async def test_after_a_gap_snapshots_and_watchlists_are_told_again(own_redis: RedisServer) -> None:
    async with running_pair(own_redis.url) as pair:
        user = await pair.one.connect("/app/app-key?protocol=7&token=viewer:v")
        await user.subscribed("private-user@v")
        assert await next_of(user, "goal.snapshot")
        watcher = await pair.one.connect()
        await signed_in(watcher, APP, "w", watchlist=["v", "nobody"])
        await pair.one.node.online.counts("1", ["v"])
        assert (await watched(watcher)).keys() == {"online"}

        own_redis.process.kill()
        own_redis.start()

        snapshot = await next_of(user, "goal.snapshot")
        assert json.loads(snapshot["data"])["of"] == "v"
        told = await next_of(watcher, "pusher_internal:watchlist_events", having="offline")
        [online, offline] = json.loads(told["data"])["events"]
        assert online == {"name": "online", "user_ids": ["v"]}
        assert offline == {"name": "offline", "user_ids": ["nobody"]}


async def next_of(client: RawClient, event: str, having: str = "") -> dict[str, Any]:
    """The next event of that name whose data has that text."""
    while True:
        got = await client.event()
        if got["event"] == event and having in got["data"]:
            return got


# Strict


@pytest.mark.pusher("1.3", "strict_protocol: a refused subscription is answered with pusher:error")
async def test_the_strict_form_of_a_refusal_is_an_error_without_code() -> None:
    refusals: list[Callable[[RawClient], None]] = [
        lambda client: client.subscribe("private-c", "app-key:00"),
        lambda client: client.subscribe("private-c"),
        lambda client: client.subscribe("presence-stream@s"),
    ]
    async with running_gateway(settings_for_tests(strict_protocol=True)) as gateway:
        client = await gateway.connect("/app/app-key?protocol=7&token=viewer:v")
        for refuse in refusals:
            refuse(client)
            answer = await client.event()
            assert answer["event"] == "pusher:error"
            assert answer["data"]["code"] is None
            assert "(channel p" in answer["data"]["message"]
        await client.subscribed("c")
