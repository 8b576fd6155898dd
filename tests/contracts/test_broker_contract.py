"""What every broker promises, over memory and over Redis; then what Redis alone can go through."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import secrets
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from gateway.broker import BrokerUnavailable, MemoryBroker, MemoryBus, Publication
from gateway.redis_broker import HEARTBEAT_MAX_S, RedisBroker
from gateway.redis_link import packed
from gateway.redis_recovery import Position, Recovery
from persistence.embedded_process import free_port
from persistence.embedded_redis import RedisServer, redis_server_path
from tests.conftest import require
from tests.gateway.harness import Recorder, until, until_accepted
from tests.lifeline import Lifeline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from redis.asyncio import Redis

    from gateway.broker import Broker
    from persistence.embedded_process import ServerGuard


@dataclass
class Listener(Recorder):
    """What one node's broker has brought it."""

    broker: Broker
    publications: list[tuple[str, str, bytes, str | None]] = field(default_factory=list)
    controls: list[bytes] = field(default_factory=list)
    gaps: int = 0

    async def start(self) -> None:
        """Starts the broker with this listener's callbacks."""
        await self.broker.start(self._publication, self._control, self._gap)

    def _publication(self, app_id: str, channel: str, body: bytes, excluded: str | None) -> None:
        self.publications.append((app_id, channel, body, excluded))
        self.changed.set()

    def _control(self, body: bytes) -> None:
        self.controls.append(body)
        self.changed.set()

    def _gap(self) -> None:
        self.gaps += 1
        self.changed.set()

    async def got(self, count: int) -> list[bytes]:
        """The first `count` bodies, once they are there."""
        await self.until(lambda: len(self.publications) >= count)
        return [body for _, _, body, _ in self.publications]


@contextlib.asynccontextmanager
async def redis_brokers(url: str, timeout_s: float = 1.0) -> AsyncIterator[Callable[..., Listener]]:
    """Makes brokers of one installation and stops them; one may reach Redis by another URL."""
    prefix = f"test-{secrets.token_hex(6)}"
    made: list[Listener] = []

    def make(url: str = url) -> Listener:
        broker = RedisBroker(url, prefix, f"node{len(made)}", timeout_s)
        made.append(Listener(broker))
        return made[-1]

    try:
        yield make
    finally:
        for listener in made:
            await listener.broker.stop()


@pytest.fixture(params=["memory", "redis"])
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[], Awaitable[Listener]]]:
    """Starts nodes that share a broker."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "memory":
            bus = MemoryBus()

            def make() -> Listener:
                return Listener(MemoryBroker(bus))
        else:
            url = request.getfixturevalue("redis_url")
            make = await stack.enter_async_context(redis_brokers(url))

        async def start() -> Listener:
            listener = make()
            await listener.start()
            stack.push_async_callback(listener.broker.stop)
            return listener

        yield start


async def test_a_publication_reaches_every_subscribed_node_and_no_other(
    nodes: Callable[[], Awaitable[Listener]],
) -> None:
    one, two, other = await nodes(), await nodes(), await nodes()
    for node in (one, two):
        await node.broker.subscribe("1", "c")
    await other.broker.subscribe("1", "d")

    await one.broker.publish([Publication("1", "c", b'{"a":1}', "1.2")])
    await one.broker.publish([Publication("1", "d", b"{}")])

    await other.got(1)
    for node in (one, two):
        assert await node.got(1) == [b'{"a":1}']
        assert node.publications == [("1", "c", b'{"a":1}', "1.2")]
    assert other.publications == [("1", "d", b"{}", None)]


async def test_apps_do_not_hear_each_other(nodes: Callable[[], Awaitable[Listener]]) -> None:
    node = await nodes()
    await node.broker.subscribe("1", "c")
    await node.broker.subscribe("2", "c")

    await node.broker.publish([Publication("2", "c", b"two"), Publication("1", "c", b"one")])

    await node.got(2)
    assert [(app, body) for app, _, body, _ in node.publications] == [("2", b"two"), ("1", b"one")]


async def test_publications_of_a_channel_arrive_in_order_however_they_were_sent(
    nodes: Callable[[], Awaitable[Listener]],
) -> None:
    node, other = await nodes(), await nodes()
    await other.broker.subscribe("1", "c")
    bodies = [str(number).encode() for number in range(500)]

    for start in range(0, 500, 50):
        batch = [Publication("1", "c", body) for body in bodies[start : start + 50]]
        await node.broker.publish(batch)

    assert await other.got(500) == bodies


async def test_the_body_is_carried_byte_for_byte(nodes: Callable[[], Awaitable[Listener]]) -> None:
    node = await nodes()
    await node.broker.subscribe("1", "c")
    body = bytes(range(256)) * 300

    await node.broker.publish([Publication("1", "c", body, "123.456")])

    assert await node.got(1) == [body]


async def test_nothing_arrives_after_unsubscribe_and_one_may_come_back(
    nodes: Callable[[], Awaitable[Listener]],
) -> None:
    node = await nodes()
    await node.broker.subscribe("1", "c")
    await node.broker.subscribe("1", "marker")
    await node.broker.unsubscribe("1", "c")
    await node.broker.publish([Publication("1", "c", b"missed")])
    await node.broker.subscribe("1", "c")
    await node.broker.publish([Publication("1", "c", b"heard")])
    await node.broker.publish([Publication("1", "marker", b"end")])

    assert await node.got(2) == [b"heard", b"end"]


async def test_subscribing_twice_and_unsubscribing_the_unknown_change_nothing(
    nodes: Callable[[], Awaitable[Listener]],
) -> None:
    node = await nodes()
    await node.broker.unsubscribe("1", "c")
    await node.broker.subscribe("1", "c")
    await node.broker.subscribe("1", "c")

    await node.broker.publish([Publication("1", "c", b"x")])
    await node.broker.publish([Publication("1", "c", b"y")])

    assert await node.got(2) == [b"x", b"y"]


async def test_what_is_recoverable_is_a_publication_like_any_other(
    nodes: Callable[[], Awaitable[Listener]],
) -> None:
    one, two, other = await nodes(), await nodes(), await nodes()
    for node in (one, two):
        await node.broker.subscribe("1", "c")
    await other.broker.subscribe("1", "d")
    body = bytes(range(256))

    await one.broker.publish([Publication("1", "c", b"first")])
    await one.broker.publish_recoverable(
        [Publication("1", "c", body), Publication("1", "d", b"{}"), Publication("1", "c", b"-")]
    )
    await one.broker.publish([Publication("1", "c", b"last", "1.2")])

    await other.got(1)
    for node in (one, two):
        assert await node.got(4) == [b"first", body, b"-", b"last"]
        assert [excluded for *_, excluded in node.publications] == [None, None, None, "1.2"]
    assert other.publications == [("1", "d", b"{}", None)]


async def test_a_control_message_reaches_every_node_its_sender_included(
    nodes: Callable[[], Awaitable[Listener]],
) -> None:
    one, two = await nodes(), await nodes()

    await one.broker.publish_control(b"drop")

    await one.until(lambda: one.controls == [b"drop"])
    await two.until(lambda: two.controls == [b"drop"])


async def test_a_started_broker_is_alive_and_a_stopped_one_refuses(
    nodes: Callable[[], Awaitable[Listener]],
) -> None:
    node = await nodes()
    was_alive = node.broker.alive

    await node.broker.stop()

    assert (was_alive, node.broker.alive) == (True, False)
    with pytest.raises(BrokerUnavailable):
        await node.broker.publish([Publication("1", "c", b"x")])


async def test_thousands_of_channels_subscribed_at_once_are_all_heard(
    nodes: Callable[[], Awaitable[Listener]],
) -> None:
    node = await nodes()
    names = [f"c{number}" for number in range(2_000)]
    await asyncio.gather(*(node.broker.subscribe("1", name) for name in names))

    await node.broker.publish([Publication("1", name, name.encode()) for name in names])

    assert await node.got(2_000) == [name.encode() for name in names]


# Redis alone


async def test_a_password_and_a_database_in_the_url_are_used(
    server_guard: ServerGuard, redis_url: str
) -> None:
    name = f"redis-{secrets.token_hex(3)}"
    server = RedisServer(server_guard, name=name, config={"requirepass": "se/cret"}).start()
    try:
        async with redis_brokers(_with_password(server, "se%2Fcret")) as make:
            node = make()
            await node.start()
            await node.broker.subscribe("1", "c")
            await node.broker.publish([Publication("1", "c", b"x")])
            assert await node.got(1) == [b"x"]
        async with redis_brokers(_with_password(server, "wrong"), timeout_s=0.2) as make:
            node = make()
            await node.start()
            assert not node.broker.alive
            with pytest.raises(BrokerUnavailable):
                await node.broker.subscribe("1", "c")
    finally:
        server.process.stop()


async def test_tls_is_spoken_and_the_servers_certificate_checked(
    server_guard: ServerGuard, redis_url: str, tmp_path: Path
) -> None:
    program = redis_server_path()
    require(program and _speaks_tls(program), "this redis-server is built without TLS")
    certificate, key = _self_signed(tmp_path)
    port = free_port()
    server = RedisServer(
        server_guard,
        name=f"redis-{secrets.token_hex(3)}",
        config={
            "tls-port": str(port),
            "tls-cert-file": str(certificate),
            "tls-key-file": str(key),
            "tls-ca-cert-file": str(certificate),
            "tls-auth-clients": "no",
        },
    ).start()
    try:
        url = f"rediss://127.0.0.1:{port}"
        async with redis_brokers(f"{url}?ssl_ca_certs={certificate}") as make:
            node = make()
            await node.start()
            await node.broker.subscribe("1", "c")
            await node.broker.publish([Publication("1", "c", b"x")])
            assert await node.got(1) == [b"x"]
        async with redis_brokers(url, timeout_s=0.5) as make:
            node = make()
            await node.start()
            assert not node.broker.alive
    finally:
        server.process.stop()


def _speaks_tls(program: Path) -> bool:
    """Whether the server knows a directive that only builds with TLS know."""
    probe = [str(program), "--tls-port", "0", "--port", "0", "--unixsocket", "/nonexistent/x"]
    output = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=10)
    return "bad directive" not in (output.stdout + output.stderr).lower()


def _self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, valid for a day, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "duet test")])
    now = dt.datetime.now(dt.UTC)
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(hosts, critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = folder / "redis.crt", folder / "redis.key"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_path, key_path


async def test_a_lost_connection_is_made_again_with_every_subscription_and_a_gap(
    redis_url: str,
) -> None:
    async with redis_brokers(redis_url) as make, redis.asyncio.Redis.from_url(redis_url) as admin:
        node, other = make(), make()
        await node.start()
        await other.start()
        for name in ("a", "b"):
            await node.broker.subscribe("1", name)
        assert node.gaps == 0

        await admin.client_kill_filter(_type="pubsub")
        await admin.client_kill_filter(_type="normal", skipme=True)
        await node.until(lambda: node.gaps == 1)
        await other.until(lambda: other.gaps == 1)
        await until_accepted(
            lambda: other.broker.publish([Publication("1", n, n.encode()) for n in ("a", "b")])
        )

        assert (await node.got(2))[-2:] == [b"a", b"b"]
        await node.broker.subscribe("1", "new")


@contextlib.asynccontextmanager
async def cut_off(redis_url: str) -> AsyncIterator[tuple[Listener, Listener, Lifeline, Redis]]:
    """A node whose line to Redis can be cut, and one whose line can't; "a" and "b" are heard."""
    async with (
        Lifeline(redis_url) as line,
        redis_brokers(redis_url) as make,
        redis.asyncio.Redis.from_url(redis_url) as admin,
    ):
        node, other = make(line.url), make()
        for listener in (node, other):
            await listener.start()
        for channel in ("a", "b"):
            await node.broker.subscribe("1", channel)
        yield node, other, line, admin


def recoverable(*bodies: str) -> list[Publication]:
    """Publications; the channel is a body's first letter."""
    return [Publication("1", body[0], body.encode()) for body in bodies]


def whole(listener: Listener) -> bool:
    assert isinstance(listener.broker, RedisBroker)
    return listener.broker._whole


def recovery(listener: Listener) -> Recovery:
    assert isinstance(listener.broker, RedisBroker)
    return listener.broker._recovery


async def entries(admin: Redis, listener: Listener) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The last entry that is kept."""
    found: Any = await admin.xrevrange(recovery(listener)._key, count=1)
    return list(found)


async def test_a_node_that_was_cut_off_is_told_what_was_recoverable_once_and_in_order(
    redis_url: str,
) -> None:
    async with cut_off(redis_url) as (node, other, line, _):
        await other.broker.publish_recoverable(recoverable("a1", "c2", "b3"))
        await node.got(2)

        line.cut()
        await until(lambda: not node.broker.alive)
        await other.broker.publish_recoverable(recoverable("a4", "c5"))
        await other.broker.publish([Publication("1", "a", b"not recoverable")])
        await other.broker.publish_recoverable(recoverable("b6"))
        line.mend()
        await node.until(lambda: node.gaps == 1)

        assert await node.got(4) == [b"a1", b"b3", b"a4", b"b6"]
        await other.broker.publish_recoverable(recoverable("a7"))
        assert await node.got(5) == [b"a1", b"b3", b"a4", b"b6", b"a7"]


async def test_what_comes_live_while_a_node_catches_up_comes_behind_what_it_missed(
    redis_url: str,
) -> None:
    async with cut_off(redis_url) as (node, other, line, _):
        numbers = iter(range(10_000))

        async def some(count: int) -> None:
            batch = [f"a{next(numbers)}" for _ in range(count)]
            await other.broker.publish_recoverable(recoverable(*batch))

        await some(1)
        await node.got(1)
        line.cut()
        await until(lambda: not node.broker.alive)
        for _ in range(10):
            await some(200)
        line.mend()
        while not node.gaps:
            await some(3)
        await some(1)

        total = next(numbers)
        assert await node.got(total) == [f"a{number}".encode() for number in range(total)]
        assert len(node.publications) == total


async def test_what_was_published_before_a_node_listened_is_not_told_to_it_at_a_gap(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has heard nothing itself: its heartbeats tell it how far the others had come."""
    monkeypatch.setattr("gateway.redis_broker.HEARTBEAT_EVERY_S", 0.02)
    async with cut_off(redis_url) as (node, other, line, admin):
        await other.broker.publish_recoverable(recoverable("c1", "c2"))
        [(last, _)] = await entries(admin, node)
        await until(lambda: recovery(node)._position == Position.of(last))
        await node.broker.subscribe("1", "c")

        line.cut()
        await until(lambda: not node.broker.alive)
        await other.broker.publish_recoverable(recoverable("c3"))
        line.mend()
        await node.until(lambda: node.gaps == 1)

        assert node.publications == [("1", "c", b"c3", None)]


async def test_a_stream_that_began_anew_with_an_older_clock_is_told_from_its_beginning(
    redis_url: str,
) -> None:
    async with cut_off(redis_url) as (node, other, line, admin):
        await other.broker.publish_recoverable(recoverable("a1"))
        await node.got(1)

        line.cut()
        await until(lambda: not node.broker.alive)
        key = recovery(node)._key
        [(_, fields)] = await entries(admin, node)
        await admin.delete(key)
        await admin.xadd(key, dict.fromkeys(fields, "a2"), id="5-1")
        line.mend()
        await node.until(lambda: node.gaps == 1)

        assert await node.got(2) == [b"a1", b"a2"]


async def test_of_what_is_recoverable_the_last_is_kept_and_not_for_ever(redis_url: str) -> None:
    async with cut_off(redis_url) as (node, other, _, admin):
        for _ in range(44):
            await other.broker.publish_recoverable(recoverable(*["c"] * 500))

        assert 20_000 <= await admin.xlen(recovery(node)._key) < 21_000
        assert 590_000 < await admin.pttl(recovery(node)._key) <= 600_000


@pytest.mark.parametrize(("batches", "lost"), [(30, False), (46, True)])
async def test_a_gap_in_which_more_was_told_than_is_kept_is_told_of(
    redis_url: str, batches: int, lost: bool
) -> None:
    async with cut_off(redis_url) as (node, other, line, _):
        await other.broker.publish_recoverable(recoverable("a1"))
        await node.got(1)

        line.cut()
        await until(lambda: not node.broker.alive)
        for _ in range(batches):
            await other.broker.publish_recoverable(recoverable(*["c"] * 500))
        await other.broker.publish_recoverable(recoverable("a2"))
        with capture_logs() as logs:
            line.mend()
            await node.until(lambda: node.gaps == 1)

        assert await node.got(2) == [b"a1", b"a2"]
        assert ("broker_gap_not_filled" in [each["event"] for each in logs]) is lost


async def test_a_redis_that_can_keep_nothing_still_carries_what_is_recoverable(
    own_redis: RedisServer,
) -> None:
    async with cut_off(own_redis.url) as (node, other, _, admin):
        await admin.config_set("maxmemory", 1000)

        await other.broker.publish_recoverable(recoverable("a1", "a2"))

        assert await node.got(2) == [b"a1", b"a2"]


async def test_without_its_link_for_commands_a_broker_is_not_alive(redis_url: str) -> None:
    async with redis_brokers(redis_url) as make, redis.asyncio.Redis.from_url(redis_url) as admin:
        node = make()
        await node.start()
        assert node.broker.alive

        # The link that listens stays, and is all that the heartbeat was last heard on.
        await admin.client_kill_filter(_type="normal", skipme=True)

        await until(lambda: not node.broker.alive)
        await until(lambda: node.broker.alive)
        assert node.gaps == 0


async def test_a_redis_that_confirms_and_carries_nothing_is_no_broker(
    own_redis: RedisServer,
) -> None:
    async with cut_off(own_redis.url) as (node, _, _, admin):
        await admin.client_pause(60_000, all=False)
        await admin.client_kill_filter(_type="pubsub")
        await until(lambda: not whole(node))
        await until(lambda: whole(node))

        assert (node.broker.alive, node.gaps) == (False, 0)
        await admin.client_unpause()
        await node.until(lambda: node.gaps == 1)
        assert node.broker.alive


async def test_a_link_that_listens_outlives_the_other_one(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing can be sent, nothing comes round; what others send is heard all the same."""
    monkeypatch.setattr("gateway.redis_broker.HEARTBEAT_EVERY_S", 0.01)
    async with cut_off(own_redis.url) as (node, _, _, admin):
        assert isinstance(node.broker, RedisBroker)
        link = node.broker._supervisor.link
        await admin.config_set("requirepass", "changed while running")
        await admin.client_kill_filter(_type="normal", skipme=True)
        await until(lambda: not node.broker.alive)

        # Ten heartbeats; three that are not heard would end it.
        heard = asyncio.get_running_loop().time() + 0.1
        await until(lambda: asyncio.get_running_loop().time() > heard)
        await admin.config_set("requirepass", "")
        await until(lambda: node.broker.alive)

        assert node.broker._supervisor.link is link
        assert node.gaps == 0


async def test_a_restarted_redis_is_found_again(own_redis: RedisServer) -> None:
    async with redis_brokers(own_redis.url, timeout_s=0.3) as make:
        node = make()
        await node.start()
        await node.broker.subscribe("1", "c")
        own_redis.process.kill()
        await until(lambda: not node.broker.alive)
        with pytest.raises(BrokerUnavailable):
            await node.broker.publish([Publication("1", "c", b"x")])
        with pytest.raises(BrokerUnavailable):
            await node.broker.subscribe("1", "d")

        own_redis.start()
        await node.until(lambda: node.gaps == 1)
        node.publications.clear()
        await until_accepted(
            lambda: node.broker.publish(
                [Publication("1", "c", b"back"), Publication("1", "d", b"no")]
            )
        )

        assert await node.got(1) == [b"back"]
        assert node.broker.alive


async def any_write(broker: RedisBroker) -> str:
    """Such as the renewal of the lease."""
    return str((await broker.commands.run(packed("SET", "a", "b")))[0])


async def a_recoverable_publication(broker: RedisBroker) -> str:
    with pytest.raises(BrokerUnavailable) as refused:
        await broker.publish_recoverable([Publication("1", "c", b"lost")])
    return str(refused.value)


@pytest.mark.parametrize("telling", [any_write, a_recoverable_publication])
async def test_a_redis_that_became_a_replica_is_left_until_it_is_none(
    own_redis: RedisServer, telling: Callable[[RedisBroker], Awaitable[str]]
) -> None:
    """What is published at a replica, those at the new primary never hear."""
    async with (
        redis_brokers(own_redis.url) as make,
        redis.asyncio.Redis.from_url(own_redis.url) as admin,
    ):
        node = make()
        await node.start()
        await node.broker.subscribe("1", "c")
        await admin.replicaof("127.0.0.1", "1")

        assert isinstance(node.broker, RedisBroker)
        refused = await telling(node.broker)
        await until(lambda: not node.broker.alive)
        with pytest.raises(BrokerUnavailable):
            await node.broker.publish([Publication("1", "c", b"x")])
        newcomer = make()
        await newcomer.start()
        assert not newcomer.broker.alive
        await admin.replicaof("NO", "ONE")
        await node.until(lambda: node.gaps == 1)
        await until_accepted(lambda: node.broker.publish([Publication("1", "c", b"back")]))

        assert "READONLY" in refused
        assert await node.got(1) == [b"back"]


async def test_a_node_that_starts_before_redis_works_once_redis_is_there(
    own_redis: RedisServer,
) -> None:
    own_redis.process.stop()
    async with redis_brokers(own_redis.url, timeout_s=0.3) as make:
        node = make()
        await node.start()
        assert not node.broker.alive

        own_redis.start()
        await until(lambda: node.broker.alive)
        await node.broker.subscribe("1", "c")
        await node.broker.publish([Publication("1", "c", b"x")])

        assert await node.got(1) == [b"x"]
        assert node.gaps == 0


async def test_a_frozen_redis_blocks_nobody_and_is_noticed_and_left(
    own_redis: RedisServer,
) -> None:
    async with redis_brokers(own_redis.url, timeout_s=0.3) as make:
        node = make()
        await node.start()
        await node.broker.subscribe("1", "c")
        loop = asyncio.get_running_loop()

        own_redis.process.pause()
        frozen_at = loop.time()
        with pytest.raises(BrokerUnavailable):
            await node.broker.publish([Publication("1", "c", b"x")])
        with pytest.raises(BrokerUnavailable):
            await node.broker.subscribe("1", "d")
        assert loop.time() - frozen_at < 2.0
        await until(lambda: not node.broker.alive)
        assert loop.time() - frozen_at < HEARTBEAT_MAX_S + 0.5

        own_redis.process.resume()
        await node.until(lambda: node.gaps == 1)
        node.publications.clear()
        await until_accepted(lambda: node.broker.publish([Publication("1", "c", b"back")]))
        assert (await node.got(1))[-1] == b"back"


async def test_who_stood_still_himself_does_not_leave_a_redis_that_goes_on(
    redis_url: str,
) -> None:
    """What it has said meanwhile waits to be read."""
    async with redis_brokers(redis_url) as make:
        node = make()
        await node.start()
        broker = node.broker
        assert isinstance(broker, RedisBroker)
        link = broker._supervisor.link

        broker._heard_at -= 2 * HEARTBEAT_MAX_S
        assert not broker.alive
        await until(lambda: broker.alive)

        assert broker._supervisor.link is link
        assert node.gaps == 0


async def test_a_link_whose_commands_are_done_but_never_answered_is_left(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat goes out over this link, and comes back over the other one."""
    monkeypatch.setattr("gateway.redis_commands._SILENT_MOST_S", 0.3)
    async with redis_brokers(redis_url, timeout_s=0.3) as make:
        node = make()
        await node.start()
        await node.broker.subscribe("1", "c")
        assert isinstance(node.broker, RedisBroker)
        commands = node.broker.commands
        silent = commands._supervisor.link

        commands.post(packed("CLIENT", "REPLY", "OFF"))
        with pytest.raises(BrokerUnavailable):
            await node.broker.publish([Publication("1", "c", b"carried")])
        await until(lambda: commands._supervisor.link not in {silent, None})
        await until_accepted(lambda: node.broker.publish([Publication("1", "c", b"answered")]))

        assert await node.got(2) == [b"carried", b"answered"]
        assert node.gaps == 0


async def test_publications_of_one_turn_leave_in_one_write(redis_url: str) -> None:
    async with redis_brokers(redis_url) as make:
        node = make()
        await node.start()
        await node.broker.subscribe("1", "c")
        link = node.broker.commands._supervisor.link  # type: ignore[attr-defined]
        writes: list[bytes] = []
        write = link._transport.write

        class Counting:
            """Counts what is handed to the transport."""

            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

            def write(self, data: bytes) -> None:
                writes.append(data)
                write(data)

        transport, link._transport = link._transport, Counting()
        await asyncio.gather(
            *(node.broker.publish([Publication("1", "c", str(n).encode())]) for n in range(50))
        )
        link._transport = transport

        assert len([data for data in writes if b"PUBLISH" in data]) == 1
        assert await node.got(50) == [str(n).encode() for n in range(50)]


def _with_password(server: RedisServer, password: str) -> str:
    if server.socket_path is not None:
        return f"unix://:{password}@{server.socket_path}?db=3"
    return f"redis://:{password}@127.0.0.1:{server.port}/3"
