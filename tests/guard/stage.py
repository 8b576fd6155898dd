"""A node in memory with sockets of its own, driven by hand: bytes in, writes counted."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, cast

import uvicorn
from uvicorn.server import ServerState

from gateway.apps import App, Apps
from gateway.arrival import Arrival
from gateway.auth import hmac_hex, sign_channel
from gateway.broker import MemoryBroker, MemoryBus
from gateway.frames import json_bytes
from gateway.node import Node
from gateway.parts import Parts
from gateway.presence import MemoryPresence
from gateway.redis_broker import RedisBroker, redis_name
from gateway.redis_link import RedisLink
from gateway.socket import GatewayProtocol
from gateway.telemetry import Telemetry
from persistence.clock import Clock
from tests.gateway.harness import (
    CommandsForTests,
    TokensForTests,
    masked_frame,
    memory_shared,
    settings_for_tests,
)
from tests.guard.counting import CountingLoop

if TYPE_CHECKING:
    from collections.abc import Callable

APP = App(id="1", key="app-key", secret="app-secret", client_events=True)
CHANNEL = "private-guard"

# What a browser sends.
UPGRADE = (
    b"GET /app/app-key?protocol=7&client=js&version=8.4.0&flash=false HTTP/1.1\r\n"
    b"Host: gateway.example:6001\r\nConnection: Upgrade\r\nPragma: no-cache\r\n"
    b"Cache-Control: no-cache\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n"
    b"Upgrade: websocket\r\nOrigin: https://shop.example\r\nSec-WebSocket-Version: 13\r\n"
    b"Accept-Encoding: gzip, deflate, br\r\nAccept-Language: en-US,en;q=0.9\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
)
PING = masked_frame(1, b'{"event":"pusher:ping","data":{}}')
CLIENT_EVENT = masked_frame(
    1, b'{"event":"client-moved","channel":"%b","data":{"x":1}}' % CHANNEL.encode()
)


# Of a wire without a descriptor: it has no address, and no Python function that would be counted.
_NO_SOCKET = SimpleNamespace(fileno=partial(int, -1), getsockname=str, getpeername=str)


class Wire(asyncio.Transport):
    """A transport whose peer reads everything at once.

    Attributes:
        write: Appends to `written`, without a Python function that would be counted.
    """

    def __init__(self, sink: IO[bytes] | None = None) -> None:
        """A transport with the descriptor of `sink`, which fan-out then writes to, or with none."""
        super().__init__()
        self._sink = sink
        self.written: list[bytes] = []
        self.write: Callable[[bytes], None] = self.written.append  # type: ignore[assignment]
        self.protocol: Any = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (self._sink or _NO_SOCKET) if name == "socket" else default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        """There is nothing to pause."""

    def resume_reading(self) -> None:
        """See `pause_reading`."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """It never fills."""

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            protocol.connection_lost(None)


class Stage:
    """One node on a `CountingLoop`."""

    def __init__(self) -> None:
        self.loop = CountingLoop()
        settings, apps, broker = settings_for_tests(), Apps([APP]), MemoryBroker(MemoryBus())
        self.clock, telemetry = Clock(), Telemetry()
        shared = memory_shared(broker, apps)
        self.node = Node(
            settings,
            apps,
            broker,
            MemoryPresence(broker, "n", settings.presence_max_members),
            self.clock,
            TokensForTests(),
            CommandsForTests(),
            telemetry,
            occupancy=shared.occupancy,
            online=shared.online,
            cache=shared.cache,
            app_connections=shared.app_connections,
        )
        asyncio.set_event_loop(self.loop)
        self.loop.finished(self.node.start())
        nothing: Any = None
        parts = Parts(
            settings=settings,
            apps=apps,
            clock=self.clock,
            telemetry=telemetry,
            node=self.node,
            # A plain publication needs none of these.
            authorizer=nothing,
            store=nothing,
            commands=nothing,
            once=nothing,
            rates=nothing,
        )
        self._state = {"node": self.node, "parts": parts}
        self._server = ServerState()
        self._config = uvicorn.Config(
            nothing, ws=GatewayProtocol, http=Arrival, lifespan="off", log_config=None
        )
        self._config.load_app = lambda: nothing  # type: ignore[method-assign]
        self._config.load()
        self.wires: list[Wire] = []
        self.loop.settle()

    def close(self) -> None:
        """Ends the node."""
        for wire in self.wires:
            self.loop.do(wire.abort)
        self.loop.finished(self.node.stop(0))
        self.loop.settle()
        asyncio.set_event_loop(None)
        self.loop.close()

    # Sockets

    def accept(self, wire: Wire) -> None:
        """What uvicorn does with a new TCP connection."""
        self.wires.append(wire)
        wire.protocol = Arrival(self._config, self._server, self._state, self.loop)
        wire.protocol.connection_made(wire)

    def receive(self, wire: Wire, data: bytes) -> None:
        """What a peer sends arrives, and is acted upon."""
        self.loop.do(wire.protocol.data_received, data)

    def connect(self, wire: Wire) -> None:
        """Connects a socket."""
        self.loop.do(self.accept, wire)
        self.receive(wire, UPGRADE)

    def subscription(self, wire: Wire) -> bytes:
        """The client's frame that subscribes the connected socket."""
        signature = sign_channel(APP, wire.protocol.pusher.socket_id, CHANNEL)
        data = {"auth": signature, "channel": CHANNEL}
        return masked_frame(1, json_bytes({"event": "pusher:subscribe", "data": data}))

    def subscribed(self, count: int, sink: IO[bytes] | None = None) -> list[Wire]:
        """That many new sockets on the channel, which have read everything."""
        wires = [Wire(sink) for _ in range(count)]
        for wire in wires:
            self.connect(wire)
            self.receive(wire, self.subscription(wire))
            assert b"subscription_succeeded" in wire.written[-1]
            wire.written.clear()
        self.loop.pass_s(0.1)
        return wires

    # Publications

    def reader(self) -> RedisLink:
        """The connection on which Redis sends the channel's publications to this node."""

        async def made() -> RedisLink:
            broker = RedisBroker("redis://127.0.0.1:1", "duet", "n", 1.0)
            broker._on_publication = self.node._on_publication
            broker._wanted[redis_name("duet", APP.id, CHANNEL)] = (APP.id, CHANNEL)
            return RedisLink(broker._on_answer)

        return self.loop.finished(made())

    def publish_call(self, channel: str) -> bytes:
        """A signed call of the Pusher HTTP API."""
        body = json_bytes({"name": "guarded", "channels": [channel], "data": "x" * 300})
        path = f"/apps/{APP.id}/events"
        query = {
            "auth_key": APP.key,
            "auth_timestamp": str(int(self.clock.now().timestamp())),
            "auth_version": "1.0",
            "body_md5": hashlib.md5(body).hexdigest(),
        }
        pairs = "&".join(f"{name}={value}" for name, value in sorted(query.items()))
        signature = hmac_hex(APP.secret, f"POST\n{path}\n{pairs}".encode())
        head = (
            f"POST {path}?{pairs}&auth_signature={signature} HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def message_from_redis(body: bytes) -> bytes:
    """A publication as it comes out of Redis."""
    name = redis_name("duet", APP.id, CHANNEL)
    parts = [b"message", name, b"\x01\x00" + body]
    return b"*3\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(one), one) for one in parts)


def connection_of(wire: Wire) -> GatewayProtocol:
    """The gateway's end of a socket."""
    return cast("GatewayProtocol", wire.protocol)
