"""One process's wiring: hub, broker, presence, fan-out, deadlines, control messages, drain."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import secrets
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from gateway.control import Control
from gateway.errors import CloseCode
from gateway.fanout import FanOut
from gateway.hub import Hub
from gateway.interest import Interest
from gateway.limits import Limits
from gateway.live_streams import LiveStreams
from gateway.protocol import PusherProtocol
from gateway.quotas import Quotas
from gateway.subscribing import Subscribing
from gateway.tasks import Tasks
from gateway.users import Users
from gateway.webhooks import NoWebhooks
from gateway.wheel import Wheel

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from typing import Any

    from gateway.apps import App, Apps
    from gateway.auth import Authorizer, Identity
    from gateway.broker import Broker, Publication
    from gateway.cache import Cache
    from gateway.commands import CommandPort
    from gateway.connections import Deadlined, NodeConnection
    from gateway.occupancy import Occupancy
    from gateway.presence import Presence
    from gateway.settings import Settings
    from gateway.telemetry import Telemetry
    from gateway.webhooks import Webhooks
    from persistence.clock import Clock

T = TypeVar("T")
log = structlog.get_logger(__name__)

# How late a socket's deadline may be met.
_TICK_MOST_S: Final = 0.25
_TICK_LEAST_S: Final = 0.01
# While draining, this often a few sockets are asked to go.
_DRAIN_STEP_S: Final = 0.05
# After the drain: the time for the last closing handshakes.
_LAST_GOODBYE_S: Final = 1.0

_DROP_CHANNEL_DATA: Final = "drop_channel_data"
_TERMINATE_USER: Final = "terminate_user"


class Node:
    """The wiring of one process.

    Attributes:
        control: What all nodes are told.
        commands: Set once, before sockets arrive, when the commands themselves need the node.
        webhooks: Who is told of client events; set once, too.
        ready: Between `start` and the beginning of the drain.
        draining: New sockets are sent elsewhere.
    """

    def __init__(
        self,
        settings: Settings,
        apps: Apps,
        broker: Broker,
        presence: Presence,
        clock: Clock,
        auth: Authorizer,
        commands: CommandPort | None,
        telemetry: Telemetry,
        *,
        occupancy: Occupancy,
        online: Occupancy,
        cache: Cache,
        app_connections: Occupancy,
    ) -> None:
        self.settings = settings
        self.apps = apps
        self.presence = presence
        self.occupancy = occupancy
        self.online = online
        self.cache = cache
        self.clock = clock
        self.auth = auth
        self.commands = commands
        self.webhooks: Webhooks = NoWebhooks()
        self.telemetry = telemetry
        self.limits = Limits.of(settings)
        self.hub = Hub()
        self.ready = False
        self.draining = False
        self._broker = broker
        self.control = Control(broker)
        self._tasks = Tasks()
        self.interest = Interest(self.hub, broker, self._tasks)
        self.subscribing = Subscribing(self)
        self.users = Users(self)
        self._quotas = Quotas(self, app_connections)
        # Parts that begin and end with the node, in this order.
        self._shared = (presence, occupancy, online, app_connections)
        self._live_streams = LiveStreams()
        self._by_socket_id: dict[str, NodeConnection] = {}
        self._sockets: set[NodeConnection] = set()
        self._turning: asyncio.TimerHandle | None = None
        self._drained: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._measure()
        self.control.on(_DROP_CHANNEL_DATA, lambda data: self._live_streams.drop(data["streamer"]))
        self.control.on(_TERMINATE_USER, self._terminate_here)

    def _measure(self) -> None:
        """Gauges are read when they are asked for, so keeping them costs nothing."""
        hub = self.hub
        self.telemetry.connections.set_function(lambda: len(hub.connections))
        self.telemetry.subscriptions.set_function(lambda: sum(map(len, hub.channels())))
        self.telemetry.channels.set_function(lambda: sum(1 for c in hub.channels() if not c.empty))
        self.telemetry.broker_alive.set_function(lambda: float(self.broker_ok))

    async def start(self) -> None:
        """Connects to the broker and begins to turn the wheel; sockets may come from now on."""
        loop = asyncio.get_running_loop()
        self.now, self.call_soon = loop.time, loop.call_soon
        self._loop = loop
        self._fan_out = FanOut(
            loop, self.settings, self._by_socket_id.get, self.telemetry.deliveries.inc
        )
        least_s = min(
            self.settings.activity_timeout_s,
            self.settings.pong_timeout_s,
            self.settings.handshake_timeout_s,
        )
        tick_s = min(_TICK_MOST_S, max(_TICK_LEAST_S, least_s / 10))
        self.wheel: Wheel[Deadlined] = Wheel(tick_s, loop.time())
        self._turning = loop.call_later(self.wheel.tick_s, self._turn)
        self._nobody_left = asyncio.Event()
        await self._broker.start(self._on_publication, self.control.receive, self._on_gap)
        for shared in self._shared:
            await shared.start()
        self._looking = self.spawn(self._quotas.keep_looking(), "quotas")
        self.ready = True

    async def stop(self, drain_s: float) -> None:
        """Sends the sockets elsewhere over `drain_s`, then ends everything that this node owns."""
        self.begin_drain(drain_s)
        if self._drained is not None:
            await asyncio.wait([self._drained])
        if self._sockets:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_GOODBYE_S):
                    await self._nobody_left.wait()
        for connection in list(self._sockets):
            connection.abort()
        # Aborted transports report their end in the loop's next turns; presence then leaves.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if self._turning is not None:
            self._turning.cancel()
        if self._looking is not None:
            self._looking.cancel()
        await self._tasks.stop(grace_s=self.settings.redis_timeout_s)
        for shared in self._shared:
            await shared.stop()
        await self._broker.stop()

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str, **ids: object) -> asyncio.Task[T]:
        """Starts a task that this node owns: its failure is logged with `ids`, its end awaited."""
        return self._tasks.spawn(coroutine, name, **ids)

    @property
    def broker_ok(self) -> bool:
        """Whether the broker answers."""
        return self._broker.alive

    # Publications

    def send(self, publications: Sequence[Publication]) -> asyncio.Future[Any]:
        """Publishes without waiting, uncounted; the future is done when the broker has them all.

        Raises:
            BrokerUnavailable: It can't be reached; or later, from the future, as `publish`.
        """
        return self._broker.publish(publications)

    async def publish(self, publications: Sequence[Publication]) -> None:
        """Publishes all of them in one go.

        Raises:
            BrokerUnavailable: The broker did not accept all in time; some may be delivered.
        """
        if not publications:
            return
        await self.send(publications)
        self.telemetry.publications_sent.inc(len(publications))

    async def publish_recoverable(self, publications: Sequence[Publication]) -> None:
        """As `publish`, for nodes that can't hear it now, too; see `Broker.publish_recoverable`."""
        if not publications:
            return
        await self._broker.publish_recoverable(publications)
        self.telemetry.publications_sent.inc(len(publications))

    async def publish_told(self, publication: Publication, hook: bytes, event: bytes) -> None:
        """Publishes a client event that a webhook tells of; see `Broker.publish_told`.

        Raises:
            BrokerUnavailable: As `publish`; told or not, it is the same for both.
        """
        await self._broker.publish_told(publication, hook, event)
        self.telemetry.publications_sent.inc()

    def _on_publication(
        self, app_id: str, channel: str, body: bytes, except_socket_id: str | None
    ) -> None:
        self.telemetry.publications_received.inc()
        known = self.hub.channel((app_id, channel))
        if known is not None and not known.empty:
            self._fan_out.push(known, body, except_socket_id)

    def _on_gap(self) -> None:
        self.telemetry.broker_gaps.inc()
        log.warning("broker_gap", channels=sum(1 for _ in self.hub.channels()))
        self.spawn(self._catch_up(), "catch_up")

    async def _catch_up(self) -> None:
        """Tells what may have been missed where it can be told again."""
        await self.subscribing.snapshots_again()
        await self.users.tell_again()

    # Sockets

    def arrive(self, connection: NodeConnection) -> None:
        """Knows a socket whose handshake has begun."""
        self._sockets.add(connection)
        self.wheel.put(connection, self._loop.time() + self.settings.handshake_timeout_s)

    def has_room(self, app: App) -> bool:
        """Whether the app may have one more connection."""
        return self._quotas.has_room(app)

    def attach(
        self, connection: NodeConnection, app: App, identity: Identity | None
    ) -> PusherProtocol:
        """Makes a socket a connection: it has a socket id and may subscribe.

        What is returned is the connection's `pusher` from then on.
        """
        # Two random halves: unique across nodes without asking anyone.
        number = secrets.randbits(60)
        socket_id = f"{number >> 30}.{number & 0x3FFFFFFF}"
        self._by_socket_id[socket_id] = connection
        self._quotas.count(app, 1)
        pusher = PusherProtocol(
            app,
            socket_id,
            self.limits,
            self.hub.attach(connection),
            invitations=app.id == self.apps.first.id,
        )
        if identity is not None:
            pusher.identity = identity
            self.users.sign_in(connection, app.id, identity.user_id)
        return pusher

    def reroute(self, connection: NodeConnection) -> None:
        """Takes over how a connection is written to; does nothing for one that is not attached."""
        if connection in self.hub.connections:
            self.hub.reroute(connection, connection.pusher.app.id)

    def detach(self, connection: NodeConnection) -> None:
        """Ends what a connection takes part in; a second call does nothing."""
        if connection not in self.hub.connections:
            return
        self.users.sign_out(connection)
        self.subscribing.end_all(connection)
        pusher = connection.pusher
        del self._by_socket_id[pusher.socket_id]
        self._quotas.count(pusher.app, -1)

    def connections(self) -> list[NodeConnection]:
        """All connections, as they are now."""
        return list(self._by_socket_id.values())

    def gone(self, connection: NodeConnection) -> None:
        """Forgets a socket whose transport is closed."""
        self._sockets.discard(connection)
        self.wheel.remove(connection)
        if self.draining and not self._sockets:
            self._nobody_left.set()

    def _turn(self) -> None:
        """Turns the wheel one tick."""
        # First of all, so that no fault below can stop the wheel.
        self._turning = self._loop.call_later(self.wheel.tick_s, self._turn)
        now = self._loop.time()
        for connection in self.wheel.advance(now):
            try:
                due = connection.on_deadline(now)
            except Exception:
                log.exception("deadline_failed")
                connection.abort()
                continue
            if due is not None:
                self.wheel.put(connection, due)

    def jittered(self, seconds: float) -> float:
        """A wait from `seconds` to a fifth more, so that sockets that came together part."""
        return seconds * random.uniform(1.0, 1.2)  # noqa: S311  only a spread

    # Draining

    def begin_drain(self, drain_s: float | None = None) -> None:
        """Asks all connections to reconnect (4200), a few at a time; a second call does nothing.

        pusher-js comes back at once after 4200, so the slices are what spares the other nodes.
        """
        if self.draining:
            return
        self.ready = False
        self.draining = True
        seconds = self.settings.drain_s if drain_s is None else drain_s
        self._drained = self.spawn(self._drain(seconds), "drain")

    async def _drain(self, drain_s: float) -> None:
        waiting = list(self._sockets)
        steps = max(1, math.floor(drain_s / _DRAIN_STEP_S))
        size = max(1, math.ceil(len(waiting) / steps))
        for start in range(0, len(waiting), size):
            for connection in waiting[start : start + size]:
                connection.disconnect(CloseCode.RECONNECT)
            if start + size < len(waiting):
                await asyncio.sleep(drain_s / steps)

    # Goal commands

    async def stream_is_live(self, streamer_id: str) -> bool:
        """Whether the streamer is live; remembered for a while when true."""
        if self.commands is None:
            return False
        ask = self.commands.stream_is_live
        return await self._live_streams.is_live(streamer_id, self._loop.time(), ask)

    async def snapshot(self, user_id: str) -> bytes:
        """The JSON object of the user's `goal.snapshot`."""
        if self.commands is None:
            return b'{"goals":[]}'
        return await self.commands.snapshot(user_id)

    # What every node is told

    async def drop_channel_data(self, streamer_id: str) -> None:
        """Makes every node forget what it remembers of a streamer's channels.

        Raises:
            BrokerUnavailable: As `Control.send`; this node has forgotten it all the same.
        """
        self._live_streams.drop(streamer_id)
        await self.control.send(_DROP_CHANNEL_DATA, streamer=streamer_id)

    async def terminate_user(self, app_id: str, user_id: str) -> None:
        """Closes (4009) every connection that has signed in as the user, on every node.

        Raises:
            BrokerUnavailable: As `Control.send`.
        """
        await self.control.send(_TERMINATE_USER, app=app_id, user=user_id)

    def _terminate_here(self, data: dict[str, str]) -> None:
        for connection in self.users.connections(data["app"], data["user"]):
            connection.disconnect(CloseCode.UNAUTHORIZED)
