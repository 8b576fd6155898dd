"""A gateway without its stores, on a real port, and a client that speaks bytes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import socket as sockets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import uvicorn

from gateway.apps import App, Apps
from gateway.arrival import Arrival
from gateway.auth import AuthError, Identity
from gateway.broker import BrokerUnavailable, MemoryBroker, MemoryBus, Publication
from gateway.cache import MemoryCache
from gateway.commands import Reply
from gateway.fallback import Fallback
from gateway.frames import push_body
from gateway.node import Node
from gateway.occupancy import MemoryOccupancy, MemoryTotals, counted_channels
from gateway.presence import MemoryPresence
from gateway.redis_cache import RedisCache
from gateway.redis_occupancy import RedisOccupancy
from gateway.settings import Settings
from gateway.socket import GatewayProtocol
from gateway.telemetry import Telemetry
from gateway.users import online_announcements
from gateway.webhooks import NoWebhooks
from persistence.clock import Clock
from statemachine.goal import Role

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from datetime import datetime

    from starlette.types import ASGIApp, Receive, Scope, Send

    from gateway.broker import Broker
    from gateway.cache import Cache
    from gateway.commands import GoalCommand
    from gateway.occupancy import Occupancy
    from gateway.presence import Presence
    from gateway.redis_broker import RedisBroker
    from gateway.redis_lease import RedisLease

PATIENCE_S = 10.0
APP = App(id="1", key="app-key", secret="app-secret")


def settings_for_tests(**changes: Any) -> Settings:
    """Settings that do not depend on this machine's environment."""
    fields: dict[str, Any] = {"node_name": "test", "drain_s": 0} | changes
    return Settings(**fields)


async def until(
    condition: Callable[[], object], *, within_s: float = PATIENCE_S, every_s: float = 0.001
) -> None:
    """Lets the loop turn until `condition` holds, for states that tell nobody of their change."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  there is no event to wait for
            await asyncio.sleep(every_s)


async def until_yes(
    question: Callable[[], Awaitable[object]], *, within_s: float = PATIENCE_S
) -> None:
    """As `until`, for what has to be asked for: of a Redis, of another process."""
    async with asyncio.timeout(within_s):
        while not await question():  # noqa: ASYNC110  nobody tells us here either
            await asyncio.sleep(0.005)


async def until_accepted(action: Callable[[], Awaitable[object]]) -> None:
    """Tries, as callers of a broker do, until it is not unavailable any more."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await action()
            except BrokerUnavailable:
                await asyncio.sleep(0.02)
            else:
                return


@dataclass
class Recorder:
    """Notes what it is told, and sets `changed`, by which those are woken who wait for it."""

    changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits for something that makes the condition hold."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class TokensForTests:
    """An authorizer that takes `role:user` for a token, and waits for `held` if it is set."""

    def __init__(self) -> None:
        self.held: asyncio.Event | None = None

    async def identity_of(self, token: str, now: datetime) -> Identity:
        """The user that the token names."""
        if self.held is not None:
            await self.held.wait()
        role, separator, user_id = token.partition(":")
        if not separator:
            raise AuthError("The token is malformed.")
        return Identity(user_id, Role(role), "test-client")


@dataclass
class CommandsForTests:
    """A command port that notes what it is asked and answers when it is let."""

    executed: list[tuple[GoalCommand, Identity]] = field(default_factory=list)
    live: set[str] = field(default_factory=set)
    asked_live: list[str] = field(default_factory=list)
    released: asyncio.Event | None = None
    snapshot_released: asyncio.Event | None = None
    snapshot_faults: list[Exception] = field(default_factory=list)
    snapshot_asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def execute(self, command: GoalCommand, identity: Identity) -> Reply:
        """Accepts everything, after `released` if there is one."""
        self.executed.append((command, identity))
        if self.released is not None:
            await self.released.wait()
        return Reply(command.request_id, b'{"id":"g"}', None)

    async def snapshot(self, user_id: str) -> bytes:
        """An empty snapshot of that user, after `snapshot_released` if there is one."""
        self.snapshot_asked.set()
        if self.snapshot_released is not None:
            await self.snapshot_released.wait()
        if self.snapshot_faults:
            raise self.snapshot_faults.pop(0)
        return json.dumps({"goals": [], "of": user_id}).encode()

    async def stream_is_live(self, streamer_id: str) -> bool:
        """Whether the test said so."""
        self.asked_live.append(streamer_id)
        return streamer_id in self.live


@dataclass
class Gateway:
    """A node that serves sockets on a port of its own."""

    node: Node
    server: uvicorn.Server
    port: int
    commands: CommandsForTests
    tokens: TokensForTests
    broker: Broker
    presence: Presence
    fallback: Fallback
    clients: list[RawClient] = field(default_factory=list)

    async def open(self, path: str = "/app/app-key?protocol=7", **headers: str) -> RawClient:
        """A client whose upgrade has been answered; it is closed with the gateway."""
        client = await RawClient.open(self.port, path, **headers)
        self.clients.append(client)
        return client

    async def connect(self, path: str = "/app/app-key?protocol=7", **headers: str) -> RawClient:
        """A client that has read `connection_established`."""
        client = await self.open(path, **headers)
        established = await client.event()
        assert established["event"] == "pusher:connection_established", established
        client.socket_id = json.loads(established["data"])["socket_id"]
        return client

    async def push(self, channel: str, event: str = "e", **data: Any) -> None:
        """Publishes an event to a channel of the first app."""
        await self.node.publish([Publication("1", channel, push_body(event, channel, data))])

    def count(self, name: str) -> float:
        """A metric's value now."""
        return self.node.telemetry.registry.get_sample_value(name) or 0.0


class Shared(NamedTuple):
    """What nodes know together, beside broker and presence."""

    occupancy: Occupancy
    online: Occupancy
    cache: Cache
    app_connections: Occupancy


def memory_shared(
    broker: Broker,
    apps: Apps,
    node_id: str = "n",
    totals: tuple[MemoryTotals, MemoryTotals] | None = None,
) -> Shared:
    """In memory, of this node alone unless it is given what others use, too."""
    assert isinstance(broker, MemoryBroker), "a Redis broker needs redis_shared()"
    occupied, online = totals or (MemoryTotals(), MemoryTotals())
    return Shared(
        MemoryOccupancy(broker, node_id, occupied, counted_channels(apps.by_id)),
        MemoryOccupancy(broker, node_id, online, online_announcements),
        MemoryCache(broker.bus),
        MemoryOccupancy(broker, node_id),
    )


def redis_shared(
    broker: RedisBroker, apps: Apps, prefix: str, lease: RedisLease, throttle_s: float = 5.0
) -> Shared:
    """In Redis, as in production."""
    announce = counted_channels(apps.by_id)
    commands = broker.commands
    return Shared(
        RedisOccupancy(commands, prefix, lease, "occupancy", announce, throttle_s),
        RedisOccupancy(commands, prefix, lease, "online", online_announcements),
        RedisCache(broker, prefix, NoWebhooks()),
        RedisOccupancy(commands, prefix, lease, "connections"),
    )


def _application(node: Node, fallback: Fallback) -> ASGIApp:
    """What uvicorn serves: the transports over HTTP alone, and the node for its sockets."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await fallback(scope, receive, send)
            return
        await receive()
        scope["state"]["node"] = node
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    return app


@contextlib.asynccontextmanager
async def running_gateway(
    settings: Settings | None = None,
    apps: Apps | None = None,
    broker: Broker | None = None,
    presence: Callable[[Broker], Presence] | None = None,
    shared: Shared | None = None,
) -> AsyncIterator[Gateway]:
    """A gateway on a free port; over memory unless it is given a broker and a presence."""
    settings = settings or settings_for_tests()
    apps = apps or Apps([APP])
    if broker is None:
        broker = memory = MemoryBroker(MemoryBus())
        members: Presence = MemoryPresence(memory, "n", settings.presence_max_members)
    else:
        assert presence is not None
        members = presence(broker)
    commands, tokens = CommandsForTests(), TokensForTests()
    shared = shared or memory_shared(broker, apps)
    node = Node(
        settings,
        apps,
        broker,
        members,
        Clock(),
        tokens,
        commands,
        Telemetry(),
        **shared._asdict(),
    )
    await node.start()
    fallback = Fallback(settings.path_prefix)
    fallback.join(node)
    app = _application(node, fallback)
    config = uvicorn.Config(app, ws=GatewayProtocol, lifespan="on", log_config=None, http=Arrival)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    listener = sockets.create_server(("127.0.0.1", 0))
    await server.startup([listener])
    port = listener.getsockname()[1]
    gateway = Gateway(node, server, port, commands, tokens, broker, members, fallback)
    try:
        yield gateway
    finally:
        for client in gateway.clients:
            await client.close()
        # Sockets first, as in production; then uvicorn has nothing to wait for.
        await node.stop(0)
        await server.shutdown([listener])


class Closed(Exception):
    """The server has closed.

    Attributes:
        code: Of the close frame; None when there was none (an abort).
    """

    def __init__(self, code: int | None, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class RawClient:
    """A WebSocket client of plain bytes, so that tests can send what no library would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.socket_id = ""
        self.response = ""

    @classmethod
    async def open(cls, port: int, path: str, **headers: str) -> RawClient:
        """Connects and upgrades; header names use `_` for `-`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = cls(reader, writer)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            f"GET {path} HTTP/1.1",
            "Host: localhost",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        async with asyncio.timeout(PATIENCE_S):
            client.response = (await reader.readuntil(b"\r\n\r\n")).decode()
        return client

    # Sending

    def send_frame(self, opcode: int, payload: bytes, *, fin: bool = True) -> None:
        """One masked frame."""
        self.writer.write(masked_frame(opcode, payload, fin=fin))

    def send(self, message: object) -> None:
        """One text message, JSON unless it is text or bytes already."""
        if isinstance(message, str):
            message = message.encode()
        self.send_frame(1, message if isinstance(message, bytes) else json.dumps(message).encode())

    def subscribe(self, channel: str, auth: str = "", **data: Any) -> None:
        """Asks for a subscription."""
        data |= {"channel": channel, "auth": auth}
        self.send({"event": "pusher:subscribe", "data": data})

    async def subscribed(self, channel: str, auth: str = "", **data: Any) -> Any:
        """Subscribes and returns the data of `subscription_succeeded`."""
        self.subscribe(channel, auth, **data)
        answer = await self.event()
        assert answer["event"] == "pusher_internal:subscription_succeeded", answer
        assert answer["channel"] == channel
        return json.loads(answer["data"])

    # Receiving

    async def frame(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload; raises `Closed` when the stream ends."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                head = await self.reader.readexactly(2)
                length = head[1] & 0x7F
                if length == 126:
                    length = int.from_bytes(await self.reader.readexactly(2))
                elif length == 127:
                    length = int.from_bytes(await self.reader.readexactly(8))
                return head[0] & 0x0F, await self.reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                raise Closed(None) from None

    async def event(self) -> dict[str, Any]:
        """The next text message, decoded; answers nothing else."""
        opcode, payload = await self.frame()
        if opcode == 8:
            code = int.from_bytes(payload[:2]) if payload else None
            raise Closed(code, payload[2:].decode())
        assert opcode == 1, (opcode, payload)
        decoded: dict[str, Any] = json.loads(payload)
        return decoded

    async def closed(self) -> Closed:
        """How the server closes; anything before the close frame fails the test."""
        try:
            event = await self.event()
        except Closed as closed:
            return closed
        raise AssertionError(f"expected a close frame, got {event}")

    async def refused(self) -> tuple[dict[str, Any], Closed]:
        """The `pusher:error` and the close that follow each other."""
        error = await self.event()
        assert error["event"] == "pusher:error", error
        return error["data"], await self.closed()

    async def ended(self) -> None:
        """Waits for the end of the TCP connection."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(65_536):
                    pass

    def stall(self) -> None:
        """Reads no more of what comes."""
        self.reader._transport.pause_reading()  # type: ignore[attr-defined]

    def read_on(self) -> None:
        """Reads again."""
        self.reader._transport.resume_reading()  # type: ignore[attr-defined]

    async def ping(self) -> None:
        """Goes round once: what was sent before has been acted upon."""
        self.send({"event": "pusher:ping", "data": {}})
        assert (await self.event())["event"] == "pusher:pong"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drops the TCP connection."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def masked_frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """A client's frame (RFC 6455 section 5.2)."""
    mask = secrets.token_bytes(4)
    length = len(payload)
    if length < 126:
        size = bytes((0x80 | length,))
    elif length < 0x10000:
        size = bytes((0x80 | 126,)) + length.to_bytes(2)
    else:
        size = bytes((0x80 | 127,)) + length.to_bytes(8)
    repeated = (mask * (length // 4 + 1))[:length]
    hidden = int.from_bytes(payload) ^ int.from_bytes(repeated)
    first = (0x80 if fin else 0) | opcode
    return bytes((first,)) + size + mask + hidden.to_bytes(length)
