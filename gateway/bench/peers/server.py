"""A peer as a process of its own, loaded through the same seam as Duet."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec

from gateway.bench.errors import BenchError
from gateway.bench.http import http_request
from gateway.bench.peers.install import compiled, npm_packages, program, source
from gateway.bench.usage import Usage, usage_of
from gateway.bench.wire import client_frame, client_message
from gateway.frames import frame, published_body
from persistence.embedded_process import LOOPBACK, ServerGuard, ServerProcess, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gateway.bench.target import Target

_START_DEADLINE_S: Final = 30.0
_STOP_GRACE_S: Final = 5.0
_POLL_S: Final = 0.02
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Recipe:
    """What distinguishes one peer from another.

    Attributes:
        argv: Makes the command without its port; installs or compiles what is not there.
        in_process: It is told a whole burst in one call and publishes in its own process.
        uses_redis: It publishes through the benchmark's Redis.
        one_channel: It knows a single channel.
    """

    argv: Callable[[], list[str]]
    dialect: str = "pusher"
    in_process: bool = True
    uses_redis: bool = False
    one_channel: bool = False


def _bun() -> list[str]:
    # The script copies nothing: Bun runs it from this package, it imports nothing from npm.
    return [str(npm_packages() / "node_modules" / ".bin" / "bun"), str(source("bun_server.js"))]


def _node(script: str) -> list[str]:
    # Modules are looked up beside the script, so it has to lie beside `node_modules`.
    packages = npm_packages()
    copy = packages / script
    text = source(script).read_bytes()
    if not copy.exists() or copy.read_bytes() != text:
        copy.write_bytes(text)
    return [program("node", "install Node.js 20 or newer"), str(copy)]


PEERS: Final[Mapping[str, Recipe]] = {
    "bun": Recipe(_bun),
    "ws": Recipe(lambda: _node("ws_server.js")),
    "socket.io": Recipe(
        lambda: _node("socketio_server.js"),
        dialect="socket.io",
        in_process=False,
        uses_redis=True,
    ),
    "c": Recipe(lambda: [str(compiled("write_server.c"))], one_channel=True),
}


class PeerTarget:
    """A peer's process; its attributes are those of `Target`."""

    host = LOOPBACK
    health_path = "/ready"

    def __init__(
        self, guard: ServerGuard, name: str, redis_url: str, redis_pid: int | None = None
    ) -> None:
        recipe = PEERS[name]
        self.name = name
        self.port = 0
        self.dialect = recipe.dialect
        self._recipe = recipe
        self._channels: set[str] = set()
        self._redis_url = redis_url
        self._redis_pid = redis_pid if recipe.uses_redis else None
        self._process = ServerProcess(guard, name, stop_grace_s=_STOP_GRACE_S)

    def start(self) -> None:
        """Starts the process and waits until it answers.

        Raises:
            BenchError: What it needs can't be installed, or it ends, or is not ready in time.
            EmbeddedError: It can't be run.
        """
        argv = self._recipe.argv()
        self.port = free_port()
        redis = [_redis_place(self._redis_url)] if self._recipe.uses_redis else []
        self._process.start([*argv, str(self.port), *redis])
        give_up_at = time.monotonic() + _START_DEADLINE_S
        while not self._is_ready():
            if self._process.exit_code() is not None or time.monotonic() > give_up_at:
                lines = self._process.log_text().strip().splitlines()
                words = next((line for line in lines if "rror" in line), "it did not say why")
                raise BenchError(f"{self.name} did not start: {words}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Ends the process."""
        self._process.stop()

    def _is_ready(self) -> bool:
        with closing(HTTPConnection(self.host, self.port, timeout=2)) as connection:
            try:
                connection.request("GET", self.health_path)
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False

    def socket_path(self, token: str | None = None) -> str:
        """The path that a WebSocket asks for; a peer asks nobody who he is."""
        if token is not None:
            raise BenchError(f"{self.name} knows no users")
        return "/socket.io/?EIO=4&transport=websocket" if self._speaks_socket_io else "/socket"

    def subscribe_frame(self, channel: str) -> bytes:
        """The client's frame that subscribes to a channel.

        Raises:
            BenchError: It is a second channel, and the peer knows one only.
        """
        self._channels.add(channel)
        if self._recipe.one_channel and len(self._channels) > 1:
            raise BenchError(f"{self.name} knows one channel only: choose another --against")
        if self._speaks_socket_io:
            return client_frame(b"420" + _encode(["join", channel]))
        return client_message("pusher:subscribe", {"channel": channel})

    def publish_request(self, channel: str, event: str, data: str) -> bytes:
        """The HTTP call that publishes one event."""
        return self._publish(channel, event, data, 1)

    def burst_requests(self, channel: str, event: str, data: str, count: int) -> list[bytes]:
        """One call for all when the peer publishes in process, else one for each."""
        if self._recipe.in_process:
            return [self._publish(channel, event, data, count)]
        return [self._publish(channel, event, data, 1)] * count

    def delivered_bytes(self, channel: str, event: str, data: str) -> int:
        """How many bytes each subscriber receives for that event."""
        if self._speaks_socket_io:
            return len(frame(b"42" + _encode([event, data])))
        return len(frame(published_body(event, channel, data)))

    def usage(self) -> Usage:
        """CPU and memory of the peer's process and its children."""
        return usage_of(self._process.pid)

    def redis_usage(self) -> Usage | None:
        """CPU and memory of the Redis that it publishes through, if any."""
        return None if self._redis_pid is None else usage_of(self._redis_pid)

    @property
    def _speaks_socket_io(self) -> bool:
        return self.dialect == "socket.io"

    def _publish(self, channel: str, event: str, data: str, count: int) -> bytes:
        if self._speaks_socket_io:
            body = _encode({"event": event, "data": data})
        else:
            # Ready to be sent: the peer neither parses nor builds what its sockets get.
            body = published_body(event, channel, data)
        return http_request("POST", f"/publish/{count}/{channel}", self.host, body)


def _redis_place(url: str) -> str:
    """The URL, or the path of a Unix socket, which Node's client does not take as a URL."""
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else url


@contextmanager
def running_peers(
    names: Sequence[str], redis_url: str, redis_pid: int | None = None
) -> Iterator[list[Target]]:
    """The peers' processes, which end with the block, and with this process however that ends.

    Raises:
        BenchError: One did not start.
        EmbeddedError: One can't be run.
    """
    with ExitStack() as stack:
        peers: list[Target] = []
        for name in names:
            guard = stack.enter_context(ServerGuard())
            peer = PeerTarget(guard, name, redis_url, redis_pid)
            peer.start()
            stack.callback(peer.stop)
            peers.append(peer)
        yield peers
