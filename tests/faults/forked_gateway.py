"""Gateway processes that start in a fraction of a second and kill themselves where a test says.

Each is forked from a server that has imported everything already (`multiprocessing`'s forkserver),
so a test can afford hundreds of real processes and real `SIGKILL`s. What a process is told about
its crash comes with its start or by `POST /crash`, a route of this program alone: no setting of the
gateway can cause one.
"""

from __future__ import annotations

import asyncio
import faulthandler
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Self

import httpx
import jwt
import msgspec
from starlette.responses import Response
from starlette.routing import Route

from gateway.app import GatewayApp, StartError
from gateway.bench.errors import BenchError
from gateway.bench.usage import usage_of
from gateway.preflight import apps_of
from gateway.server import GatewayServer, listen, server_config
from gateway.settings import Settings
from gateway.telemetry import configure_logging
from persistence import faults
from persistence.embedded_process import free_port
from tests.e2e.forking_guard import GATEWAY_MODULES
from tests.e2e.gateway_process import APP_KEY, CLIENT_ID, JWT_SECRET

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess
    from pathlib import Path

    from starlette.requests import Request

    from persistence.faults import Step
    from tests.e2e.gateway_process import Stores

# A start takes a tenth of a second of CPU. A process that had twenty times that, and the time, has
# stalled; one that was not given it, on a machine busy with something else, has the longer time.
READY_WITHIN_S = 30.0
_READY_WITHIN_CPU_S = 2.0
_READY_AT_LAST_S = 150.0
# What it is given to write down where it stands.
_LAST_WORDS_S = 2.0
_NUMBERS = itertools.count(1)

# What every child would import by itself otherwise: the programs that start it, which Python
# imports in it once more, and what a gateway imports only when it starts. The order counts.
_PRELOADED = (
    __name__,
    *GATEWAY_MODULES,
    "pytest",
    "tests.faults.forking",
)

# The exit code of a process that found that it can't be started, and said why in its log.
REFUSED = 3

# What a caller sees of a process that dies amid its call, or is dead already.
DIED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError, httpx.WriteError)


class CrashPoint(msgspec.Struct, frozen=True):
    """The `nth` time that a step is reached with this detail; an empty detail is any."""

    step: str
    detail: str = ""
    nth: int = 1

    def __str__(self) -> str:
        detail = f"({self.detail})" if self.detail else ""
        return f"{self.step}{detail}#{self.nth}"


class Steps(msgspec.Struct, frozen=True):
    """What a process has reached since it was told to record."""

    reached: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a child needs to know."""

    settings: dict[str, Any]
    log: str
    crash: CrashPoint | None


# --- in the child -------------------------------------------------------------------------------


class Hook:
    """Counts and, at its point, ends the process as `kill -9` does.

    One that is installed between two commands begins with the second: the last step of the first
    comes a moment after everybody has seen its effect.
    """

    def __init__(self, point: CrashPoint | None, *, begun: bool) -> None:
        self.point = point
        self.begun = begun
        self.count = 0
        self.reached: list[tuple[str, str]] = []

    def __call__(self, step: Step, detail: str) -> None:
        self.begun = self.begun or step is faults.Step.BEFORE_LOAD
        if not self.begun:
            return
        point = self.point
        if point is None:
            self.reached.append((step.value, str(detail)))
            return
        if step.value != point.step or (point.detail and detail != point.detail):
            return
        self.count += 1
        if self.count == point.nth:
            os.kill(os.getpid(), signal.SIGKILL)


async def arm(request: Request) -> Response:
    """Crashes at the point in the body, or records what is reached when that is `null`."""
    point = msgspec.json.decode(await request.body(), type=CrashPoint | None)
    hook = Hook(point, begun=False)
    request.app.state.hook = hook
    faults.install(hook)
    return Response(status_code=204)


async def steps(request: Request) -> Response:
    """What has been reached since recording began."""
    return Response(msgspec.json.encode(Steps(request.app.state.hook.reached)))


def child_main(plan: Plan) -> None:
    """Serves until killed, or until the parent is gone."""
    log = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if plan.crash is not None:
        faults.install(Hook(plan.crash, begun=True))
    settings = Settings(**plan.settings)
    configure_logging(settings)
    routes = [Route("/crash", arm, methods=["POST"]), Route("/crash", steps, methods=["GET"])]
    app = GatewayApp(settings, apps_of(settings), None, routes)
    try:
        with closing(listen(settings.host, settings.port)) as listener:
            server = GatewayServer(server_config(settings, app))
            server.run([listener])
        fault = server.fault
    except StartError as error:
        fault = error  # another process has taken the port since it was found free
    if fault is not None:
        sys.stderr.write(f"{settings.node_name} did not start: {fault}\n")
        sys.exit(REFUSED)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


# --- in the test --------------------------------------------------------------------------------


@cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


@cache
def _begin_to_fork() -> None:
    """Waits for the imports of the server that forks, before the first process."""
    first = _context().Process(target=_end_at_once)
    first.start()
    first.join()


def _end_at_once() -> None:
    """What a process does whose start alone is waited for."""


@cache
def token(user_id: str, role: str) -> str:
    """A JWT for that user."""
    claims = {
        "sub": user_id,
        "role": role,
        "client_id": CLIENT_ID,
        "exp": datetime.now(UTC) + timedelta(days=1),
    }
    return jwt.encode(claims, JWT_SECRET, algorithm="HS256")


@dataclass(slots=True)
class ForkedGateway:
    """One gateway process, which can be killed and started again under its name.

    Attributes:
        started: how often it has been started.
    """

    stores: Stores
    apps_file: Path
    log: Path
    settings: dict[str, Any] = field(default_factory=dict)
    port: int = 0
    name: str = ""
    app_key: str = APP_KEY
    started: int = 0
    process: ForkServerProcess | None = None
    http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        self.name = f"forked-{next(_NUMBERS)}"
        # An own certificate store would be read for every client otherwise.
        self.http = httpx.AsyncClient(timeout=10, verify=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
        assert self.http is not None
        await self.http.aclose()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        assert self.process.pid is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def token(self, user_id: str, role: str | None) -> str:
        return token(user_id, role or "")

    async def start(self, crash: CrashPoint | None = None) -> None:
        """Starts the process, or starts it again, and waits until it is ready."""
        await self.launch(crash)
        assert await self.until_ready(), f"{self.process}\n{self.log_text()}"

    async def launch(self, crash: CrashPoint | None = None) -> None:
        """Starts the process without waiting for it.

        It listens on a port of its own each time: amid hundreds of starts a free one may be taken
        by anybody before it is bound again.
        """
        self.port = free_port()
        settings = {
            "host": "127.0.0.1",
            "port": self.port,
            "mongodb_url": self.stores.mongodb_url,
            "mongodb_database": self.stores.database,
            "redis_url": self.stores.redis_url,
            "redis_prefix": self.stores.prefix,
            "apps_file": self.apps_file,
            "jwt_secret": JWT_SECRET,
            "node_name": self.name,
            "drain_s": 0,
            **self.settings,
        }
        plan = Plan(settings, str(self.log), crash)
        self.process = _context().Process(target=child_main, args=(plan,), daemon=True)
        await asyncio.to_thread(_begin_to_fork)
        # In this thread, as all that asks how a process has ended: a start looks at the others too,
        # and of two who read the same exit code one gets none.
        self.process.start()
        self.started += 1

    async def until_ready(self) -> bool:
        """Waits until it is ready; false when it died before."""
        assert self.http is not None
        began_at_s = time.monotonic()
        said = "nothing"
        while self.is_running:
            try:
                response = await self.http.get(f"{self.url}/readyz")
            except httpx.TransportError as error:
                said = repr(error)
            else:
                if response.status_code == 200:
                    return True
                said = response.text
            if self._has_stalled(time.monotonic() - began_at_s):
                raise AssertionError(await self._stalled(said))
            await asyncio.sleep(0.01)
        return False

    def _has_stalled(self, waited_s: float) -> bool:
        if waited_s < READY_WITHIN_S:
            return False
        try:
            worked_s = usage_of(self.pid).cpu_s
        except BenchError:
            return False  # it has just died, which is something else
        return waited_s > _READY_AT_LAST_S or worked_s > _READY_WITHIN_CPU_S

    async def _stalled(self, said: str) -> str:
        """All that is known about a process that does not get ready."""
        worked_s = usage_of(self.pid).cpu_s
        os.kill(self.pid, signal.SIGUSR1)
        await asyncio.sleep(_LAST_WORDS_S)
        return (
            f"{self.name} (process {self.pid}, {worked_s:.1f} s of CPU) is not ready, "
            f"it says {said}\n{self.log_text()}"
        )

    async def until_dead(self, timeout_s: float) -> bool:
        """Waits for the process's end; false when it lives on."""
        assert self.process is not None
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self.process.sentinel, ended.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self.process.sentinel)
        self.process.join()
        return True

    async def kill(self) -> None:
        """Ends the process as a crash does and waits until it is gone."""
        if self.process is not None and self.process.is_alive():
            self.process.kill()
            await self.until_dead(READY_WITHIN_S)

    def pause(self) -> None:
        """Freezes the process; its sockets stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on."""
        os.kill(self.pid, signal.SIGCONT)

    async def arm(self, point: CrashPoint | None) -> None:
        """Lets it crash at a point from here on; none: lets it record what it reaches."""
        assert self.http is not None
        response = await self.http.post(f"{self.url}/crash", content=msgspec.json.encode(point))
        assert response.status_code == 204, response.text

    async def steps(self) -> list[tuple[str, str]]:
        """What it has reached since it was told to record."""
        assert self.http is not None
        response = await self.http.get(f"{self.url}/crash")
        return msgspec.json.decode(response.content, type=Steps).reached

    async def call(
        self,
        method: str,
        path: str,
        *,
        user_id: str,
        role: str,
        body: Any = None,
        request_id: str | None = None,
    ) -> httpx.Response:
        """One HTTP call, with the JWT of `user_id`."""
        assert self.http is not None
        headers = {
            "Authorization": f"Bearer {token(user_id, role)}",
            "Content-Type": "application/json",
        }
        if request_id is not None:
            headers["Idempotency-Key"] = request_id
        content = b"" if body is None else msgspec.json.encode(body)
        return await self.http.request(
            method, f"{self.url}{path}", content=content, headers=headers
        )

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""
