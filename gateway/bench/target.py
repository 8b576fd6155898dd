"""What is loaded: the contract of a server under test, and the gateway as a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import secrets
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlencode

import jwt
import msgspec

import gateway
from gateway.auth import hmac_hex
from gateway.bench.errors import BenchError
from gateway.bench.http import http_request
from gateway.bench.orders import SIGNATURE_PLACE
from gateway.bench.usage import Usage, usage_of
from gateway.bench.wire import client_message
from gateway.frames import frame, published_body
from persistence.clock import Clock
from persistence.embedded_process import LOOPBACK, ServerGuard, ServerProcess, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_APP_ID: Final = "1"
_APP_KEY: Final = "bench-key"
_START_DEADLINE_S: Final = 30.0
_STOP_GRACE_S: Final = 10.0
_POLL_S: Final = 0.05
_TOKEN_TTL_S: Final = 86_400

# The `duet` command, wherever it is installed.
_SERVE: Final = "from gateway.cli import main; main()"

# Limits that protect one socket from its user; here one socket stands for many users.
_SETTINGS: Final = {
    "DUET_COMMANDS_IN_FLIGHT": "10000",
    "DUET_COMMAND_RATE_PER_S": "100000",
    # Invitations are made long before they are answered, and no timer works beside the load.
    "DUET_INVITATION_TTL_S": "86400",
    "DUET_REFUND_DELAY_S": "86400",
    # A ping would be counted as a part of an event.
    "DUET_ACTIVITY_TIMEOUT_S": "3600",
    # The publishers' connections are opened first, and used when all sockets are there.
    "DUET_HANDSHAKE_TIMEOUT_S": "600",
    "DUET_LOG_LEVEL": "warning",
    "DUET_DRAIN_S": "0",
}


class Target(Protocol):
    """A server on loopback that fans events out to the subscribers of a channel.

    Attributes:
        name: For tables.
        host: Where it listens.
        port: Where it listens.
        dialect: What its sockets speak, a key of `gateway.bench.peers.dialects.DIALECTS`.
        health_path: Where it answers a GET at once, without asking anybody.
    """

    name: str
    host: str
    port: int
    dialect: str
    health_path: str

    def socket_path(self, token: str | None = None) -> str:
        """The path that a WebSocket asks for, with what proves its user."""

    def subscribe_frame(self, channel: str) -> bytes:
        """The client's frame that subscribes to a public channel."""

    def publish_request(self, channel: str, event: str, data: str) -> bytes:
        """The HTTP call that publishes one event."""

    def burst_requests(self, channel: str, event: str, data: str, count: int) -> list[bytes]:
        """The HTTP calls that publish one event `count` times, each for a connection of its own."""

    def delivered_bytes(self, channel: str, event: str, data: str) -> int:
        """How many bytes each subscriber receives for that event."""

    def usage(self) -> Usage:
        """CPU and memory of the server, all its processes together, Redis apart."""

    def redis_usage(self) -> Usage | None:
        """CPU and memory of the Redis that it uses; None without one, or with somebody else's."""


class GatewayTarget:
    """A `duet serve` process with its own database, Redis names, app and keys.

    Other `DUET_…` variables of this environment apply to it, so that their effect can be measured.
    """

    name = "duet"
    host = LOOPBACK
    dialect = "pusher"
    health_path = "/healthz"

    def __init__(
        self,
        guard: ServerGuard,
        mongodb_url: str,
        database: str,
        redis_url: str,
        redis_pid: int | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.port = 0
        self._redis_pid = redis_pid
        self._settings = _SETTINGS | dict(settings)
        self._database = database
        self._redis_prefix = f"duet-bench-{secrets.token_hex(4)}"
        self._mongodb_url = mongodb_url
        self._redis_url = redis_url
        self._app_secret = secrets.token_hex(16)
        self._jwt_secret = secrets.token_hex(32)
        self._clock = Clock()
        self._guard = guard
        self._process = ServerProcess(guard, "gateway", stop_grace_s=_STOP_GRACE_S)

    def start(self) -> None:
        """Starts the process and waits until it is ready.

        Raises:
            BenchError: It ends, or is not ready in time.
            EmbeddedError: It can't be run.
        """
        self.port = self.port or free_port()
        apps_file = self._guard.directory / "apps.toml"
        apps_file.write_text(
            f'[[apps]]\nid = "{_APP_ID}"\nkey = "{_APP_KEY}"\nsecret = "{self._app_secret}"\n'
        )
        variables = self._settings | {
            "DUET_HOST": self.host,
            "DUET_PORT": str(self.port),
            "DUET_MONGODB_URL": self._mongodb_url,
            "DUET_MONGODB_DATABASE": self._database,
            "DUET_REDIS_URL": self._redis_url,
            "DUET_REDIS_PREFIX": self._redis_prefix,
            "DUET_APPS_FILE": str(apps_file),
            "DUET_JWT_SECRET": self._jwt_secret,
            "PYTHONPATH": import_path(),
        }
        settings = [f"{name}={value}" for name, value in variables.items()]
        self._process.start(["/usr/bin/env", *settings, sys.executable, "-c", _SERVE, "serve"])
        give_up_at = time.monotonic() + _START_DEADLINE_S
        while not self._is_ready():
            if self._process.exit_code() is not None or time.monotonic() > give_up_at:
                raise BenchError(f"the gateway did not start: {self.last_words()}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Ends the process, by force when it takes too long."""
        self._process.stop()

    def last_words(self) -> str:
        """The last line of the process's log."""
        lines = self._process.log_text().strip().splitlines()
        return lines[-1].removeprefix("duet: ") if lines else "it wrote nothing"

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=2)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/readyz")
                return connection.getresponse().status == http.HTTPStatus.OK
            except (OSError, http.client.HTTPException):
                return False

    def token(self, user_id: str, role: str) -> str:
        """A JWT for that user."""
        expires_at = self._clock.now() + timedelta(seconds=_TOKEN_TTL_S)
        claims = {"sub": user_id, "role": role, "exp": int(expires_at.timestamp())}
        return jwt.encode(claims, self._jwt_secret, algorithm="HS256")

    def socket_path(self, token: str | None = None) -> str:
        """The path that a WebSocket asks for, with what proves its user."""
        query = {"protocol": "7", "client": "duet-bench", "version": "1"}
        if token is not None:
            query["token"] = token
        return f"/app/{_APP_KEY}?{urlencode(query)}"

    def subscribe_frame(self, channel: str) -> bytes:
        """The client's frame that subscribes to a channel that needs no signature."""
        return client_message("pusher:subscribe", {"channel": channel})

    @property
    def app_secret(self) -> str:
        """What channel subscriptions are signed with."""
        return self._app_secret

    def signed_frame(self, channel: str) -> bytes:
        """The client's frame that subscribes to a private channel, but for the signature."""
        auth = f"{_APP_KEY}:{SIGNATURE_PLACE.decode()}"
        return client_message("pusher:subscribe", {"channel": channel, "auth": auth})

    def publish_request(self, channel: str, event: str, data: str) -> bytes:
        """The signed call of the Pusher HTTP API (docs/pusher-compatibility.md 2.1)."""
        return self._signed_call("events", {"name": event, "channels": [channel], "data": data})

    def batch_request(self, channels: Sequence[str], event: str, data: str) -> bytes:
        """The signed call that publishes one event to each of at most ten channels."""
        batch = [{"name": event, "channel": channel, "data": data} for channel in channels]
        return self._signed_call("batch_events", {"batch": batch})

    def _signed_call(self, name: str, content: dict[str, Any]) -> bytes:
        body = msgspec.json.encode(content)
        path = f"/apps/{_APP_ID}/{name}"
        query = {
            "auth_key": _APP_KEY,
            "auth_timestamp": str(int(self._clock.now().timestamp())),
            "auth_version": "1.0",
            "body_md5": hashlib.md5(body, usedforsecurity=False).hexdigest(),
        }
        pairs = "&".join(f"{name}={value}" for name, value in sorted(query.items()))
        signature = hmac_hex(self._app_secret, f"POST\n{path}\n{pairs}".encode())
        return http_request("POST", f"{path}?{pairs}&auth_signature={signature}", self.host, body)

    def burst_requests(self, channel: str, event: str, data: str, count: int) -> list[bytes]:
        """As many signed calls: nobody's backend may publish one event twice in a call."""
        return [self.publish_request(channel, event, data) for _ in range(count)]

    def call(self, method: str, path: str, token: str, body: Any) -> bytes:
        """The bytes of an HTTP call of the user whose JWT is given."""
        headers = f"Authorization: Bearer {token}\r\n"
        return http_request(method, path, self.host, msgspec.json.encode(body), headers)

    def delivered_bytes(self, channel: str, event: str, data: str) -> int:
        """How many bytes each subscriber receives for that event."""
        return len(frame(published_body(event, channel, data)))

    def usage(self) -> Usage:
        """CPU and memory of the gateway, worker processes included."""
        return usage_of(self._process.pid)

    def redis_usage(self) -> Usage | None:
        """CPU and memory of the embedded Redis; None of one that was given by its URL."""
        return None if self._redis_pid is None else usage_of(self._redis_pid)


def import_path() -> str:
    """A `PYTHONPATH` with which another process imports the same `gateway` as this one."""
    own = str(Path(gateway.__file__).parent.parent)
    return os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH", "")]))


@contextlib.contextmanager
def running_gateway_process(
    mongodb_url: str,
    database: str,
    redis_url: str,
    redis_pid: int | None = None,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[GatewayTarget]:
    """A gateway process that ends with the block, and with this process however that ends.

    Raises:
        BenchError: It did not start.
        EmbeddedError: It can't be run.
    """
    with ServerGuard() as guard:
        target = GatewayTarget(guard, mongodb_url, database, redis_url, redis_pid, settings)
        try:
            target.start()
            yield target
        finally:
            if target.port:
                target.stop()
