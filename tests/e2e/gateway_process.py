"""`duet serve` as a real process, and everything a test needs to speak to it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

import httpx
import jwt

from persistence.embedded_process import ServerGuard, ServerProcess, free_port
from tests.e2e.forking_guard import DUET, forking_guard
from tests.gateway.harness import PATIENCE_S, until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

APP_ID = "7"
APP_KEY = "e2e-key"
APP_SECRET = "e2e-secret-that-signs-channels"
JWT_SECRET = "e2e-secret-that-signs-tokens-and-is-long-enough"
CLIENT_ID = "e2e-app"

APPS_TOML = f"""\
[[apps]]
id = "{APP_ID}"
key = "{APP_KEY}"
secret = "{APP_SECRET}"
client_events = true
"""

DUET_SERVE = (DUET, "serve")

START_DEADLINE_S = 30.0
STOP_GRACE_S = 15.0
_POLL_S = 0.02
_NUMBERS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Stores:
    """Where the gateways of one test keep their state."""

    mongodb_url: str
    database: str
    redis_url: str
    prefix: str


@dataclass(slots=True)
class Call:
    """One HTTP call.

    Attributes:
        response: none as long as there is no answer, and for ever when the gateway died over it.
    """

    at_s: float
    method: str
    path: str
    user_id: str | None
    body: Any
    headers: Mapping[str, str]
    response: httpx.Response | None = None
    answered_at_s: float = 0.0


@dataclass(slots=True)
class Gateway:
    """One gateway process; it ends with the test, and with this process however that ends.

    Attributes:
        calls: what it was asked over HTTP; gateways on the same stores may share the list.
    """

    guard: ServerGuard
    stores: Stores
    apps_file: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    argv: tuple[str, ...] = DUET_SERVE
    port: int = 0
    name: str = ""
    process: ServerProcess | None = None
    app_key: str = APP_KEY
    calls: list[Call] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        return {
            "DUET_HOST": "127.0.0.1",
            "DUET_PORT": str(self.port),
            "DUET_MONGODB_URL": self.stores.mongodb_url,
            "DUET_MONGODB_DATABASE": self.stores.database,
            "DUET_REDIS_URL": self.stores.redis_url,
            "DUET_REDIS_PREFIX": self.stores.prefix,
            "DUET_APPS_FILE": str(self.apps_file),
            "DUET_JWT_SECRET": JWT_SECRET,
            "DUET_NODE_NAME": self.name,
            # A test that ends does not wait for sockets to leave one by one.
            "DUET_DRAIN_S": "0",
            **self.settings,
        }

    def launch(self) -> None:
        """Starts the process, or starts it again on its port, without waiting for it."""
        if self.process is None:
            self.port = free_port()
            self.name = f"gateway-{next(_NUMBERS)}"
            guard = forking_guard() if self.argv == DUET_SERVE else self.guard
            self.process = ServerProcess(guard, self.name, stop_grace_s=STOP_GRACE_S)
        variables = [f"{name}={value}" for name, value in self.environment().items()]
        self.process.start(["/usr/bin/env", *variables, *self.argv])

    def start(self) -> None:
        """Starts the process and waits until it is ready."""
        self.launch()
        give_up_at = time.monotonic() + START_DEADLINE_S
        while not self.is_ready():
            log = self.log_text()
            assert self.running().exit_code() is None, f"the gateway ended:\n{log}"
            assert time.monotonic() < give_up_at, f"the gateway is not ready:\n{log}"
            time.sleep(_POLL_S)

    def running(self) -> ServerProcess:
        assert self.process is not None, "the gateway was not started"
        return self.process

    def log_text(self) -> str:
        return self.running().log_text()

    def said(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of one event, in order."""
        lines = [line for line in self.log_text().splitlines() if line.startswith("{")]
        return [line for line in map(json.loads, lines) if line["event"] == event]

    async def until_said(self, event: str, times: int) -> list[dict[str, Any]]:
        """Waits until the log has so many lines of the event; returns those it has."""
        await until(
            lambda: len(self.said(event)) >= times,
            within_s=START_DEADLINE_S + PATIENCE_S,
            every_s=_POLL_S,
        )
        return self.said(event)

    def is_ready(self) -> bool:
        try:
            # Reading a certificate store takes 19 ms of CPU, and each client has its own.
            return httpx.get(f"{self.url}/readyz", timeout=2, verify=False).status_code == 200
        except httpx.TransportError:
            return False

    def complaints(self) -> list[str]:
        """The lines of its log that tell of a fault of its own."""
        log = self.running().log
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return [line for line in lines if '"level": "error"' in line or "Traceback" in line]

    def kill(self) -> None:
        """Ends the process as a crash does."""
        if self.process is not None:
            self.process.kill()

    def stop(self) -> None:
        """Ends the process in order."""
        if self.process is not None:
            self.process.stop()

    async def restart(self) -> None:
        """Starts the process again where it was and waits until it is ready."""
        await asyncio.to_thread(self.start)

    def token(self, user_id: str, role: str | None, **claims: Any) -> str:
        """A JWT for that user."""
        return jwt.encode(
            {
                "sub": user_id,
                "role": role,
                "client_id": CLIENT_ID,
                "exp": datetime.now(UTC) + timedelta(hours=1),
                **claims,
            },
            JWT_SECRET,
            algorithm="HS256",
        )

    def backend_options(self) -> dict[str, Any]:
        """How the `pusher` libraries of a customer's backend reach this gateway."""
        return {
            "appId": APP_ID,
            "key": APP_KEY,
            "secret": APP_SECRET,
            "host": "127.0.0.1",
            "port": self.port,
            "useTLS": False,
            "timeout": 5000,
        }

    async def call(
        self,
        method: str,
        path: str,
        *,
        user_id: str | None = None,
        role: str | None = None,
        body: Any = None,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """One HTTP call, with the JWT of `user_id`."""
        headers = dict(headers or {})
        if user_id is not None:
            headers["Authorization"] = f"Bearer {self.token(user_id, role)}"
        if body is not None:
            content = json.dumps(body).encode()
        if content is not None:
            headers.setdefault("Content-Type", "application/json")
        call = Call(time.monotonic(), method, path, user_id, body, headers)
        self.calls.append(call)
        async with httpx.AsyncClient(timeout=10, verify=False) as client:
            call.response = await client.request(
                method, f"{self.url}{path}", content=content, headers=headers
            )
        call.answered_at_s = time.monotonic()
        return call.response

    async def publish(self, channels: list[str], event: str, data: Any) -> httpx.Response:
        """A signed event of the Pusher HTTP API (docs/pusher-compatibility.md 2.1)."""
        target, body = self.signed_event(channels, event, json.dumps(data))
        return await self.call("POST", target, content=body)

    def signed_event(self, channels: list[str], event: str, data: str) -> tuple[str, bytes]:
        """Target and body of the call that publishes `data`; they may be sent again and again."""
        path = f"/apps/{APP_ID}/events"
        body = json.dumps({"name": event, "channels": channels, "data": data})
        query = {
            "auth_key": APP_KEY,
            "auth_timestamp": str(int(datetime.now(UTC).timestamp())),
            "auth_version": "1.0",
            "body_md5": hashlib.md5(body.encode()).hexdigest(),
        }
        pairs = "&".join(f"{key}={value}" for key, value in sorted(query.items()))
        signature = hmac.new(
            APP_SECRET.encode(), f"POST\n{path}\n{pairs}".encode(), hashlib.sha256
        ).hexdigest()
        return f"{path}?{pairs}&auth_signature={signature}", body.encode()


class GatewayBuilder(Protocol):
    """Starts a gateway with these settings; a second one on the same stores is a second node."""

    async def __call__(self, *, argv: tuple[str, ...] = DUET_SERVE, **settings: str) -> Gateway: ...
