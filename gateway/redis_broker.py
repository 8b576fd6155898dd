"""The broker over Redis pub/sub.

Two links: one that listens, one for commands (publishing, presence). Names in Redis, behind the
prefix: `{prefix}:{app}:c:{channel}` for publications, `{prefix}:control` for what nodes tell all
nodes, `{prefix}:node:{node}` for the heartbeat and fences.

A publication travels as version byte, length of the excluded socket id, that id, the JSON body.

Redis tells nobody that it has stopped answering: a frozen server keeps its connections. So the
node publishes to itself every second; if none of the last few has come back, both links are torn
down and made anew. After a reconnect everything wanted is subscribed again. When the last
confirmation is in, what was published in between is told by `gateway.redis_recovery` where it is
recoverable, and lost where it is not; then `on_gap` is called. Until the confirmation publishing is
refused, because this node itself would miss it.

Source: docs/decisions.md (measured), docs/architecture.md.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import structlog

from gateway.backoff import Backoff
from gateway.broker import BrokerUnavailable
from gateway.channels import is_cache_channel
from gateway.redis_commands import RedisCommands, Script
from gateway.redis_link import RedisAddress, Supervisor, packed
from gateway.redis_recovery import Recovery
from gateway.tasks import Tasks
from gateway.webhooks import BEHIND

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.broker import OnControl, OnGap, OnPublication, Publication
    from gateway.redis_link import Answer, RedisLink

log = structlog.get_logger(__name__)

HEARTBEAT_EVERY_S: Final = 1.0
HEARTBEAT_MAX_S: Final = 5.0
# Few enough that a server which froze right after a beat is left within the limit.
_UNHEARD_BEATS_MAX: Final = 3
_VERSION: Final = 1
# Before a node that could publish nothing behind a new link tries again.
_FENCE_AGAIN_LEAST_S: Final = 0.05
# How long a cache channel's last event is kept unless the settings say otherwise.
CACHE_TTL_S: Final = 1800.0
_CACHE_PUBLISH: Final = Script.load("cache_publish", 2)
_PUBLISH_TOLD: Final = Script.load("publish_told", 0, BEHIND)
# Names in one SUBSCRIBE: Redis answers each, so one command of 100,000 would block it for long.
_SUBSCRIBE_AT_ONCE: Final = 500


class RedisBroker:
    """See `gateway.broker` for what it promises.

    Attributes:
        commands: The command link; presence runs its scripts over it.
        cache_ttl_ms: How long the last event of a cache channel is kept.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        node_id: str,
        timeout_s: float,
        cache_ttl_s: float = CACHE_TTL_S,
    ) -> None:
        address = RedisAddress.of(url)
        self._prefix = prefix
        self.cache_ttl_ms = max(1, int(cache_ttl_s * 1000))
        self._timeout_s = timeout_s
        self._control = f"{prefix}:control".encode()
        self._own = f"{prefix}:node:{node_id}".encode()
        self._tasks = Tasks()
        self.commands = RedisCommands(address, timeout_s)
        self.commands.use_scripts(_CACHE_PUBLISH, _PUBLISH_TOLD)
        self._recovery = Recovery(self.commands, prefix, self._on_recoverable)
        self._catching_up: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(
            address, "subscriptions", timeout_s, self._on_answer, self._on_up, self._on_down
        )
        self.commands.when_demoted(self._supervisor.abort)
        # Redis name -> (app id, channel), for what this node wants to hear.
        self._wanted: dict[bytes, tuple[str, str]] = {}
        # Name -> SUBSCRIBEs of this link whose confirmation is still to come. A count, because
        # subscribe, unsubscribe, subscribe in a row is confirmed twice and true the second time.
        self._unconfirmed: dict[bytes, int] = {}
        self._waiters: dict[bytes, asyncio.Future[None]] = {}
        # Fences that this node has sent to itself and that have not come round.
        self._fences: dict[bytes, asyncio.Future[None]] = {}
        self._fence_count = 0
        # False from the loss of the link until everything wanted is confirmed again.
        self._whole = False
        self._was_whole = False
        self._heard_at = float("-inf")
        # Sent since then.
        self._unheard_beats = 0

    # Life

    async def start(
        self, on_publication: OnPublication, on_control: OnControl, on_gap: OnGap
    ) -> None:
        """Tries to connect once before it returns; goes on trying if that failed."""
        self._on_publication = on_publication
        self._on_control = on_control
        self._on_gap = on_gap
        self._loop = asyncio.get_running_loop()
        self._became_whole = asyncio.Event()
        self._tasks.spawn(self._supervisor.run(), "redis_subscriptions")
        await self.commands.start(self._tasks)
        await self._supervisor.first_try.wait()
        if self._supervisor.link is not None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._became_whole.wait()
                    await self.fence()
            except (TimeoutError, BrokerUnavailable):
                log.warning("redis_slow_to_subscribe")
        self._tasks.spawn(self._beat(), "redis_heartbeat")

    async def stop(self) -> None:
        """Ends both links."""
        await self._tasks.stop()

    @property
    def alive(self) -> bool:
        """Whether both links stand and Redis carried a heartbeat within `HEARTBEAT_MAX_S`."""
        # A broker that was never started is not whole, and has no loop to ask.
        return (
            self._whole
            and self.commands.connected
            and self._loop.time() - self._heard_at < HEARTBEAT_MAX_S
        )

    async def _beat(self) -> None:
        """Publishes to this node's own channel; tears down links that have gone silent."""
        while True:
            self._give_up_if_silent()
            if self.commands.connected:
                self.commands.post(packed("PUBLISH", self._own, b"@" + self._recovery.latest))
                self._unheard_beats += 1
                self._recovery.look()
            await asyncio.sleep(HEARTBEAT_EVERY_S)

    def _give_up_if_silent(self) -> None:
        # Beats and not seconds: when it was this process that stood still, what Redis has said
        # meanwhile lies here unread, and would be lost with the link.
        if self._whole and self._unheard_beats >= _UNHEARD_BEATS_MAX:
            log.error("redis_silent", unheard_beats=self._unheard_beats)
            self._supervisor.abort()
            self.commands.abort()

    # Subscriptions

    async def subscribe(self, app_id: str, channel: str) -> None:
        """See `Broker`."""
        name = redis_name(self._prefix, app_id, channel)
        if name in self._wanted and name not in self._unconfirmed and self._whole:
            return
        self._wanted[name] = (app_id, channel)
        waiter = self._waiters.get(name)
        if waiter is None:
            waiter = self._waiters[name] = self._loop.create_future()
        if self._supervisor.link is not None:
            self._unconfirmed[name] = self._unconfirmed.get(name, 0) + 1
            self._supervisor.link.send(packed("SUBSCRIBE", name))
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(waiter)
        except TimeoutError:
            self._waiters.pop(name, None)
            await self.unsubscribe(app_id, channel)
            raise BrokerUnavailable("Redis did not confirm a subscription") from None

    async def unsubscribe(self, app_id: str, channel: str) -> None:
        """See `Broker`."""
        name = redis_name(self._prefix, app_id, channel)
        if self._wanted.pop(name, None) is None:
            return
        if self._supervisor.link is not None:
            self._supervisor.link.send(packed("UNSUBSCRIBE", name))

    def _on_up(self, link: RedisLink) -> None:
        """A new link knows nothing: everything wanted is subscribed again."""
        names = [self._control, self._own, *self._wanted]
        self._unconfirmed = dict.fromkeys(names, 1)
        for start in range(0, len(names), _SUBSCRIBE_AT_ONCE):
            link.send(packed("SUBSCRIBE", *names[start : start + _SUBSCRIBE_AT_ONCE]))

    def _on_down(self) -> None:
        self._whole = False
        # What the old link has carried says nothing of the next one.
        self._heard_at = float("-inf")
        self._unconfirmed.clear()
        self._recovery.broken()
        if self._catching_up is not None:
            self._catching_up.cancel()

    def _on_answer(self, answer: Answer) -> None:
        """Takes what the listening link brings: publications, confirmations."""
        if not isinstance(answer, list):
            log.error("redis_subscription_refused", answer=str(answer))
            self._supervisor.abort()
            return
        kind, name, value = answer
        if kind == b"message":
            self._on_message(name, value)
        elif kind == b"subscribe":
            self._on_confirmed(name)

    def _on_confirmed(self, name: bytes) -> None:
        left = self._unconfirmed.pop(name, 1) - 1
        if left > 0:
            self._unconfirmed[name] = left
            return
        waiter = self._waiters.pop(name, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        self._settle()

    def _settle(self) -> None:
        """The last confirmation after a (re)connect makes the node whole."""
        if self._whole or self._unconfirmed or self._supervisor.link is None:
            return
        self._whole = True
        self._unheard_beats = 0
        self._became_whole.set()
        again, self._was_whole = self._was_whole, True
        self._catching_up = self._tasks.spawn(self._catch_up(gap=again), "redis_catch_up")

    async def _catch_up(self, *, gap: bool) -> None:
        await self._recovery.catch_up()
        if gap:
            await self._until_carried()
            self._on_gap()

    async def _until_carried(self) -> None:
        """Returns when Redis carries publications: it may confirm subscriptions and carry none."""
        backoff = Backoff(_FENCE_AGAIN_LEAST_S, HEARTBEAT_EVERY_S)
        while True:
            try:
                await self.fence()
            except BrokerUnavailable:
                await backoff.pause()
            else:
                return

    def _heard(self) -> None:
        self._heard_at = self._loop.time()
        self._unheard_beats = 0

    def _on_message(self, name: bytes, value: bytes) -> None:
        target = self._wanted.get(name)
        if target is not None:
            if value[:1] != b"\x01":
                log.warning("publication_of_unknown_version", channel=target[1])
                return
            body_at = 2 + value[1]
            excluded = value[2:body_at] if body_at > 2 else b""
            if b"-" in excluded:
                self._recovery.heard(excluded, name, value[body_at:])
                return
            socket_id = excluded.decode() or None
            self._on_publication(target[0], target[1], value[body_at:], socket_id)
        elif name == self._own:
            self._heard()
            if value[:1] == b"@":
                self._recovery.came_round(value[1:])
                return
            fence = self._fences.pop(value, None)
            if fence is not None and not fence.done():
                fence.set_result(None)
        elif name == self._control:
            self._on_control(value)

    def _on_recoverable(self, name: bytes, body: bytes) -> None:
        target = self._wanted.get(name)
        if target is not None:
            self._on_publication(*target, body, None)

    # Publishing

    def publish(self, publications: Sequence[Publication]) -> asyncio.Future[Any]:
        """See `Broker`."""
        prefix = self._prefix
        return self._publish(
            [
                packed("PUBLISH", redis_name(prefix, one.app_id, one.channel), encoded(one))
                if one.by_client or not is_cache_channel(one.channel)
                else self._kept(one)
                for one in publications
            ]
        )

    def _kept(self, one: Publication) -> bytes:
        """The command that publishes and keeps the last event of a cache channel."""
        last = last_event_name(self._prefix, one.app_id, one.channel)
        name = redis_name(self._prefix, one.app_id, one.channel)
        call = (last, f"{last}:missed", name, encoded(one), self.cache_ttl_ms)
        return _CACHE_PUBLISH.call(*call)

    async def publish_told(self, publication: Publication, hook: bytes, event: bytes) -> None:
        """See `Broker`."""
        name = redis_name(self._prefix, publication.app_id, publication.channel)
        await self._publish([_PUBLISH_TOLD.call(name, encoded(publication), hook, event)])

    def publish_recoverable(self, publications: Sequence[Publication]) -> asyncio.Future[Any]:
        """See `Broker`."""
        prefix = self._prefix
        named = [(redis_name(prefix, one.app_id, one.channel), one.body) for one in publications]
        return self._publish([self._recovery.call(named)])

    async def fence(self) -> None:
        """See `Broker`."""
        self._fence_count += 1
        token = b"%d" % self._fence_count
        fence = self._fences[token] = self._loop.create_future()
        try:
            await self._publish([packed("PUBLISH", self._own, token)])
            async with asyncio.timeout(self._timeout_s):
                await fence
        except TimeoutError:
            raise BrokerUnavailable("Redis does not carry publications") from None
        finally:
            self._fences.pop(token, None)

    async def publish_control(self, body: bytes) -> None:
        """See `Broker`."""
        await self._publish([packed("PUBLISH", self._control, body)])

    def _publish(self, commands: list[bytes]) -> asyncio.Future[Any]:
        if not self._whole:
            raise BrokerUnavailable("Redis can't be reached")
        return self.commands.send(b"".join(commands), len(commands), all_or_none=True)


def encoded(publication: Publication) -> bytes:
    """A publication as Redis carries it."""
    excluded = (publication.except_socket_id or "").encode()
    return bytes((_VERSION, len(excluded))) + excluded + publication.body


def last_event_name(prefix: str, app_id: str, channel: str) -> str:
    """The Redis key of a cache channel's last event."""
    return f"{prefix}:{app_id}:last:{channel}"


def redis_name(prefix: str, app_id: str, channel: str) -> bytes:
    """The Redis pub/sub channel of a channel."""
    return f"{prefix}:{app_id}:c:{channel}".encode()
