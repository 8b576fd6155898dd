from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio
from structlog.testing import capture_logs

from gateway import redis_webhooks
from gateway.apps import App, Apps, Webhook
from gateway.redis_broker import _PUBLISH_TOLD, RedisBroker
from gateway.redis_link import packed
from gateway.redis_webhooks import HookTiming, RedisWebhooks, Settled
from gateway.telemetry import Telemetry
from gateway.webhook_sender import WebhookSender
from gateway.webhooks import endpoints
from persistence.clock import Clock
from persistence.embedded_redis import RedisServer
from tests.gateway.harness import PATIENCE_S, until, until_yes
from tests.gateway.receiver import Receiver, receiving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from gateway.redis_webhooks import Claim
    from persistence.embedded_process import ServerGuard

TIMING = HookTiming(delay_s=0.05, give_up_s=60, claim_s=5, retry_first_s=0.02, retry_most_s=0.05)
EVERY = ("client_event", "cache_miss", "subscription_count")


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


class Cluster:
    """Nodes that share the queues of some apps."""

    def __init__(self, stack: contextlib.AsyncExitStack, url: str, prefix: str, *apps: App) -> None:
        self._stack = stack
        self._url = url
        self.prefix = prefix
        self.apps = Apps(apps)
        self.app = apps[0]

    async def node(
        self, timing: HookTiming = TIMING, timeout_s: float = 5.0, *, sends: bool = True
    ) -> Node:
        """One more node."""
        broker = RedisBroker(self._url, self.prefix, f"n{secrets.token_hex(3)}", 1.0)
        await broker.start(lambda *_: None, lambda _: None, lambda: None)
        self._stack.push_async_callback(broker.stop)
        webhooks = RedisWebhooks(broker.commands, self.prefix, self.apps.by_id, timing)
        node = Node(
            broker,
            webhooks,
            WebhookSender(webhooks, self.apps, Clock(), telemetry := Telemetry(), timeout_s, 0.01),
        )
        node.telemetry = telemetry
        self._stack.push_async_callback(node.sender.stop)
        if sends:
            node.sender.start()
        return node

    async def queue_lengths(self) -> list[int]:
        async with redis.asyncio.Redis.from_url(self._url) as admin:
            streams = [key async for key in admin.scan_iter(f"{self.prefix}:*", _type="stream")]
            return [await admin.xlen(key) for key in streams]

    async def left(self) -> list[str]:
        """The names that webhooks have left in Redis."""
        async with redis.asyncio.Redis.from_url(self._url) as admin:
            return [str(key) for key in await admin.keys(f"{self.prefix}:*hooks*")]


class Node:
    telemetry: Telemetry

    def __init__(self, broker: RedisBroker, webhooks: RedisWebhooks, sender: WebhookSender) -> None:
        self.broker = broker
        self.webhooks = webhooks
        self.sender = sender

    def count(self, name: str, app_id: str = "1") -> float:
        value = self.telemetry.registry.get_sample_value(f"duet_{name}_total", {"app": app_id})
        return value or 0.0

    def tell(self, app: App, number: int, **more: Any) -> None:
        self.record(
            app, {"name": "subscription_count", "channel": "c", "subscription_count": number} | more
        )

    def record(self, app: App, event: dict[str, Any]) -> None:
        """Records an event beside a publication, as any script does, and does not wait."""
        if hook := self.webhooks.hook(app.id, event["name"]):
            call = _PUBLISH_TOLD.call("nobody", b"", hook, json.dumps(event))
            self.broker.commands.post(call)


def app_with(*hooks: Webhook, app_id: str = "1", **fields: Any) -> App:
    return App(id=app_id, key=f"key-{app_id}", secret=f"secret-{app_id}", webhooks=hooks, **fields)


@contextlib.asynccontextmanager
async def clustered(url: str, *apps: App) -> AsyncIterator[Cluster]:
    async with contextlib.AsyncExitStack() as stack:
        yield Cluster(stack, url, f"test-{secrets.token_hex(6)}", *apps)


@pytest.fixture
async def cluster(redis_url: str, receiver: Receiver) -> AsyncIterator[Cluster]:
    """One app with one endpoint that hears of everything."""
    async with clustered(redis_url, app_with(Webhook(url=receiver.url(), events=EVERY))) as running:
        yield running


def numbers(receiver: Receiver) -> list[int]:
    return [event["subscription_count"] for event in receiver.events()]


@pytest.mark.pusher("2.3", "webhooks are POSTed as exactly application/json, signed over the body")
async def test_a_call_is_signed_with_the_apps_secret(cluster: Cluster, receiver: Receiver) -> None:
    node = await cluster.node()

    node.tell(cluster.app, 1)
    await receiver.until_events(1)

    [told] = receiver.told
    assert told.headers["content-type"] == "application/json"
    assert told.headers["x-pusher-key"] == "key-1"
    digest = hmac.new(b"secret-1", told.body, hashlib.sha256).hexdigest()
    assert told.headers["x-pusher-signature"] == digest
    document = json.loads(told.body)
    assert document["events"] == [
        {"name": "subscription_count", "channel": "c", "subscription_count": 1}
    ]
    assert abs(document["time_ms"] - Clock().now().timestamp() * 1000) < 60_000


@pytest.mark.pusher("2.3", "many events of an endpoint are one POST")
async def test_events_that_wait_are_one_call_in_order(cluster: Cluster, receiver: Receiver) -> None:
    node = await cluster.node()
    receiver.gate = asyncio.Event()
    node.tell(cluster.app, 0)
    await receiver.until(lambda: receiver.waiting)
    for number in range(1, 80):
        node.tell(cluster.app, number)

    gate, receiver.gate = receiver.gate, None
    gate.set()
    await receiver.until_events(80)

    assert numbers(receiver) == list(range(80))
    assert len(receiver.told) == 2


async def test_a_batch_is_bounded(cluster: Cluster, receiver: Receiver) -> None:
    silent = await cluster.node(sends=False)
    for number in range(60):
        silent.tell(cluster.app, number, padding="x" * 10_000)
    for number in range(60, 260):
        silent.tell(cluster.app, number)

    await cluster.node()
    await receiver.until_events(260)

    assert numbers(receiver) == list(range(260))
    assert max(len(told.body) for told in receiver.told) < 300_000
    assert max(len(told.events) for told in receiver.told) == 100


@pytest.mark.pusher("2.3", "each endpoint gets the events that it asks for, and no app another's")
async def test_endpoints_hear_of_what_they_ask_for_and_apps_of_their_own(
    redis_url: str, receiver: Receiver
) -> None:
    one = app_with(
        Webhook(url=receiver.url("/counts"), events=("subscription_count",)),
        Webhook(url=receiver.url("/rest"), events=("client_event",)),
        Webhook(url=receiver.url("/rest"), events=("cache_miss",)),
    )
    two = app_with(Webhook(url=receiver.url("/two"), events=EVERY), app_id="2")
    async with clustered(redis_url, one, two) as cluster:
        node = await cluster.node()
        node.tell(one, 1)
        node.record(one, {"name": "client_event", "channel": "c"})
        node.record(one, {"name": "cache_miss", "channel": "cache-c"})
        node.tell(two, 2)

        await receiver.until_events(4)

    assert receiver.names("/counts") == ["subscription_count"]
    assert receiver.names("/rest") == ["client_event", "cache_miss"]
    assert receiver.events("/two") == [
        {"name": "subscription_count", "channel": "c", "subscription_count": 2}
    ]
    assert {told.headers["x-pusher-key"] for told in receiver.told if told.path == "/two"} == {
        "key-2"
    }


@pytest.mark.pusher("2.3", "an answer other than 2xx is tried again, with backoff")
async def test_what_is_not_taken_is_sent_again_in_order(
    cluster: Cluster, receiver: Receiver
) -> None:
    receiver.answers.extend([500, 302, 404, 429])
    node = await cluster.node()

    node.tell(cluster.app, 1)
    await receiver.until(lambda: len(receiver.told) == 2)
    node.tell(cluster.app, 2)
    await receiver.until_events(2)
    await until(lambda: node.count("webhook_events_sent") == 2)

    assert numbers(receiver) == [1, 2]
    assert [told.status for told in receiver.told] == [500, 302, 404, 429, 200]
    assert node.count("webhook_calls_failed") == 4
    assert node.count("webhook_events_given_up") == 0


async def test_the_waits_between_attempts_double_up_to_a_bound(
    cluster: Cluster, receiver: Receiver
) -> None:
    timing = replace(TIMING, retry_first_s=1.0, retry_most_s=60.0)
    node = await cluster.node(timing, sends=False)
    node.tell(cluster.app, 1)
    waits = []
    async with redis.asyncio.Redis.from_url(cluster._url) as admin:
        key = f"{cluster.prefix}:hooks:due"
        for _ in range(9):
            [claim] = await node.webhooks.claim(10)
            seconds, microseconds = await admin.time()
            assert await node.webhooks.failed(claim) == Settled(0, 0, 0)
            due_ms = await admin.zscore(key, claim.queue) or 0.0
            waits.append(due_ms / 1000 - seconds - microseconds / 1e6)
            await admin.zadd(key, {claim.queue: 0})

    assert [round(wait_s) for wait_s in waits] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert receiver.told == []


async def test_an_endpoint_that_does_not_answer_in_time_is_asked_again(
    cluster: Cluster, receiver: Receiver
) -> None:
    receiver.gate = asyncio.Event()
    node = await cluster.node(timeout_s=0.1)
    node.tell(cluster.app, 1)

    await until(lambda: node.count("webhook_calls_failed") >= 2)
    gate, receiver.gate = receiver.gate, None
    gate.set()
    await until(lambda: node.count("webhook_events_sent") == 1)

    assert set(numbers(receiver)) == {1}


async def test_an_endpoint_that_nobody_listens_at_is_told_when_it_is_back(
    cluster: Cluster, redis_url: str
) -> None:
    async with receiving() as gone:
        url = gone.url()
    app = app_with(Webhook(url=url, events=EVERY))
    async with clustered(redis_url, app) as others:
        node = await others.node()
        node.tell(app, 1)
        await until(lambda: node.count("webhook_calls_failed") >= 2)

        assert await others.queue_lengths() == [1]
        assert node.count("webhook_events_sent") == 0


async def test_a_slow_endpoint_holds_up_no_other(redis_url: str, receiver: Receiver) -> None:
    async with receiving() as other:
        slow = app_with(Webhook(url=receiver.url(), events=EVERY))
        quick = app_with(Webhook(url=other.url(), events=EVERY), app_id="2")
        receiver.gate = asyncio.Event()
        async with clustered(redis_url, slow, quick) as cluster:
            node = await cluster.node()
            node.tell(slow, 1)
            await receiver.until(lambda: receiver.waiting)
            for number in range(3):
                node.tell(quick, number)
                await other.until_events(number + 1)

            assert receiver.told == []
            receiver.gate.set()
            await receiver.until_events(1)


@pytest.mark.pusher("2.3", "an event is given up five minutes after it happened")
async def test_what_is_too_old_is_given_up_when_a_call_with_it_fails(
    cluster: Cluster, receiver: Receiver
) -> None:
    receiver.status = 503
    node = await cluster.node(sends=False)
    node.tell(cluster.app, 1)
    node.tell(cluster.app, 2)
    await until_queued(cluster, 2)
    await make_older(cluster, by_s=TIMING.give_up_s)
    node.sender.start()
    await until(lambda: node.count("webhook_events_given_up") == 2)
    assert node.count("webhook_calls_failed") == 1

    receiver.status = 200
    node.tell(cluster.app, 3)
    await receiver.until_events(1)

    assert numbers(receiver) == [3]
    await until(lambda: node.count("webhook_events_sent") == 1)


async def test_what_does_not_fit_is_counted_and_logged_once_until_the_queue_is_half_empty(
    cluster: Cluster, receiver: Receiver
) -> None:
    node = await cluster.node(sends=False)
    receiver.status = 503
    dropped: list[float] = []
    with capture_logs() as logs:
        for waiting in (0, 9_000, 4_000, 4_000):
            await trim_queue(cluster, waiting)
            # The third call finds room, which ends the first stretch.
            if len(dropped) != 2:
                await overfill(cluster, node, by=300)
            await send_once(node)
            dropped.append(node.count("webhook_events_dropped"))

    # Redis drops whole portions, so a few more than 10,000 may wait.
    one, two, three, four = dropped
    assert 200 <= one <= 300
    assert one < two == three < four
    told = [line["dropped"] for line in logs if line["event"] == "webhook_queue_full"]
    assert told == [one, four - three]


async def test_what_waited_while_no_node_ran_is_tried_however_old_it_is(
    cluster: Cluster, receiver: Receiver
) -> None:
    silent = await cluster.node(sends=False)
    silent.tell(cluster.app, 1)
    await until_queued(cluster, 1)
    await make_older(cluster, by_s=2 * TIMING.give_up_s)

    await cluster.node()
    await receiver.until_events(1)

    assert numbers(receiver) == [1]


@pytest.mark.pusher("2.3", "another node sends what a killed one was sending")
async def test_a_killed_nodes_batch_is_taken_over(cluster: Cluster, receiver: Receiver) -> None:
    timing = replace(TIMING, claim_s=0.3)
    killed = await cluster.node(timing, sends=False)
    killed.tell(cluster.app, 1)
    await until_queued(cluster, 1)
    [claim] = await killed.webhooks.claim(10)
    assert await killed.webhooks.read(claim) is not None

    survivor = await cluster.node(timing)
    await until(lambda: survivor.count("webhook_events_sent") == 1)

    assert numbers(receiver) == [1]


async def test_who_was_away_for_longer_than_its_claim_settles_nothing(
    cluster: Cluster, receiver: Receiver
) -> None:
    timing = replace(TIMING, claim_s=0.05)
    away = await cluster.node(timing, sends=False)
    other = await cluster.node(replace(TIMING, claim_s=60), sends=False)
    away.tell(cluster.app, 1)
    await until_queued(cluster, 1)
    [late] = await away.webhooks.claim(10)
    batch = await away.webhooks.read(late)
    assert batch is not None
    claims: list[Any] = []
    async with asyncio.timeout(PATIENCE_S):
        while not claims:
            claims = await other.webhooks.claim(10)
    away.tell(cluster.app, 2)

    assert not await away.webhooks.sent(late, batch)
    assert await away.webhooks.failed(late) is None

    both = await other.webhooks.read(claims[0])
    assert both is not None
    assert len(both.events) == 2
    assert await other.webhooks.sent(claims[0], both)
    assert await cluster.left() == []


async def test_many_nodes_send_each_event_once_and_in_order(
    cluster: Cluster, receiver: Receiver
) -> None:
    nodes = [await cluster.node() for _ in range(4)]

    for number in range(200):
        nodes[0].tell(cluster.app, number)
        if number % 20 == 0:
            await receiver.until_events(number + 1)
    await receiver.until_events(200)

    assert numbers(receiver) == list(range(200))
    await until(lambda: sum(node.count("webhook_events_sent") for node in nodes) == 200)


async def test_an_endpoint_that_was_taken_out_of_the_apps_is_not_called(
    cluster: Cluster, receiver: Receiver
) -> None:
    node = await cluster.node(sends=False)
    node.tell(cluster.app, 1)
    await until_queued(cluster, 1)
    cluster.apps = Apps([App(id="1", key="key-1", secret="secret-1")])

    without = await cluster.node(sends=False)

    assert await without.webhooks.claim(10) == []
    assert receiver.told == []


async def test_events_whose_endpoint_was_taken_out_are_told_of_and_sent_when_it_is_back(
    cluster: Cluster, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_webhooks, "_ORPHAN_AFTER_S", 0.0)
    with_it, without = cluster.apps, Apps([App(id="1", key="key-1", secret="secret-1")])
    node = await cluster.node(replace(TIMING, claim_s=0.02), sends=False)
    node.tell(cluster.app, 1)
    node.tell(cluster.app, 2)
    await until_queued(cluster, 2)
    cluster.apps.become(without)

    with capture_logs() as logs:
        assert await node.webhooks.claim(10) == []

    [told] = [line for line in logs if line["event"] == "webhooks_without_endpoint"]
    assert (told["app"], told["events"]) == ("1", 2)
    assert 86_000 < told["dropped_in_s"] <= 86_400
    with_it.become(Apps([cluster.app]))
    node.sender.start()
    await receiver.until_events(2)
    assert numbers(receiver) == [1, 2]


def test_a_queue_without_an_endpoint_is_told_of_after_a_while_and_then_seldom() -> None:
    orphans = redis_webhooks.Orphans()

    told = [at for at in range(0, 8_000, 10) if orphans.met(b"q", float(at))]

    assert told == [60, 3_660, 7_260]


def test_a_queue_that_has_found_its_endpoint_is_no_orphan() -> None:
    orphans = redis_webhooks.Orphans()
    assert not orphans.met(b"q", 0.0)

    orphans.found(b"q")

    assert not orphans.met(b"q", 60.0)


class WatchedApps(Apps):
    """Counts how often somebody has gone through them."""

    asked = 0

    def __iter__(self) -> Iterator[App]:
        self.asked += 1
        return super().__iter__()


class WatchedWebhooks(RedisWebhooks):
    """Counts the looks."""

    looks = 0

    async def claim(self, most: int) -> list[Claim]:
        self.looks += 1
        return await super().claim(most)


async def test_redis_is_left_alone_until_an_app_has_an_endpoint(
    cluster: Cluster, receiver: Receiver
) -> None:
    apps = WatchedApps([App(id="1", key="key-1", secret="secret-1")])
    node = await cluster.node(sends=False)
    webhooks = WatchedWebhooks(node.broker.commands, cluster.prefix, apps.by_id, TIMING)
    sender = WebhookSender(webhooks, apps, Clock(), Telemetry(), 5.0, 0.001)
    sender.start()
    await until(lambda: apps.asked >= 20)
    assert webhooks.looks == 1

    # As when the apps file is read again.
    apps.become(Apps([cluster.app]))
    node.tell(cluster.app, 1)
    await receiver.until_events(1)

    assert numbers(receiver) == [1]
    await sender.stop()


async def test_a_stopping_node_ends_the_calls_under_way(
    cluster: Cluster, receiver: Receiver
) -> None:
    receiver.gate = asyncio.Event()
    node = await cluster.node()
    node.tell(cluster.app, 1)
    await receiver.until(lambda: receiver.waiting)

    stopping = asyncio.create_task(node.sender.stop())
    receiver.gate.set()
    await stopping

    assert numbers(receiver) == [1]
    assert node.count("webhook_events_sent") == 1
    assert await cluster.left() == []


@pytest.mark.pusher("2.3", "what is recorded survives a kill of Redis that keeps its data")
async def test_a_redis_that_keeps_its_data_is_killed_and_nothing_is_lost(
    server_guard: ServerGuard, redis_url: str, receiver: Receiver, tmp_path: Path
) -> None:
    name = f"redis-{secrets.token_hex(3)}"
    server = RedisServer(server_guard, name=name, data_directory=tmp_path).start()
    app = app_with(Webhook(url=receiver.url(), events=EVERY))
    async with clustered(server.url, app) as cluster:
        node = await cluster.node(sends=False)
        for number in range(3):
            node.tell(app, number)
        await until_queued(cluster, 3)

        server.process.kill()
        server.start()
        await cluster.node()
        await receiver.until_events(3)

    server.process.stop()
    assert numbers(receiver) == [0, 1, 2]


async def make_older(cluster: Cluster, by_s: float) -> None:
    """Lets every queued event have happened so much earlier: its age is in its entry's id."""
    admin: Any
    async with redis.asyncio.Redis.from_url(cluster._url, decode_responses=True) as admin:
        async for queue in admin.scan_iter(f"{cluster.prefix}:*", _type="stream"):
            entries = await admin.xrange(queue)
            await admin.delete(queue)
            for entry_id, fields in entries:
                at_ms, _, number = entry_id.partition("-")
                await admin.xadd(queue, fields, id=f"{int(at_ms) - int(by_s * 1000)}-{number}")


async def send_once(node: Node) -> None:
    """Makes one call to the only endpoint, as soon as it may be called."""
    claims: list[Any] = []
    async with asyncio.timeout(PATIENCE_S):
        while not claims:
            claims = await node.webhooks.claim(10)
    await node.sender._send(claims[0])


async def trim_queue(cluster: Cluster, length: int) -> None:
    """Leaves so many events in the only queue, the newest."""
    async with redis.asyncio.Redis.from_url(cluster._url) as admin:
        async for queue in admin.scan_iter(f"{cluster.prefix}:*", _type="stream"):
            await admin.xtrim(queue, maxlen=length, approximate=False)


async def overfill(cluster: Cluster, node: Node, by: int) -> None:
    """Records so many events more than fit into the only queue."""
    [endpoint] = endpoints(cluster.app)
    queue = f"{cluster.prefix}:1:hooks:{endpoint.digest}"
    async with redis.asyncio.Redis.from_url(cluster._url) as admin:
        missing = 10_000 - await admin.xlen(queue)
        async with admin.pipeline(transaction=False) as pipeline:
            for _ in range(missing):
                pipeline.xadd(queue, {"e": "{}"})
            await pipeline.execute()
        for number in range(by):
            node.tell(cluster.app, number)
        # The link's commands are done in order, so the last one's effect is everyone's.
        await node.broker.commands.run(packed("PING"))


async def until_queued(cluster: Cluster, count: int) -> None:
    """Waits until as many events are in the queues."""

    async def are_queued() -> bool:
        return sum(await cluster.queue_lengths()) >= count

    await until_yes(are_queued)
